"""The training step of all heads that read the same features, as an autograd function.

The forward pass computes loss and feature gradient; at the end of an optimizer step it also updates the weights. The
backward pass returns the stored gradient to the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from xmc_trainer.parallel import Ranks

if TYPE_CHECKING:
    from xmc_trainer.head.layer import FixedFanInHead


class HeadTerm(NamedTuple):
    """One of the heads that read the same features, and the weight of its loss."""

    head: FixedFanInHead
    ids_of: (
        Callable[[Tensor], Tensor] | None
    )  # int64 [n] label ids -> the head's ids; others are ignored. None: unchanged
    loss_weight: float


def check_batch(feat_bd: Tensor, label_ids: Tensor, label_counts: Tensor, features: int, labels: int) -> None:
    """Raise ValueError unless the arguments of a step fit each other and the head.

    Values on a GPU are not checked, because reading them would wait for the device.

    Args:
        features, labels: numbers of features and labels of the head.
    """
    if feat_bd.ndim != 2 or feat_bd.shape[1] != features:
        raise ValueError(f"features of shape {list(feat_bd.shape)}: the head reads [texts, {features}]")
    if label_counts.shape != feat_bd.shape[:1]:
        raise ValueError(
            f"label_counts of shape {list(label_counts.shape)}: needs one number for each of the {feat_bd.shape[0]} texts"
        )
    if label_ids.is_cuda or label_counts.is_cuda:
        return
    if int(label_counts.sum()) != label_ids.shape[0]:
        raise ValueError(
            f"label_counts add up to {int(label_counts.sum())}, but there are {label_ids.shape[0]} label_ids"
        )
    if label_ids.numel() and not 0 <= int(label_ids.min()) <= int(label_ids.max()) < labels:
        raise ValueError(
            f"label_ids from {int(label_ids.min())} to {int(label_ids.max())}: the head has labels 0 to {labels - 1}"
        )


def gather_batch(
    ranks: Ranks,
    feat_bd: Tensor,
    label_ids: Tensor,
    label_counts: Tensor,
    rank_sizes: tuple[list[int], list[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Gather the texts of all ranks in one transfer.

    Args:
        label_ids, label_counts: ragged global label ids, int [sum of label_counts] and int [b].
        rank_sizes: (texts, label ids) of every rank. None: the ranks exchange them, which waits for the device.
    Returns: features [B, d]; int64 [P] label and int64 [P] row of each (label, text) pair; texts of each rank.
    """
    rows, pairs = rank_sizes or (
        ranks.sizes(feat_bd.shape[0], feat_bd.device),
        ranks.sizes(label_ids.shape[0], label_ids.device),
    )
    feat_Bd, label_P, counts = ranks.gather_rows_of([feat_bd, label_ids, label_counts], [rows, pairs, rows])
    row_B = torch.arange(counts.shape[0], device=counts.device)
    # With output_size the host need not wait for the sum.
    row_P = torch.repeat_interleave(row_B, counts.to(torch.int64), output_size=label_P.shape[0])
    return feat_Bd, label_P.to(torch.int64), row_P, rows


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
    """Compute the weighted sum of the heads' losses, with one exchange between ranks for all heads. See `Head.forward`.

    Args:
        terms: heads with the same product_dtype and ranks.
    """
    batch = (torch.is_grad_enabled(), label_ids, label_counts, end_of_step, texts_in_step, engine_divisor, rank_sizes)
    if feat_bd.requires_grad and torch.is_grad_enabled():
        return _HeadStep.apply(feat_bd, terms, batch)
    return _step(feat_bd, terms, *batch)[0]


def feature_gradient(loss: Tensor) -> Tensor:
    """Return the feature gradient, float32 [b, d], stored in a loss from `multi_head_step` before its backward pass."""
    return cast(BackwardCFunction, loss.grad_fn).saved_tensors[0]


class _HeadStep(torch.autograd.Function):
    """Forward runs the step of all heads; backward returns the feature gradient that forward stored."""

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
    """Run a micro-batch. Returns the loss and the feature gradient, float32 [b, d]."""
    first = terms[0].head
    feat_Bd, label_P, row_P, sizes = gather_batch(
        first.ranks, feat_bd.to(first.product_dtype), label_ids, label_counts, rank_sizes
    )
    done = [
        head.rank_step(
            feat_Bd,
            label_P if ids_of is None else ids_of(label_P),
            row_P,
            train=train,
            end_of_step=end_of_step,
            texts_in_step=texts_in_step,
            loss_weight=loss_weight,
        )
        for head, ids_of, loss_weight in terms
    ]
    loss, grad_Bd = (reduce(torch.add, values) for values in zip(*done))
    return first.ranks.sum(loss), first.ranks.scatter_sum_rows(grad_Bd, sizes) * engine_divisor
