"""Launches group.cu: the step of labels that share index rows, in one pass over the weights, on capability 9.0."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_trainer.kernels.arguments import GROUP, TEXTS, WORKSPACE, Batch, Step, chunk_labels
from xmc_trainer.kernels.cuda.source import Kernel
from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.kernels.triton.bitmap import PairBitmap


def in_warpgroup_order(x_dB: Tensor) -> Tensor:
    """Reorder the texts of each tile to the rows of group.cu. x_dB: [d, columns]."""
    d = x_dB.shape[0]
    warp_row_half_high = x_dB.view(d, -1, 4, 8, 2, 2)
    return warp_row_half_high.permute(0, 1, 4, 2, 5, 3).reshape(d, -1)


def run(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Run the step. Return the loss, float32 [columns], and the feature gradient, float32 [columns, d].

    batch: padded to whole tiles of TEXTS texts.
    """
    assert head.index_RF is not None  # dispatch sends no dense head here
    (labels, fan_in), group, rows = head.weight_LF.shape, head.group_size, head.index_RF.shape[0]
    columns, device = batch.columns, batch.rows.device
    assert batch.rows.numel() < 1 << 31  # the kernel's offsets are int32
    # Two warpgroups take a tile of 128 labels, and each a half of the features.
    warps = 4 if group <= 64 or fan_in <= 64 else 8
    tile = 16 * warps
    kernel = Kernel(
        "group.cu", GROUP, head, device, RULE=step.rule["RULE"], LOSS=step.loss, WARPS=warps, FEATURES=64 if fan_in <= 64 else 128,
        ONE_TILE=int(columns == TEXTS),
    )  # fmt: skip
    chunk = chunk_labels(rows * group, WORKSPACE, columns // 8, group) // group
    pairs = PairBitmap(chunk * group, columns, group, tile, device)
    programs = min(kernel.blocks, chunk * -(-group // tile))
    losses = torch.zeros(programs, columns, device=device)
    dx = torch.zeros_like(batch.transposed, dtype=torch.float32)
    row_key, column_key = (step.decay.get(f"key{i}", 0) & 0xFFFFFFFF for i in range(2))
    arguments = dict(
        weight=head.weight_LF, index=head.index_RF, bias=head.bias_L, x=in_warpgroup_order(batch.transposed), dx=dx,
        positive=pairs.bits, any_positive=pairs.any, loss=losses, finite=step.finite,
        labels=labels, label_start=head.label_start, texts=batch.texts, columns=columns, fan_in=fan_in, group=group,
        update=step.update, text_weight=step.text_weight, weight_decay=step.decay.get("weight_decay", 0.0),
        row_key=row_key, column_key=column_key ^ column_key >> 16,
        **dict(zip(("state0", "state1"), head.weight_state)), **dict(zip(("bias_state0", "bias_state1"), head.bias_state)),
        **{name: step.rule[name] for name in ("lr", "beta0", "beta1", "eps", "correct0", "correct1")},
    )  # fmt: skip
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        pairs.mark(label_P, row_P, first * group)
        kernel(min(programs, (last - first) * -(-group // tile)), arguments | dict(first_row=first, last_row=last))
    return losses.sum(0), dx.T * step.text_weight
