"""Builds and launches group_pass.cu and warpgroup_pass.cu: the step of labels that share index rows, one pass over the weights.

A kernel is compiled on first use for what a head needs of it, by torch's extension loader, and kept on disk. That takes
nvcc (torch looks at CUDA_HOME, then at the PATH), ninja, and a GPU of compute capability 8.0 or more; `can_compile` says
whether it is all there. Where it is not, `group_step` does the same in Triton.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels.reference import HeadTensors
from xmc_trainer.kernels.tuning import cache_folder

_FOLDER = Path(__file__).parent
_HEADERS = ("tile_math.cuh", "launch.cuh", "ptx.cuh")
TEXTS = 128  # texts a tile, as in the source
_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int16: "int16_t", torch.int32: "int32_t"}


class Blocks(NamedTuple):
    """How the work of a tile of labels is shared out. All ways give the same numbers, but for the order of sums."""

    warps: int  # a block: 4 or 8
    blocks: int  # meant to fit on a multiprocessor
    strip: int  # 16 features of the feature gradient that a warp makes at a time: 1, 2 or 4; 0: warpgroup_pass.cu


# Worth trying for groups of up to that many labels, or any; the fastest on an H100 (d = 768, F = 128, B = 128) first.
BLOCKS = {
    16: (Blocks(4, 4, 2), Blocks(4, 3, 4)),
    32: (Blocks(4, 4, 2), Blocks(4, 3, 4)),
    64: (Blocks(4, 3, 0), Blocks(4, 2, 0), Blocks(8, 2, 2), Blocks(4, 3, 2)),
    128: (Blocks(8, 2, 0), Blocks(4, 3, 0), Blocks(8, 2, 2), Blocks(4, 3, 2)),
}
_WARPGROUPS = (9, 0)  # the compute capability that warpgroup_pass.cu is for


class _Arguments(ctypes.Structure):
    """`Arguments` of tile_math.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "weight", "state0", "state1", "index", "bias", "bias_state0", "bias_state1", "x", "dx", "positive", "any_positive",
            "loss", "finite")),
        ("labels", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (
            "first_row", "last_row", "label_start", "texts", "columns", "fan_in", "group", "update")),
        *((name, ctypes.c_float) for name in (
            "text_weight", "lr", "weight_decay", "beta0", "beta1", "eps", "correct0", "correct1")),
        ("key", ctypes.c_uint32 * 6),
    ]  # fmt: skip


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether the kernel can be compiled for a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0) or shutil.which("ninja") is None:
        return False
    from torch.utils.cpp_extension import CUDA_HOME  # takes a while to import

    return CUDA_HOME is not None


def choices(head: HeadTensors, device: torch.device) -> tuple[Blocks, ...]:
    """Those of `BLOCKS` that a head may be taken by on a device."""
    warpgroups = torch.cuda.get_device_capability(device) == _WARPGROUPS
    halves = head.weight_LF.shape[1] > 64  # two warpgroups each take half of the features
    found = BLOCKS[_rounded(head.group_size, 128)]
    return tuple(blocks for blocks in found if blocks.strip or (warpgroups and (halves or blocks.warps == 4)))


def takes(head: HeadTensors, feat_Bd: Tensor) -> bool:
    """Whether `launch` takes this head and these features."""
    fan_in, (texts, d) = head.weight_LF.shape[1], feat_Bd.shape
    shapes = head.index_RF is not None and fan_in <= 128 and fan_in % 8 == 0 and (texts + TEXTS) * d < 1 << 31
    by_element = all(state.shape == head.weight_LF.shape for state in head.weight_state)
    return shapes and by_element and feat_Bd.dtype != torch.float32 and can_compile(feat_Bd.device)


def tile_labels(group: int, blocks: Blocks) -> int:
    """Labels a tile: groups are cut into tiles of 16, 32 or 64, or of 64 a warpgroup."""
    return _rounded(group, 64) if blocks.strip else 16 * blocks.warps


def _rounded(group: int, most: int) -> int:
    return min(most, max(16, 1 << (group - 1).bit_length()))


