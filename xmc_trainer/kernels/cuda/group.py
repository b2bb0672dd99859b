"""Launches group.cu and warpgroup.cu: the step of labels that share index rows, in one pass over the weights.

`triton.group` does the same where they cannot be compiled.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels.arguments import GROUP, TEXTS, WORKSPACE, Batch, Step, chunk_labels
from xmc_trainer.kernels.cuda import source
from xmc_trainer.kernels.cuda.source import TYPES
from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.kernels.triton.bitmap import PairBitmap


class Blocks(NamedTuple):
    """How a thread block shares the work on a tile of labels. Results differ only in the order of sums."""

    warps: int  # in a block: 4 or 8
    blocks: int  # that should fit on a multiprocessor
    strip: int  # 1, 2 or 4: a warp computes 16 * strip features of the feature gradient at a time; 0: warpgroup.cu

    @property
    def labels(self) -> int:
        """The most labels that a tile can have."""
        return 64 if self.strip else 16 * self.warps


def blocks_for(group_size: int, fan_in: int, capability: tuple[int, int]) -> Blocks:
    """Return the fastest configuration tried on an H200 (d = 768, F = 128, 128 and 1,024 texts)."""
    if group_size <= 32:
        return Blocks(4, 4, 2)
    if capability != source.HOPPER:
        return Blocks(8, 2, 2)
    # Two warpgroups each take half of the features.
    return Blocks(4, 3, 0) if group_size <= 64 or fan_in <= 64 else Blocks(8, 2, 0)


def tile_labels(group_size: int, blocks: Blocks) -> int:
    """Return the labels in a tile: 16, 32 or 64 in group.cu, 64 for each warpgroup in warpgroup.cu."""
    return min(64, max(16, 1 << (group_size - 1).bit_length())) if blocks.strip else blocks.labels


def state_dtype(head: HeadTensors) -> torch.dtype | None:
    """Return the dtype of the states that have a value for each weight; None if there are none."""
    return next((state.dtype for state in head.weight_state if state.shape == head.weight_LF.shape), None)


def _compiled(head: HeadTensors, device: torch.device, step: Step, blocks: Blocks, one_tile: bool) -> ctypes.CDLL:
    assert head.index_RF is not None  # dispatch sends no dense head here
    weight = head.weight_LF.dtype
    state = state_dtype(head) if step.rule["RULE"] else None  # a step without update runs as SGD and reads no state
    words = {
        "WEIGHT": TYPES[weight], "INDEX": TYPES[head.index_RF.dtype], "STATE": TYPES[state or weight], "RULE": step.rule["RULE"],
        "LOSS": step.loss, "LABELS": tile_labels(head.group_size, blocks), "FEATURES": 64 if head.weight_LF.shape[1] <= 64 else 128,
        "WARPS": blocks.warps, "DX_M": blocks.strip, "BLOCKS": blocks.blocks if one_tile else 1, "ONE_TILE": int(one_tile),
    }  # fmt: skip
    capability = torch.cuda.get_device_capability(device)
    name = "group.cu" if blocks.strip else "warpgroup.cu"
    return source.compiled(name, capability, tuple(f"{name}={word}" for name, word in words.items()), GROUP)


def in_warpgroup_order(x_dB: Tensor) -> Tensor:
    """Reorder the texts of each tile to the rows of warpgroup.cu. x_dB: [d, columns]."""
    d = x_dB.shape[0]
    warp_row_half_high = x_dB.view(d, -1, 4, 8, 2, 2)
    return warp_row_half_high.permute(0, 1, 4, 2, 5, 3).reshape(d, -1)


def run(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Run the step. Return the loss, float32 [columns], and the feature gradient, float32 [columns, d].

    batch: padded to whole tiles of TEXTS texts.
    """
    assert head.index_RF is not None
    (labels, fan_in), group, rows, device = (
        head.weight_LF.shape,
        head.group_size,
        head.index_RF.shape[0],
        batch.rows.device,
    )
    blocks = blocks_for(group, fan_in, torch.cuda.get_device_capability(device))
    tile = tile_labels(group, blocks)
    library = _compiled(head, device, step, blocks, one_tile=batch.columns == TEXTS)
    chunk = chunk_labels(rows * group, WORKSPACE, batch.columns // 8, group) // group
    pairs = PairBitmap(chunk * group, batch.columns, group, tile, device)
    x = batch.transposed if blocks.strip else in_warpgroup_order(batch.transposed)
    programs = min(source.checked(library.launch_blocks()), chunk * -(-group // tile))
    losses = torch.zeros(programs, batch.columns, device=device)
    dx = torch.zeros_like(batch.transposed, dtype=torch.float32)
    row_key, column_key = (step.decay.get(f"key{i}", 0) & 0xFFFFFFFF for i in range(2))
    tensors = dict(
        weight=head.weight_LF, index=head.index_RF, bias=head.bias_L, x=x, dx=dx, positive=pairs.bits, any_positive=pairs.any,
        loss=losses, finite=step.finite,
        **dict(zip(("state0", "state1"), head.weight_state)), **dict(zip(("bias_state0", "bias_state1"), head.bias_state)),
    )  # fmt: skip
    numbers = {name: step.rule[name] for name in ("lr", "beta0", "beta1", "eps", "correct0", "correct1")} | dict(
        labels=labels, label_start=head.label_start, texts=batch.texts, columns=batch.columns, fan_in=fan_in, group=group,
        update=step.update, text_weight=step.text_weight, weight_decay=step.decay.get("weight_decay", 0.0),
        row_key=row_key, column_key=column_key ^ column_key >> 16,
    )  # fmt: skip
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        pairs.mark(label_P, row_P, first * group)
        arguments = GROUP.structure(**addresses, **numbers, first_row=first, last_row=last)
        here = min(programs, (last - first) * -(-group // tile))
        source.checked(-library.launch(ctypes.byref(arguments), here, source.stream(device)))
    return losses.sum(0), dx.T * step.text_weight
