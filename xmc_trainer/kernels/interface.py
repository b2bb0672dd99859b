"""The types that the head's layer and its kernels share: head tensors, updates, index rows and ranking candidates.

Shape suffixes: in `head/` and `kernels/` a tensor parameter's name ends in its shape, one letter for each dimension (`weight_LF` is
[L, F]). Scalars have none, nor have parameters that take any shape, nor the names of the public interface (`label_ids`).

    L  labels of this rank          B  texts of the step
    G  labels of an index row       b  texts of this rank or micro-batch, a slice of B
    R  index rows, ceil(L / G)      P  (text, label) pairs
    F  fan-in                       T  labels of a tile
    d  features                     C  labels of a chunk, several tiles
    N  parts of a sum               K  blocks of labels (rankings)

GPU kernels pad B to whole tiles of texts and call the result `columns`. They take pointers; a comment beside each gives its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

LossFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class UpdateRule(Protocol):
    """An optimizer of `xmc_trainer.head.optimizers`."""

    @property
    def name(self) -> str: ...

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]: ...


@dataclass
class HeadTensors:
    """One rank's part of the head. The step edits these tensors in place."""

    weight_LF: Tensor  # float32 or bfloat16
    index_RF: Tensor | None  # int16 or int32, each row ascending; None: a dense head, F = d
    bias_L: Tensor | None  # float32
    group_size: int
    label_start: int  # global id of local label 0
    # Each has the shape of weight_LF and its dtype or uint8 (see `eight_bits`), or is float32 [L, 1].
    weight_state: list[Tensor] = field(default_factory=list)
    bias_state: list[Tensor] = field(default_factory=list)  # each like bias_L
    # of_index(make, x) returns make(index_RF, x), a table derived from the index, and caches it.
    of_index: Callable[[Callable[[Tensor, Any], Tensor], Any], Tensor] | None = None


@dataclass(frozen=True)
class Update:
    """The weight update at the end of a step. Functions take None instead to leave the weights alone (gradient accumulation)."""

    rule: UpdateRule
    lr: float
    weight_decay: float
    seed: int
    step: int  # 1 for the first update


def index_rows(head: HeadTensors, start: int, stop: int) -> Tensor:
    """Return the features that labels start..stop read: int64 [T, F]."""
    assert head.index_RF is not None  # not for dense heads
    group = torch.arange(start, stop, device=head.weight_LF.device) // head.group_size
    return head.index_RF[group].to(torch.int64)


# A ranking candidate is one int64. The upper half holds the score's bits, mapped so that integers sort like scores; the lower
# half holds ID_MAX minus the label id. Sorting sorts by score and puts the smaller id first in a tie, on any device and tiling.
ID_MAX = 2**31 - 1


def pack_candidates(score: Tensor, label: Tensor) -> Tensor:
    """Pack float32 scores and int64 global label ids, which broadcast, into int64 candidates."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) + (ID_MAX - label)


def candidate_ids(key: Tensor) -> Tensor:
    """Return the int64 label ids of packed candidates, whatever their scores."""
    return ID_MAX - (key & 0xFFFFFFFF)


def unpack_candidates(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 scores and int64 label ids of packed candidates. The id is -1 where the score is -inf (no label)."""
    ordered = (key >> 32).to(torch.int32)
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return score, torch.where(score == -torch.inf, -1, candidate_ids(key))
