"""The best k labels without a B x L matrix: the largest logit of every block of labels, then the best blocks again.

A label among the best k lies in one of the k blocks with the largest maxima (ties to the earlier block): if it did not,
each of those k blocks would hold a label that comes before it. So one number is kept for a block, straight from the
matrix product that makes its logits:

    dense_best_kernel    z = X D^T + bias             for rows made dense         (D_Cd; see `dense`), a tile of
                                                      BLOCK labels after another, each with up to 256 texts
    group_best_kernel    z = X^T[index]^T w + bias    for labels that share index rows (see `group`)
    logits.cu            z = X W^T + bias             for rows that are dense on the chip alone (see `cuda.densify`)

Logits never leave the chip: from memory come weights (and index) once, X from the L2 cache. Texts are the first
dimension of z, so that the maximum over a block's labels is taken within a few threads. The best of the maxima are found
by the same argument, from the maxima of BLOCK blocks. Then `rescore_kernel` computes the logits of the chosen blocks
once more, always in the same order: a score, and which of two labels comes first, depends neither on tiles, chunks,
batch or shard nor on the way that chose the blocks.

A maximum and a score are two roundings of the same sum. SPARE blocks more than k are therefore rescored, and what is
certain is: a label that belongs among the best k by its score is missed only if in at least SPARE + 1 other blocks the
largest logit lies within both roundings below it. Labels of equal weights and index, and all whose sums are exact in
float32, have equal logits either way, and no such luck is needed.
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
    """Which labels a block has: every `span` labels are cut into `tiles` blocks of BLOCK, the last one perhaps shorter."""

    span: int
    tiles: int
    total: int

    @classmethod
    def of(cls, labels: int, group: int) -> Blocks:
        """group: labels that share an index row; as many whole groups as fit a block, or a group cut into blocks."""
        span = max(1, BLOCK // group) * group
        tiles = triton.cdiv(span, BLOCK)
        whole, rest = divmod(labels, span)
        return cls(span, tiles, whole * tiles + triton.cdiv(rest, BLOCK))


@triton.jit
def tile_max(z, local, label_ok, text, columns, skip_ptr, SKIPS: tl.constexpr):
    """Each text's largest logit [B_TILE] of z [B_TILE, labels], but for labels to skip, if SKIPS.

    local: int64 [labels], their rows in skip_ptr.
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
    skip_ptr,  # int32 [labels of the chunk, columns // 32]: one bit a (label, text) to leave out
    any_skip_ptr,  # int32 [blocks of the chunk]
    best_ptr,  # out: float32 [blocks, columns]
    first_label, last_label, first_block, columns,
    D: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr, B_TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One program: every n-th tile of a block and B_TILE texts. Tiles of the same block are neighbours."""
    labels = last_label - first_label
    text_tiles = columns // B_TILE
    tiles = (labels + BLOCK - 1) // BLOCK * text_tiles
    # One loop over the tiles' features: the next tile's loads are under way while a maximum is taken.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block = tile // text_tiles
        local = block * BLOCK + tl.arange(0, BLOCK)
        text = tile % text_tiles * B_TILE + tl.arange(0, B_TILE)
        # Past the end is the last label again: no mask in the loop.
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
        # Two maxima, not a branch in one: loading the bits wants another layout, which would then be every block's.
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
    """The largest logits [B_TILE] of a block; see `group_best_kernel`."""
    g = block % TILES * BLOCK + tl.arange(0, G_TILE)
    best = tl.full([text.shape[0]], float("-inf"), tl.float32)
    for number in range(ROWS):
        # Past the end is the last row again.
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
    skip_ptr,  # int32 [labels from first_label, columns // 32]: one bit a (label, text) to leave out
    any_skip_ptr,  # int32 [blocks from first_block]
    best_ptr,  # out: float32 [blocks, columns]
    first_block, first_label, labels, columns,
    F: tl.constexpr, G: tl.constexpr, F_TILE: tl.constexpr, G_TILE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, B_TILE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """One program: a block, which is ROWS index rows or one of the TILES of a row's labels, and B_TILE texts.

    Programs of the same block are neighbours.
    """
    text_tiles = columns // B_TILE
    local_block = tl.program_id(0) // text_tiles
    text = tl.program_id(0) % text_tiles * B_TILE + tl.arange(0, B_TILE)
    block = first_block + local_block
    # Two loops, not a branch in one: a loop without a branch has its next loads under way.
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
    """One program: one block of one text."""
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


# find(head, batch, blocks, best, skip_label_P, skip_row_P): every block's largest logit, into `best` [blocks or more, columns].
Find = Callable[[HeadTensors, Batch, Blocks, Tensor, Tensor, Tensor], None]


def best_labels(
    head: HeadTensors, batch: Batch, k: int, skip_label_P: Tensor, skip_row_P: Tensor, find: Find, group_blocks: bool
) -> Tensor:
    """See `reference.head_topk`. group_blocks: `find` has blocks of whole groups, or of a group's labels."""
    (labels, fan_in), texts, device = head.weight_LF.shape, batch.texts, batch.rows.device
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    blocks = Blocks.of(labels, head.group_size if group_blocks else 1)
    best = torch.empty(triton.cdiv(blocks.total, BLOCK) * BLOCK, batch.columns, device=device)
    best[blocks.total :] = -torch.inf
    find(head, batch, blocks, best, skip_label_P, skip_row_P)
    chosen = _best_blocks(best, texts, min(k + SPARE, blocks.total))
    score = torch.empty(*chosen.shape, BLOCK, device=device)
    if texts:
        rescore_kernel[chosen.shape](
            head.weight_LF, head.index_RF if sparse else best, head.bias_L if has_bias else best, batch.rows, chosen,
            score, labels, batch.rows.shape[1], chosen.shape[1], F=fan_in, G=head.group_size,
            F_TILE=min(64, triton.next_power_of_2(fan_in)), BLOCK=BLOCK, SPAN=blocks.span, TILES=blocks.tiles,
            SPARSE=sparse, HAS_BIAS=has_bias, BF16=batch.bf16,
        )  # fmt: skip
    score = score.flatten(1)
    start = chosen // blocks.tiles * blocks.span + chosen % blocks.tiles * BLOCK
    label = (start[:, :, None] + torch.arange(BLOCK, device=device)).flatten(1)
    if skip_label_P.numel():
        # Candidates meet the pairs to skip by binary search: (text, label) as one number.
        skip = (skip_row_P * (labels + 1) + skip_label_P.clamp(-1, labels)).sort().values
        candidate = torch.arange(texts, device=device)[:, None] * (labels + 1) + label
        place = torch.searchsorted(skip, candidate).clamp_max(skip.shape[0] - 1)
        score = score.masked_fill(skip[place] == candidate, -torch.inf)
    key = pack_candidates(score, label + head.label_start)
    if key.shape[1] < k:
        key = torch.nn.functional.pad(key, (0, k - key.shape[1]), value=int(pack_candidates(*_NOTHING)))
    return key.topk(k, dim=1).values


