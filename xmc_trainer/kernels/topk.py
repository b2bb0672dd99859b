"""The best k labels without a B x L matrix: the largest logit of every block of labels, then the best blocks again.

A label among the best k lies in one of the k blocks with the largest maxima (ties to the earlier block): if it did not,
each of those k blocks would hold a label that comes before it. So `block_max_kernel` keeps one number for BLOCK logits of
a chunk, and `rescore_kernel` computes k x BLOCK logits for each text once more, always in the same order, so that a
label's score does not depend on where it was computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xmc_trainer.kernels.tile_math import operand

BLOCK = 128


@triton.jit(do_not_specialize=["first_label", "last_label", "first_block"])
def block_max_kernel(
    logit_ptr,  # float32 [labels of the chunk, columns], without bias
    bias_ptr,  # float32 [L]
    skip_ptr,  # int32 [labels of the chunk, columns // 32]: one bit a (label, text) to leave out
    any_skip_ptr,  # int32 [blocks of the chunk]
    best_ptr,  # out: float32 [blocks, columns]
    first_label, last_label, first_block, columns,
    BLOCK: tl.constexpr, B_TILE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program: a block, B_TILE texts."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    label_ok = (first_label + local < last_label)[:, None]
    text = tl.program_id(1) * B_TILE + tl.arange(0, B_TILE)
    z = tl.load(logit_ptr + local[:, None] * columns + text[None, :], mask=label_ok, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + first_label + local, mask=first_label + local < last_label, other=0.0)[:, None]
    keep = label_ok & (text >= 0)[None, :]
    if tl.load(any_skip_ptr + tl.program_id(0)) != 0:
        word = tl.load(skip_ptr + local[:, None] * (columns // 32) + (text // 32)[None, :], mask=label_ok, other=0)
        keep = keep & (((word >> (text % 32)[None, :]) & 1) == 0)
    best = tl.max(tl.where(keep, z, float("-inf")), 0)
    tl.store(best_ptr + (first_block + tl.program_id(0)) * columns + text, best)


@triton.jit
def rescore_kernel(
    weight_ptr,  # [L, F]
    index_ptr,  # [R, F]
    bias_ptr,  # float32 [L]
    x_ptr,  # [columns, d]
    block_ptr,  # int64 [B, blocks]
    score_ptr,  # out: float32 [B, blocks, BLOCK]
    labels, d, blocks,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, BLOCK: tl.constexpr,
    SPARSE: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One program: one block of one text."""
    text = tl.program_id(0)
    block = tl.load(block_ptr + text * blocks + tl.program_id(1))
    label = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    label_ok = label < labels
    score = tl.zeros([BLOCK], tl.float32)
    for first in range(0, F, F_TILE):
        f = (first + tl.arange(0, F_TILE))[None, :]
        ok = label_ok[:, None] & (f < F)
        feature = f
        if SPARSE:
            feature = tl.load(index_ptr + (label // G)[:, None] * F + f, mask=ok, other=0).to(tl.int32)
        x = tl.load(x_ptr + text * d + feature, mask=ok, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + label[:, None] * F + f, mask=ok, other=0.0).to(tl.float32)
        weight = operand(weight, BF16).to(tl.float32)
        score += tl.sum(x * weight, 1)
    if HAS_BIAS:
        score += tl.load(bias_ptr + label, mask=label_ok, other=0.0)
    place = (text * blocks + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
    tl.store(score_ptr + place, tl.where(label_ok, score, float("-inf")))
