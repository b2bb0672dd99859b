"""Chooses the backend, and on a GPU the kernel, for the head's step and its rankings.

A backend is a module or an object with the functions `head_step` and `head_topk`; `reference` documents both. On a GPU, bfloat16 and
float16 features are multiplied in bfloat16 and float32 features in float32; sums are float32 (see docs/kernels.md). Weights are read
and updated in their own dtype. The first kernel of `STEPS` or `RANKINGS` that accepts the head runs; nothing is timed.
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
from xmc_trainer.kernels.arguments import TEXTS, Batch, Step
from xmc_trainer.kernels.cuda import source
from xmc_trainer.kernels.interface import HeadTensors, LossFn, Update

BACKENDS = ("auto", "triton", "reference", "torch_sparse")


class Problem(NamedTuple):
    """The properties of a head and a GPU that decide which kernel runs, for a batch of any size."""

    group_size: int | None  # None: no index, a dense head
    fan_in: int
    bf16: bool  # products are bfloat16, else float32
    plain_states: bool  # the optimizer's states are like the weights
    deterministic: bool  # torch.use_deterministic_algorithms
    cuda: bool  # the CUDA sources can be compiled and run

    @classmethod
    def of(cls, head: HeadTensors, dtype: torch.dtype) -> Problem:
        """Read the properties of a head whose features have that dtype."""
        weight = head.weight_LF
        return cls(
            None if head.index_RF is None else head.group_size, weight.shape[1], dtype != torch.float32,
            all(state.shape == weight.shape and state.dtype == weight.dtype for state in head.weight_state),
            torch.are_deterministic_algorithms_enabled(), source.can_compile(weight.device),
        )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One implementation of a step or a ranking, and the heads that it accepts."""

    name: str
    module: str  # in xmc_trainer.kernels; imported when it is used, for it imports triton
    function: str
    tiles: str  # a thread block's tile, for messages
    cuda: bool = False  # for bfloat16 products on capability 9.0; else Triton, for any GPU
    index: bool = False  # no dense heads
    least_group: int = 1
    most_fan_in: int | None = None
    fan_in_multiple: int = 1
    deterministic: bool = True
    plain_states: bool = False

    def refuses(self, problem: Problem) -> str | None:
        """Return why the kernel cannot take this problem, or None if it can."""
        reasons = [
            (self.cuda and not problem.cuda, "needs nvcc, ninja and a GPU of capability 9.0"),
            (self.index and problem.group_size is None, "needs an index"),
            ((problem.group_size or 1) < self.least_group, f"needs group_size >= {self.least_group}"),
            (self.most_fan_in and problem.fan_in > self.most_fan_in, f"needs fan_in <= {self.most_fan_in}"),
            (problem.fan_in % self.fan_in_multiple, f"needs a fan_in that is a multiple of {self.fan_in_multiple}"),
            (self.cuda and not problem.bf16, "needs bfloat16 or float16 features"),
            (problem.deterministic and not self.deterministic, "is not deterministic"),
            (self.plain_states and not problem.plain_states, "needs an optimizer whose states are like the weights"),
        ]
        return next((reason for applies, reason in reasons if applies), None)

    @property
    def texts(self) -> int:
        """The smallest tile of texts."""
        return TEXTS if self.cuda else 32

    def __call__(self, *arguments: Any) -> Any:
        return getattr(importlib.import_module(f"xmc_trainer.kernels.{self.module}"), self.function)(*arguments)


# Fastest first, as measured on an H200 (docs/results).
STEPS = (
    Kernel(
        "group, CUDA", "cuda.group", "run", "64 or 128 labels of an index row x 128 texts", cuda=True, index=True, least_group=32,
        most_fan_in=128, fan_in_multiple=8, deterministic=False, plain_states=True,
    ),
    Kernel("densify, CUDA", "cuda.densify", "run", "64 labels x 128 texts", cuda=True, index=True),
    Kernel("dense, Triton", "triton.dense", "run", "chunks of labels, multiplied by cuBLAS"),
)  # fmt: skip
RANKINGS = (
    Kernel("densify, CUDA", "cuda.densify", "find_best", "64 labels x 128 texts", cuda=True, index=True),
    Kernel("dense, Triton", "triton.topk", "dense_best", "chunks of labels, multiplied by cuBLAS"),
)  # fmt: skip


