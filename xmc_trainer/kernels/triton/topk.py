"""The best k labels of each text, without a B x L matrix of logits.

First a kernel finds the largest logit of each block of BLOCK labels. The best k labels lie in the k blocks with the largest maxima
(ties go to the earlier block): otherwise each of those blocks would hold a better label. Each kernel reduces its matrix product to one
number for each block and text:

    dense_best_kernel    z = X D^T + bias             dense rows (D_Cd; see `dense`), BLOCK labels x up to 256 texts at a time
    group_best_kernel    z = X^T[index]^T w + bias    labels that share index rows (see `group`)
    logits.cu            z = X W^T + bias             sparse rows, made dense in shared memory (see `cuda.densify`)

Logits are never in device memory. Weights and index are read once; X comes from the L2 cache. Texts are the first dimension of z, so
a few threads share each maximum. The best blocks are found in the same way, from the maxima of BLOCK blocks.

Then `rescore_kernel` computes the logits of the chosen blocks again, in a fixed order of sums. So scores and ties do not depend on
tiles, chunks, batch, shard or the kernel that chose the blocks.

The maximum and the score are two roundings of the same sum, so SPARE more than k blocks are rescored. A label of the best k is missed
only if at least SPARE + 1 other blocks have a maximum within rounding error of its score. Labels with equal weights and index, and
labels whose sums are exact in float32, have equal logits both times and are never missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_trainer.kernels.arguments import BLOCK, WORKSPACE, Batch, chunk_labels, multiprocessors
from xmc_trainer.kernels.interface import HeadTensors, candidate_ids, pack_candidates
from xmc_trainer.kernels.triton.bitmap import PairBitmap
from xmc_trainer.kernels.triton.dense import DenseChunks
from xmc_trainer.kernels.triton.tile_math import load_columns, load_operand, operand, product

SPARE = 2


class Blocks(NamedTuple):
    """How labels are cut into blocks: every `span` labels into `tiles` blocks of BLOCK, the last of which may be shorter."""

    span: int
    tiles: int
    total: int

    @classmethod
    def of(cls, labels: int, group: int) -> Blocks:
        """Cut groups of `group` labels: a block has as many whole groups as fit, or a large group is cut into blocks."""
        span = max(1, BLOCK // group) * group
        tiles = triton.cdiv(span, BLOCK)
        whole, rest = divmod(labels, span)
        return cls(span, tiles, whole * tiles + triton.cdiv(rest, BLOCK))


@triton.jit
def tile_max(z, local, label_ok, text, columns, skip_ptr, SKIPS: tl.constexpr):
    """Return each text's largest logit, [B_TILE], of z [B_TILE, labels]; with SKIPS, without the labels to skip.

    local: int64 [labels], the labels' rows in skip_ptr.
    """
    keep = label_ok[None, :] & (text >= 0)[:, None]
    if SKIPS:
        place = local[None, :] * (columns // 32) + (text // 32)[:, None]
        word = tl.load(skip_ptr + place, mask=keep, other=0)
        keep = keep & (((word >> (text % 32)[:, None]) & 1) == 0)
    return tl.max(tl.where(keep, z, float("-inf")), 1)


@triton.jit(do_not_specialize=["first_label", "last_label", "first_block"])
def dense_best_kernel(
    dense_ptr,  # [labels of the chunk, D]
    bias_ptr,  # float32 [L]
    x_ptr,  # [columns, D]
    skip_ptr,  # int32 [labels of the chunk, columns // 32]: one bit for each (label, text) to leave out
    any_skip_ptr,  # int32 [blocks of the chunk]
    best_ptr,  # out: float32 [blocks, columns]
    first_label, last_label, first_block, columns,
    D: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr, B_TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Find the largest logits of dense rows. Each program takes every n-th tile of a block and B_TILE texts.

    Tiles of the same block are neighbours.
    """
    labels = last_label - first_label
    text_tiles = columns // B_TILE
    tiles = (labels + BLOCK - 1) // BLOCK * text_tiles
    # Flattened, so that the next tile's loads overlap with the maximum of this one.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block = tile // text_tiles
        local = block * BLOCK + tl.arange(0, BLOCK)
        text = tile % text_tiles * B_TILE + tl.arange(0, B_TILE)
        # Padding labels repeat the last one, so the loop needs no mask.
        row = tl.minimum(local, labels - 1).to(tl.int64)
        z = tl.zeros([B_TILE, BLOCK], tl.float32)
        for first in range(0, D, D_TILE):
            x = load_columns(x_ptr + text[:, None] * D, first, D, D_TILE, BF16)
            dense = load_columns(dense_ptr + row[:, None] * D, first, D, D_TILE, BF16)
            z = product(x, tl.trans(dense), z, BF16)
        if HAS_BIAS:
            z += tl.load(bias_ptr + first_label + row)[None, :]
        skips = False
        if HAS_SKIP:
            skips = tl.load(any_skip_ptr + block) != 0
        # Two calls, not a branch in one: bits need another layout, which the compiler would then use for blocks without bits too.
        if skips:
            best = tile_max(z, row, local < labels, text, columns, skip_ptr, True)
        else:
            best = tile_max(z, row, local < labels, text, columns, skip_ptr, False)
        tl.store(best_ptr + (first_block + block).to(tl.int64) * columns + text, best)


