"""The best k labels of each text, without a B x L matrix of logits.

First a kernel finds the largest logit of each block of BLOCK labels. The best k labels lie in the k blocks with the largest maxima
(ties go to the earlier block): otherwise each of those blocks would hold a better label.

    dense_best    z_CB = D X^T by cuBLAS, a chunk of labels at a time (see `dense`); then `block_max_kernel`
    logits.cu     z = X W^T, made dense in shared memory (see `cuda.densify`); logits are never in device memory

The best blocks are found in the same way, from the maxima of BLOCK blocks.

Then `rescore_kernel` computes the logits of the chosen blocks again, in a fixed order of sums. So scores and ties do not depend on
tiles, chunks, batch, shard or the kernel that chose the blocks.

The maximum and the score are two roundings of the same sum, so SPARE more than k blocks are rescored. A label of the best k is missed
only if at least SPARE + 1 other blocks have a maximum within rounding error of its score. Labels with equal weights and index, and
labels whose sums are exact in float32, have equal logits both times and are never missed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_trainer.kernels.arguments import BLOCK, Batch
from xmc_trainer.kernels.interface import HeadTensors, candidate_ids, pack_candidates
from xmc_trainer.kernels.triton.bitmap import PairBitmap
from xmc_trainer.kernels.triton.dense import DenseChunks, multiply
from xmc_trainer.kernels.triton.tile_math import operand

SPARE = 2


@triton.jit(do_not_specialize=["first_label", "last_label"])
def block_max_kernel(
    z_ptr,  # float32 [labels of the chunk, columns]: logits without bias
    bias_ptr,  # float32 [L]
    skip_ptr,  # int32 [labels of the chunk, columns // 32]: one bit for each (label, text) to leave out
    best_ptr,  # out: float32 [blocks, columns]
    first_label, last_label, columns,
    BLOCK: tl.constexpr, B_TILE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Find the largest logits of a chunk's blocks. Each program takes a block and B_TILE texts."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    label = first_label + local
    text = tl.program_id(1) * B_TILE + tl.arange(0, B_TILE)
    ok = (label < last_label)[:, None] & (text >= 0)[None, :]
    z = tl.load(z_ptr + local[:, None] * columns + text[None, :], mask=ok, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias_ptr + label, mask=label < last_label, other=0.0)[:, None]
    if HAS_SKIP:
        word = tl.load(skip_ptr + local[:, None] * (columns // 32) + (text // 32)[None, :], mask=ok, other=0)
        z = tl.where(((word >> (text % 32)[None, :]) & 1) != 0, float("-inf"), z)
    block = first_label // BLOCK + tl.program_id(0)
    tl.store(best_ptr + block.to(tl.int64) * columns + text, tl.max(z, 0))


@triton.jit
def rescore_kernel(
    weight_ptr,  # [L, F]
    index_ptr,  # [R, F]
    bias_ptr,  # float32 [L]
    x_ptr,  # [columns, d]
    block_ptr,  # int64 [B, blocks]
    score_ptr,  # out: float32 [B, blocks, BLOCK]
    labels, d, blocks,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """Compute the logits of chosen blocks. Each program takes one block of one text."""
    text = tl.program_id(0)
    block = tl.load(block_ptr + text * blocks + tl.program_id(1))
    label = block * BLOCK + tl.arange(0, BLOCK)
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


# find(head, batch, best_KB, skip_label_P, skip_row_P) writes each block's largest logit to `best_KB`: [blocks or more, columns].
Find = Callable[[HeadTensors, Batch, Tensor, Tensor, Tensor], None]


def best_labels(
    head: HeadTensors, batch: Batch, k: int, skip_label_P: Tensor, skip_row_P: Tensor, find: Find
) -> Tensor:
    """Rank labels as `reference.head_topk` does."""
    (labels, fan_in), texts, device = head.weight_LF.shape, batch.texts, batch.rows.device
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    blocks = triton.cdiv(labels, BLOCK)
    best_KB = torch.empty(triton.cdiv(blocks, BLOCK) * BLOCK, batch.columns, device=device)
    best_KB[blocks:] = -torch.inf
    find(head, batch, best_KB, skip_label_P, skip_row_P)
    chosen = _best_blocks(best_KB, texts, min(k + SPARE, blocks))
    score = torch.empty(*chosen.shape, BLOCK, device=device)
    if texts:
        rescore_kernel[chosen.shape](
            head.weight_LF, head.index_RF if sparse else best_KB, head.bias_L if has_bias else best_KB, batch.rows, chosen,
            score, labels, batch.rows.shape[1], chosen.shape[1], F=fan_in, G=head.group_size,
            F_TILE=min(64, triton.next_power_of_2(fan_in)), BLOCK=BLOCK, SPARSE=sparse, HAS_BIAS=has_bias, BF16=batch.bf16,
        )  # fmt: skip
    score = score.flatten(1)
    label = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
    if skip_label_P.numel():
        # Look candidates up among the pairs to skip by binary search: a pair (text, label) is one number.
        skip = (skip_row_P * (labels + 1) + skip_label_P.clamp(-1, labels)).sort().values
        candidate = torch.arange(texts, device=device)[:, None] * (labels + 1) + label
        place = torch.searchsorted(skip, candidate).clamp_max(skip.shape[0] - 1)
        score = score.masked_fill(skip[place] == candidate, -torch.inf)
    key = pack_candidates(score, label + head.label_start)
    if key.shape[1] < k:
        key = torch.nn.functional.pad(key, (0, k - key.shape[1]), value=int(pack_candidates(*_NOTHING)))
    return key.topk(k, dim=1).values


def dense_best(head: HeadTensors, batch: Batch, best_KB: Tensor, skip_label_P: Tensor, skip_row_P: Tensor) -> None:
    """Write each block's largest logit to `best_KB` [blocks or more, columns], from dense rows."""
    columns, device = batch.columns, batch.rows.device
    has_bias, has_skip = head.bias_L is not None, skip_label_P.numel() > 0
    chunks = DenseChunks(head, batch, columns * 4 + columns // 8, BLOCK)
    pairs = PairBitmap(chunks.size, columns, BLOCK, BLOCK, device) if has_skip else None
    z_CB = torch.empty(chunks.size, columns, device=device)
    for first, last, rows in chunks:
        if pairs:
            pairs.mark(skip_label_P, skip_row_P, first)
        multiply(rows, batch.rows.T, z_CB[: last - first])
        block_max_kernel[(triton.cdiv(last - first, BLOCK), columns // 32)](
            z_CB, head.bias_L if has_bias else best_KB, pairs.bits if pairs else best_KB, best_KB, first, last, columns,
            BLOCK=BLOCK, B_TILE=32, HAS_BIAS=has_bias, HAS_SKIP=has_skip,
        )  # fmt: skip


def _best_blocks(best_KB: Tensor, texts: int, wanted: int) -> Tensor:
    """Return the `wanted` blocks with the largest maxima for each text: int64 [texts, wanted]. Ties go to the smaller number.

    best_KB: float32 [blocks, columns], with a multiple of BLOCK blocks. If there are many, BLOCK blocks at a time are compared first.
    """
    device = best_KB.device
    best_KB = best_KB[:, :texts]
    block = torch.arange(best_KB.shape[0], device=device).expand(texts, -1)
    if best_KB.shape[0] > wanted * BLOCK:
        upper = best_KB.unflatten(0, (-1, BLOCK)).amax(1)
        chosen = _best_columns(upper.T, torch.arange(upper.shape[0], device=device), wanted)
        block = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
    return _best_columns(best_KB.T.gather(1, block), block, wanted)


def _best_columns(score_BK: Tensor, number: Tensor, wanted: int) -> Tensor:
    """Return the numbers of the `wanted` largest scores of each row. Ties go to the smaller number, by the packing of labels."""
    return candidate_ids(pack_candidates(score_BK, number).topk(wanted, dim=1).values)


_NOTHING = torch.tensor(-torch.inf), torch.tensor(0)
