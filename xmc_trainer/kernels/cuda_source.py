"""Compiles the CUDA sources, and what they are called with.

A source is compiled on first use for what a head needs of it, by torch's extension loader, and kept on disk. That takes
nvcc (torch looks at CUDA_HOME, then at the PATH), ninja, and a GPU of compute capability 8.0 or more; `can_compile` says
whether it is all there. Where it is and fails (nvcc and the C++ compiler must fit each other), `CompilationFailed` says why,
and from `give_up` on nothing is compiled.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.kernels.reference import HeadTensors
from xmc_trainer.kernels.tuning import cache_folder

FOLDER = Path(__file__).parent / "cuda"
HEADERS = ("operands.cuh", "losses.cuh", "densify.cuh", "tile_math.cuh", "rows.cuh", "launch.cuh", "launch_clusters.cuh", "ptx.cuh")
TEXTS = 128  # texts a tile, as in the sources
HOPPER = (9, 0)  # the compute capability whose GPUs have products of warpgroups, and clusters
TYPES = {
    torch.float32: "float", torch.bfloat16: "bfloat16", torch.uint8: "uint8_t", torch.int16: "int16_t", torch.int32: "int32_t"
}  # fmt: skip


class Arguments(ctypes.Structure):
    """`Arguments` of tile_math.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "weight", "state0", "state1", "index", "bias", "bias_state0", "bias_state1", "x", "dx", "positive", "any_positive",
            "loss", "finite", "first_slots")),
        ("labels", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (
            "first_row", "last_row", "label_start", "texts", "columns", "fan_in", "group", "update")),
        ("group_factor", ctypes.c_uint32),
        ("group_shift", ctypes.c_uint32),
        *((name, ctypes.c_float) for name in (
            "text_weight", "lr", "weight_decay", "beta0", "beta1", "eps", "correct0", "correct1")),
        ("key", ctypes.c_uint32 * 2),
    ]  # fmt: skip

    @classmethod
    def of(
        cls,
        head: HeadTensors,
        first_row: int,
        last_row: int,
        *,
        x: Tensor,
        columns: int,
        texts: int,
        dx: Tensor | None,
        losses: Tensor,
        positive: Tensor | None,
        any_positive: Tensor | None,
        finite: Tensor | None,
        text_weight: float,
        update: bool,
        rule: dict[str, Any],
        decay: dict[str, Any],
        first_slots: Tensor | None = None,
    ) -> Arguments:
        """The tensors must outlive the launch's call."""
        labels, fan_in = head.weight_LF.shape
        weight_state, bias_state = ([*state, None, None][:2] for state in (head.weight_state, head.bias_state))
        row_key, column_key = (decay.get(f"key{i}", 0) & 0xFFFFFFFF for i in range(2))
        tensors = [
            head.weight_LF, *weight_state, head.index_RF, head.bias_L, *bias_state, x, dx, positive, any_positive, losses,
            finite, first_slots,
        ]  # fmt: skip
        return cls(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            labels, first_row, last_row, head.label_start, texts, columns, fan_in, head.group_size, update,
            *quotient(head.group_size), text_weight, rule["lr"], decay.get("weight_decay", 0.0),
            *(rule[k] for k in ("beta0", "beta1", "eps", "correct0", "correct1")),
            (ctypes.c_uint32 * 2)(row_key, column_key ^ column_key >> 16),
        )  # fmt: skip


def quotient(divisor: int) -> tuple[int, int]:
    """(factor, shift), such that n // divisor == n * factor >> shift for 0 <= n < 2^31; factor is below 2^32."""
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


class CompilationFailed(RuntimeError):
    """The compiler's words."""


_gave_up = False


def give_up(error: CompilationFailed) -> None:
    """Do without the CUDA sources from here on, with a warning."""
    global _gave_up
    _gave_up = True
    warnings.warn(f"the head's CUDA kernels cannot be compiled, Triton's take their place, which are slower: {error}", stacklevel=2)


def can_compile(device: torch.device) -> bool:
    """Whether the sources can be compiled for a device."""
    return not _gave_up and _finds_compiler(device)


@functools.cache
def _finds_compiler(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0) or shutil.which("ninja") is None:
        return False
    from torch.utils.cpp_extension import CUDA_HOME  # takes a while to import

    return CUDA_HOME is not None


def state_dtype(head: HeadTensors) -> torch.dtype | None:
    """Of states like weights; None if there are none."""
    return next((state.dtype for state in head.weight_state if state.shape == head.weight_LF.shape), None)


def takes_types(head: HeadTensors) -> bool:
    """Whether a step's sources take them: states in a byte go with bfloat16 weights."""
    return head.weight_LF.dtype == torch.bfloat16 or state_dtype(head) != torch.uint8


def library(source: str, head: HeadTensors, device: torch.device, rule: dict[str, Any], loss: int, **defines: int) -> ctypes.CDLL:
    """A source compiled for a head's types, a device, and `defines`."""
    weight, index = head.weight_LF.dtype, torch.int16 if head.index_RF is None else head.index_RF.dtype
    state = state_dtype(head) if rule["RULE"] else None  # a step without update has the plainest rule, and reads none
    types = {"WEIGHT": TYPES[weight], "INDEX": TYPES[index], "STATE": TYPES[state or weight]}
    words = types | {"RULE": rule["RULE"], "LOSS": loss} | defines
    return compiled(source, torch.cuda.get_device_capability(device), tuple(f"{name}={word}" for name, word in words.items()))


@functools.cache
def compiled(source: str, capability: tuple[int, int], defines: tuple[str, ...]) -> ctypes.CDLL:
    """Ranks that start together each compile their own; the last one's is kept. Raises CompilationFailed."""
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in (source, *HEADERS)]
    made_of = (texts, defines, capability, torch.__version__)
    name = f"{Path(source).stem}_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}"
    kept = cache_folder() / f"{name}.so"
    if not kept.exists():
        from torch.utils import cpp_extension

        kept.parent.mkdir(parents=True, exist_ok=True)
        # Of its own accord torch compiles for sm_90, which lacks the warpgroup's instructions.
        target = ["-gencode=arch=compute_90a,code=sm_90a"] if capability == HOPPER else []
        # A folder of its own: torch's lock file would outlive a process that is killed, and stop every later one.
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            try:
                cpp_extension.load(
                    name, [str(FOLDER / source)], build_directory=folder, is_python_module=False,
                    extra_cuda_cflags=["-O3", *target, *(f"-D{define}" for define in defines)],
                )  # fmt: skip
            except (RuntimeError, OSError) as error:
                raise CompilationFailed(str(error)) from error
            os.replace(Path(folder) / f"{name}.so", kept)
    return ctypes.CDLL(str(kept))


def stream(device: torch.device) -> ctypes.c_void_p:
    """The current one."""
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


def checked(result: int) -> int:
    """What a source's function returned, unless it is CUDA's error number, negative."""
    if result < 0:
        raise RuntimeError(f"CUDA error {-result}")
    return result
