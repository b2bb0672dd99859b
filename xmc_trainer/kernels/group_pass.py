"""Launches group_pass.cu and warpgroup_pass.cu: the step of labels that share index rows, one pass over the weights.

Where they cannot be compiled (`cuda_source`), `group_step` does the same in Triton.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels import cuda_source
from xmc_trainer.kernels.cuda_source import TEXTS
from xmc_trainer.kernels.reference import HeadTensors


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


def choices(head: HeadTensors, device: torch.device) -> tuple[Blocks, ...]:
    """Those of `BLOCKS` that a head may be taken by on a device."""
    warpgroups = torch.cuda.get_device_capability(device) == cuda_source.HOPPER
    halves = head.weight_LF.shape[1] > 64  # two warpgroups each take half of the features
    found = BLOCKS[_rounded(head.group_size, 128)]
    return tuple(blocks for blocks in found if blocks.strip or (warpgroups and (halves or blocks.warps == 4)))


def takes(head: HeadTensors, feat_Bd: Tensor) -> bool:
    """Whether `launch` takes this head and these features."""
    fan_in, (texts, d) = head.weight_LF.shape[1], feat_Bd.shape
    shapes = head.index_RF is not None and fan_in <= 128 and fan_in % 8 == 0 and (texts + TEXTS) * d < 1 << 31
    by_element = all(state.shape == head.weight_LF.shape for state in head.weight_state)
    types = cuda_source.takes_types(head)
    return shapes and by_element and types and feat_Bd.dtype != torch.float32 and cuda_source.can_compile(feat_Bd.device)


def tile_labels(group: int, blocks: Blocks) -> int:
    """Labels a tile: groups are cut into tiles of 16, 32 or 64, or of 64 a warpgroup."""
    return _rounded(group, 64) if blocks.strip else 16 * blocks.warps


def _rounded(group: int, most: int) -> int:
    return min(most, max(16, 1 << (group - 1).bit_length()))


def in_warpgroup_order(x_dB: Tensor) -> Tensor:
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
    fan_in, columns, device = head.weight_LF.shape[1], x_dB.shape[1], x_dB.device
    tile, one_tile = tile_labels(head.group_size, blocks), columns == TEXTS
    library = cuda_source.library(
        "group_pass.cu" if blocks.strip else "warpgroup_pass.cu", head, device, rule, loss, LABELS=tile,
        FEATURES=64 if fan_in <= 64 else 128, WARPS=blocks.warps, DX_M=blocks.strip, BLOCKS=blocks.blocks if one_tile else 1,
        ONE_TILE=int(one_tile),
    )  # fmt: skip
    if not blocks.strip:
        x_dB = in_warpgroup_order(x_dB)
    fit = cuda_source.checked(library.launch_blocks())
    programs = min(fit, (last_row - first_row) * -(-head.group_size // tile))
    losses = torch.zeros(programs, columns, device=device)
    arguments = cuda_source.Arguments.of(
        head, first_row, last_row, x=x_dB, columns=columns, texts=texts, dx=dx_dB, losses=losses, positive=positive,
        any_positive=any_positive, finite=finite, text_weight=text_weight, update=update, rule=rule, decay=decay,
    )  # fmt: skip
    cuda_source.checked(-library.launch(ctypes.byref(arguments), programs, cuda_source.stream(device)))
    loss_B += losses.sum(0)
