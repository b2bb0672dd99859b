"""The split head against one dense computation in float64: loss, feature gradient, update, ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xmc_trainer.head import SGD, FixedFanInHead, Head, RewireRule, SplitHead, multi_head_step
from xmc_trainer.head.cluster_branch import MetaBranch
from xmc_trainer.head.split import head_of_parts
from xmc_trainer.parallel import Ranks

FEATURES, FREQUENT, LABELS, TEXTS = 13, 7, 41, 9


def made(loss="bce", group_size=4, head_fan_in=None):
    common = dict(loss=loss, optimizer=SGD(), lr=0.1, text_reduction="mean", tile_labels=8)
    frequent = FixedFanInHead(FEATURES, FREQUENT, fan_in=head_fan_in, first_bias=-1.0, seed=1, **common)
    tail = FixedFanInHead(FEATURES, LABELS - FREQUENT, fan_in=5, group_size=group_size, first_bias=-2.0, **common)
    return SplitHead(frequent, tail)


def dense_of(head):
    """Return weights [L, d] and biases [L] in float64, and the mask of existing weights."""
    weights, exist = [], []
    for part in (head.frequent, head.tail):
        index = torch.arange(FEATURES).expand(part.num_labels, FEATURES)
        if part.index is not None:
            index = part.index.long().repeat_interleave(part.group_size, 0)[: part.num_labels]
        zero = torch.zeros(part.num_labels, FEATURES, dtype=torch.float64)
        weights.append(zero.scatter(1, index, part.weight.double()))
        exist.append(zero.scatter(1, index, 1.0))
    return torch.cat(weights), torch.cat([head.frequent.bias.double(), head.tail.bias.double()]), torch.cat(exist)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (TEXTS,), generator=g)
    ids = torch.cat([torch.randperm(LABELS, generator=g)[:count] for count in counts])
    return torch.randn(TEXTS, FEATURES, generator=g), ids.to(torch.int32), counts


@pytest.mark.parametrize("head_fan_in", [None, 9])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_a_step_equals_one_over_all_labels(loss, head_fan_in):
    head = made(loss, head_fan_in=head_fan_in)
    weight, bias, exists = dense_of(head)
    assert int(exists.sum()) == FREQUENT * (head_fan_in or FEATURES) + (LABELS - FREQUENT) * 5
    feat, ids, counts = batch()
    target = torch.zeros(TEXTS, LABELS, dtype=torch.float64)
    target[torch.repeat_interleave(torch.arange(TEXTS), counts), ids.long()] = 1
    x, w, b = feat.double().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    logits = x @ w.T + b
    if loss == "bce":
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / TEXTS
    else:
        expected = (1 - (2 * target - 1) * logits).clamp_min(0).square().sum() / TEXTS
    expected.backward()
    feat.requires_grad_()
    found = head(feat, ids, counts)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(feat.grad.double(), x.grad, rtol=1e-4, atol=1e-5)
    after, after_bias, _ = dense_of(head)
    torch.testing.assert_close(after, weight.detach() - 0.1 * w.grad * exists, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after_bias, bias.detach() - 0.1 * b.grad, rtol=1e-4, atol=1e-5)


def test_ranking_over_both_parts_with_ties_and_excluded_labels():
    head = made()
    feat, ids, counts = batch(3)
    weight, bias, _ = dense_of(head)
    scores = feat.double() @ weight.T + bias
    scores[torch.repeat_interleave(torch.arange(TEXTS), counts), ids.long()] = -torch.inf
    found, labels = head.topk(feat, 10, ids, counts)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(labels, expected.indices[:, :10])
    torch.testing.assert_close(found.double(), expected.values[:, :10], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for part in (head.frequent, head.tail):
            part.weight.zero_()
            part.bias.zero_()
    assert torch.equal(head.topk(feat, LABELS + 2)[1][0], torch.tensor([*range(LABELS), -1, -1]))


def test_learning_rate_and_rewiring_reach_both_parts():
    head = made()
    head.lr = 0.5
    assert head.frequent.lr == head.tail.lr == 0.5
    assert head.rewire(RewireRule("fraction", 0.4)).moved == 2 * 9  # 5 slots in each of 9 groups
    report = made(head_fan_in=9).rewire(RewireRule("fraction", 0.4))
    assert (report.moved, report.slots) == (2 * 9 + 3 * FREQUENT, 5 * 9 + 9 * FREQUENT)
    with pytest.raises(ValueError, match="the same loss"):
        SplitHead(made("bce").frequent, made("squared_hinge").tail)


def test_only_a_dense_tail_becomes_sparse():
    frequent, tail = (FixedFanInHead(FEATURES, n, fan_in=None, group_size=g) for n, g in ((FREQUENT, 1), (34, 4)))
    head = SplitHead(frequent, tail)
    strength = torch.nn.functional.pad(tail.weight.abs(), (0, 0, 0, 2)).view(9, 4, FEATURES).sum(1)
    assert head.index is None
    head.become_sparse(5, 4)
    assert frequent.index is None and (tail.fan_in, tail.group_size) == (5, 4)
    assert torch.equal(head.index.long(), strength.topk(5, dim=1).indices.sort(dim=1).values)
    with pytest.raises(ValueError, match="already sparse"):
        head.become_sparse(5, 4)
    with pytest.raises(ValueError, match="whole groups of 4"):
        SplitHead(frequent, FixedFanInHead(FEATURES, 34, fan_in=None, group_size=4)).become_sparse(5, 2)


def test_a_head_can_be_rebuilt_from_its_parts():
    head, plain = made(), FixedFanInHead(FEATURES, LABELS, fan_in=5)
    for each in (head, plain):
        again = head_of_parts([part for _, part in each.parts()])
        assert isinstance(again, Head) and type(again) is type(each) and again.num_labels == LABELS
        names = [prefix + name for prefix, part in each.parts() for name in part.state_dict()]
        assert len(set(names)) == len(names) == len(list(each.state_dict()))
    assert [prefix for prefix, _ in head.parts()] == ["frequent.", ""]


def test_heads_with_common_features_exchange_them_once():
    class Counting(Ranks):
        def gather_rows_of(self, tensors, sizes):
            sent.append(("gather", *(tuple(x.shape) for x in tensors)))
            return tensors

        def scatter_sum_rows(self, x, sizes):
            sent.append(("scatter", tuple(x.shape)))
            return x

        def sum(self, x):
            sent.append(("sum", tuple(x.shape)))
            return x

    sent, ranks = [], Counting()
    head = SplitHead(
        *(FixedFanInHead(FEATURES, n, fan_in=f, ranks=ranks) for n, f in ((FREQUENT, None), (LABELS - FREQUENT, 5)))
    )
    branch = MetaBranch.build(FEATURES, np.arange(LABELS) % 3, scaling=0.4, last_step=9, ranks=ranks)
    feat, ids, counts = batch()
    multi_head_step(head.terms(0.6) + branch.terms(0.4), feat.requires_grad_(), ids, counts).backward()
    texts = (TEXTS, FEATURES)
    assert sorted(sent) == [("gather", texts, tuple(ids.shape), (TEXTS,)), ("scatter", texts), ("sum", ())]
    assert feat.grad.abs().sum() > 0
