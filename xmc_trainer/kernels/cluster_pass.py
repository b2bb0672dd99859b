"""Launches cluster_pass.cu: the step of labels that share index rows with few others or none, and of dense heads, one pass over the weights."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels import cuda_source
from xmc_trainer.kernels.cuda_source import TEXTS
from xmc_trainer.kernels.pairs import PairBits
from xmc_trainer.kernels.reference import HeadTensors

_ROWS = 1 << 16  # of the index at a time
_LABELS, _WARPS = 64, 16  # of a tile, of a block
_MOST_FEATURES = {1: 128, 2: 192, 4: 192, 8: 192}  # of a block, by blocks of a cluster: one with 192 does not fit the shared memory alone


class Shape(NamedTuple):
    """How a cluster's blocks share out d features."""

    blocks: int
    features: int  # of a block: 64, 128 or 192

    @classmethod
    def of(cls, d: int) -> Shape:
        blocks = next(blocks for blocks, most in _MOST_FEATURES.items() if blocks * most >= d)
        return cls(blocks, -(-d // (64 * blocks)) * 64)


def first_slots(index_RF: Tensor, shape: Shape) -> Tensor:
    """int16 [R, blocks]: a row's first slot that a block, or one after it, has the feature of. `index_RF`: ascending rows."""
    found = torch.empty(index_RF.shape[0], shape.blocks, dtype=torch.int16, device=index_RF.device)
    for start in range(0, index_RF.shape[0], _ROWS):
        rows = index_RF[start : start + _ROWS]
        for block in range(shape.blocks):
            found[start : start + _ROWS, block] = (rows < block * shape.features).sum(1)
    return found


def takes(head: HeadTensors, feat_Bd: Tensor) -> bool:
    """Whether `launch` takes this head and these features."""
    texts, d = feat_Bd.shape
    shapes = texts <= TEXTS and d <= max(blocks * most for blocks, most in _MOST_FEATURES.items())
    if head.index_RF is None:
        # Rows are read 16 bytes at a time. Two states a weight are too many for the registers: Triton's kernels are faster.
        shapes = shapes and d % 8 == 0 and len(head.weight_state) < 2
    shapes = shapes and cuda_source.takes_types(head)
    if not shapes or feat_Bd.dtype == torch.float32 or not cuda_source.can_compile(feat_Bd.device):
        return False
    return torch.cuda.get_device_capability(feat_Bd.device) == cuda_source.HOPPER


class ClusterPass:
    """A step's launches, over parts of the head.

    Args:
        rows: bfloat16 [TEXTS, d]; those from `texts` on are no texts.
        labels: of a launch, at most.
        finite: int32 scalar; nothing is updated where it is 0.
        text_weight, update, rule, decay, loss: as in `triton_head.Step`.
    """

    def __init__(
        self,
        head: HeadTensors,
        rows: Tensor,
        texts: int,
        labels: int,
        *,
        finite: Tensor,
        text_weight: float,
        update: bool,
        rule: dict[str, Any],
        decay: dict[str, Any],
        loss: int,
    ) -> None:
        self.head, self.d, self.device = head, rows.shape[1], rows.device
        self.shape = shape = Shape.of(self.d)
        self._library = self._compiled(rule, loss)
        self.clusters = min(cuda_source.checked(self._library.launch_clusters()), self._tiles(labels))
        self._dx = torch.zeros(self.clusters, TEXTS, shape.blocks * shape.features, device=self.device)
        self._losses = torch.zeros(self.clusters * shape.blocks, TEXTS, device=self.device)
        self._arguments = dict(
            x=self._features(rows), columns=TEXTS, texts=texts, dx=self._dx, losses=self._losses,
            finite=finite, text_weight=text_weight, update=update, rule=rule, decay=decay,
            first_slots=None if head.index_RF is None else head.of_index(first_slots, shape),
        )  # fmt: skip

    def _features(self, rows: Tensor) -> Tensor:
        """Those of `rows` as the source reads them: bfloat16 [TEXTS, features of all blocks]."""
        return torch.nn.functional.pad(rows, (0, self.shape.blocks * self.shape.features - self.d))

    def _compiled(self, rule: dict[str, Any], loss: int) -> ctypes.CDLL:
        head, shape, dense = self.head, self.shape, self.head.index_RF is None
        return cuda_source.library(
            "cluster_pass.cu", head, self.device, rule, loss, CLUSTER=shape.blocks, FEATURES=shape.features, LABELS=_LABELS,
            WARPS=_WARPS, DENSE=int(dense), CHUNK=8 if dense else math.gcd(head.weight_LF.shape[1], 4),
        )  # fmt: skip

    def _tiles(self, labels: int) -> int:
        """How many times a cluster takes some of so many labels."""
        return -(-labels // _LABELS)

    def pair_bits(self, labels: int) -> PairBits:
        """Those that `launch` takes, of so many labels."""
        return PairBits(labels, TEXTS, _LABELS, _LABELS, self.device)

    def launch(self, first_row: int, last_row: int, pairs: PairBits) -> None:
        """The step of index rows first_row..last_row, of a dense head labels, on the current stream. pairs: of their labels."""
        head = self.head
        labels = min(last_row * head.group_size, head.weight_LF.shape[0]) - first_row * head.group_size
        arguments = cuda_source.Arguments.of(
            head, first_row, last_row, positive=pairs.bits, any_positive=pairs.any, **self._arguments
        )
        clusters = min(self.clusters, self._tiles(labels))
        cuda_source.checked(-self._library.launch(ctypes.byref(arguments), clusters, cuda_source.stream(self.device)))

    def results(self) -> tuple[Tensor, Tensor]:
        """(loss float32 [TEXTS], feature gradient float32 [TEXTS, d], without text_weight) of all launches."""
        return self._losses.sum(0), self._dx.sum(0)[:, : self.d]
