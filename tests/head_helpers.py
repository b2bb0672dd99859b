"""Independent oracles for the head: dense float64 matrices, autograd and torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from xmc_trainer.head import FixedFanInHead
from xmc_trainer.parallel import Ranks


class OneOf(Ranks):
    """Rank `rank` of `size` in one process: it gets the whole batch, so nothing is communicated."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sizes(self, length, device):
        return [length]

    def gather_rows(self, x, sizes):
        return x

    def gather_rows_of(self, tensors, sizes):
        return tensors

    def scatter_sum_rows(self, x, sizes):
        return x

    def sum(self, x):
        return x


def ragged_batch(texts: int, labels: int, generator: torch.Generator, most: int = 6) -> tuple[Tensor, Tensor]:
    """Draw positives, including texts without labels, repeated positives, and the first and the last label."""
    counts = torch.randint(0, most, (texts,), generator=generator)
    counts[0], counts[-1] = 3, 0
    ids = torch.randint(0, labels, (int(counts.sum()),), generator=generator)
    ids[0], ids[1], ids[2] = labels - 1, labels - 1, 0
    return ids, counts


def target_matrix(ids: Tensor, counts: Tensor, labels: int) -> Tensor:
    target = torch.zeros(len(counts), labels, dtype=torch.float64)
    place = 0
    for row, count in enumerate(counts.tolist()):
        for label in ids[place : place + count].tolist():
            target[row, label] = 1
        place += count
    return target


def dense_of(head: FixedFanInHead) -> tuple[Tensor, Tensor]:
    """Return the dense matrix, float64 [L, d], and the mask of its connections, bool [L, d]."""
    dense = torch.zeros(head.num_labels, head.in_features, dtype=torch.float64)
    mask = torch.zeros_like(dense, dtype=torch.bool)
    for label in range(head.num_labels):
        index = slice(None) if head.index is None else head.index[label // head.group_size].long().cpu()
        dense[label, index] = head.weight[label].double().cpu()
        mask[label, index] = True
    return dense, mask


def oracle_loss(logits: Tensor, target: Tensor, loss: str) -> Tensor:
    """Return the loss of each text, summed over labels."""
    if loss == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    return torch.clamp(1 - (2 * target - 1) * logits, min=0).pow(2).sum(1)


class OracleRowwise:
    """RowwiseRMSprop by torch.optim.Adam on one number per label, the root mean square of its row's gradient.

    The bias has its own Adam.
    """

    def __init__(self, groups: list[dict], fan_in: Tensor, lr: float) -> None:
        (self.weight,), (self.bias,) = (group["params"] for group in groups)
        self.decay, self.fan_in, self.lr = groups[0]["weight_decay"], fan_in, lr
        self.length = torch.zeros(len(fan_in), dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.length, self.bias], lr=lr, betas=(0.0, 0.999), eps=1e-4)

    def zero_grad(self) -> None:
        self.weight.grad = self.bias.grad = None

    def step(self) -> None:
        self.length.grad = (self.weight.grad.square().sum(1) / self.fan_in).sqrt()
        before = self.length.detach().clone()
        self.adam.step()
        with torch.no_grad():
            moved = (before - self.length) / self.length.grad.clamp_min(1e-300)
            self.weight.mul_(1 - self.lr * self.decay).sub_(moved[:, None] * self.weight.grad)


class OracleHead:
    """A dense float64 layer trained by torch.optim, with absent connections kept at zero."""

    def __init__(self, head: FixedFanInHead, optimizer: str, lr: float, weight_decay: float) -> None:
        dense, self.mask = dense_of(head)
        self.weight = dense.requires_grad_()
        self.bias = head.bias.double().clone().requires_grad_()
        groups = [{"params": [self.weight], "weight_decay": weight_decay}, {"params": [self.bias], "weight_decay": 0.0}]
        self.optimizer = {
            "sgd": lambda: torch.optim.SGD(groups, lr=lr),
            "momentum": lambda: torch.optim.SGD(groups, lr=lr, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=lr, eps=1e-4),
            "rowwise_rmsprop": lambda: OracleRowwise(groups, self.mask.sum(1), lr),
        }[optimizer]()
        self.loss, self.reduction = head.loss_name, head.text_reduction

    def step(self, feat: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Make one update from a whole batch. Returns (loss, feature gradient)."""
        x = feat.detach().double().requires_grad_()
        per_text = oracle_loss(
            x @ (self.weight * self.mask).T + self.bias, target_matrix(ids, counts, len(self.bias)), self.loss
        )
        loss = per_text.sum() if self.reduction == "sum" else per_text.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), x.grad


def assert_parts_train_as_one(
    make: Callable[..., FixedFanInHead], batches: Iterable[tuple[Tensor, ...]], grad_rtol: float
) -> None:
    """Check that three micro-batches, one of them empty, on three shards train as one head on the whole batch.

    Args: make: makes a head, with text_reduction="mean"; takes `ranks`.
    """
    whole, parts, shards = make(), make(), [make(ranks=OneOf(rank, 3)) for rank in range(3)]
    for feat, ids, counts in batches:
        a, b = feat.clone().requires_grad_(), feat.clone().requires_grad_()
        loss = whole(a, ids, counts)
        loss.backward()
        assert sum(shard(feat, ids, counts).item() for shard in shards) == pytest.approx(loss.item(), rel=1e-5)
        texts = feat.shape[0]
        cuts, ends, parts_loss = [0, texts - 10, texts - 10, texts], counts.cumsum(0).tolist(), 0.0
        for number, (start, stop) in enumerate(zip(cuts, cuts[1:])):
            first, last = ends[start - 1] if start else 0, ends[stop - 1]
            part = parts(
                b[start:stop], ids[first:last], counts[start:stop], end_of_step=number == 2, texts_in_step=texts
            )
            part.backward()
            parts_loss += part.item()
        assert parts_loss == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(b.grad, a.grad, rtol=grad_rtol, atol=1e-6)
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
        joined = torch.cat([getattr(shard, name) for shard in shards])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-4, atol=1e-6)
