"""The head step for any index and dtype: cuBLAS products, one chunk of labels at a time.

D_Cd holds the chunk's weights as dense rows. A dense head in the features' dtype is used where it is; any other head is first copied
to a workspace.

    densify_kernel     D <- rows of the chunk
    cuBLAS             z_CB = D X^T
    slopes_kernel      loss_B += sum_C loss(z + bias, y)    s_CB = dloss/dz    bias <- update
    cuBLAS             dX_Bd += s^T D    dW_Cd = s X
    gather_kernel      weight[l] <- update(weight[l], dW[l, index[l]])

For a dense head and one tile of texts, reading and writing weights takes most of the time. Then `gradients_kernel` computes dX and dW
and updates the weights in one pass over them, and dW is never in memory.

bfloat16 products sum in float32; dW is rounded to bfloat16. float32 products are exact unless torch allows TF32
(`torch.set_float32_matmul_precision`, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment).

There are no atomic adds: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_trainer.kernels.arguments import Batch, Step, chunk_labels, multiprocessors, step_workspace, two_states
from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.kernels.triton.bitmap import PairBitmap, feature_bitmap
from xmc_trainer.kernels.triton.tile_math import (
    ROWWISE,
    count_bits,
    loss_and_slope,
    operand,
    update_bias,
    update_weights,
)


@triton.jit(do_not_specialize=["first_label", "last_label"])
def densify_kernel(
    weight_ptr,  # [L, F]
    bits_ptr,  # int32 [R, words]: bitmap of the features that a row reads
    dense_ptr,  # out: [labels of the chunk, d]
    first_label, last_label, d, words, F: tl.constexpr, G: tl.constexpr, T: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write dense rows. Each program is one warp and writes T labels, one after another, 32 * WORDS features at a time.

    An index row is ascending, so a feature's slot is the number of set bits before it. One warp takes one label at a time so that
    the slots that it reads are contiguous, whatever layout the compiler chooses.
    """
    place = tl.arange(0, 32)
    bit = (tl.full([32], 1, tl.uint32) << place.to(tl.uint32))[:, None]
    first = first_label + tl.program_id(0) * T
    for label in range(first, tl.minimum(first + T, last_label)):
        row = tl.full([1], 0, tl.int64) + label
        bits_row = bits_ptr + row // G * words
        weights = (weight_ptr + row * F)[:, None]
        dense = (dense_ptr + (row - first_label) * d)[:, None]
        slot = tl.zeros([1], tl.int32)
        for first_word in range(0, words, WORDS):
            word = first_word + tl.arange(0, WORDS)
            mask = tl.load(bits_row + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
            count = count_bits(mask)
            start = slot + tl.cumsum(count, 0) - count
            present = (mask[None, :] & bit) != 0
            before = count_bits(mask[None, :] & (bit - 1))
            weight = tl.load(weights + (start[None, :] + before), mask=present, other=0.0)
            k = place[:, None] + word[None, :] * 32
            tl.store(dense + k, operand(weight, dense_ptr.dtype.element_ty == tl.bfloat16), mask=k < d)
            slot += tl.sum(count, 0)


@triton.jit(do_not_specialize=["first_label", "last_label"])
def slopes_kernel(
    z_ptr,  # float32 [labels of the chunk, columns]: logits without bias
    bias_ptr, bias_state0_ptr, bias_state1_ptr,  # float32 [L]
    positive_ptr,  # int32 [labels of the chunk, columns // 32]: one bit for each (label, text)
    slope_ptr,  # out: [labels of the chunk, columns]
    loss_ptr,  # out: float32 [tiles of the chunk, columns]
    update_ptr,  # int32 scalar: 0 leaves the biases alone
    first_label, last_label, texts, columns,
    text_weight, lr, beta0, beta1, eps, correct0, correct1,
    T: tl.constexpr, B_TILE: tl.constexpr, LOSS: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Turn logits into losses and slopes, and update the biases. Each program takes T labels and all texts, B_TILE at a time."""
    tile = tl.program_id(0)
    local = tile * T + tl.arange(0, T).to(tl.int64)
    label = first_label + local
    label_ok = label < last_label
    # Padding labels get a logit of -1e30: its loss and slope are zero.
    bias = tl.where(label_ok, 0.0, -1e30)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + label, mask=label_ok, other=-1e30)
    grad = tl.zeros([T], tl.float32)
    for first in range(0, columns, B_TILE):
        text = first + tl.arange(0, B_TILE)
        place = local[:, None] * columns + text[None, :]
        z = tl.load(z_ptr + place, mask=label_ok[:, None], other=0.0) + bias[:, None]
        # Most tiles have no positive; they do not look at single bits.
        row = positive_ptr + local[:, None] * (columns // 32)
        word = (first // 32 + tl.arange(0, B_TILE // 32))[None, :]
        any_positive = tl.max((tl.load(row + word, mask=label_ok[:, None], other=0) != 0).to(tl.int32)) != 0
        words = row + (text // 32)[None, :]
        loss, slope = loss_and_slope(z, any_positive, words, label_ok[:, None], (text % 32)[None, :], LOSS)
        slope = tl.where((text < texts)[None, :], slope, 0.0)
        tl.store(loss_ptr + tile.to(tl.int64) * columns + text, tl.sum(loss, 0))
        tl.store(slope_ptr + place, operand(slope, BF16), mask=label_ok[:, None])
        grad += tl.sum(slope, 1)
    if HAS_BIAS:
        update = tl.load(update_ptr + tl.zeros([1], tl.int32)) != 0
        update_bias(
            bias_ptr, bias_state0_ptr, bias_state1_ptr, label, label_ok, update, bias, grad * text_weight,
            lr, beta0, beta1, eps, correct0, correct1, RULE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_label", "last_label", "label_start", "key0", "key1"])
def gradients_kernel(
    weight_ptr, state0_ptr, state1_ptr,  # in and out: [L, D]
    x_ptr,  # [B, D]; B is one padded tile of texts
    slope_ptr,  # [labels of the chunk, B]
    dx_ptr,  # in and out: float32 [lanes, B, D], without text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, label_start, lanes,
    text_weight, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
    key0, key1,  # for rounding
    D: tl.constexpr, D_TILE: tl.constexpr, T: tl.constexpr, B: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Add to dX and update dense weights, with bfloat16 products. Each program takes D_TILE features and every `lanes`-th tile of T labels.

    Its features of X and dX stay in registers and shared memory. Programs of the same labels are neighbours, so that slopes are read
    from device memory once.
    """
    D_TILES: tl.constexpr = (D + D_TILE - 1) // D_TILE
    first_k = tl.program_id(0) % D_TILES * D_TILE
    lane = tl.program_id(0) // D_TILES
    k = first_k + tl.arange(0, D_TILE)
    labels = last_label - first_label
    finite = tl.load(finite_ptr + tl.zeros([1], tl.int32)) != 0
    text = tl.arange(0, B)
    x = operand(tl.load(x_ptr + text[:, None] * D + k[None, :], mask=(k < D)[None, :], other=0.0), True)
    dx = tl.zeros([B, D_TILE], tl.float32)
    for tile in range(lane, (labels + T - 1) // T, lanes):
        local = tile * T + tl.arange(0, T).to(tl.int64)
        label = first_label + local
        ok = (local < labels)[:, None]
        if D % D_TILE != 0:
            ok = ok & (k < D)[None, :]
        place = label[:, None] * D + k[None, :]
        s = operand(
            tl.load(slope_ptr + local[:, None] * B + text[None, :], mask=(local < labels)[:, None], other=0.0), True
        )
        weight = tl.load(weight_ptr + place, mask=ok, other=0.0)
        dx = tl.dot(tl.trans(s), operand(weight, True), dx)
        dw = tl.dot(s, x)
        update_weights(
            weight, weight_ptr, state0_ptr, state1_ptr, place, ok, finite, dw * text_weight,
            label, label_start, k[None, :], lr, weight_decay, beta0, beta1, eps, correct0, correct1,
            key0, key1, D, RULE,
        )  # fmt: skip
    sums = dx_ptr + (lane * B + text).to(tl.int64)[:, None] * D + k[None, :]
    tl.store(sums, tl.load(sums, mask=(k < D)[None, :], other=0.0) + dx, mask=(k < D)[None, :])


@triton.jit(do_not_specialize=["first_label", "last_label", "label_start", "key0", "key1"])
def gather_kernel(
    weight_ptr, state0_ptr, state1_ptr,  # [L, F]
    index_ptr,  # [R, F], if SPARSE
    dense_ptr,  # [labels of the chunk, d]: the gradient without text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, label_start, d,
    text_weight, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
    key0, key1,  # for rounding
    F: tl.constexpr, G: tl.constexpr, T: tl.constexpr, F_TILE: tl.constexpr, SPARSE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update weights by the gradient at their index. Each program takes T labels, F_TILE slots at a time (all F with ROWWISE)."""
    local = tl.program_id(0) * T + tl.arange(0, T).to(tl.int64)
    label = first_label + local
    for first in range(0, F, F_TILE):
        f = (first + tl.arange(0, F_TILE))[None, :]
        ok = (label < last_label)[:, None] & (f < F)
        feature = f
        if SPARSE:
            feature = tl.load(index_ptr + (label // G)[:, None] * F + f, mask=ok, other=0).to(tl.int32)
        dw = tl.load(dense_ptr + local[:, None] * d + feature, mask=ok, other=0.0).to(tl.float32) * text_weight
        finite = tl.load(finite_ptr + tl.zeros([1], tl.int32)) != 0
        place = label[:, None] * F + f
        update_weights(
            tl.load(weight_ptr + place, mask=ok, other=0.0), weight_ptr, state0_ptr, state1_ptr, place, ok, finite, dw,
            label, label_start, f, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
            key0, key1, F, RULE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_label", "last_label"])
def update_bias_kernel(
    bias_ptr, state0_ptr, state1_ptr,  # float32 [L]
    grad_ptr,  # float32 [PARTS, pitch]: partial sums of the gradient of the chunk's labels, without text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, pitch, text_weight, lr, beta0, beta1, eps, correct0, correct1,
    PARTS: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update biases by the sum of PARTS partial gradients. Each program takes T labels."""
    local = tl.program_id(0) * T + tl.arange(0, T)
    label = first_label + local.to(tl.int64)
    ok = label < last_label
    grad = tl.zeros([T], tl.float32)
    for part in range(PARTS):
        grad += tl.load(grad_ptr + tl.cast(part, tl.int64) * pitch + local, mask=ok, other=0.0)
    finite = tl.load(finite_ptr + tl.zeros([1], tl.int32)) != 0
    update_bias(
        bias_ptr, state0_ptr, state1_ptr, label, ok, finite, tl.load(bias_ptr + label, mask=ok, other=0.0), grad * text_weight,
        lr, beta0, beta1, eps, correct0, correct1, RULE,
    )  # fmt: skip


# Labels in a tile of `slopes_kernel`; labels and features in a tile of `gradients_kernel`, its warps and its pipeline stages.
_LABELS = 32
_GRADIENTS_LABELS, _GRADIENTS_FEATURES, _GRADIENTS_WARPS, _GRADIENTS_STAGES = 64, 128, 16, 3


class DenseChunks:
    """Iterates over the head's weights as dense rows, a chunk of labels at a time.

    Args:
        bytes_a_label: bytes that the caller keeps for each label of a chunk.
        unit: labels in a tile. A chunk is a multiple of it, and where it can be a whole number of tiles for each multiprocessor.
    """

    def __init__(self, head: HeadTensors, batch: Batch, bytes_a_label: int, unit: int) -> None:
        self.head, self.d, dtype, device = head, batch.rows.shape[1], batch.rows.dtype, batch.rows.device
        labels, self.workspace = head.weight_LF.shape[0], None
        in_workspace = not self.needs_no_copy(head, dtype)
        if in_workspace:
            bytes_a_label += self.d * dtype.itemsize
        size = chunk_labels(labels, step_workspace(head), max(1, bytes_a_label), unit)
        wave = unit * multiprocessors(device)
        self.size = size if size >= labels else size // wave * wave or size
        if in_workspace:
            self.workspace = torch.empty(self.size, self.d, dtype=dtype, device=device)

    @staticmethod
    def needs_no_copy(head: HeadTensors, dtype: torch.dtype) -> bool:
        """Return whether the weights serve as dense rows without a copy."""
        return head.index_RF is None and head.weight_LF.dtype == dtype

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first label, last label, dense rows [last - first, d])."""
        head = self.head
        labels, fan_in = head.weight_LF.shape
        for first in range(0, labels, self.size):
            last = min(first + self.size, labels)
            if self.workspace is None:
                yield first, last, head.weight_LF[first:last]
                continue
            rows = self.workspace[: last - first]
            if head.index_RF is None:
                rows.copy_(head.weight_LF[first:last])
            else:
                assert head.of_index is not None  # a layer's head has it
                densify_kernel[(triton.cdiv(last - first, 16),)](
                    head.weight_LF, head.of_index(feature_bitmap, self.d), rows, first, last, self.d, triton.cdiv(self.d, 32), F=fan_in,
                    G=head.group_size, T=16, WORDS=8, num_warps=1,
                )  # fmt: skip
            yield first, last, rows


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute out <- a @ b and return out. a and b share a dtype; out has it too, or is float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def run(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Run the step. Return the loss, float32 [columns], and the feature gradient, float32 [columns, d]."""
    labels, (columns, d), device = head.weight_LF.shape[0], batch.rows.shape, batch.rows.device
    has_bias, dtype, programs = head.bias_L is not None, batch.rows.dtype, multiprocessors(device)
    by_label = step.update and step.rule["RULE"] == ROWWISE.value
    one_pass = step.update and head.index_RF is None and not by_label and batch.bf16 and columns == batch.tile
    needs_no_copy = DenseChunks.needs_no_copy(head, dtype)
    # Rows in a workspace are overwritten by dW.
    own_gradient = step.update and not one_pass and needs_no_copy
    bytes_a_label = columns * (4 + dtype.itemsize) + columns // 8 + (d * dtype.itemsize if own_gradient else 0)
    chunks = DenseChunks(head, batch, bytes_a_label, _LABELS)
    pairs = PairBitmap(chunks.size, columns, _LABELS, _LABELS, device)
    z_CB = torch.empty(chunks.size, columns, device=device)
    slope_CB = torch.empty(chunks.size, columns, dtype=dtype, device=device)
    gradient_Cd = torch.empty(chunks.size if own_gradient else 0, d, dtype=dtype, device=device)
    tile_loss = torch.empty(triton.cdiv(chunks.size, _LABELS), columns, device=device)
    bias = [head.bias_L, *two_states(head.bias_state, z_CB)] if has_bias else [z_CB] * 3
    update_bias = step.finite * int(step.update)
    feature_tiles = triton.cdiv(d, _GRADIENTS_FEATURES)
    lanes = max(1, min(programs // feature_tiles, triton.cdiv(labels, _GRADIENTS_LABELS))) if one_pass else 1
    loss, dx = torch.zeros(columns, device=device), torch.zeros(lanes, columns, d, device=device)
    dx_of_chunk = torch.empty(columns, d, device=device)
    for first, last, rows in chunks:
        count, tiles = last - first, triton.cdiv(last - first, _LABELS)
        slope = slope_CB[:count]
        pairs.mark(label_P, row_P, first)
        multiply(rows, batch.rows.T, z_CB[:count])
        slopes_kernel[(tiles,)](
            z_CB, *bias, pairs.bits, slope_CB, tile_loss, update_bias, first_label=first, last_label=last,
            texts=batch.texts, columns=columns, text_weight=step.text_weight, T=_LABELS, B_TILE=batch.tile, LOSS=step.loss,
            HAS_BIAS=has_bias, BF16=batch.bf16, num_warps=8, **step.rule,
        )  # fmt: skip
        loss += tile_loss[:tiles].sum(0)
        if one_pass:
            gradients_kernel[(feature_tiles * lanes,)](
                head.weight_LF, *two_states(head.weight_state, head.weight_LF), batch.rows, slope_CB, dx, step.finite,
                first_label=first, last_label=last, label_start=head.label_start, lanes=lanes, text_weight=step.text_weight,
                D=d, D_TILE=_GRADIENTS_FEATURES, T=_GRADIENTS_LABELS, B=columns, num_warps=_GRADIENTS_WARPS,
                num_stages=_GRADIENTS_STAGES, **step.rule, **step.decay,
            )  # fmt: skip
            continue
        dx[0] += multiply(slope.T, rows, dx_of_chunk)
        if step.update:
            gradient = multiply(slope, batch.rows, gradient_Cd[:count] if own_gradient else rows)
            update_from(head, gradient, first, last, step, head.index_RF)
    return loss, dx.sum(0) * step.text_weight


def update_from(head: HeadTensors, grad_Cd: Tensor, first: int, last: int, step: Step, index_RF: Tensor | None) -> None:
    """Update the weights of labels first..last.

    grad_Cd: without `text_weight`; [last - first, d], read at `index_RF`, or [last - first, F] if that is None.
    """
    fan_in, by_label = head.weight_LF.shape[1], step.rule["RULE"] == ROWWISE.value
    # A program takes rows of 2048 elements in all. ROWWISE needs whole rows.
    f_tile = triton.next_power_of_2(fan_in)
    f_tile = f_tile if by_label else min(1024, f_tile)
    rows = max(1, 2048 // f_tile)
    gather_kernel[(triton.cdiv(last - first, rows),)](
        head.weight_LF, *two_states(head.weight_state, head.weight_LF), grad_Cd if index_RF is None else index_RF, grad_Cd,
        step.finite, first_label=first, last_label=last, label_start=head.label_start, d=grad_Cd.shape[1],
        text_weight=step.text_weight, F=fan_in, G=head.group_size, T=rows, F_TILE=f_tile, SPARSE=index_RF is not None,
        **step.rule, **step.decay,
    )  # fmt: skip


def update_biases_from(head: HeadTensors, grad_NC: Tensor, first: int, last: int, step: Step) -> None:
    """Update the biases of labels first..last by the sum over parts of `grad_NC`: float32 [parts, last - first or more]."""
    assert head.bias_L is not None
    update_bias_kernel[(triton.cdiv(last - first, 256),)](
        head.bias_L, *two_states(head.bias_state, head.bias_L), grad_NC, step.finite, first_label=first, last_label=last,
        pitch=grad_NC.shape[1], text_weight=step.text_weight, PARTS=grad_NC.shape[0], T=256, **step.rule,
    )  # fmt: skip
