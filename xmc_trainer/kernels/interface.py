"""What the head's layer and its kernels share: the tensors of a head, an update, index rows, and candidates of a ranking.

Shapes (capital letters as in every kernel):
    L labels of this rank, G = group_size, R = ceil(L / G) index rows, F fan-in, d features, B texts,
    T labels of one tile, P (text, label) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

LossFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class UpdateRule(Protocol):
    """An optimizer: see `xmc_trainer.head.optimizers`."""

    @property
    def name(self) -> str: ...

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]: ...


@dataclass
class HeadTensors:
    """What one rank owns of the head. The step edits these tensors in place."""

    weight_LF: Tensor  # float32 or bfloat16
    index_RF: Tensor | None  # int16 or int32, every row ascending; None: dense, F = d
    bias_L: Tensor | None  # float32
    group_size: int
    label_start: int  # global id of local label 0
    # Each like weight_LF, or uint8 of `eight_bits`, or float32 [L, 1], one a label.
    weight_state: list[Tensor] = field(default_factory=list)
    bias_state: list[Tensor] = field(default_factory=list)  # each like bias_L
    # of_index(make, x): make(index_RF, x), what a kernel needs of the index besides; made on demand and kept.
    of_index: Callable[[Callable[[Tensor, Any], Tensor], Any], Tensor] | None = None


@dataclass(frozen=True)
class Update:
    """How the step ends: None in its place means that the weights stay (accumulation micro-batch)."""

    rule: UpdateRule
    lr: float
    weight_decay: float
    seed: int
    step: int  # 1 for the first update


def index_rows(head: HeadTensors, start: int, stop: int) -> Tensor:
    """The features that labels start..stop read: int64 [T, F]."""
    assert head.index_RF is not None  # a dense head's labels read all
    group = torch.arange(start, stop, device=head.weight_LF.device) // head.group_size
    return head.index_RF[group].to(torch.int64)


# Top-k. A candidate is one int64: the score's bits, order-preserving, above the complement of the label id. Sorting
# these sorts by score and breaks ties by the smaller label id, the same on every device and for every tiling.
ID_MAX = 2**31 - 1


def pack_candidates(score: Tensor, label: Tensor) -> Tensor:
    """int64 keys of float32 scores and int64 global label ids that broadcast; see above."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) + (ID_MAX - label)


def candidate_ids(key: Tensor) -> Tensor:
    """The int64 label ids of packed candidates, whatever their scores."""
    return ID_MAX - (key & 0xFFFFFFFF)


def unpack_candidates(key: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (float32) and label ids (int64) of packed candidates; id -1 where the score is -inf (no such label)."""
    ordered = (key >> 32).to(torch.int32)
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return score, torch.where(score == -torch.inf, -1, candidate_ids(key))
