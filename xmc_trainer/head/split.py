"""SplitHead: the most frequent labels read more features than all others; two heads that look like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from xmc_trainer.head.layer import FixedFanInHead, HeadTerm, check_batch, multi_head_step
from xmc_trainer.head.rewire import RewireReport, RewireRule
from xmc_trainer.kernels.interface import ID_MAX, pack_candidates, unpack_candidates


class SplitHead(nn.Module):
    """Labels 0..H-1 in a head of their own, labels H.. in another, with the methods of FixedFanInHead.

    Args: frequent: dense or sparse, over the first H labels. tail: sparse, over the other labels, numbered from 0. Both of one
        loss, on one set of ranks, each of which owns a share of both.
    """

    def __init__(self, frequent: FixedFanInHead, tail: FixedFanInHead) -> None:
        super().__init__()
        if frequent.loss_name != tail.loss_name or frequent.in_features != tail.in_features:
            raise ValueError("the two heads must have one loss and read the same features")
        self.frequent, self.tail = frequent, tail
        self.ranks, self.loss_name = tail.ranks, tail.loss_name
        self.num_labels = frequent.num_labels + tail.num_labels

    @property
    def index(self) -> Tensor | None:
        return self.tail.index

    @property
    def skipped(self) -> Tensor:
        return self.tail.skipped  # both read the same features

    @property
    def lr(self) -> float:
        return self.tail.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.frequent.lr = self.tail.lr = value

    def forward(
        self, feat_bd: Tensor, label_ids: Tensor, label_counts: Tensor, *, loss_weight: float = 1.0, **arguments: object
    ) -> Tensor:
        """As of FixedFanInHead."""
        check_batch(feat_bd, label_ids, label_counts, self.frequent.in_features, self.num_labels)
        return multi_head_step(self.terms(loss_weight), feat_bd, label_ids, label_counts, **arguments)

    def terms(self, loss_weight: float) -> list[HeadTerm]:
        """What `multi_head_step` takes."""
        tail = HeadTerm(self.tail, lambda label_ids: label_ids - self.frequent.num_labels, loss_weight)
        return [*self.frequent.terms(loss_weight), tail]

    @torch.no_grad()
    def topk(
        self, feat_bd: Tensor, k: int, skip_ids: Tensor | None = None, skip_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of FixedFanInHead: equal scores go to the smaller label id."""
        first = self.frequent.num_labels
        candidates = []
        for head, start in ((self.frequent, 0), (self.tail, first)):
            skipped = None if skip_ids is None else skip_ids - start
            score, label = head.topk(feat_bd, k, skipped, skip_counts)
            candidates.append(pack_candidates(score, torch.where(label < 0, ID_MAX, label + start)))
        return unpack_candidates(torch.cat(candidates, 1).topk(k, dim=1).values)

    def start_from_texts(self, texts_of: Callable[[range], tuple[Tensor, Tensor]], **arguments: object) -> None:
        """As of FixedFanInHead."""
        first = self.frequent.num_labels
        self.frequent.start_from_texts(texts_of, **arguments)
        self.tail.start_from_texts(
            lambda labels: texts_of(range(labels.start + first, labels.stop + first)), **arguments
        )

    def rewire(self, rule: RewireRule) -> RewireReport:
        """Of the sparse labels; see FixedFanInHead."""
        reports = [head.rewire(rule) for head in (self.frequent, self.tail) if head.index is not None]
        return RewireReport(sum(report.moved for report in reports), sum(report.slots for report in reports))
