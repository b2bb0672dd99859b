"""FixedFanInHead: the classifier over this rank's share of the labels, and the one bridge to autograd.

The head never meets an engine, an optimizer or autograd's gradient buffers. Its forward pass computes the loss and the
gradient of the features, and, at the end of an optimizer step, has already updated the weights; its backward pass
hands the stored feature gradient to the encoder. In a training script that still reads

    loss = head(encoder(texts), label_ids, label_counts)
    loss.backward()
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xmc_trainer.head.losses import LOSSES
from xmc_trainer.head.optimizers import SGD, AdamW, RowwiseRMSprop
from xmc_trainer.head.partition import label_range
from xmc_trainer.head.rewire import (
    RewireReport,
    RewireRule,
    group_mean,
    index_dtype,
    kept_slots,
    largest,
    random_index,
    random_weight,
    rewire,
    strongest_index,
)
from xmc_trainer.kernels.dispatch import GPU, RANKINGS, STEPS, Problem, describe, select_backend
from xmc_trainer.kernels.interface import HeadTensors, Update, index_rows, unpack_candidates
from xmc_trainer.kernels.reference import dense_weight_grad
from xmc_trainer.parallel import Ranks
from xmc_trainer.rng import Stream


def ragged_rows(counts: Tensor, total: int) -> Tensor:
    """int [B] numbers of entries a row -> int64 [total], the row of each entry; `total` is their sum."""
    # Given the total the device need not be asked for it.
    rows = torch.arange(counts.shape[0], device=counts.device)
    return torch.repeat_interleave(rows, counts.to(torch.int64), output_size=total)


def check_batch(feat_bd: Tensor, label_ids: Tensor, label_counts: Tensor, features: int, labels: int) -> None:
    """ValueError unless they fit each other and the head. On a GPU their values are not looked at: that would wait for it."""
    if feat_bd.ndim != 2 or feat_bd.shape[1] != features:
        raise ValueError(f"features of shape {list(feat_bd.shape)}: the head reads [texts, {features}]")
    if label_counts.shape != feat_bd.shape[:1]:
        raise ValueError(
            f"label_counts of shape {list(label_counts.shape)}: one number for each of the {feat_bd.shape[0]} texts"
        )
    if label_ids.is_cuda or label_counts.is_cuda:
        return
    if int(label_counts.sum()) != label_ids.shape[0]:
        raise ValueError(
            f"label_counts add up to {int(label_counts.sum())}, and there are {label_ids.shape[0]} label_ids"
        )
    if label_ids.numel() and not 0 <= int(label_ids.min()) <= int(label_ids.max()) < labels:
        raise ValueError(
            f"label_ids from {int(label_ids.min())} to {int(label_ids.max())}: there are labels 0 to {labels - 1}"
        )


class HeadTerm(NamedTuple):
    """A head and its term of the loss: one of the heads that read the same features."""

    head: FixedFanInHead
    ids_of: Callable[[Tensor], Tensor] | None  # int64 [n] label ids -> its own; it passes over those that are not
    loss_weight: float


class _HeadStep(torch.autograd.Function):
    """Forward runs the step of all heads; backward returns the feature gradient that it left."""

    @staticmethod
    def forward(ctx: Any, feat_bd: Tensor, terms: list[HeadTerm], batch: tuple[Any, ...]) -> Tensor:
        loss, grad_bd = _step(feat_bd.detach(), terms, *batch)
        ctx.save_for_backward(grad_bd)
        ctx.feat_dtype = feat_bd.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (grad_bd,) = ctx.saved_tensors
        # grad_output carries fp16's loss scale: multiply in float32, round once.
        return (grad_bd * grad_output.float()).to(ctx.feat_dtype), None, None


def feature_gradient(loss: Tensor) -> Tensor:
    """What the backward pass of a loss of `multi_head_step`, to come, will hand the features for a gradient of 1: float32 [b, d]."""
    return loss.grad_fn.saved_tensors[0]


def multi_head_step(
    terms: list[HeadTerm],
    feat_bd: Tensor,
    label_ids: Tensor,
    label_counts: Tensor,
    *,
    end_of_step: bool = True,
    texts_in_step: int | None = None,
    engine_divisor: float = 1.0,
    rank_sizes: tuple[list[int], list[int]] | None = None,
) -> Tensor:
    """The sum of the heads' weighted losses; see `FixedFanInHead.forward`. Between ranks everything travels once for all.

    Args: terms: of one product_dtype, on one set of ranks.
    """
    batch = (torch.is_grad_enabled(), label_ids, label_counts, end_of_step, texts_in_step, engine_divisor, rank_sizes)
    if feat_bd.requires_grad and torch.is_grad_enabled():
        return _HeadStep.apply(feat_bd, terms, batch)
    return _step(feat_bd, terms, *batch)[0]


def _step(
    feat_bd: Tensor,
    terms: list[HeadTerm],
    train: bool,
    label_ids: Tensor,
    label_counts: Tensor,
    end_of_step: bool,
    texts_in_step: int | None,
    engine_divisor: float,
    rank_sizes: tuple[list[int], list[int]] | None,
) -> tuple[Tensor, Tensor]:
    """(loss, feature gradient [b, d] float32) of this micro-batch; see `FixedFanInHead.forward`."""
    first = terms[0].head
    feat_Bd, label_P, row_P, sizes = first._gather(feat_bd, label_ids, label_counts, rank_sizes)
    done = [
        head._step(
            feat_Bd,
            label_P if ids_of is None else ids_of(label_P),
            row_P,
            train,
            end_of_step,
            texts_in_step,
            loss_weight,
        )
        for head, ids_of, loss_weight in terms
    ]
    loss, grad_Bd = (reduce(torch.add, values) for values in zip(*done))
    return first.ranks.sum(loss), first.ranks.scatter_sum_rows(grad_Bd, sizes) * engine_divisor


class FixedFanInHead(nn.Module):
    """Linear classifier in which every label reads `fan_in` of the d features, sharded by labels over the ranks.

    Weights, index and optimizer state are buffers, not parameters: nothing outside may train, shard or move them apart.

    Args:
        in_features: d, at most 65,536.
        num_labels: L over all ranks. This rank holds `labels`, a contiguous group-aligned range.
        fan_in: F <= d; None for a dense head (F = d, no index).
        group_size: consecutive labels that share one index row.
        first_bias: where the biases start, one number or float32 [L], of all labels; see `losses.best_constant`.
        zero_weights: start from zero weights instead of random ones.
        logit_shift: float32 [L], of all labels: taken off the logits where labels are ranked, and there alone; needs a bias.
        loss: "bce" or "squared_hinge", summed over labels.
        text_reduction: "sum" or "mean" over the texts of an optimizer step, all ranks and micro-batches together.
        optimizer: SGD(...), AdamW(...) or RowwiseRMSprop(...) of this package; default SGD(momentum=0.9).
        lr: an attribute too, to be set by a schedule.
        weight_dtype: float32, or bfloat16 with stochastic rounding, for weights and, unless it has a type of its own,
            optimizer state.
        product_dtype: float32, or bfloat16: what features are rounded to before the products. The reference backend
            computes in float32 from there; triton uses bfloat16 matrix instructions. Sums are float32 in both.
        seed: of index, weights, rounding and rewiring; the same on every rank.
        growth_batches: steps whose features and labels are kept for growth by gradient. Their memory is that of the features.
        backend: auto, triton, reference or torch_sparse; see `xmc_trainer.kernels.dispatch`.
        tile_labels: of the backends without Triton, labels a tile: bounds the working memory (a few [B, tile] and [tile, d]
            float32 matrices). Default: 4096 on a CPU, where a tile should stay in the cache, 65,536 on a GPU, where each
            tile is some 40 launches.
        ranks: the process group; default: the initialised one, or this process alone.

    Attributes:
        steps: updates made so far. skipped: int64 scalar on the device, updates skipped for a non-finite feature.
    """

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
        optimizer: SGD | AdamW | RowwiseRMSprop | None = None,
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
            raise ValueError(f"in_features={in_features}: at most 65536")
        if weight_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weight_dtype={weight_dtype}: float32 or bfloat16")
        if product_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"product_dtype={product_dtype}: float32 or bfloat16")
        if text_reduction not in ("sum", "mean"):
            raise ValueError(f"text_reduction={text_reduction!r}: sum or mean")
        self.in_features, self.num_labels = in_features, num_labels
        self.fan_in, self.group_size = fan_in, 1 if fan_in is None else group_size
        self._align = group_size  # of a rank's labels; a dense head's too, which may become sparse
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
        self._of_index: tuple[Any, dict[Any, Tensor]] = (None, {})  # the index as it was, and what was made of it
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # features and pairs of this step's earlier micro-batches
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=growth_batches)  # and of the last steps

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
            self.register_buffer(f"bias_{name}", torch.zeros_like(self.bias) if bias else None)
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        select_backend(backend, self.weight.device)  # refuses what cannot run here
        self.reset_parameters()

    @property
    def _backend(self) -> ModuleType:
        return select_backend(self._backend_name, self.weight.device)

    def describe_kernels(self, texts: int) -> str:
        """Which kernels make a step of so many texts (of all ranks) and find the best labels, and why: a line for a log."""
        backend = self._backend
        if not isinstance(backend, GPU):
            return f"head: {backend.__name__.rpartition('.')[2]}, tiles of {self.tile_labels} labels"
        problem = Problem.of(self.tensors(), texts, self.in_features, self.product_dtype)
        return f"head: {describe(STEPS, problem)}; best labels: {describe(RANKINGS, problem)}"

    @property
    def tile_labels(self) -> int:
        return self._tile_labels or (65536 if self.weight.is_cuda else 4096)

    @property
    def ranking_bias(self) -> Tensor | None:
        """The bias by which labels are ranked; what a model is saved with."""
        return self.bias if self.logit_shift is None else self.bias - self.logit_shift

    def labels_of(self, rank: int) -> range:
        """The global label ids that `rank` owns."""
        return label_range(self.num_labels, self._align, rank, self.ranks.size)

    def load_labels(self, labels: range, tensors: dict[str, Tensor]) -> None:
        """Copy the weight, index and bias of a range of global label ids into the part of it that this rank owns.

        Args: labels: starts at a group boundary. tensors: as of a rank that owns just these labels.
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
        """What is kept for growth by gradient, the oldest step first: features [B, d], labels (global ids) and rows (int64 [P])."""
        return [
            {"features": feat_Bd, "labels": label_P + self.labels.start, "rows": row_P}
            for feat_Bd, label_P, row_P in self._recent
        ]

    def load_recent_steps(self, steps: list[dict[str, Tensor]]) -> None:
        """Of `recent_steps`, of any rank."""
        for step in steps:
            feat_Bd, label_P, row_P = (step[name].to(self.weight.device) for name in ("features", "labels", "rows"))
            self._recent.append((feat_Bd, label_P - self.labels.start, row_P))

    def reset_parameters(self) -> None:
        """Random index, weights uniform in +-1/sqrt(fan_in) (or zero); from the seed and global ids alone."""
        fan_in, device = self.weight.shape[1], self.weight.device
        self.weight.zero_()
        for start in range(0, 0 if self._zero_weights else len(self.labels), self.tile_labels):
            part = self.weight[start : start + self.tile_labels]
            label = torch.arange(part.shape[0], device=device) + self.labels.start + start
            part.copy_(random_weight(label, fan_in, self.seed, 0, Stream.INIT_WEIGHT))
        if self.index is not None:
            first_row = self.labels.start // self.group_size
            tile = max(1, (32 << 20) // (8 * self.in_features))  # the ranking of features takes d int64 a row
            for start in range(0, self.index.shape[0], tile):
                part = self.index[start : start + tile]
                row = torch.arange(part.shape[0], device=device) + first_row + start
                part.copy_(random_index(row, fan_in, self.in_features, self.seed, part.dtype))

    def _made_of_index(self, make: Callable[[Tensor, Any], Tensor], argument: Any) -> Tensor:
        """make(index, argument); kept until the index changes."""
        state = (self.index.data_ptr(), self.index._version)
        if self._of_index[0] != state:
            self._of_index = (state, {})
        made = self._of_index[1]
        if (make, argument) not in made:
            made[make, argument] = make(self.index, argument)
        return made[make, argument]

    def tensors(self) -> HeadTensors:
        """The kernels' view of this rank's part: the same memory."""
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
        """The loss of this micro-batch over all ranks; in training mode also the update, if the step ends here.

        Args:
            feat_bd: this rank's features, float, [b, d]; b may be 0 and may differ between ranks.
            label_ids: int [sum of label_counts], the global ids of the positives, text after text.
            label_counts: int [b].
            end_of_step: false for every micro-batch of an optimizer step but the last. The head keeps such a batch's
                features and labels and makes one update from all of them at the end.
            texts_in_step: texts of the whole optimizer step; needed only for text_reduction="mean" with several
                micro-batches (the default is this micro-batch's, over all ranks).
            loss_weight: of this loss beside others, the same for all micro-batches of a step. The update happens here,
                so that a factor on what is returned would come too late.
            engine_divisor: what the training engine divides gradients by, to be undone here: the number of ranks times the
                number of micro-batches that it averages over.
            rank_sizes: (texts, positives) of every rank in this micro-batch, where the caller knows them. Otherwise
                several ranks tell each other, which makes the host wait for the device.
        Returns: float32 scalar, the same on all ranks. With "mean" it is divided by texts_in_step, so that the losses
            of a step's micro-batches add up to the step's loss.
        """
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

    def terms(self, loss_weight: float) -> list[HeadTerm]:
        """What `multi_head_step` takes."""
        return [HeadTerm(self, None, loss_weight)]

    def _step(
        self,
        feat_Bd: Tensor,
        label_P: Tensor,
        row_P: Tensor,
        train: bool,
        end_of_step: bool,
        texts_in_step: int | None,
        loss_weight: float,
    ) -> tuple[Tensor, Tensor]:
        """(loss, gradient [B, d] float32 of all ranks' features) as far as this rank's labels go."""
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
            self._kept = []
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
        # A saturated logit has a finite slope, and a feature may have no reader: a loss scaler must see the overflow all the same.
        grad_Bd = grad_Bd.masked_fill(~finite, torch.nan)
        return loss_B.sum() * text_weight, grad_Bd

    def _gather(
        self, feat_bd: Tensor, label_ids: Tensor, label_counts: Tensor, rank_sizes: tuple[list[int], list[int]] | None
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """All ranks' features, their (label, row) pairs as int64, and the number of rows of each rank."""
        rows, pairs = rank_sizes or (
            self.ranks.sizes(feat_bd.shape[0], feat_bd.device),
            self.ranks.sizes(label_ids.shape[0], label_ids.device),
        )
        feat_Bd, label_P, counts = self.ranks.gather_rows_of(
            [feat_bd.to(self.product_dtype), label_ids, label_counts], [rows, pairs, rows]
        )
        return feat_Bd, label_P.to(torch.int64), ragged_rows(counts, label_P.shape[0]), rows

    @torch.no_grad()
    def topk(
        self, feat_bd: Tensor, k: int, skip_ids: Tensor | None = None, skip_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best labels over all ranks for this rank's texts; equal scores go to the smaller label id.

        Args:
            feat_bd: [b, d]; every rank must call, b may differ and be 0.
            skip_ids, skip_counts: ragged global label ids to leave out for each text; None on every rank or on none.
        Returns: scores float32 [b, k] (logits) and label ids int64 [b, k], best first; id -1 and score -inf where
            fewer than k labels are left.
        """
        sizes = self.ranks.sizes(feat_bd.shape[0], feat_bd.device)
        if skip_ids is None:
            feat_Bd = self.ranks.gather_rows(feat_bd.to(self.product_dtype), sizes)
            label_P = row_P = torch.empty(0, dtype=torch.int64, device=feat_bd.device)
        else:
            pairs = self.ranks.sizes(skip_ids.shape[0], skip_ids.device)
            feat_Bd, label_P, row_P, _ = self._gather(feat_bd, skip_ids, skip_counts, (sizes, pairs))
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
        """Turn a dense head into a fixed fan-in head: each index row keeps the features of the largest mean |weight|.

        Weights and optimizer state of these features are kept; all others are dropped.
        Args: group_size: that of the constructor, by which the ranks share the labels.
        """
        if self.index is not None:
            raise ValueError("this head is sparse already")
        if group_size != self._align:
            raise ValueError(f"group_size={group_size}: the ranks share the labels by groups of {self._align}")
        self.index = strongest_index(self.weight, fan_in, group_size, self.tile_labels)
        every_weight = [name for name in self.optimizer.state_names if name not in self.optimizer.per_label_states]
        for name in ["weight", *(f"weight_{name}" for name in every_weight)]:
            setattr(self, name, kept_slots(getattr(self, name), self.index, group_size, self.tile_labels))
        self.fan_in, self.group_size = fan_in, group_size

    @torch.no_grad()
    def rewire(self, rule: RewireRule) -> RewireReport:
        """Prune and regrow this rank's connections; see `xmc_trainer.head.rewire`. Deterministic in (seed, steps)."""
        if self.index is None:
            raise ValueError("a dense head has no connections to rewire")
        if rule.growth_mode == "gradient" and not self._recent:
            raise ValueError("growth by gradient needs recent steps: set growth_batches, and train before rewiring")
        tensors = self.tensors()

        def dense_grad(first: int, last: int) -> Tensor:
            total = torch.zeros(last - first, self.in_features, device=self.weight.device)
            for feat_Bd, label_P, row_P in self._recent:
                # A step with a feature that is not finite was none.
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
        """Let the features of each label's training texts decide where it starts. Labels without texts start at random.

        Args:
            texts_of: a range of global label ids -> (float32 [T, d], sums over each label's texts of standardised features;
                int64 [T], how many texts), on the head's device.
            index: each row reads the features on which the mean of its labels' texts stands out most, up or down.
            whitener_dd: float64, symmetric; for the index the sums are multiplied by it: see `label_features.whitener`.
            centroid_scale: each label's weights point along the mean z of its texts, in standardised features, with this
                length: w_f = scale z_f / |z| / deviation_f, and the bias takes up the mean features. 0: weights stay.
            mean_d, deviation_d: float32, of the features; needed for centroid_scale.
        """
        group = self.group_size
        step = max(1, min(self.tile_labels, (256 << 20) // (4 * self.in_features)) // group) * group
        for start in range(0, len(self.labels), step):
            stop = min(start + step, len(self.labels))
            sums, counts = texts_of(self.labels[start:stop])
            if index and self.index is not None:
                rows = slice(start // group, -(-stop // group))
                # group_mean of the signed sums: what the labels have in common counts.
                strength = group_mean(sums, group)
                if whitener_dd is not None:
                    # In float64 the tile, whose shape orders the sums, does not decide between features.
                    strength = strength.double() @ whitener_dd
                chosen = largest(strength.abs(), self.fan_in).sort(dim=1).values.to(self.index.dtype)
                known = group_mean((counts > 0).float()[:, None], group) > 0
                self.index[rows] = torch.where(known, chosen, self.index[rows])
            if centroid_scale:
                z = sums / counts.clamp_min(1)[:, None]
                inverse = torch.where(deviation_d > 0, 1 / deviation_d, 0.0).expand_as(z)
                mean = mean_d.expand_as(z)
                if self.index is not None:
                    read = index_rows(self.tensors(), start, stop)
                    z, inverse, mean = (x.gather(1, read) for x in (z, inverse, mean))
                weight = centroid_scale * inverse * torch.nn.functional.normalize(z, dim=1)
                known = counts > 0
                part = self.weight[start:stop]
                part.copy_(torch.where(known[:, None], weight, part))
                if self.bias is not None:
                    self.bias[start:stop] -= torch.where(known, (weight * mean).sum(1), 0.0)
