"""The head step for labels that share index rows: products over the F gathered features.

For the G labels of an index row, with their features gathered from the transposed features X^T [d, B]:

    slopes_kernel    x_FB = X^T[index]    z_BG = x_FB^T w_GF^T + bias    loss_B += sum_G loss(z, y)    g_GB = dloss/dz
                     dX^T[index] += w_GF^T g_GB   (atomic)
    update_kernel    x_FB = X^T[index]    dw_GF = g_GB x_FB^T    w_GF, bias <- update

There are two kernels because one would need so many registers that a multiprocessor could hold only one program. Between them
the slopes of a chunk stay in the L2 cache, and so do X^T and dX^T. Texts are contiguous in X^T and dX^T, so gathers and atomic adds
move whole sectors. Texts are the first dimension of z because a matrix instruction needs 64 rows and G may be 16. Large groups are
taken G_TILE labels at a time, while dx stays in registers.

Atomic adds come in any order, so the last digits of feature gradients vary from run to run. `dense` is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_trainer.kernels.arguments import WORKSPACE, Batch, Step, chunk_labels, multiprocessors, two_states
from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.kernels.triton.bitmap import PairBitmap
from xmc_trainer.kernels.triton.tile_math import (
    load_operand,
    loss_and_slope,
    operand,
    product,
    update_bias,
    update_weights,
)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def slopes_kernel(
    weight_ptr,  # [L, F]
    index_ptr,  # [R, F]
    bias_ptr,  # float32 [L]
    x_ptr,  # [d, columns]
    dx_ptr,  # float32 [d, columns]
    positive_ptr,  # int32 [labels of rows from first_row on, columns // 32]: one bit for each (label, text)
    any_positive_ptr,  # int32 [rows, tiles in a row]: not zero if the tile of labels has a positive
    slope_ptr,  # out: [labels of rows from first_row on, columns]
    loss_ptr,  # in and out: float32 [programs, columns]
    first_row, last_row, labels, texts, columns, text_weight,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, G_TILE: tl.constexpr,
    B_TILE: tl.constexpr, ALL_TEXTS: tl.constexpr,
    LOSS: tl.constexpr, BF16: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_SLOPES: tl.constexpr,
):  # fmt: skip
    """Compute losses, slopes and the feature gradient. Each program takes every n-th index row and B_TILE texts (program_id(1))."""
    text = tl.program_id(1) * B_TILE + tl.arange(0, B_TILE)
    f = tl.arange(0, F_TILE)
    f_ok = f < F
    loss_sum = tl.zeros([B_TILE, G_TILE], tl.float32)
    for row in range(first_row + tl.program_id(0), last_row, tl.num_programs(0)):
        index = tl.load(index_ptr + tl.full([1], F, tl.int64) * row + f, mask=f_ok, other=0).to(tl.int32)
        x = load_operand(x_ptr + index[:, None] * columns + text[None, :], None, BF16)
        dx = tl.zeros([F_TILE, B_TILE], tl.float32)
        for first in range(0, G, G_TILE):
            g = first + tl.arange(0, G_TILE)
            local = (row - first_row) * G + g
            label = row * G + g.to(tl.int64)
            label_ok = (g < G) & (label < labels)
            w = load_operand(weight_ptr + label[:, None] * F + f[None, :], label_ok[:, None] & f_ok[None, :], BF16)
            # Padding labels get a logit of -1e30: its loss and slope are zero.
            bias = tl.where(label_ok, 0.0, -1e30)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + label, mask=label_ok, other=-1e30)
            tiles = (G + G_TILE - 1) // G_TILE
            any_positive = tl.load(any_positive_ptr + (row - first_row) * tiles + first // G_TILE) != 0
            z = product(tl.trans(x), tl.trans(w), tl.zeros([B_TILE, G_TILE], tl.float32), BF16) + bias[None, :]
            words_ptr = positive_ptr + local[None, :] * (columns // 32) + (text // 32)[:, None]
            loss, slope = loss_and_slope(z, any_positive, words_ptr, label_ok[None, :], (text % 32)[:, None], LOSS)
            if not ALL_TEXTS:
                slope = tl.where((text < texts)[:, None], slope, 0.0)
            loss_sum += loss
            s = operand(tl.trans(slope), BF16)
            dx = product(tl.trans(w), s, dx, BF16)
            if KEEP_SLOPES:
                tl.store(slope_ptr + local.to(tl.int64)[:, None] * columns + text[None, :], s, mask=label_ok[:, None])
        # No mask along the texts: it would prevent vector instructions, and nobody reads the padding columns.
        place = dx_ptr + index[:, None] * columns + text[None, :]
        tl.atomic_add(place, dx * text_weight, mask=f_ok[:, None], sem="relaxed")
    sums = loss_ptr + tl.program_id(0) * columns + text
    tl.store(sums, tl.load(sums) + tl.sum(loss_sum, 1))


@triton.jit(do_not_specialize=["first_row", "last_row", "label_start", "key0", "key1"])
def update_kernel(
    weight_ptr, state0_ptr, state1_ptr,  # [L, F]
    index_ptr,  # [R, F]
    bias_ptr, bias_state0_ptr, bias_state1_ptr,  # float32 [L]
    x_ptr,  # [d, columns]
    slope_ptr,  # [labels of rows from first_row on, columns]
    finite_ptr,  # int32 scalar
    first_row, last_row, labels, label_start, columns,
    text_weight, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
    key0, key1,  # for rounding
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, G_TILE: tl.constexpr,
    B_TILE: tl.constexpr, B_TILES: tl.constexpr, RULE: tl.constexpr, BF16: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Compute the weight gradient and update weights and biases. Each program takes G_TILE labels of one row and all texts."""
    tiles = (G + G_TILE - 1) // G_TILE
    row = first_row + tl.program_id(0) // tiles
    g = tl.program_id(0) % tiles * G_TILE + tl.arange(0, G_TILE)
    f = tl.arange(0, F_TILE)
    f_ok = f < F
    local = (row - first_row) * G + g.to(tl.int64)
    label = row * G + g.to(tl.int64)
    label_ok = (g < G) & (label < labels)
    finite = tl.load(finite_ptr + tl.zeros([1], tl.int32)) != 0
    index = tl.load(index_ptr + tl.full([1], F, tl.int64) * row + f, mask=f_ok, other=0).to(tl.int32)
    dw_FG = tl.zeros([F_TILE, G_TILE], tl.float32)
    dbias = tl.zeros([G_TILE], tl.float32)
    for tile in range(B_TILES):
        text = tile * B_TILE + tl.arange(0, B_TILE)
        x = load_operand(x_ptr + index[:, None] * columns + text[None, :], None, BF16)
        s = load_operand(slope_ptr + local[:, None] * columns + text[None, :], label_ok[:, None], BF16)
        dw_FG = product(x, tl.trans(s), dw_FG, BF16)
        dbias += tl.sum(s.to(tl.float32), 1)
    place = label[:, None] * F + f[None, :]
    ok = label_ok[:, None] & f_ok[None, :]
    update_weights(
        tl.load(weight_ptr + place, mask=ok, other=0.0), weight_ptr, state0_ptr, state1_ptr, place, ok, finite,
        tl.trans(dw_FG) * text_weight, label, label_start, f[None, :],
        lr, weight_decay, beta0, beta1, eps, correct0, correct1, key0, key1, F, RULE,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + label, mask=label_ok, other=0.0)
        update_bias(
            bias_ptr, bias_state0_ptr, bias_state1_ptr, label, label_ok, finite, bias, dbias * text_weight,
            lr, beta0, beta1, eps, correct0, correct1, RULE,
        )  # fmt: skip


