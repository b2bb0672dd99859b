"""The head step for any index, by dense products over a chunk of labels at a time. No atomics.

Where few labels share an index row there is nothing to gather for a matrix instruction, and gathering for a single label
is slower than multiplying with its zeros. So a chunk's rows become dense in a workspace, D_Cd (zero but at index; a
dense head's is its weights, where they are), and the products are dense:

    densify_kernel       D <- rows of the chunk
    slopes_kernel       z_CB = D X^T + bias     loss_B += sum_C loss(z, y)     g_CB = dloss/dz     bias <- update
    gradients_kernel    dX_Bd += g^T D          D <- g X, or weight <- update(weight, g X) of a dense head
    gather_kernel       weight[l] <- update(weight[l], D[l, index[l]])

(a dense head whose optimizer must see a label's whole gradient takes the way through D, too).

The weights of a dense head, or D, are the bulk of what is moved: `slopes_kernel` reads them once, and `gradients_kernel`
reads and writes them once. Logits never leave the chip. Losses and slopes take a while in which nothing would be read,
so that programs stay for many tiles of labels and the next ones are on their way meanwhile. A program of
`gradients_kernel` keeps some features of X and of dX on chip for all of its labels, where a tile of texts is the batch;
of larger batches dX is the library's product.

Sums have one order: results are the same, bit for bit, from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_trainer.kernels.arguments import WORKSPACE, Batch, Step, chunk_labels, multiprocessors, two_states
from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.kernels.triton.bitmap import PairBitmap, feature_bitmap
from xmc_trainer.kernels.triton.tile_math import (
    ROWWISE,
    count_bits,
    load_columns,
    load_operand,
    loss_and_slope,
    operand,
    product,
    update_bias,
    update_weights,
)


@triton.jit(do_not_specialize=["first_label", "last_label"])
def densify_kernel(
    weight_ptr,  # [L, F]
    bits_ptr,  # int32 [R, words]: which features a row reads
    dense_ptr,  # out: [labels of the chunk, d]
    first_label, last_label, d, words, F: tl.constexpr, G: tl.constexpr, T: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program, of one warp: T labels, one after another, 32 WORDS features at a time.

    An index row is ascending: a feature's slot is the number of features before it. The slots that a warp reads at a time
    are one label's and lie together, however the compiler lays out its threads.
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


@triton.jit
def tile_slopes(
    z, any_positive: tl.constexpr, words_ptr, text, texts, label_ok, sums_ptr, place_ptr,
    ALL_TEXTS: tl.constexpr, LOSS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Store a tile's losses [B_TILE] at sums_ptr and its slopes at place_ptr [T, B_TILE]; sums of slopes over texts [T]."""
    loss, slope = loss_and_slope(z, any_positive, words_ptr, label_ok[:, None], (text % 32)[None, :], LOSS)
    if not ALL_TEXTS:
        slope = tl.where((text < texts)[None, :], slope, 0.0)
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(place_ptr, operand(slope, BF16), mask=label_ok[:, None])
    return tl.sum(slope, 1)


