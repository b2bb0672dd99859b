"""Rewiring: which slots are pruned, which features grow, and that no stale state remains."""

from __future__ import annotations

import pytest
import torch

from tests.head_helpers import OneOf, dense_of, oracle_loss, ragged_batch, target_matrix
from xmc_trainer.head import AdamW, FixedFanInHead, RewireRule, RowwiseRMSprop
from xmc_trainer.head.rewire import plan, scheduled_amount

D, LABELS = 40, 101


def make_head(**options):
    options = {"fan_in": 12, "optimizer": AdamW(), "seed": 3, "tile_labels": 33} | options
    head = FixedFanInHead(D, LABELS, **options)
    for name in ("weight_exp_avg", "weight_exp_avg_sq"):
        getattr(head, name).fill_(7.0)
    return head


def group_magnitude(head, row):
    return head.weight[row * head.group_size : (row + 1) * head.group_size].float().abs().mean(0)


@pytest.mark.parametrize("group_size", [1, 4, 32])
@pytest.mark.parametrize("dtype, optimizer", [
    (torch.float32, AdamW()), (torch.bfloat16, AdamW()), (torch.bfloat16, AdamW(eight_bits=True))
])  # fmt: skip
@pytest.mark.parametrize(
    "rule", [RewireRule("threshold", 0.1), RewireRule("fraction", 0.3), RewireRule("fraction", 0.3, "random")]
)
def test_rewire_moves_exactly_the_small_slots(rule, dtype, optimizer, group_size):
    head = make_head(group_size=group_size, weight_dtype=dtype, optimizer=optimizer)
    index, weight = head.index.clone(), head.weight.clone()
    rows = index.shape[0]
    expected = torch.zeros_like(index, dtype=torch.bool)
    for row in range(rows):
        magnitude = group_magnitude(head, row)
        if rule.prune_mode == "threshold":
            expected[row] = magnitude < rule.amount
        else:
            smallest = sorted(range(12), key=lambda slot: (magnitude[slot].item(), slot))[: int(0.3 * 12)]
            expected[row, smallest] = True
    assert expected.any() and not expected.all()
    report = head.rewire(rule)
    assert report.moved == expected.sum() and report.slots == rows * 12
    assert report.survivors == report.slots - report.moved and report.share == report.moved / report.slots
    states = ("weight_exp_avg", "weight_exp_avg_sq")
    for row in range(rows):
        before, now = index[row].tolist(), head.index[row].tolist()
        assert now == sorted(set(now)) and len(now) == 12 and min(now) >= 0 and max(now) < D
        kept = {feature for slot, feature in enumerate(before) if not expected[row, slot]}
        assert set(now) & set(before) == kept
        for label in range(row * group_size, min((row + 1) * group_size, LABELS)):
            for slot, feature in enumerate(now):
                if feature in kept:
                    assert head.weight[label, slot] == weight[label, before.index(feature)]
                    assert all(getattr(head, name)[label, slot] == 7 for name in states)
                else:
                    assert all(getattr(head, name)[label, slot] == 0 for name in states)
    moved = torch.stack([~torch.isin(head.index[row], index[row]) for row in range(rows)])
    grown = head.weight[moved.repeat_interleave(group_size, 0)[:LABELS]].float()
    if rule.growth_init_mode == "zero":
        assert (grown == 0).all()
    else:
        assert (
            grown.abs().max() <= 12**-0.5 + 1e-3 and grown.std() > 0.1 and not torch.isin(grown, weight.float()).all()
        )


def trained(steps=5, **options):
    """Return a head after some steps, of which it keeps the last three, and the batches of these."""
    head = FixedFanInHead(
        D, LABELS, fan_in=12, optimizer=AdamW(), lr=0.05, seed=3, tile_labels=33, growth_batches=3, **options
    )
    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        feat = torch.randn(17, D, generator=generator)
        batches.append((feat, *ragged_batch(17, LABELS, generator)))
        head(*batches[-1])
    return head, batches[-3:]


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_growth_by_gradient_takes_the_largest_absent_ones(group_size, loss):
    head, batches = trained(group_size=group_size, loss=loss)
    dense = dense_of(head)[0].requires_grad_()
    for feat, ids, counts in batches:
        logits = feat.double() @ dense.T + head.bias.double()
        oracle_loss(logits, target_matrix(ids, counts, LABELS), loss).sum().backward()
    size = torch.stack([part.abs().mean(0) for part in dense.grad.split(group_size)])
    before = head.index.clone()
    head.rewire(RewireRule("fraction", 0.3, growth_mode="gradient"))
    for row, (old, new) in enumerate(zip(before.tolist(), head.index.tolist())):
        absent = sorted(set(range(D)) - set(old), key=lambda feature: -size[row, feature].item())
        assert set(new) - set(old) == set(absent[:3])


