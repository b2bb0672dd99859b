"""Rewiring: learn which features a label reads by pruning small weights and growing new connections.

`plan` is pure: it decides which slots are pruned and which features replace them. `apply` edits index, weights and optimizer
state of these slots. Random numbers depend on seed, step and global row only, so any sharding rewires alike, without
communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.rng import Stream, make_key, random_order, uniform

_RANKING_BYTES = 32 << 20


@dataclass(frozen=True)
class RewireRule:
    """How to rewire.

    Attributes:
        prune_mode: "threshold" prunes slots whose magnitude is below `amount`, "fraction" the smallest floor(amount * F)
            of each row. A slot's magnitude is its mean |weight| over the labels of the group.
        growth_mode: "random" draws uniformly from the features that the row does not read. "gradient" takes those with the
            largest mean |dloss / dweight| over the group's labels in recent steps (RigL: Evci et al., ICML 2020).
        growth_init_mode: first weights of grown slots: "zero", or "random" (uniform, as at the start).
    """

    prune_mode: str = "threshold"
    amount: float = 0.01
    growth_init_mode: str = "zero"
    growth_mode: str = "random"


@dataclass(frozen=True)
class RewireReport:
    """The result of a rewiring, over this rank's rows."""

    moved: int  # slots that read a new feature
    slots: int  # all slots
    ms: float = 0.0  # time of the rewiring

    @property
    def share(self) -> float:
        return self.moved / max(self.slots, 1)

    @property
    def survivors(self) -> int:
        return self.slots - self.moved


