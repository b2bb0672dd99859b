"""Which kernels make the head's step and find its best labels: of the backends, and of a GPU's kernels.

A backend is a module or object with `head_step` and `head_topk`, the same signatures in each (see `reference`). On a GPU bfloat16
and float16 features are multiplied as bfloat16, float32 ones in float32 (see docs/kernels.md); all sums are float32. Weights are read and
updated in their own precision. Of several kernels the first one of `STEPS` and `RANKINGS` that takes a head is used, always.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels import reference
from xmc_trainer.kernels.arguments import Batch, Step
from xmc_trainer.kernels.cuda import source
from xmc_trainer.kernels.interface import HeadTensors, LossFn, Update

BACKENDS = ("auto", "triton", "reference", "torch_sparse")


class Problem(NamedTuple):
    """What decides which kernel is used."""

    group_size: int | None  # None: no index, a dense head
    fan_in: int
    features: int
    texts: int
    bf16: bool  # the products; else float32
    by_weight: bool  # the optimizer updates each weight by itself
    bytes_in_float32: bool  # states of a byte beside float32 weights
    deterministic: bool  # torch.use_deterministic_algorithms
    capability: tuple[int, int] | None  # of a GPU for which CUDA sources can be compiled

    @classmethod
    def of(cls, head: HeadTensors, texts: int, features: int, dtype: torch.dtype) -> Problem:
        device = head.weight_LF.device
        capability = torch.cuda.get_device_capability(device) if source.can_compile(device) else None
        return cls(
            None if head.index_RF is None else head.group_size, head.weight_LF.shape[1], features, texts, dtype != torch.float32,
            all(state.shape == head.weight_LF.shape for state in head.weight_state),
            head.weight_LF.dtype == torch.float32 and any(state.dtype == torch.uint8 for state in head.weight_state),
            torch.are_deterministic_algorithms_enabled(), capability,
        )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A way through the work, and what it takes."""

    name: str
    module: str  # of xmc_trainer.kernels; imports triton
    function: str
    tiles: str  # what a block of threads has at a time
    texts: int = 32  # a tile, at least
    capability: tuple[int, int] | None = None  # the least; None: any GPU, nothing to compile
    hopper: bool = False  # 9.0 alone
    index: bool = False  # not of dense heads
    least_group: int = 1
    most_fan_in: int | None = None
    fan_in_multiple: int = 1
    bf16: bool = False  # products of bfloat16 alone
    deterministic: bool = True
    by_weight: bool = False  # not of optimizers that need a label's whole gradient
    most_numbers: int | None = None  # texts times features

    def refuses(self, problem: Problem) -> str | None:
        """Why it does not take a head; None if it does."""
        most = None if self.most_fan_in is None else self.most_fan_in if problem.bf16 else self.most_fan_in // 2
        reasons = [
            (self.capability and problem.capability is None, "needs nvcc, ninja and a GPU of capability 8.0"),
            (self.hopper and problem.capability != source.HOPPER, "needs a GPU of capability 9.0"),
            (self.index and problem.group_size is None, "needs an index"),
            (
                self.least_group > 1 and (problem.group_size or 0) < self.least_group,
                f"needs group_size >= {self.least_group}",
            ),
            (most and problem.fan_in > most, f"needs fan_in <= {most}"),
            (problem.fan_in % self.fan_in_multiple, f"needs a fan_in that is a multiple of {self.fan_in_multiple}"),
            (self.bf16 and not problem.bf16, "needs bfloat16 or float16 features"),
            (problem.deterministic and not self.deterministic, "its sums have no fixed order"),
            (self.by_weight and not problem.by_weight, "does not take an optimizer with one state a label"),
            (
                self.by_weight and self.capability and problem.bytes_in_float32,
                "does not take states of a byte beside float32 weights",
            ),
            (
                self.most_numbers and (problem.texts + 128) * problem.features >= self.most_numbers,
                "too many texts and features",
            ),
        ]
        return next((reason for applies, reason in reasons if applies), None)

    def __call__(self, *arguments: Any) -> Any:
        return getattr(importlib.import_module(f"xmc_trainer.kernels.{self.module}"), self.function)(*arguments)


# The fastest first (measured on an H200; docs/results).
STEPS = (
    Kernel(
        "group, CUDA", "cuda.group", "run", "16 to 128 labels of an index row x 128 texts", texts=128, capability=(8, 0), index=True,
        least_group=16, most_fan_in=128, fan_in_multiple=8, bf16=True, deterministic=False, by_weight=True, most_numbers=1 << 31,
    ),
    Kernel(
        "densify, CUDA", "cuda.densify", "run", "64 labels x 128 texts", texts=128, capability=(9, 0), hopper=True, index=True, bf16=True,
    ),
    Kernel(
        "group, Triton", "triton.group", "run", "32 labels of an index row x 64 texts", index=True, least_group=16, most_fan_in=256,
        deterministic=False,
    ),
    Kernel("dense, Triton", "triton.dense", "run", "chunks of labels, by the library's products"),
)  # fmt: skip
RANKINGS = (
    Kernel("group, Triton", "triton.topk", "group_best", "128 labels of index rows x 128 texts", index=True, least_group=16),
    Kernel(
        "densify, CUDA", "cuda.densify", "find_best", "64 labels x 128 texts", texts=128, capability=(9, 0), hopper=True, index=True,
        bf16=True,
    ),
    Kernel("dense, Triton", "triton.topk", "dense_best", "128 labels x 256 texts"),
)  # fmt: skip