def test_growth_by_gradient_does_not_depend_on_shards_or_tiles():
    rule = RewireRule("fraction", 0.4, growth_mode="gradient")
    whole, _ = trained()
    parts = [trained(ranks=OneOf(rank, 3))[0] for rank in range(3)]
    for head in (whole, *parts):
        head.rewire(rule)
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)


def test_growth_by_gradient_needs_steps_and_ignores_non_finite_ones():
    with pytest.raises(ValueError, match="growth_batches"):
        make_head().rewire(RewireRule("fraction", 0.3, growth_mode="gradient"))
    head, batches = trained()
    twin, _ = trained()
    bad = batches[0][0].clone()
    bad[0, 0] = torch.inf
    head(bad, *batches[0][1:])
    twin._recent.popleft()
    for one in (head, twin):
        one.rewire(RewireRule("fraction", 0.3, growth_mode="gradient"))
    assert torch.equal(head.index, twin.index)


def test_rewiring_does_not_depend_on_shards_or_tiles():
    rule = RewireRule("fraction", 0.5, "random")
    for group_size in (1, 8):
        whole = make_head(group_size=group_size)
        whole.rewire(rule)
        shards = [make_head(group_size=group_size, tile_labels=9, ranks=OneOf(r, 3)) for r in range(3)]
        for shard in shards:
            shard.rewire(rule)
        assert torch.equal(torch.cat([s.index for s in shards]), whole.index)
        assert torch.equal(torch.cat([s.weight for s in shards]), whole.weight)


def test_every_step_and_row_grows_differently():
    first, second = make_head(), make_head()
    second.steps = 1
    rule = RewireRule("fraction", 0.5)
    first.rewire(rule), second.rewire(rule)
    assert not torch.equal(first.index, second.index)
    assert len({tuple(sorted(row)) for row in first.index.tolist()}) == LABELS


def test_growth_is_uniform_over_the_absent_features():
    head = FixedFanInHead(16, 20000, fan_in=4, seed=1)
    head.index.copy_(torch.arange(4, dtype=torch.int16).expand(20000, 4))
    head.rewire(RewireRule("fraction", 1.0))
    counts = torch.bincount(head.index.flatten().long(), minlength=16)
    assert (counts[:4] == 0).all()
    assert (counts[4:] - 20000 * 4 / 12).abs().max() < 6 * (20000 * 4 / 12) ** 0.5


def test_a_wide_row_moves_only_as_many_slots_as_features_are_absent():
    magnitude = torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0]])
    index = torch.tensor([[0, 1, 2, 3, 4]])
    moved, feature = plan(magnitude, index, torch.tensor([9]), 7, RewireRule("threshold", 100.0), 0, 1)
    assert moved.tolist() == [[False, True, False, True, False]]
    assert sorted(feature[moved].tolist()) == [5, 6] and feature[~moved].tolist() == [0, 2, 4]
    full = FixedFanInHead(8, 5, fan_in=8)
    assert full.rewire(RewireRule("threshold", 100.0)).moved == 0


def test_per_label_states_are_kept():
    head = FixedFanInHead(D, LABELS, fan_in=12, optimizer=RowwiseRMSprop(), seed=3)
    state = torch.rand(LABELS, 1)
    head.weight_mean_square.copy_(state)
    assert head.rewire(RewireRule("fraction", 0.3)).moved and torch.equal(head.weight_mean_square, state)


def test_a_dense_head_is_refused():
    with pytest.raises(ValueError, match="dense"):
        FixedFanInHead(8, 5, fan_in=None).rewire(RewireRule())


def test_scheduled_amount_is_a_cosine():
    assert scheduled_amount(0.01, 1e-4, 0, 100) == pytest.approx(0.01)
    assert scheduled_amount(0.01, 1e-4, 50, 100) == pytest.approx((0.01 + 1e-4) / 2)
    assert scheduled_amount(0.01, 1e-4, 100, 100) == pytest.approx(1e-4)
    assert scheduled_amount(0.01, 1e-4, 150, 100) == pytest.approx(1e-4)
