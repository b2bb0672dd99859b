"""The meta branch: a dense head over label clusters, whose loss helps the encoder along while the labels' head is young."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from xmc_trainer.head import AdamW, FixedFanInHead, HeadTerm


class MetaBranch:
    """Predicts which clusters a text's labels are in.

    Args:
        head: dense, one output a cluster.
        cluster_of: int [L], the cluster of every label.
        scaling: weight of this loss at step 0; the labels' loss has the rest of 1.
        last_step: optimizer step at which the weight has decayed to 0, by a cosine.
    """

    def __init__(self, head: FixedFanInHead, cluster_of: np.ndarray, scaling: float, last_step: int) -> None:
        self.head, self.scaling, self.last_step = head, scaling, last_step
        self._cluster_of = torch.from_numpy(cluster_of.astype(np.int32)).to(head.weight.device)

    @classmethod
    def build(
        cls, features: int, cluster_of: np.ndarray, *, scaling: float, last_step: int, **head: object
    ) -> MetaBranch:
        """`head`: arguments of FixedFanInHead that the labels' head has too."""
        clusters = int(cluster_of.max()) + 1
        return cls(
            FixedFanInHead(features, clusters, fan_in=None, optimizer=AdamW(), **head), cluster_of, scaling, last_step
        )

    def weight(self, step: int) -> float:
        """Of the branch's loss after `step` optimizer steps: scaling at 0, 0 from last_step on."""
        return self.scaling * 0.5 * (1 + math.cos(math.pi * min(step / self.last_step, 1.0)))

    def clusters(self, label_ids: Tensor) -> Tensor:
        """int [n] label ids -> int32 [n] cluster ids; labels of one cluster repeat it, which a head counts once."""
        return self._cluster_of[label_ids.to(torch.int64)]

    def terms(self, loss_weight: float) -> list[HeadTerm]:
        """What `multi_head_step` takes, beside the labels' head."""
        return [HeadTerm(self.head, self.clusters, loss_weight)]
