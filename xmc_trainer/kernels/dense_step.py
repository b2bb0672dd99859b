"""The head step for any index, by dense products over a chunk of labels at a time. No atomics.

Where few labels share an index row there is nothing to gather for a matrix instruction, and gathering for a single label
is slower than multiplying with its zeros. So a chunk's rows are spread out in a workspace, D_Cd (zero but at index; a
dense head's is its weights, where they are), and the products are dense:

    spread_kernel       D <- rows of the chunk
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

import triton
import triton.language as tl

from xmc_trainer.kernels.tile_math import (
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
def spread_kernel(
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
