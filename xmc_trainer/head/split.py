"""SplitHead: two layers that work as one head, so that the most frequent labels read more features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.head.layer import FixedFanInHead
from xmc_trainer.head.protocol import Head
from xmc_trainer.head.rewire import RewireReport, RewireRule
from xmc_trainer.head.step import HeadTerm
from xmc_trainer.kernels.interface import ID_MAX, pack_candidates, unpack_candidates

FREQUENT = "frequent."  # prefix of the frequent labels' tensors


class SplitHead(Head):
    """Labels 0..H-1 in one layer and labels H.. in another.

    Args:
        frequent: dense or sparse, over the first H labels.
        tail: dense or sparse, over the other labels, numbered from 0. `index` and `become_sparse` are the tail's.

    Both layers must have the same loss, in_features and ranks. Every rank owns labels of both.
    """

    def __init__(self, frequent: FixedFanInHead, tail: FixedFanInHead) -> None:
        super().__init__()
        if frequent.loss_name != tail.loss_name or frequent.in_features != tail.in_features:
            raise ValueError("the two heads must have the same loss and in_features")
        self.frequent, self.tail = frequent, tail
        self.ranks, self.loss_name, self.in_features = tail.ranks, tail.loss_name, tail.in_features
        self.num_labels = frequent.num_labels + tail.num_labels

    @property
    def index(self) -> Tensor | None:
        return self.tail.index

    @property
    def skipped(self) -> Tensor:
        return self.tail.skipped  # equal in both layers, which get the same features

    @property
    def lr(self) -> float:
        return self.tail.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.frequent.lr = self.tail.lr = value

    def terms(self, loss_weight: float) -> list[HeadTerm]:
        tail = HeadTerm(self.tail, lambda label_ids: label_ids - self.frequent.num_labels, loss_weight)
        return [*self.frequent.terms(loss_weight), tail]

    def parts(self) -> list[tuple[str, FixedFanInHead]]:
        return [(FREQUENT, self.frequent), ("", self.tail)]

    @torch.no_grad()
    def topk(
        self, feat_bd: Tensor, k: int, skip_ids: Tensor | None = None, skip_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first = self.frequent.num_labels
        candidates = []
        for head, start in ((self.frequent, 0), (self.tail, first)):
            skipped = None if skip_ids is None else skip_ids - start
            score, label = head.topk(feat_bd, k, skipped, skip_counts)
            candidates.append(pack_candidates(score, torch.where(label < 0, ID_MAX, label + start)))
        return unpack_candidates(torch.cat(candidates, 1).topk(k, dim=1).values)

    def start_from_texts(self, texts_of: Callable[[range], tuple[Tensor, Tensor]], **arguments: Any) -> None:
        first = self.frequent.num_labels
        self.frequent.start_from_texts(texts_of, **arguments)
        self.tail.start_from_texts(
            lambda labels: texts_of(range(labels.start + first, labels.stop + first)), **arguments
        )

    def become_sparse(self, fan_in: int, group_size: int) -> None:
        self.tail.become_sparse(fan_in, group_size)

    def rewire(self, rule: RewireRule) -> RewireReport:
        """Rewire the layers that are sparse; see `Head.rewire`."""
        reports = [head.rewire(rule) for head in (self.frequent, self.tail) if head.index is not None]
        return RewireReport(sum(report.moved for report in reports), sum(report.slots for report in reports))


def head_of_parts(parts: list[FixedFanInHead]) -> Head:
    """Return the head with these layers as its `parts()`."""
    return SplitHead(*parts) if len(parts) > 1 else parts[0]
