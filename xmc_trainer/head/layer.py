"""FixedFanInHead: the classifier over this rank's share of the labels.

The head needs no engine, no torch optimizer and no gradient buffers: its forward pass also updates its weights. A training
script still reads

    loss = head(encoder(texts), label_ids, label_counts)
    loss.backward()
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.head.losses import LOSSES
from xmc_trainer.head.optimizers import SGD, Optimizer
from xmc_trainer.head.protocol import Head
from xmc_trainer.head.rewire import (
    RewireReport,
    RewireRule,
    index_dtype,
    kept_slots,
    random_index,
    random_weight,
    rewire,
    strongest_index,
)
from xmc_trainer.head.start import start_from_texts
from xmc_trainer.head.step import HeadTerm, gather_batch
from xmc_trainer.kernels.dispatch import GPU, RANKINGS, STEPS, Problem, describe, select_backend
from xmc_trainer.kernels.interface import HeadTensors, Update, unpack_candidates
from xmc_trainer.kernels.reference import dense_weight_grad
from xmc_trainer.parallel import Ranks
from xmc_trainer.rng import Stream


def label_range(num_labels: int, group_size: int, rank: int, world_size: int) -> range:
    """Return the global label ids that `rank` owns: a contiguous range, as even as whole groups allow.

    Groups are not split, because their labels share one index row. Raises ValueError if there are fewer groups than ranks.
    """
    groups = -(-num_labels // group_size)
    if groups < world_size:
        raise ValueError(f"{groups} groups of labels cannot be shared by {world_size} ranks; start fewer processes")
    first, last = groups * rank // world_size, groups * (rank + 1) // world_size
    return range(first * group_size, min(last * group_size, num_labels))


class FixedFanInHead(Head):
    """Linear classifier in which every label reads `fan_in` of the d features, sharded by labels over the ranks.

    Weights, index and optimizer state are buffers, not parameters: no optimizer or engine may train, shard or move them.

    Args:
        in_features: d, at most 65,536.
        num_labels: labels over all ranks. This rank holds `labels`, a contiguous range cut between groups.
        fan_in: F <= d; None for a dense head (F = d, no index).
        group_size: consecutive labels that share one index row.
        first_bias: initial bias, one number or float32 [num_labels]; see `losses.best_constant`.
        zero_weights: start from zero weights instead of random ones.
        logit_shift: float32 [num_labels], subtracted from the logits when labels are ranked, and only then; needs a bias.
        loss: "bce" or "squared_hinge", summed over labels.
        text_reduction: "sum" or "mean" over the texts of an optimizer step, all ranks and micro-batches together.
        optimizer: SGD(...), AdamW(...) or RowwiseRMSprop(...) of this package; default SGD(momentum=0.9).
        lr: initial value of the attribute `lr`.
        weight_dtype: float32, or bfloat16 with stochastic rounding; for the weights and for optimizer states without a
            dtype of their own.
        product_dtype: float32 or bfloat16, which features are rounded to before the products. The reference backend then
            multiplies in float32, triton with bfloat16 matrix instructions. Both sum in float32.
        seed: seed of index, weights, rounding and rewiring; the same on every rank.
        growth_batches: number of recent steps whose features [B, d] and labels are kept for growth by gradient.
        backend: auto, triton, reference or torch_sparse; see `xmc_trainer.kernels.dispatch`.
        tile_labels: labels per tile, for backends without Triton. It bounds the workspace: a few float32 matrices of
            [B, tile] and [tile, d]. Default: 4096 on a CPU, where a tile should fit into the cache; 65,536 on a GPU, where
            each tile takes some 40 launches.
        ranks: the process group. Default: the initialised one, or this process alone.

    Attributes:
        labels: global label ids that this rank owns.
        steps: updates made so far.
    """

    weight: Tensor
    index: Tensor | None
    bias: Tensor | None
    logit_shift: Tensor | None
    skipped: Tensor

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        fan_in: int | None = 128,
        group_size: int = 1,
        bias: bool = True,
        first_bias: float | Tensor = 0.0,
        zero_weights: bool = False,
        logit_shift: Tensor | None = None,
        loss: str = "bce",
        text_reduction: str = "sum",
        optimizer: Optimizer | None = None,
        lr: float = 0.05,
        weight_decay: float = 0.0,
        weight_dtype: torch.dtype = torch.float32,
        product_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        growth_batches: int = 0,
        tile_labels: int | None = None,
        backend: str = "auto",
        ranks: Ranks | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if fan_in is not None and not 1 <= fan_in <= in_features:
            raise ValueError(f"fan_in={fan_in}: must be between 1 and in_features={in_features}")
        if in_features > 1 << 16:
            raise ValueError(f"in_features={in_features}: must be at most 65536")
        if weight_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weight_dtype={weight_dtype}: must be float32 or bfloat16")
        if product_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"product_dtype={product_dtype}: must be float32 or bfloat16")
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: must be one of {', '.join(LOSSES)}")
        if text_reduction not in ("sum", "mean"):
            raise ValueError(f"text_reduction={text_reduction!r}: must be sum or mean")
        self.in_features, self.num_labels = in_features, num_labels
        self.fan_in, self.group_size = fan_in, 1 if fan_in is None else group_size
        self._align = group_size  # ranks own whole groups even while the head is dense: it may become sparse
        self.loss_name, self.text_reduction = loss, text_reduction
        optimizer = optimizer or SGD(momentum=0.9)
        self.optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.product_dtype = product_dtype
        self.seed = seed
        self._zero_weights = zero_weights
        self._tile_labels = tile_labels
        self.ranks = ranks or Ranks()
        self.labels = self.labels_of(self.ranks.rank)
        self.steps = 0
        self._loss_fn = LOSSES[loss]
        self._backend_name = backend
        self._of_index: tuple[Any, dict[Any, Tensor]] = (None, {})  # version of the index, and tensors derived from it
        self._kept: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # this step's earlier micro-batches: features, labels, rows
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=growth_batches)  # likewise of whole steps

        shape = (len(self.labels), fan_in or in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=weight_dtype, device=device))
        own_bias = None
        if bias:
            own_bias = torch.empty(shape[:1], device=device)
            own_bias.copy_(
                first_bias[self.labels.start : self.labels.stop]
                if isinstance(first_bias, Tensor)
                else torch.tensor(first_bias)
            )
        self.register_buffer("bias", own_bias)
        if logit_shift is not None:
            if not bias:
                raise ValueError("logit_shift needs a bias")
            logit_shift = logit_shift[self.labels.start : self.labels.stop].to(own_bias)
        self.register_buffer("logit_shift", logit_shift, persistent=False)
        index = None
        if fan_in is not None:
            index = torch.empty(-(-shape[0] // group_size), fan_in, dtype=index_dtype(in_features), device=device)
        self.register_buffer("index", index)
        for name in optimizer.state_names:
            a_label = name in optimizer.per_label_states
            dtype = optimizer.state_dtype or weight_dtype
            state = torch.zeros(shape[0], 1, device=device) if a_label else torch.zeros_like(self.weight, dtype=dtype)
            self.register_buffer(f"weight_{name}", state)
            self.register_buffer(f"bias_{name}", None if self.bias is None else torch.zeros_like(self.bias))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        select_backend(backend, self.weight.device)  # raises ValueError for a backend that cannot run here
        self.reset_parameters()

    @property
    def _backend(self) -> ModuleType | GPU:
        return select_backend(self._backend_name, self.weight.device)

    def describe_kernels(self) -> str:
        """Describe the kernels for a step and for ranking, with the reasons, in one line for a log."""
        backend = self._backend
        if not isinstance(backend, GPU):
            return f"head: {backend.__name__.rpartition('.')[2]}, tiles of {self.tile_labels} labels"
        problem = Problem.of(self.tensors(), self.product_dtype)
        return f"head: {describe(STEPS, problem)}; best labels: {describe(RANKINGS, problem)}"

    @property
    def tile_labels(self) -> int:
        return self._tile_labels or (65536 if self.weight.is_cuda else 4096)

    @property
    def ranking_bias(self) -> Tensor | None:
        """Return the bias used for ranking, float32 [L], which saved models hold."""
        return self.bias if self.bias is None or self.logit_shift is None else self.bias - self.logit_shift

    def labels_of(self, rank: int) -> range:
        """Return the global label ids that `rank` owns."""
        return label_range(self.num_labels, self._align, rank, self.ranks.size)

    def load_labels(self, labels: range, tensors: dict[str, Tensor]) -> None:
        """Copy tensors of a range of global label ids into this rank's buffers; labels of other ranks are ignored.

        Args:
            labels: starts at a group boundary.
            tensors: by buffer name ("weight", "index", "bias", ...), shaped as on a rank that owns exactly these labels.
        """
        start, stop = max(labels.start, self.labels.start), min(labels.stop, self.labels.stop)
        if start >= stop:
            return
        for name, value in tensors.items():
            unit = self.group_size if name == "index" else 1
            to_first, from_first = (start - self.labels.start) // unit, (start - labels.start) // unit
            count = -(-(stop - start) // unit)
            getattr(self, name)[to_first : to_first + count] = value[from_first : from_first + count]

    def recent_steps(self) -> list[dict[str, Tensor]]:
        """Return the steps kept for growth by gradient, oldest first: features [B, d], global labels and rows, int64 [P]."""
        return [
            {"features": feat_Bd, "labels": label_P + self.labels.start, "rows": row_P}
            for feat_Bd, label_P, row_P in self._recent
        ]

    def load_recent_steps(self, steps: list[dict[str, Tensor]]) -> None:
        """Restore the output of `recent_steps()` saved by any rank."""
        for step in steps:
            feat_Bd, label_P, row_P = (step[name].to(self.weight.device) for name in ("features", "labels", "rows"))
            self._recent.append((feat_Bd, label_P - self.labels.start, row_P))

    def reset_parameters(self) -> None:
        """Draw the index, and weights uniform in +-1/sqrt(fan_in) (or zero), from the seed and global ids alone."""
        fan_in, device = self.weight.shape[1], self.weight.device
        self.weight.zero_()
        for start in range(0, 0 if self._zero_weights else len(self.labels), self.tile_labels):
            part = self.weight[start : start + self.tile_labels]
            label = torch.arange(part.shape[0], device=device) + self.labels.start + start
            part.copy_(random_weight(label, fan_in, self.seed, 0, Stream.INIT_WEIGHT))
        if self.index is not None:
            first_row = self.labels.start // self.group_size
            tile = max(1, (32 << 20) // (8 * self.in_features))  # random_index ranks d int64 a row
            for start in range(0, self.index.shape[0], tile):
                part = self.index[start : start + tile]
                row = torch.arange(part.shape[0], device=device) + first_row + start
                part.copy_(random_index(row, fan_in, self.in_features, self.seed, part.dtype))

    def _made_of_index(self, make: Callable[[Tensor, Any], Tensor], argument: Any) -> Tensor:
        """Return make(index, argument), cached until the index changes."""
        assert self.index is not None  # kernels of a dense head use no tables
        state = (self.index.data_ptr(), self.index._version)
        if self._of_index[0] != state:
            self._of_index = (state, {})
        made = self._of_index[1]
        if (make, argument) not in made:
            made[make, argument] = make(self.index, argument)
        return made[make, argument]

    def tensors(self) -> HeadTensors:
        """Return this rank's buffers as the kernels take them. They share memory."""
        names = self.optimizer.state_names
        return HeadTensors(
            weight_LF=self.weight,
            index_RF=self.index,
            bias_L=self.bias,
            group_size=self.group_size,
            label_start=self.labels.start,
            weight_state=[getattr(self, f"weight_{name}") for name in names],
            bias_state=[getattr(self, f"bias_{name}") for name in names] if self.bias is not None else [],
            of_index=self._made_of_index,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_labels={self.num_labels}, labels={self.labels}, "
            f"fan_in={self.fan_in or 'dense'}, group_size={self.group_size}, loss={self.loss_name}, "
            f"optimizer={self.optimizer}"
        )

    def terms(self, loss_weight: float) -> list[HeadTerm]:
        return [HeadTerm(self, None, loss_weight)]

    def parts(self) -> list[tuple[str, FixedFanInHead]]:
        return [("", self)]

    def drop_micro_batches(self) -> None:
        """Discard the kept micro-batches of a step that is abandoned."""
        self._kept = []

    def rank_step(
        self,
        feat_Bd: Tensor,
        label_P: Tensor,
        row_P: Tensor,
        *,
        train: bool,
        end_of_step: bool,
        texts_in_step: int | None,
        loss_weight: float,
    ) -> tuple[Tensor, Tensor]:
        """Compute loss and update of this rank's labels, on the texts of all ranks; see `Head.forward`.

        Args:
            label_P, row_P: int [P], global label id and row of each (label, text) pair; other ranks' labels are ignored.
        Returns: loss, float32 scalar; gradient of the features, float32 [B, d].
        """
        train = train and self.training
        label_P = label_P.to(torch.int64) - self.labels.start
        texts = feat_Bd.shape[0]
        text_weight = loss_weight
        if self.text_reduction == "mean":
            if texts_in_step is None and (self._kept or not end_of_step):
                raise ValueError("texts_in_step is needed for text_reduction='mean' with several micro-batches a step")
            text_weight /= texts_in_step or texts
        grad_start, update = 0, None
        if train and end_of_step:
            self.steps += 1
            update = Update(self.optimizer, self.lr, self.weight_decay, self.seed, self.steps)
            grad_start = sum(kept[0].shape[0] for kept in self._kept)
            feat_Bd = torch.cat([kept[0] for kept in self._kept] + [feat_Bd])
            label_P = torch.cat([kept[1] for kept in self._kept] + [label_P])
            row_P = torch.cat([kept[2] for kept in self._kept] + [row_P + grad_start])
            self.drop_micro_batches()
            self._recent.append((feat_Bd, label_P, row_P))
        elif train:
            before = sum(kept[0].shape[0] for kept in self._kept)
            self._kept.append((feat_Bd, label_P, row_P + before))
        loss_B, grad_Bd, finite = self._backend.head_step(
            self.tensors(),
            feat_Bd,
            label_P,
            row_P,
            loss_fn=self._loss_fn,
            text_weight=text_weight,
            grad_start=grad_start,
            update=update,
            tile_labels=self.tile_labels,
        )
        if update is not None:
            self.skipped += ~finite
        # Make the loss scaler see the overflow: the gradient may be finite if logits saturate or no label reads the feature.
        grad_Bd = grad_Bd.masked_fill(~finite, torch.nan)
        return loss_B.sum() * text_weight, grad_Bd

    @torch.no_grad()
    def topk(
        self, feat_bd: Tensor, k: int, skip_ids: Tensor | None = None, skip_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        sizes = self.ranks.sizes(feat_bd.shape[0], feat_bd.device)
        if skip_ids is None:
            feat_Bd = self.ranks.gather_rows(feat_bd.to(self.product_dtype), sizes)
            label_P = row_P = torch.empty(0, dtype=torch.int64, device=feat_bd.device)
        else:
            assert skip_counts is not None  # both or none
            pairs = self.ranks.sizes(skip_ids.shape[0], skip_ids.device)
            feat_Bd, label_P, row_P, _ = gather_batch(
                self.ranks, feat_bd.to(self.product_dtype), skip_ids, skip_counts, (sizes, pairs)
            )
            label_P = label_P - self.labels.start
        tensors = dataclasses.replace(self.tensors(), bias_L=self.ranking_bias)
        key_Bk = self._backend.head_topk(tensors, feat_Bd, k, label_P, row_P, tile_labels=self.tile_labels)
        if self.ranks.size > 1:
            every = self.ranks.gather_rows(key_Bk, [key_Bk.shape[0]] * self.ranks.size)
            merged = every.view(self.ranks.size, -1, k).transpose(0, 1).flatten(1)
            key_Bk = merged.topk(k, dim=1).values.split(sizes)[self.ranks.rank]
        return unpack_candidates(key_Bk)

    @torch.no_grad()
    def become_sparse(self, fan_in: int, group_size: int) -> None:
        if self.index is not None:
            raise ValueError("the head is already sparse")
        if group_size != self._align:
            raise ValueError(
                f"group_size={group_size}: the ranks own whole groups of {self._align} labels; use this group size"
            )
        self.index = strongest_index(self.weight, fan_in, group_size, self.tile_labels)
        every_weight = [name for name in self.optimizer.state_names if name not in self.optimizer.per_label_states]
        for name in ["weight", *(f"weight_{name}" for name in every_weight)]:
            setattr(self, name, kept_slots(getattr(self, name), self.index, group_size, self.tile_labels))
        self.fan_in, self.group_size = fan_in, group_size

    @torch.no_grad()
    def rewire(self, rule: RewireRule) -> RewireReport:
        if self.index is None:
            raise ValueError("a dense head has no connections to rewire")
        if rule.growth_mode == "gradient" and not self._recent:
            raise ValueError("growth by gradient needs recent steps: set growth_batches, and train before rewiring")
        tensors = self.tensors()

        def dense_grad(first: int, last: int) -> Tensor:
            total = torch.zeros(last - first, self.in_features, device=self.weight.device)
            for feat_Bd, label_P, row_P in self._recent:
                # Steps with a non-finite feature were skipped.
                grad = dense_weight_grad(tensors, first, last, feat_Bd, label_P, row_P, self._loss_fn)
                total += torch.where(torch.isfinite(feat_Bd).all(), grad, 0.0)
            return total

        return rewire(tensors, self.in_features, rule, self.seed, self.steps, self.tile_labels, dense_grad)

    @torch.no_grad()
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
        start_from_texts(
            self.tensors(),
            self.labels,
            self.in_features,
            self.tile_labels,
            texts_of,
            index=index,
            whitener_dd=whitener_dd,
            centroid_scale=centroid_scale,
            mean_d=mean_d,
            deviation_d=deviation_d,
        )
