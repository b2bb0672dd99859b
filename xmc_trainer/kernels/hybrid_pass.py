"""Launches hybrid_pass.cu: the step of labels that share index rows with some others, one pass over the weights."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from xmc_trainer.kernels import cluster_pass, cuda_source, group_pass
from xmc_trainer.kernels.cluster_pass import ClusterPass
from xmc_trainer.kernels.cuda_source import TEXTS
from xmc_trainer.kernels.pairs import PairBits
from xmc_trainer.kernels.reference import HeadTensors

_MOST_FEATURES = 768  # of four blocks


def takes(head: HeadTensors, feat_Bd: Tensor) -> bool:
    """Whether `HybridPass` takes this head and these features."""
    return feat_Bd.shape[1] <= _MOST_FEATURES and cluster_pass.takes(head, feat_Bd) and group_pass.takes(head, feat_Bd)


class HybridPass(ClusterPass):
    """As `ClusterPass`. Each block of a cluster has labels of one index row."""

    @property
    def _labels(self) -> int:
        """Of a block's tile. A cluster's products add up 16 labels at least."""
        return 8 if self.head.group_size <= 8 and self.shape.blocks > 1 else 16

    def _features(self, rows: Tensor) -> Tensor:
        """bfloat16 [d, TEXTS]."""
        return group_pass.in_warpgroup_order(rows.T.contiguous())

    def _compiled(self, rule: dict[str, Any], loss: int) -> ctypes.CDLL:
        return cuda_source.library(
            "hybrid_pass.cu", self.head, self.device, rule, loss, CLUSTER=self.shape.blocks, SLICE=self.shape.features,
            LABELS=self._labels, FEATURES=64 if self.head.weight_LF.shape[1] <= 64 else 128, WARPS=4, CHUNK=4,
        )  # fmt: skip

    def _tiles(self, labels: int) -> int:
        group = self.head.group_size
        tiles = -(-labels // group) * -(-group // self._labels)
        return -(-tiles // self.shape.blocks)

    def pair_bits(self, labels: int) -> PairBits:
        return PairBits(labels, TEXTS, self.head.group_size, self._labels, self.device)