def choose(kernels: tuple[Kernel, ...], problem: Problem) -> Kernel:
    """The first that takes it: the last one takes everything."""
    return next(kernel for kernel in kernels if kernel.refuses(problem) is None)


def describe(kernels: tuple[Kernel, ...], problem: Problem) -> str:
    """The chosen kernel and why it is none before it: "densify, CUDA, 64 labels x 128 texts (group, CUDA: needs group_size >= 16)"."""
    chosen = choose(kernels, problem)
    before = [f"{kernel.name}: {kernel.refuses(problem)}" for kernel in kernels[: kernels.index(chosen)]]
    return f"{chosen.name}, {chosen.tiles}" + (f" ({'; '.join(before)})" if before else "")


class GPU:
    """The backend "triton": the kernels of the tables above."""

    def head_step(
        self,
        head: HeadTensors,
        feat_Bd: Tensor,
        label_P: Tensor,
        row_P: Tensor,
        *,
        loss_fn: LossFn,
        text_weight: float,
        grad_start: int,
        update: Update | None,
        tile_labels: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.head_step`. `tile_labels` does not apply: the kernels' tiles are their own."""
        texts, features = feat_Bd.shape
        finite = torch.isfinite(feat_Bd).all()
        step = Step.of(loss_fn, text_weight, finite, update)

        def run() -> tuple[Tensor, Tensor]:
            kernel = choose(STEPS, Problem.of(head, texts, features, feat_Bd.dtype))
            return kernel(head, Batch.of(feat_Bd, kernel.texts), label_P, row_P, step)

        loss, grad = _compiling(run, feat_Bd.device)
        return loss[grad_start:texts], grad[grad_start:texts], finite

    def head_topk(
        self, head: HeadTensors, feat_Bd: Tensor, k: int, skip_label_P: Tensor, skip_row_P: Tensor, *, tile_labels: int
    ) -> Tensor:
        """See `reference.head_topk`. `tile_labels` does not apply."""
        from xmc_trainer.kernels.triton import topk

        def run() -> Tensor:
            texts, features = feat_Bd.shape
            kernel = choose(RANKINGS, Problem.of(head, texts, features, feat_Bd.dtype))
            batch = Batch.of(feat_Bd, kernel.texts)
            return topk.best_labels(
                head, batch, k, skip_label_P, skip_row_P, kernel, group_blocks=kernel.least_group > 1
            )

        return _compiling(run, feat_Bd.device)


def _compiling(run: Any, device: torch.device) -> Any:
    """run(), without CUDA sources if they fail to compile, which they do before anything is launched."""
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            return run()
        except source.CompilationFailed as error:
            source.give_up(error)
            return run()


@functools.cache
def select_backend(name: str, device: torch.device) -> ModuleType | GPU:
    """The kernels of a backend on a device: "auto" is triton on a GPU where it is installed, else reference.

    Raises ValueError for "triton" and "torch_sparse" where they cannot run. Under TRITON_INTERPRET=1 it runs on a CPU, for tests.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: choose {', '.join(BACKENDS)}")
    if name == "torch_sparse":
        return _torch_sparse()
    installed = importlib.util.find_spec("triton") is not None
    if name == "reference" or (name == "auto" and not (installed and device.type == "cuda")):
        return reference
    if not installed:
        raise ValueError("backend='triton': triton is not installed; pip install triton, or choose reference")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton': needs a CUDA device, this is {device}; choose auto or reference")
    return GPU()


def _torch_sparse() -> ModuleType:
    field = "backend='torch_sparse'"
    spec = importlib.util.find_spec("torch_sparse")
    if spec is None:
        raise ValueError(
            f"{field}: PyG's torch_sparse is not installed; pip install --no-build-isolation torch_scatter torch_sparse "
            "(they are compiled, which takes a while), or choose auto"
        )
    # PyG's has this module. Spartex's kernels are a wheel of the same name; importing it would be of no use.
    if not any((Path(folder) / "tensor.py").is_file() for folder in spec.submodule_search_locations or ()):
        raise ValueError(
            f"{field}: the installed torch_sparse is not PyG's but another package of that name, such as Spartex's kernels, "
            "which this backend does not use; pip uninstall torch_sparse and install PyG's, or choose auto"
        )
    try:
        from xmc_trainer.kernels import torch_sparse_head
    except (OSError, ImportError) as error:
        raise ValueError(
            f"{field}: torch_sparse does not fit this torch ({str(error).splitlines()[0]}); build it and torch_scatter anew: "
            "pip install --no-build-isolation --force-reinstall --no-deps torch_scatter torch_sparse"
        ) from None
    return torch_sparse_head