def choose(kernels: tuple[Kernel, ...], problem: Problem) -> Kernel:
    """Return the first kernel that accepts the problem. The last one accepts every problem."""
    return next(kernel for kernel in kernels if kernel.refuses(problem) is None)


def describe(kernels: tuple[Kernel, ...], problem: Problem) -> str:
    """Name the chosen kernel and why those before it were refused.

    Example: "densify, CUDA, 64 labels x 128 texts (group, CUDA: needs group_size >= 32)".
    """
    chosen = choose(kernels, problem)
    before = [f"{kernel.name}: {kernel.refuses(problem)}" for kernel in kernels[: kernels.index(chosen)]]
    return f"{chosen.name}, {chosen.tiles}" + (f" ({'; '.join(before)})" if before else "")


class GPU:
    """The backend "triton": runs the kernels of `STEPS` and `RANKINGS`."""

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
        """See `reference.head_step`. `tile_labels` is ignored: each kernel has its own tiles."""
        finite = torch.isfinite(feat_Bd).all()
        step = Step.of(loss_fn, text_weight, finite, update)

        def run() -> tuple[Tensor, Tensor]:
            kernel = choose(STEPS, Problem.of(head, feat_Bd.dtype))
            return kernel(head, Batch.of(feat_Bd, kernel.texts), label_P, row_P, step)

        loss, grad = _without_cuda_if_it_fails(run, feat_Bd.device)
        rows = slice(grad_start, len(feat_Bd))
        return loss[rows], grad[rows], finite

    def head_topk(
        self, head: HeadTensors, feat_Bd: Tensor, k: int, skip_label_P: Tensor, skip_row_P: Tensor, *, tile_labels: int
    ) -> Tensor:
        """See `reference.head_topk`. `tile_labels` is ignored."""
        from xmc_trainer.kernels.triton import topk

        def run() -> Tensor:
            kernel = choose(RANKINGS, Problem.of(head, feat_Bd.dtype))
            batch = Batch.of(feat_Bd, kernel.texts)
            return topk.best_labels(head, batch, k, skip_label_P, skip_row_P, kernel)

        return _without_cuda_if_it_fails(run, feat_Bd.device)


def _without_cuda_if_it_fails(run: Any, device: torch.device) -> Any:
    """Call run(). If a CUDA source fails to compile, call it again without them: compilation precedes every launch."""
    # Triton launches on the current device, not on that of its tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            return run()
        except source.CompilationFailed as error:
            source.give_up(error)
            return run()


@functools.cache
def select_backend(name: str, device: torch.device) -> ModuleType | GPU:
    """Return the backend of that name. "auto" is triton on a GPU with Triton installed, else reference.

    Under TRITON_INTERPRET=1 "triton" runs on a CPU, for tests.
    Raises ValueError for an unknown name, and for "triton" and "torch_sparse" where they cannot run.
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
            "(compiling takes several minutes), or choose auto"
        )
    # Only PyG's package has this module. Spartex ships its kernels under the same name.
    if not any((Path(folder) / "tensor.py").is_file() for folder in spec.submodule_search_locations or ()):
        raise ValueError(
            f"{field}: the installed torch_sparse is not PyG's but another package of that name, such as Spartex's kernels; "
            "pip uninstall torch_sparse and install PyG's, or choose auto"
        )
    try:
        from xmc_trainer.kernels import torch_sparse_head
    except (OSError, ImportError) as error:
        raise ValueError(
            f"{field}: torch_sparse does not load with this torch ({str(error).splitlines()[0]}); rebuild it and torch_scatter: "
            "pip install --no-build-isolation --force-reinstall --no-deps torch_scatter torch_sparse"
        ) from None
    return torch_sparse_head
