"""Bitmaps of (label, text) pairs (positives, or labels that a ranking skips) and of the features that index rows read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["first_label", "labels", "pairs"])
def mark_kernel(
    bits_ptr, any_ptr, label_ptr, row_ptr, first_label, labels, pairs, words, group, tile, tiles, BLOCK: tl.constexpr
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + pair, mask=pair < pairs, other=-1) - first_label
    row = tl.load(row_ptr + pair, mask=pair < pairs, other=0)
    inside = (label >= 0) & (label < labels)
    bit = tl.full([BLOCK], 1, tl.int32) << (row % 32).to(tl.int32)
    tl.atomic_or(bits_ptr + label * words + row // 32, bit, mask=inside, sem="relaxed")
    tl.store(any_ptr + label // group * tiles + label % group // tile, 1, mask=inside)


class PairBitmap:
    """A bitmap of the (label, text) pairs of one chunk of labels, and a flag for each tile of labels that has a pair.

    Args:
        labels: largest chunk. A chunk starts at the first label of a group.
        columns: texts, padded to a multiple of 32.
        group: labels in a group.
        tile: labels in a tile. Each group is cut into ceil(group / tile) tiles.
    Attributes:
        bits: int32 [labels, columns // 32].
        any: int32 [groups * tiles in a group].
    """

    def __init__(self, labels: int, columns: int, group: int, tile: int, device: torch.device) -> None:
        self.group, self.tile, self.tiles = group, tile, -(-group // tile)
        bits, tiles = labels * (columns // 32), -(-labels // group) * self.tiles
        self._memory = torch.empty(bits + tiles, dtype=torch.int32, device=device)
        self.bits, self.any = self._memory[:bits].view(labels, -1), self._memory[bits:]

    def mark(self, label_P: Tensor, row_P: Tensor, first_label: int) -> None:
        """Set the bits of the chunk that starts at first_label, from int64 pairs (local label, text). Pairs may repeat."""
        self._memory.zero_()
        pairs = label_P.shape[0]
        if pairs:
            mark_kernel[(triton.cdiv(pairs, 256),)](
                self.bits, self.any, label_P, row_P, first_label, self.bits.shape[0], pairs, self.bits.shape[1],
                self.group, self.tile, self.tiles, BLOCK=256,
            )  # fmt: skip


def feature_bitmap(index_RF: Tensor, d: int) -> Tensor:
    """Mark the features that each row reads: int32 [R, ceil(d / 32)], one bit for each feature. index_RF: int16 or int32."""
    rows, words = index_RF.shape[0], -(-d // 32)
    bits = torch.empty(rows, words, dtype=torch.int32, device=index_RF.device)
    power = torch.ones((), dtype=torch.int64, device=index_RF.device) << torch.arange(32, device=index_RF.device)
    for start in range(0, rows, 4096):
        part = index_RF[start : start + 4096].to(torch.int64)
        present = torch.zeros(part.shape[0], words * 32, dtype=torch.bool, device=part.device).scatter_(1, part, True)
        bits[start : start + 4096] = (present.view(-1, words, 32) * power).sum(2).to(torch.int32)
    return bits
