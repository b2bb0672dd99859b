"""The head step for any index, by dense products over a chunk of labels at a time. No atomics.

Where few labels share an index row there is nothing to gather for a matrix instruction, and gathering for a single label
is slower than multiplying with its zeros. So a chunk's rows are spread out in a workspace, D_Cd (zero but at index; a
dense head's is its weights), the products are the library's, and what is between them is done here:

    spread_kernel    D <- rows of the chunk                            z_CB = D X^T       (library)
    slopes_kernel    loss_B += sum_C loss(z + bias, y)      g_CB = dloss/dz      bias <- update
                                                            dX_Bd += g^T D     D <- g X   (library)
    gather_kernel    weight[l] <- update(weight[l], D[l, index[l]])

Sums have one order: results are the same, bit for bit, from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xmc_trainer.kernels.tile_math import count_bits, loss_and_slope, operand, update_bias, update_weights


@triton.jit(do_not_specialize=["first_label", "last_label", "end"])
def spread_kernel(
    weight_ptr,  # [L, F]
    bits_ptr,  # int32 [R, words]: which features a row reads
    dense_ptr,  # out: [labels of the chunk, d]
    first_label, last_label, end, d, words, F: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program: T labels. An index row is ascending: a feature's slot is the number of features before it.

    Rows from last_label to `end` become zero.
    """
    local = tl.program_id(0) * T + tl.arange(0, T).to(tl.int64)
    label = first_label + local
    ok = label < last_label
    place = tl.arange(0, 32)
    bit = (tl.full([32], 1, tl.uint32) << place.to(tl.uint32))[None, :]
    row = weight_ptr + label * F
    bits_row = bits_ptr + label // G * words
    slot = tl.zeros([T], tl.int32)
    for word in range(0, words):
        mask = tl.load(bits_row + word, mask=ok, other=0).to(tl.uint32, bitcast=True)
        present = (mask[:, None] & bit) != 0
        before = count_bits(mask[:, None] & (bit - 1))
        weight = tl.load(row[:, None] + (slot[:, None] + before), mask=present, other=0.0)
        k = word * 32 + place
        tl.store(
            dense_ptr + local[:, None] * d + k[None, :],
            operand(weight, dense_ptr.dtype.element_ty == tl.bfloat16),
            mask=(label < end)[:, None] & (k < d)[None, :],
        )
        slot += count_bits(mask)


@triton.jit(do_not_specialize=["first_label", "last_label"])
def slopes_kernel(
    logit_ptr,  # float32 [labels of the chunk, columns], without bias
    bias_ptr, bias_state0_ptr, bias_state1_ptr,  # float32 [L]
    positive_ptr,  # int32 [labels of the chunk, columns // 32]: one bit a (label, text)
    any_positive_ptr,  # int32 [tiles of the chunk]: not zero if the tile of labels has a positive
    slope_ptr,  # out: [labels of the chunk, columns]
    loss_ptr,  # in and out: float32 [tiles of the chunk, columns]
    finite_ptr,  # int32 scalar
    first_label, last_label, texts, columns,
    text_weight, lr, beta0, beta1, eps, correct0, correct1,
    T: tl.constexpr, B_TILE: tl.constexpr, B_TILES: tl.constexpr, ALL_TEXTS: tl.constexpr,
    LOSS: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """One program: T labels, all texts."""
    local = tl.program_id(0) * T + tl.arange(0, T).to(tl.int64)
    label = first_label + local
    label_ok = label < last_label
    # A logit of -1e30 stands for no label: its loss and slope are zero.
    bias = tl.where(label_ok, 0.0, -1e30)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + label, mask=label_ok, other=-1e30)
    dbias = tl.zeros([T], tl.float32)
    any_positive = tl.load(any_positive_ptr + tl.program_id(0)) != 0
    words_ptr = positive_ptr + local[:, None] * (columns // 32)
    for tile in range(B_TILES):
        text = tile * B_TILE + tl.arange(0, B_TILE)
        place = local[:, None] * columns + text[None, :]
        z = tl.load(logit_ptr + place, mask=label_ok[:, None], other=0.0) + bias[:, None]
        loss, slope = loss_and_slope(
            z, any_positive, words_ptr + (text // 32)[None, :], label_ok[:, None], (text % 32)[None, :], LOSS
        )
        if not ALL_TEXTS:
            slope = tl.where((text < texts)[None, :], slope, 0.0)
        sums = loss_ptr + tl.program_id(0) * columns + text
        tl.store(sums, tl.load(sums) + tl.sum(loss, 0))
        # Rows past the end get their zeros too: the products take the whole chunk.
        tl.store(slope_ptr + place, operand(slope, slope_ptr.dtype.element_ty == tl.bfloat16))
        dbias += tl.sum(slope, 1)
    if UPDATE and HAS_BIAS:
        finite = tl.load(finite_ptr + tl.zeros([1], tl.int32)) != 0
        update_bias(
            bias_ptr, bias_state0_ptr, bias_state1_ptr, label, label_ok, finite, bias, dbias * text_weight,
            lr, beta0, beta1, eps, correct0, correct1, RULE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["first_label", "last_label", "label_start", "key0", "key1", "key2", "key3", "key4", "key5"]
)
def gather_kernel(
    weight_ptr, state0_ptr, state1_ptr,  # [L, F]
    index_ptr,  # [R, F]
    dense_ptr,  # [labels of the chunk, d]: the gradient, but for text_weight
    finite_ptr,  # int32 scalar
    first_label, last_label, label_start, d,
    text_weight, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
    key0, key1, key2, key3, key4, key5,  # two for the rounding of weight, state0, state1
    F: tl.constexpr, G: tl.constexpr, T: tl.constexpr, F_TILE: tl.constexpr, SPARSE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One program: T labels."""
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
        update_weights(
            weight_ptr, state0_ptr, state1_ptr, label[:, None] * F + f, ok, finite, dw,
            (label_start + label).to(tl.int32), f, lr, weight_decay, beta0, beta1, eps, correct0, correct1,
            key0, key1, key2, key3, key4, key5, RULE,
        )  # fmt: skip
