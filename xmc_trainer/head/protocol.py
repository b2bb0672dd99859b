"""Head: the interface of a classifier for trainer, checkpoints, hooks and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from xmc_trainer.head.rewire import RewireReport, RewireRule
from xmc_trainer.head.step import HeadTerm, check_batch, multi_head_step
from xmc_trainer.parallel import Ranks, broadcast_by_ddp

if TYPE_CHECKING:
    from xmc_trainer.head.layer import FixedFanInHead


class Head(nn.Module, ABC):
    """A classifier over labels, sharded by labels over the ranks, that trains itself inside its forward pass.

    Attributes:
        in_features: d, features of a text.
        num_labels: labels over all ranks.
        loss_name: "bce" or "squared_hinge".
        lr: learning rate of the next update; a schedule sets it.
        ranks: the processes that share the labels.
        index: the features that each group of sparse labels reads, int [R, F]; None while the head is dense.
        skipped: updates skipped because a feature was not finite; int64 scalar on the device.
    """

    in_features: int
    num_labels: int
    loss_name: str
    lr: float
    ranks: Ranks

    if TYPE_CHECKING:  # a layer's are buffers

        @property
        def index(self) -> Tensor | None: ...

        @property
        def skipped(self) -> Tensor: ...

    def forward(
        self,
        feat_bd: Tensor,
        label_ids: Tensor,
        label_counts: Tensor,
        *,
        end_of_step: bool = True,
        texts_in_step: int | None = None,
        loss_weight: float = 1.0,
        engine_divisor: float = 1.0,
        rank_sizes: tuple[list[int], list[int]] | None = None,
    ) -> Tensor:
        """Compute the loss of a micro-batch over all ranks. In training mode the last one of a step updates the weights.

        Args:
            feat_bd: this rank's features, float [b, d]; b may be 0 and may differ between ranks.
            label_ids: int [sum of label_counts], global ids of the positives, text after text.
            label_counts: int [b].
            end_of_step: false for every micro-batch of an optimizer step but the last. The head keeps the features and
                labels of these micro-batches and makes one update from all of them at the end.
            texts_in_step: texts of the whole optimizer step, over all ranks. Needed only for text_reduction="mean" with
                several micro-batches; default: the texts of this micro-batch.
            loss_weight: weight of this loss among others, constant within a step. Scaling the returned loss instead would
                not affect the update, which happens here.
            engine_divisor: factor for the feature gradient that cancels the engine's averaging: ranks times the
                micro-batches that the engine averages over.
            rank_sizes: (texts, positives) of every rank in this micro-batch, if the caller knows them. Otherwise the
                ranks exchange them, and the host waits for the device.
        Returns: float32 scalar, the same on all ranks. With "mean" it is divided by texts_in_step, so that the losses
            of a step's micro-batches add up to the step's loss.
        Raises ValueError if the arguments do not fit each other or the head, and in a DistributedDataParallel module that
            overwrites the labels of all ranks but 0; see `exclude_from_ddp`.
        """
        if self.ranks.size > 1 and any(broadcast_by_ddp(part.weight) for _, part in self.parts()):
            raise ValueError(
                "DistributedDataParallel has overwritten this rank's labels with rank 0's: call exclude_from_ddp(module) before "
                "it wraps the module, or leave the head outside"
            )
        check_batch(feat_bd, label_ids, label_counts, self.in_features, self.num_labels)
        return multi_head_step(
            self.terms(loss_weight),
            feat_bd,
            label_ids,
            label_counts,
            end_of_step=end_of_step,
            texts_in_step=texts_in_step,
            engine_divisor=engine_divisor,
            rank_sizes=rank_sizes,
        )

    @abstractmethod
    def terms(self, loss_weight: float) -> list[HeadTerm]:
        """Return the head's terms for `multi_head_step`."""

    @abstractmethod
    def parts(self) -> list[tuple[str, FixedFanInHead]]:
        """Return the head's layers in label order, each with a prefix for the names of its tensors.

        Every part holds a contiguous range of labels and numbers them from 0. Files are written and read by part.
        """

    @abstractmethod
    def topk(
        self, feat_bd: Tensor, k: int, skip_ids: Tensor | None = None, skip_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rank labels: find the k best of all ranks for this rank's texts. Equal scores are ordered by label id.

        Args:
            feat_bd: [b, d]; every rank must call, b may differ and be 0.
            skip_ids, skip_counts: ragged global label ids to exclude for each text; None on every rank or on none.
        Returns: scores float32 [b, k] (logits) and label ids int64 [b, k], best first; id -1 and score -inf where
            fewer than k labels are left.
        """

    @abstractmethod
    def start_from_texts(
        self,
        texts_of: Callable[[range], tuple[Tensor, Tensor]],
        *,
        index: bool = False,
        whitener_dd: Tensor | None = None,
        centroid_scale: float = 0.0,
        mean_d: Tensor | None = None,
        deviation_d: Tensor | None = None,
    ) -> None:
        """Set the first index and weights from each label's training texts. Labels without texts keep their initial values.

        Args:
            texts_of: range of global label ids -> (float32 [T, d], sums of standardised features over each label's
                texts; int64 [T], numbers of texts), on the head's device.
            index: each index row reads the features on which the mean of its labels' texts deviates most, up or down.
            whitener_dd: float64 [d, d], symmetric. The sums are multiplied by it before the index is chosen; see
                `xmc_trainer.labels.features.whitener`.
            centroid_scale: length of the first weights in standardised features. They point along the mean z of the
                label's texts: w_f = scale z_f / |z| / deviation_f, and the bias subtracts the mean features. 0 leaves
                the weights as they are.
            mean_d, deviation_d: float32 [d], moments of the features; needed for centroid_scale.
        """

    @abstractmethod
    def become_sparse(self, fan_in: int, group_size: int) -> None:
        """Turn a dense head into a sparse one: each index row keeps the features of the largest mean |weight|.

        Keeps the weights and optimizer state of these features and drops all others.

        Args:
            group_size: must equal the constructor's, because ranks own whole groups.
        Raises ValueError if the head is already sparse or group_size differs.
        """

    @abstractmethod
    def rewire(self, rule: RewireRule) -> RewireReport:
        """Prune and regrow this rank's connections; see `xmc_trainer.head.rewire`. The result depends on seed and steps only.

        Raises ValueError if the head is dense, or if growth by gradient finds no recent steps.
        """


def exclude_from_ddp(module: nn.Module) -> None:
    """Make a later DistributedDataParallel(module) leave the heads inside `module` alone.

    It would otherwise overwrite their buffers, which belong to other labels on each rank, with rank 0's.
    """
    heads = [(prefix, each) for prefix, each in module.named_modules() if isinstance(each, Head)]
    names = {f"{prefix}.{name}" for prefix, head in heads for name, _ in head.named_buffers()}
    ignored = names.union(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]