def scheduled_amount(start: float, end: float, step: int, last_step: int) -> float:
    """Decay by a cosine from `start` at step 0 to `end` at `last_step`."""
    progress = min(step / max(last_step, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def random_index(row_R: Tensor, fan_in: int, d: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Draw the first index, [R, F]: `fan_in` distinct features of 0..d-1, ascending, for each global row id (int64 [R])."""
    order = random_order(make_key(seed, 0, Stream.INIT_INDEX), row_R, d)
    return (order.topk(fan_in, dim=1, largest=False).values & 0xFFFF).sort(dim=1).values.to(dtype)


def random_weight(label_T: Tensor, fan_in: int, seed: int, step: int, stream: Stream) -> Tensor:
    """Draw weights uniform in +-1/sqrt(fan_in), torch.nn.Linear's default; float32 [T, F] for int64 global label ids [T]."""
    slot = torch.arange(fan_in, device=label_T.device)
    # Multiply by the reciprocal: dividing by a scalar rounds differently on GPU and CPU.
    return (2 * uniform(make_key(seed, step, stream), label_T[:, None], slot) - 1) * (1 / math.sqrt(fan_in))


def index_dtype(d: int) -> torch.dtype:
    """Return the smallest index dtype for d features."""
    return torch.int16 if d <= 1 << 15 else torch.int32


def group_mean(magnitude_LF: Tensor, group: int) -> Tensor:
    """Average float32 [L, F] over groups of consecutive labels, [ceil(L / group), F]. The last group may be short."""
    labels, width = magnitude_LF.shape
    if group == 1:
        return magnitude_LF
    rows = -(-labels // group)
    short = rows * group - labels
    size = torch.full((rows, 1), float(group), device=magnitude_LF.device)
    size[-1] -= short
    return torch.nn.functional.pad(magnitude_LF, (0, 0, 0, short)).view(rows, group, width).sum(1) / size


def strongest_index(weight_Ld: Tensor, fan_in: int, group: int, tile_labels: int) -> Tensor:
    """Find the `fan_in` features of largest mean |weight| in each group of dense rows, ascending; [ceil(L / group), F]."""
    step = max(1, tile_labels // group) * group
    parts = []
    for start in range(0, weight_Ld.shape[0], step):
        magnitude = group_mean(weight_Ld[start : start + step].float().abs(), group)
        parts.append(largest(magnitude, fan_in).sort(dim=1).values.to(index_dtype(weight_Ld.shape[1])))
    return torch.cat(parts)


def largest(score_Rd: Tensor, count: int) -> Tensor:
    """Find the features with the largest scores of each row, largest first; int64 [R, count]."""
    # A stable sort: of equal scores the smaller feature comes first, on every device.
    return score_Rd.argsort(dim=1, descending=True, stable=True)[:, :count]


def kept_slots(dense_Ld: Tensor, index_RF: Tensor, group: int, tile_labels: int) -> Tensor:
    """Gather the entries of dense rows that the index names, [L, F]."""
    parts = []
    for start in range(0, dense_Ld.shape[0], tile_labels):
        part = dense_Ld[start : start + tile_labels]
        row = torch.arange(start, start + part.shape[0], device=part.device) // group
        parts.append(part.gather(1, index_RF[row].to(torch.int64)))
    return torch.cat(parts)


def plan(
    magnitude_RF: Tensor,
    index_RF: Tensor,
    row_R: Tensor,
    d: int,
    rule: RewireRule,
    seed: int,
    step: int,
    wanted_Rd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide which slots get a new feature, and which.

    Args:
        magnitude_RF: float32, mean |weight| of each slot over its group.
        index_RF: int64.
        row_R: int64 global row ids.
        d: number of features.
        wanted_Rd: float32, growth takes the features of the largest values first; None for random features.
    Returns: moved bool [R, F]; feature int64 [R, F], the new index (equal to the old where not moved). A row never
        reads a feature twice. If fewer features are absent than slots are pruned, only the smallest slots move.
    """
    rows, fan_in = magnitude_RF.shape
    absent = d - fan_in
    if absent == 0:
        return torch.zeros_like(magnitude_RF, dtype=torch.bool), index_RF
    if rule.prune_mode == "threshold":
        wanted = (magnitude_RF < rule.amount).sum(1, keepdim=True)
    else:
        wanted = torch.full((rows, 1), int(rule.amount * fan_in), device=magnitude_RF.device)
    # A stable sort: equal magnitudes are pruned in slot order, on every device.
    rank = magnitude_RF.argsort(dim=1, stable=True).argsort(dim=1)
    moved = rank < wanted.clamp_max(absent)
    most = min(fan_in, absent)
    if wanted_Rd is None:
        order = random_order(make_key(seed, step, Stream.GROW_INDEX), row_R, d)
        order.scatter_(1, index_RF, torch.iinfo(torch.int64).max)
        candidate = order.topk(most, dim=1, largest=False).values & 0xFFFF
    else:
        candidate = largest(wanted_Rd.scatter(1, index_RF, -torch.inf), most)
    ordinal = (moved.cumsum(1) - 1).clamp(0, candidate.shape[1] - 1)
    return moved, torch.where(moved, candidate.gather(1, ordinal), index_RF)


def apply(head: HeadTensors, first_row: int, moved_RF: Tensor, feature_RF: Tensor, weight_RGF: Tensor | None) -> None:
    """Edit index, weights and optimizer state of the moved slots of rows first_row, first_row + 1, ...

    Then sorts the slots, because every row of the index must be ascending.

    Args:
        weight_RGF: first weights of the grown slots, float32 [R, G, F]; None for zero.
    """
    assert head.index_RF is not None  # a dense head has no slots to move
    rows, fan_in = moved_RF.shape
    feature_RF, order_RF = feature_RF.sort(dim=1)
    head.index_RF[first_row : first_row + rows] = feature_RF.to(head.index_RF.dtype)
    start = first_row * head.group_size
    weight = head.weight_LF[start : start + rows * head.group_size]
    labels = weight.shape[0]  # the last group may be short
    moved = moved_RF.repeat_interleave(head.group_size, dim=0)[:labels]
    if weight_RGF is None:
        weight.masked_fill_(moved, 0)
    else:
        weight.copy_(torch.where(moved, weight_RGF.reshape(-1, fan_in)[:labels].to(weight.dtype), weight))
    order = order_RF.repeat_interleave(head.group_size, dim=0)[:labels]
    weight.copy_(weight.gather(1, order))
    for state in head.weight_state:
        if state.shape != head.weight_LF.shape:
            continue  # one value per label, no slots
        part = state[start : start + labels].masked_fill_(moved, 0)
        part.copy_(part.gather(1, order))


def rewire(
    head: HeadTensors,
    d: int,
    rule: RewireRule,
    seed: int,
    step: int,
    tile_labels: int,
    dense_grad: Callable[[int, int], Tensor],
) -> RewireReport:
    """Plan and apply over all rows of this rank, tile by tile. The host waits for the device once, for the report.

    Args:
        dense_grad: (first, last) local label -> dloss / dweight, float32 [last - first, d]; used for growth by gradient.
    """
    assert head.index_RF is not None  # as above
    group, fan_in = head.group_size, head.weight_LF.shape[1]
    rows = head.index_RF.shape[0]
    device = head.weight_LF.device
    moved_total = torch.zeros((), dtype=torch.int64, device=device)
    # Ranking the features takes d int64 per row, several times.
    tile = max(1, min(tile_labels // group, _RANKING_BYTES // (8 * d)))
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        magnitude = group_mean(head.weight_LF[first * group : last * group].float().abs(), group)
        row = torch.arange(first, last, device=device) + head.label_start // group
        wanted = None
        if rule.growth_mode == "gradient":
            wanted = group_mean(dense_grad(first * group, min(last * group, head.weight_LF.shape[0])).abs(), group)
        moved, feature = plan(magnitude, head.index_RF[first:last].to(torch.int64), row, d, rule, seed, step, wanted)
        grown = None
        if rule.growth_init_mode == "random":
            label = torch.arange(first * group, last * group, device=device) + head.label_start
            grown = random_weight(label, fan_in, seed, step, Stream.GROW_WEIGHT).view(-1, group, fan_in)
        apply(head, first, moved, feature, grown)
        moved_total += moved.sum()
    return RewireReport(moved=int(moved_total), slots=rows * fan_in)