def dense_best(
    head: HeadTensors, batch: Batch, blocks: Blocks, best: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """Every block's largest logit, into `best` [blocks or more, columns]."""
    columns, device = batch.columns, batch.rows.device
    has_bias, has_skip = head.bias_L is not None, skip_label_P.numel() > 0
    # As many texts a tile as the chip holds, with the bits of those to skip: each tile of texts reads the rows once more.
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
            rows, head.bias_L if has_bias else best, batch.rows, *_bits(pairs, best), best, first, last,
            first // BLOCK, columns, D=chunks.d, D_TILE=features_tile, BLOCK=BLOCK,
            B_TILE=texts_tile, HAS_BIAS=has_bias, HAS_SKIP=has_skip, BF16=batch.bf16, num_warps=8,
            # A single tile of features leaves nothing to be on its way, and Triton 3.6 fails where it should be.
            num_stages=1 if chunks.d <= features_tile else 4 if texts_tile == 256 else 3,
        )  # fmt: skip


def group_best(
    head: HeadTensors, batch: Batch, blocks: Blocks, best: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """The same for labels that share index rows."""
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
            head.weight_LF, head.index_RF, head.bias_L if has_bias else best, batch.transposed, *_bits(pairs, best), best,
            first, first_label, labels, columns, F=fan_in, G=group,
            F_TILE=min(128 if batch.bf16 else 32, max(16, triton.next_power_of_2(fan_in))),
            G_TILE=max(16, triton.next_power_of_2(min(group, BLOCK))), BLOCK=BLOCK, ROWS=span // group,
            TILES=tiles, B_TILE=texts_tile, HAS_BIAS=has_bias, HAS_SKIP=has_skip, BF16=batch.bf16, num_warps=4, num_stages=2,
        )  # fmt: skip


def _bits(pairs: PairBitmap | None, missing: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' arguments for the pairs to skip; they do not read what is not there."""
    return (missing.view(torch.int32),) * 2 if pairs is None else (pairs.bits, pairs.any)


def _best_blocks(best: Tensor, texts: int, wanted: int) -> Tensor:
    """The `wanted` blocks of the largest maxima for each text, equal ones by number: int64 [texts, wanted].

    best: float32 [blocks, columns], blocks a multiple of BLOCK. Of many blocks, the best among those of the best BLOCKs.
    """
    device = best.device
    best = best[:, :texts]
    block = torch.arange(best.shape[0], device=device).expand(texts, -1)
    if best.shape[0] > wanted * BLOCK:
        upper = best.unflatten(0, (-1, BLOCK)).amax(1)
        chosen = _best_columns(upper.T, torch.arange(upper.shape[0], device=device), wanted)
        block = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
    return _best_columns(best.T.gather(1, block), block, wanted)


def _best_columns(score: Tensor, number: Tensor, wanted: int) -> Tensor:
    """The numbers of the `wanted` largest scores of each row, equal ones by number: by the same packing as labels."""
    return candidate_ids(pack_candidates(score, number).topk(wanted, dim=1).values)


_NOTHING = torch.tensor(-torch.inf), torch.tensor(0)