@triton.jit(do_not_specialize=["first_label", "last_label"])
def slopes_kernel(
    dense_ptr,  # [labels of the chunk, D]
    x_ptr,  # [columns, D]
    bias_ptr, bias_state0_ptr, bias_state1_ptr,  # float32 [L]
    positive_ptr,  # int32 [labels of the chunk, columns // 32]: one bit a (label, text)
    any_positive_ptr,  # int32 [tiles of the chunk]: not zero if the tile of labels has a positive
    slope_ptr,  # out: [labels of the chunk, columns]
    loss_ptr,  # out: float32 [tiles of the head, columns]
    update_ptr,  # int32 scalar: not zero if there is a bias to update
    first_label, last_label, texts, columns,
    text_weight, lr, beta0, beta1, eps, correct0, correct1,
    D: tl.constexpr, D_TILE: tl.constexpr, T: tl.constexpr, B_TILE: tl.constexpr, B_TILES: tl.constexpr,
    ALL_TEXTS: tl.constexpr, LOSS: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One program: every n-th tile of T labels, all texts, B_TILE of them at a time."""
    labels = last_label - first_label
    # One loop over the tiles' features: the next tile's loads are under way while losses and slopes are taken.
    for tile in tl.range(tl.program_id(0), (labels + T - 1) // T, tl.num_programs(0), flatten=B_TILES == 1):
        local = tile * T + tl.arange(0, T)
        label_ok = local < labels
        # Past the end is the last label again: no mask in the loop.
        row = tl.minimum(local, labels - 1).to(tl.int64)
        label = first_label + row
        dbias = tl.zeros([T], tl.float32)
        for number in range(B_TILES):
            text = number * B_TILE + tl.arange(0, B_TILE)
            z = tl.zeros([T, B_TILE], tl.float32)
            for first in range(0, D, D_TILE):
                dense = load_columns(dense_ptr + row[:, None] * D, first, D, D_TILE, BF16)
                x = load_columns(x_ptr + text[:, None] * D, first, D, D_TILE, BF16)
                z = product(dense, tl.trans(x), z, BF16)
            # A logit of -1e30 stands for no label: its loss and slope are zero.
            bias = tl.where(label_ok, 0.0, -1e30)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + label, mask=label_ok, other=-1e30)
            z += bias[:, None]
            words = positive_ptr + row[:, None] * (columns // 32) + (text // 32)[None, :]
            sums = loss_ptr + (first_label // T + tile).to(tl.int64) * columns + text
            place = slope_ptr + row[:, None] * columns + text[None, :]
            # Not a branch inside `tile_slopes`: loading the bits wants another layout, which would be every tile's.
            if tl.load(any_positive_ptr + tile) != 0:
                dbias += tile_slopes(z, True, words, text, texts, label_ok, sums, place, ALL_TEXTS, LOSS, BF16)
            else:
                dbias += tile_slopes(z, False, words, text, texts, label_ok, sums, place, ALL_TEXTS, LOSS, BF16)
        # No `if`: Triton 3.6 cannot flatten a loop with a sum that is not used.
        update = tl.load(update_ptr + tl.zeros([1], tl.int32)) != 0
        bias = tl.load(bias_ptr + label, mask=label_ok & update, other=0.0)
        update_bias(
            bias_ptr, bias_state0_ptr, bias_state1_ptr, label, label_ok, update, bias, dbias * text_weight,
            lr, beta0, beta1, eps, correct0, correct1, RULE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_label", "last_label", "label_start", "key0", "key1"])
def gradients_kernel(
    dense_ptr,  # in and out: [labels of the chunk, D], in memory of their own if IN_WORKSPACE; else [L, D], the weights
    state0_ptr, state1_ptr,  # like the weights
    x_ptr,  # [columns, D]
    slope_ptr,  # [labels of the chunk, columns]
    dx_ptr,  # in and out: float32 [lanes, columns, D], without text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, label_start, columns, lanes,
    text_weight, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
    key0, key1,  # for rounding
    D: tl.constexpr, D_TILE: tl.constexpr, T: tl.constexpr, B_TILE: tl.constexpr, B_TILES: tl.constexpr,
    IN_WORKSPACE: tl.constexpr, RULE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One program: D_TILE features, every n-th tile of T labels. The feature gradient is made if B_TILES is 1.

    Programs of the same labels are neighbours: slopes come from memory once.
    """
    D_TILES: tl.constexpr = (D + D_TILE - 1) // D_TILE
    first_k = tl.program_id(0) % D_TILES * D_TILE
    lane = tl.program_id(0) // D_TILES
    k = first_k + tl.arange(0, D_TILE)
    labels = last_label - first_label
    finite = tl.load(finite_ptr + tl.zeros([1], tl.int32)) != 0
    text = tl.arange(0, B_TILE)
    x = load_columns(x_ptr + text[:, None] * D, first_k, D, D_TILE, BF16)
    dx = tl.zeros([B_TILE, D_TILE], tl.float32)
    for tile in range(lane, (labels + T - 1) // T, lanes):
        local = tile * T + tl.arange(0, T).to(tl.int64)
        label = first_label + local
        ok = (local < labels)[:, None]
        if D % D_TILE != 0:
            ok = ok & (k < D)[None, :]
        place = (local if IN_WORKSPACE else label)[:, None] * D + k[None, :]
        dw = tl.zeros([T, D_TILE], tl.float32)
        if B_TILES == 1:
            s = load_operand(slope_ptr + local[:, None] * columns + text[None, :], (local < labels)[:, None], BF16)
            weight = tl.load(dense_ptr + place, mask=ok, other=0.0)
            dx = product(tl.trans(s), operand(weight, BF16), dx, BF16)
            dw = product(s, x, dw, BF16)
        else:
            for b in range(B_TILES):
                at = b * B_TILE + text
                s = load_operand(slope_ptr + local[:, None] * columns + at[None, :], (local < labels)[:, None], BF16)
                dw = product(s, load_columns(x_ptr + at[:, None] * D, first_k, D, D_TILE, BF16), dw, BF16)
            weight = tl.load(dense_ptr + place, mask=ok, other=0.0)
        if IN_WORKSPACE:
            tl.store(dense_ptr + place, operand(dw, dense_ptr.dtype.element_ty == tl.bfloat16), mask=ok)
        else:
            update_weights(
                weight, dense_ptr, state0_ptr, state1_ptr, place, ok, finite, dw * text_weight,
                label, label_start, k[None, :], lr, weight_decay, beta0, beta1, eps, correct0, correct1,
                key0, key1, D, RULE,
            )  # fmt: skip
    if B_TILES == 1:
        sums = dx_ptr + (lane * columns + text).to(tl.int64)[:, None] * D + k[None, :]
        tl.store(sums, tl.load(sums, mask=(k < D)[None, :], other=0.0) + dx, mask=(k < D)[None, :])


@triton.jit(do_not_specialize=["first_label", "last_label", "label_start", "key0", "key1"])
def gather_kernel(
    weight_ptr, state0_ptr, state1_ptr,  # [L, F]
    index_ptr,  # [R, F], if SPARSE
    dense_ptr,  # [labels of the chunk, d]: the gradient, but for text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, label_start, d,
    text_weight, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
    key0, key1,  # for rounding
    F: tl.constexpr, G: tl.constexpr, T: tl.constexpr, F_TILE: tl.constexpr, SPARSE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One program: T labels. F_TILE: with ROWWISE F at least."""
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
    grad_ptr,  # float32 [PARTS, pitch]: parts of the gradient of the chunk's labels, but for text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, pitch, text_weight, lr, beta0, beta1, eps, correct0, correct1,
    PARTS: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One program: T labels."""
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


class Tiles(NamedTuple):
    """How a kernel cuts its work."""

    labels: int
    features: int
    warps: int
    stages: int  # of tiles on their way from memory


def stages_of(d: int, features: int, stages: int) -> int:
    """Of a loop over tiles of features. A single tile leaves nothing to be on its way, and Triton 3.6 fails where it should be."""
    return stages if d > features else 1


# For bfloat16 features and for float32 ones.
_SLOPES_TILES, _SLOPES_TILES_32 = Tiles(128, 64, 16, 5), Tiles(64, 32, 8, 3)
_GRADIENTS_TILES, _GRADIENTS_TILES_32 = Tiles(64, 128, 16, 3), Tiles(64, 32, 8, 2)
# A chunk takes more launches than elsewhere: its workspace is this share of the head's weights and index if that is more than
# WORKSPACE. The first where rows become dense in it, the second where it holds slopes alone.
_DENSE_SHARE, _SLOPES_SHARE = 0.2, 0.05


class DenseChunks:
    """The head's rows as dense ones, a chunk of labels after another.

    Args:
        bytes_a_label: of what the caller keeps for a chunk.
        unit: labels a tile: a chunk is a multiple of it, of as many as there are multiprocessors if it is that large.
        copy: the caller writes on the rows, which must not be the weights themselves then.
    """

    def __init__(self, head: HeadTensors, batch: Batch, bytes_a_label: int, unit: int, copy: bool = False) -> None:
        self.head, self.d, dtype, device = head, batch.rows.shape[1], batch.rows.dtype, batch.rows.device
        labels, share, self.workspace = head.weight_LF.shape[0], _DENSE_SHARE, None
        as_they_are = head.index_RF is None and head.weight_LF.dtype == dtype and not copy
        if as_they_are:
            share = _SLOPES_SHARE
        else:
            bytes_a_label += self.d * dtype.itemsize
        head_bytes = head.weight_LF.nbytes + (0 if head.index_RF is None else head.index_RF.nbytes)
        size = chunk_labels(labels, max(WORKSPACE, share * head_bytes), max(1, bytes_a_label), unit)
        wave = unit * multiprocessors(device)
        self.size = size if size >= labels else size // wave * wave or size
        if not as_they_are:
            self.workspace = torch.empty(self.size, self.d, dtype=dtype, device=device)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first label, last label, rows [last - first, d])."""
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
                densify_kernel[(triton.cdiv(last - first, 16),)](
                    head.weight_LF, head.of_index(feature_bitmap, self.d), rows, first, last, self.d, triton.cdiv(self.d, 32), F=fan_in,
                    G=head.group_size, T=16, WORDS=8, num_warps=1,
                )  # fmt: skip
            yield first, last, rows


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of the batch's dtype, as float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def run(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    labels, columns, device = head.weight_LF.shape[0], batch.columns, batch.rows.device
    d, size, programs = batch.rows.shape[1], batch.rows.element_size(), multiprocessors(device)
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    # Tiles of labels and features, warps and stages.
    slopes, gradients = (_SLOPES_TILES, _GRADIENTS_TILES) if batch.bf16 else (_SLOPES_TILES_32, _GRADIENTS_TILES_32)
    by_label = step.update and step.rule["RULE"] == ROWWISE.value
    gathered = sparse or by_label
    chunks = DenseChunks(head, batch, columns * size + columns // 8, slopes.labels, copy=by_label)
    pairs = PairBitmap(chunks.size, columns, slopes.labels, slopes.labels, device)
    slope_CB = torch.empty(chunks.size, columns, dtype=batch.rows.dtype, device=device)
    loss = torch.empty(triton.cdiv(labels, slopes.labels), columns, device=device)
    bias = [head.bias_L, *two_states(head.bias_state, loss)] if has_bias else [loss] * 3
    update_bias = step.finite * int(step.update and has_bias)
    # Weight and feature gradient are made together if each text is in one tile.
    together = step.update and columns == batch.tile
    feature_tiles = triton.cdiv(d, gradients.features)
    lanes = max(1, min(programs // feature_tiles, triton.cdiv(labels, gradients.labels)))
    dx = torch.zeros(lanes if together else 1, columns, d, device=device)
    texts = dict(B_TILE=batch.tile, B_TILES=columns // batch.tile, BF16=batch.bf16)
    for first, last, rows in chunks:
        pairs.mark(label_P, row_P, first)
        slopes_kernel[(min(programs, triton.cdiv(last - first, slopes.labels)),)](
            rows, batch.rows, *bias, pairs.bits, pairs.any, slope_CB, loss, update_bias,
            first_label=first, last_label=last, texts=batch.texts, columns=columns, text_weight=step.text_weight,
            D=d, D_TILE=slopes.features, T=slopes.labels, ALL_TEXTS=batch.texts == columns, LOSS=step.loss,
            HAS_BIAS=has_bias, num_warps=slopes.warps, num_stages=stages_of(d, slopes.features, slopes.stages), **texts,
            **step.rule,
        )  # fmt: skip
        if not together:
            dx[0] += _product(slope_CB[: last - first].T, rows)
        if not step.update:
            continue
        # In the workspace, the gradient takes the place of the rows.
        gradients_kernel[(feature_tiles * lanes,)](
            rows if gathered else head.weight_LF, *two_states(head.weight_state, head.weight_LF), batch.rows, slope_CB, dx,
            step.finite, first_label=first, last_label=last, label_start=head.label_start, columns=columns, lanes=lanes,
            text_weight=step.text_weight, D=d, D_TILE=gradients.features, T=gradients.labels, IN_WORKSPACE=gathered,
            num_warps=gradients.warps, num_stages=gradients.stages, **texts, **step.rule, **step.decay,
        )  # fmt: skip
        if gathered:
            update_from(head, rows, first, last, step, head.index_RF)
    return loss.sum(0), dx.sum(0) * step.text_weight


def update_from(
    head: HeadTensors, gradient: Tensor, first: int, last: int, step: Step, index_RF: Tensor | None
) -> None:
    """Update the weights of labels first..last by their gradient, but for `text_weight`: [last - first, d], read at the index if given."""
    fan_in, by_label = head.weight_LF.shape[1], step.rule["RULE"] == ROWWISE.value
    # Rows of 2048 elements in all for each program; with ROWWISE whole ones.
    f_tile = triton.next_power_of_2(fan_in)
    f_tile = f_tile if by_label else min(1024, f_tile)
    rows = max(1, 2048 // f_tile)
    gather_kernel[(triton.cdiv(last - first, rows),)](
        head.weight_LF, *two_states(head.weight_state, head.weight_LF), gradient if index_RF is None else index_RF, gradient,
        step.finite, first_label=first, last_label=last, label_start=head.label_start, d=gradient.shape[1],
        text_weight=step.text_weight, F=fan_in, G=head.group_size, T=rows, F_TILE=f_tile, SPARSE=index_RF is not None,
        **step.rule, **step.decay,
    )  # fmt: skip


def update_biases_from(head: HeadTensors, gradient: Tensor, first: int, last: int, step: Step) -> None:
    """The same for biases, by the sum of the rows of `gradient` [parts, last - first or more]."""
    update_bias_kernel[(triton.cdiv(last - first, 256),)](
        head.bias_L, *two_states(head.bias_state, head.bias_L), gradient, step.finite, first_label=first, last_label=last,
        pitch=gradient.shape[1], text_weight=step.text_weight, PARTS=gradient.shape[0], T=256, **step.rule,
    )  # fmt: skip