@functools.cache
def _library(source: str, capability: tuple[int, int], defines: tuple[str, ...]) -> ctypes.CDLL:
    """A compiled source. Ranks that start together each compile their own; the last one's is kept."""
    texts = [(_FOLDER / name).read_text(encoding="utf-8") for name in (source, *_HEADERS)]
    made_of = (texts, defines, capability, torch.__version__)
    name = "group_pass_" + hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    kept = cache_folder() / f"{name}.so"
    if not kept.exists():
        from torch.utils import cpp_extension

        kept.parent.mkdir(parents=True, exist_ok=True)
        # Of its own accord torch compiles for sm_90, which lacks the warpgroup's instructions.
        target = ["-gencode=arch=compute_90a,code=sm_90a"] if capability == _WARPGROUPS else []
        # A folder of its own: torch's lock file would outlive a process that is killed, and stop every later one.
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            cpp_extension.load(
                name, [str(_FOLDER / source)], build_directory=folder, is_python_module=False,
                extra_cuda_cflags=["-O3", *target, *(f"-D{define}" for define in defines)],
            )  # fmt: skip
            os.replace(Path(folder) / f"{name}.so", kept)
    return ctypes.CDLL(str(kept))


def _in_warpgroup_order(x_dB: Tensor) -> Tensor:
    """The texts of each tile in the order of warpgroup_pass.cu's rows."""
    d = x_dB.shape[0]
    warp_row_half_high = x_dB.view(d, -1, 4, 8, 2, 2)
    return warp_row_half_high.permute(0, 1, 4, 2, 5, 3).reshape(d, -1)


def launch(
    head: HeadTensors,
    first_row: int,
    last_row: int,
    blocks: Blocks,
    *,
    x_dB: Tensor,
    texts: int,
    dx_dB: Tensor,
    loss_B: Tensor,
    positive: Tensor,
    any_positive: Tensor,
    finite: Tensor,
    text_weight: float,
    update: bool,
    rule: dict[str, Any],
    decay: dict[str, Any],
    loss: int,
) -> None:
    """The step of index rows first_row..last_row, on the current stream.

    Args:
        x_dB: bfloat16 [d, columns], columns a multiple of TEXTS; those from `texts` on are no texts.
        dx_dB: float32 [d, columns], added to; without text_weight.
        loss_B: float32 [columns], each text's loss: added to.
        positive, any_positive: `bits` and `any` of `PairBits` in tiles of `tile_labels`, for these rows.
        finite: int32 scalar; nothing is updated where it is 0.
        text_weight, update, rule, decay, loss: as in `triton_head.Step`.
    """
    (labels, fan_in), columns, device = head.weight_LF.shape, x_dB.shape[1], x_dB.device
    tile, one_tile = tile_labels(head.group_size, blocks), columns == TEXTS
    library = _library(
        "group_pass.cu" if blocks.strip else "warpgroup_pass.cu",
        torch.cuda.get_device_capability(device),
        (
            f"LABELS={tile}", f"FEATURES={64 if fan_in <= 64 else 128}", f"WEIGHT={_TYPES[head.weight_LF.dtype]}",
            f"INDEX={_TYPES[head.index_RF.dtype]}", f"RULE={rule['RULE']}", f"LOSS={loss}", f"WARPS={blocks.warps}",
            f"DX_M={blocks.strip}", f"BLOCKS={blocks.blocks if one_tile else 1}", f"ONE_TILE={int(one_tile)}",
        ),
    )  # fmt: skip
    if not blocks.strip:
        x_dB = _in_warpgroup_order(x_dB)
    programs = min(_check(library.group_pass_blocks()), (last_row - first_row) * -(-head.group_size // tile))
    losses = torch.zeros(programs, columns, device=device)
    weight_state, bias_state = ([*state, None, None][:2] for state in (head.weight_state, head.bias_state))
    tensors = [
        head.weight_LF, *weight_state, head.index_RF, head.bias_L, *bias_state, x_dB, dx_dB, positive, any_positive, losses,
        finite,
    ]  # fmt: skip
    arguments = _Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        labels, first_row, last_row, head.label_start, texts, columns, fan_in, head.group_size, update, text_weight,
        rule["lr"], decay.get("weight_decay", 0.0), *(rule[k] for k in ("beta0", "beta1", "eps", "correct0", "correct1")),
        (ctypes.c_uint32 * 6)(*(decay.get(f"key{i}", 0) & 0xFFFFFFFF for i in range(6))),
    )  # fmt: skip
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _check(-library.group_pass(ctypes.byref(arguments), programs, stream))
    loss_B += losses.sum(0)


def _check(result: int) -> int:
    if result < 0:
        raise RuntimeError(f"group_pass.cu: CUDA error {-result}")
    return result