def run(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Run the step. Return the loss, float32 [columns], and the feature gradient, float32 [columns, d]."""
    assert head.index_RF is not None  # dispatch sends no dense head here
    (labels, fan_in), group, rows = head.weight_LF.shape, head.group_size, head.index_RF.shape[0]
    columns, device, d = batch.columns, batch.rows.device, batch.rows.shape[1]
    # Tiles of labels and texts: the fastest tried on an H200 at d = 768, F = 128, B = 128.
    whole = max(16, triton.next_power_of_2(group))
    tile, update_tile, texts_tile = min(32, whole), min(64, whole), min(64, batch.tile)
    programs = 4 * multiprocessors(device)
    chunk = chunk_labels(labels, WORKSPACE, columns * (batch.rows.element_size() + 1), group) // group
    pairs = PairBitmap(chunk * group, columns, group, tile, device)
    slope = torch.empty(chunk * group, columns, dtype=batch.rows.dtype, device=device)
    loss = torch.zeros(programs, columns, device=device)
    dx = torch.zeros(d, columns, device=device)
    bias = [loss] * 3 if head.bias_L is None else [head.bias_L, *two_states(head.bias_state, loss)]
    shape = dict(
        labels=labels, columns=columns, text_weight=step.text_weight, F=fan_in, G=group,
        F_TILE=max(16, triton.next_power_of_2(fan_in)), BF16=batch.bf16, HAS_BIAS=head.bias_L is not None,
    )  # fmt: skip
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        pairs.mark(label_P, row_P, first * group)
        slopes_kernel[(min(programs, last - first), columns // texts_tile)](
            head.weight_LF, head.index_RF, bias[0], batch.transposed, dx, pairs.bits, pairs.any, slope, loss,
            first_row=first, last_row=last, texts=batch.texts, G_TILE=tile, B_TILE=texts_tile,
            ALL_TEXTS=batch.texts == columns, LOSS=step.loss, KEEP_SLOPES=step.update, num_warps=4, **shape,
        )  # fmt: skip
        if step.update:
            update_kernel[((last - first) * triton.cdiv(group, update_tile),)](
                head.weight_LF, *two_states(head.weight_state, head.weight_LF), head.index_RF, *bias, batch.transposed, slope,
                step.finite, first_row=first, last_row=last, label_start=head.label_start, G_TILE=update_tile,
                B_TILE=batch.tile, B_TILES=columns // batch.tile, num_warps=8, **shape, **step.rule, **step.decay,
            )  # fmt: skip
    return loss.sum(0), dx.T