@triton.jit
def rows_max(
    weight_ptr, index_ptr, bias_ptr, x_ptr, skip_ptr, block, text, first_label, labels, columns,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, G_TILE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, HAS_BIAS: tl.constexpr, SKIPS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Return the largest logits of a block, [B_TILE]; see `group_best_kernel`."""
    g = block % TILES * BLOCK + tl.arange(0, G_TILE)
    best = tl.full([text.shape[0]], float("-inf"), tl.float32)
    for number in range(ROWS):
        # Padding rows repeat the last one.
        row = tl.minimum(block // TILES * ROWS + number, (labels - 1) // G).to(tl.int64)
        label = row * G + g
        label_ok = (g < G) & (label < labels)
        z = tl.zeros([text.shape[0], G_TILE], tl.float32)
        for first in range(0, F, F_TILE):
            f = first + tl.arange(0, F_TILE)
            f_ok = f < F
            index = tl.load(index_ptr + row * F + f, mask=f_ok, other=0).to(tl.int32)
            x = load_operand(x_ptr + index[:, None] * columns + text[None, :], None, BF16)
            w = load_operand(weight_ptr + label[:, None] * F + f[None, :], label_ok[:, None] & f_ok[None, :], BF16)
            z = product(tl.trans(x), tl.trans(w), z, BF16)
        if HAS_BIAS:
            z += tl.load(bias_ptr + label, mask=label_ok, other=0.0)[None, :]
        best = tl.maximum(best, tile_max(z, label - first_label, label_ok, text, columns, skip_ptr, SKIPS))
    return best


@triton.jit(do_not_specialize=["first_block", "first_label"])
def group_best_kernel(
    weight_ptr,  # [L, F]
    index_ptr,  # [R, F]
    bias_ptr,  # float32 [L]
    x_ptr,  # [d, columns]
    skip_ptr,  # int32 [labels from first_label on, columns // 32]: one bit for each (label, text) to leave out
    any_skip_ptr,  # int32 [blocks from first_block on]
    best_ptr,  # out: float32 [blocks, columns]
    first_block, first_label, labels, columns,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, G_TILE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, B_TILE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """Find the largest logits of groups. Each program takes a block and B_TILE texts.

    A block is ROWS index rows, or one of the TILES tiles of a row's labels. Programs of the same block are neighbours.
    """
    text_tiles = columns // B_TILE
    local_block = tl.program_id(0) // text_tiles
    text = tl.program_id(0) % text_tiles * B_TILE + tl.arange(0, B_TILE)
    block = first_block + local_block
    # Two loops, not a branch in one: the compiler prefetches only in a loop without a branch.
    skips = False
    if HAS_SKIP:
        skips = tl.load(any_skip_ptr + local_block) != 0
    if skips:
        best = rows_max(
            weight_ptr, index_ptr, bias_ptr, x_ptr, skip_ptr, block, text, first_label, labels, columns,
            F, G, F_TILE, G_TILE, BLOCK, ROWS, TILES, HAS_BIAS, True, BF16,
        )  # fmt: skip
    else:
        best = rows_max(
            weight_ptr, index_ptr, bias_ptr, x_ptr, skip_ptr, block, text, first_label, labels, columns,
            F, G, F_TILE, G_TILE, BLOCK, ROWS, TILES, HAS_BIAS, False, BF16,
        )  # fmt: skip
    tl.store(best_ptr + block.to(tl.int64) * columns + text, best)


@triton.jit
def rescore_kernel(
    weight_ptr,  # [L, F]
    index_ptr,  # [R, F]
    bias_ptr,  # float32 [L]
    x_ptr,  # [columns, d]
    block_ptr,  # int64 [B, blocks]
    score_ptr,  # out: float32 [B, blocks, BLOCK]
    labels, d, blocks,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, TILES: tl.constexpr,
    SPARSE: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Compute the logits of chosen blocks. Each program takes one block of one text."""
    text = tl.program_id(0)
    block = tl.load(block_ptr + text * blocks + tl.program_id(1))
    inside = block % TILES * BLOCK + tl.arange(0, BLOCK)
    label = block // TILES * SPAN + inside
    label_ok = (inside < SPAN) & (label < labels)
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


# find(head, batch, blocks, best_KB, skip_label_P, skip_row_P) writes each block's largest logit to `best_KB`: [blocks or more, columns].
Find = Callable[[HeadTensors, Batch, Blocks, Tensor, Tensor, Tensor], None]


def best_labels(
    head: HeadTensors, batch: Batch, k: int, skip_label_P: Tensor, skip_row_P: Tensor, find: Find, group_blocks: bool
) -> Tensor:
    """Rank labels as `reference.head_topk` does. group_blocks: `find` cuts blocks along groups, see `Blocks`."""
    (labels, fan_in), texts, device = head.weight_LF.shape, batch.texts, batch.rows.device
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    blocks = Blocks.of(labels, head.group_size if group_blocks else 1)
    best_KB = torch.empty(triton.cdiv(blocks.total, BLOCK) * BLOCK, batch.columns, device=device)
    best_KB[blocks.total :] = -torch.inf
    find(head, batch, blocks, best_KB, skip_label_P, skip_row_P)
    chosen = _best_blocks(best_KB, texts, min(k + SPARE, blocks.total))
    score = torch.empty(*chosen.shape, BLOCK, device=device)
    if texts:
        rescore_kernel[chosen.shape](
            head.weight_LF, head.index_RF if sparse else best_KB, head.bias_L if has_bias else best_KB, batch.rows, chosen,
            score, labels, batch.rows.shape[1], chosen.shape[1], F=fan_in, G=head.group_size,
            F_TILE=min(64, triton.next_power_of_2(fan_in)), BLOCK=BLOCK, SPAN=blocks.span, TILES=blocks.tiles,
            SPARSE=sparse, HAS_BIAS=has_bias, BF16=batch.bf16,
        )  # fmt: skip
    score = score.flatten(1)
    start = chosen // blocks.tiles * blocks.span + chosen % blocks.tiles * BLOCK
    label = (start[:, :, None] + torch.arange(BLOCK, device=device)).flatten(1)
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


def dense_best(
    head: HeadTensors, batch: Batch, blocks: Blocks, best_KB: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """Write each block's largest logit to `best_KB` [blocks or more, columns], from dense rows."""
    columns, device = batch.columns, batch.rows.device
    has_bias, has_skip = head.bias_L is not None, skip_label_P.numel() > 0
    # As many texts in a tile as fit, with the bits to skip: each tile of texts reads the dense rows once.
    texts_tile = min(batch.tile, 128 if batch.bf16 else 64)
    if batch.bf16 and columns % 256 == 0 and not has_skip:
        texts_tile = 256
    features_tile = 64 if batch.bf16 else 32
    programs = (1 if texts_tile == 256 else 2) * multiprocessors(device)
    chunks = DenseChunks(head, batch, columns // 8 if has_skip else 0, BLOCK)
    pairs = PairBitmap(chunks.size, columns, BLOCK, BLOCK, device) if has_skip else None
    for first, last, rows in chunks:
        if pairs:
            pairs.mark(skip_label_P, skip_row_P, first)
        tiles = triton.cdiv(last - first, BLOCK) * (columns // texts_tile)
        dense_best_kernel[(min(programs, tiles),)](
            rows, head.bias_L if has_bias else best_KB, batch.rows, *_bits(pairs, best_KB), best_KB, first, last,
            first // BLOCK, columns, D=chunks.d, D_TILE=features_tile, BLOCK=BLOCK,
            B_TILE=texts_tile, HAS_BIAS=has_bias, HAS_SKIP=has_skip, BF16=batch.bf16, num_warps=8,
            # One tile of features leaves nothing to prefetch, and Triton 3.6 fails if more stages are asked for.
            num_stages=1 if chunks.d <= features_tile else 4 if texts_tile == 256 else 3,
        )  # fmt: skip


def group_best(
    head: HeadTensors, batch: Batch, blocks: Blocks, best_KB: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """Write each block's largest logit to `best_KB` [blocks or more, columns], for labels that share index rows."""
    (labels, fan_in), group, columns, device = head.weight_LF.shape, head.group_size, batch.columns, batch.rows.device
    has_bias, has_skip = head.bias_L is not None, skip_label_P.numel() > 0
    texts_tile = min(batch.tile, 128 if batch.bf16 else 64)
    span, tiles, chunk, pairs = blocks.span, blocks.tiles, blocks.total, None
    if has_skip:
        chunk = chunk_labels(labels, WORKSPACE, columns // 8, span) // span * tiles
        pairs = PairBitmap(chunk // tiles * span, columns, span, BLOCK, device)
    for first in range(0, blocks.total, chunk):
        first_label = first // tiles * span
        if pairs:
            pairs.mark(skip_label_P, skip_row_P, first_label)
        group_best_kernel[(min(chunk, blocks.total - first) * (columns // texts_tile),)](
            head.weight_LF, head.index_RF, head.bias_L if has_bias else best_KB, batch.transposed, *_bits(pairs, best_KB), best_KB,
            first, first_label, labels, columns, F=fan_in, G=group,
            F_TILE=min(128 if batch.bf16 else 32, max(16, triton.next_power_of_2(fan_in))),
            G_TILE=max(16, triton.next_power_of_2(min(group, BLOCK))), BLOCK=BLOCK, ROWS=span // group,
            TILES=tiles, B_TILE=texts_tile, HAS_BIAS=has_bias, HAS_SKIP=has_skip, BF16=batch.bf16, num_warps=4, num_stages=2,
        )  # fmt: skip


def _bits(pairs: PairBitmap | None, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernels' arguments skip_ptr and any_skip_ptr. Without pairs they are `missing`, which kernels do not read."""
    return (missing.view(torch.int32),) * 2 if pairs is None else (pairs.bits, pairs.any)


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
