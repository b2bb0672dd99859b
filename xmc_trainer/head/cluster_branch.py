"""The meta branch: a dense head over label clusters that trains the encoder early, while the labels' head is still poor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmc_trainer.head import AdamW, FixedFanInHead, HeadTerm


class MetaBranch:
    """A head that predicts the clusters of a text's labels.

    Args:
        head: dense, one output per cluster.
        cluster_of: int [L], the cluster of every label.
        scaling: weight of this loss at step 0; the labels' loss has weight 1 - scaling.
        last_step: optimizer step at which the weight reaches 0; it decays by a cosine.
    """

    def __init__(self, head: FixedFanInHead, cluster_of: np.ndarray, scaling: float, last_step: int) -> None:
        self.head, self.scaling, self.last_step = head, scaling, last_step
        self._cluster_of = torch.from_numpy(cluster_of.astype(np.int32)).to(head.weight.device)

    @classmethod
    def build(cls, features: int, cluster_of: np.ndarray, *, scaling: float, last_step: int, **head: Any) -> MetaBranch:
        """Build the branch with its head. `head`: further arguments of FixedFanInHead."""
        clusters = int(cluster_of.max()) + 1
        return cls(
            FixedFanInHead(features, clusters, fan_in=None, optimizer=AdamW(), **head), cluster_of, scaling, last_step
        )

    def weight(self, step: int) -> float:
        """Return the weight of the branch's loss after `step` optimizer steps: scaling at 0, 0 from last_step on."""
        return self.scaling * 0.5 * (1 + math.cos(math.pi * min(step / self.last_step, 1.0)))

    def clusters(self, label_ids: Tensor) -> Tensor:
        """Map label ids, int [n], to cluster ids, int32 [n]. Repeated ids count once in a head."""
        return self._cluster_of[label_ids.to(torch.int64)]

    def terms(self, loss_weight: float) -> list[HeadTerm]:
        """Return the branch's terms for `multi_head_step`."""
        return [HeadTerm(self.head, self.clusters, loss_weight)]
