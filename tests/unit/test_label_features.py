"""Sums over each label's texts, and heads initialised from them, against plain Python loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.head_helpers import OneOf
from xmc_trainer.data import Ragged
from xmc_trainer.errors import UserError
from xmc_trainer.head import FixedFanInHead, SplitHead
from xmc_trainer.head.losses import best_constant, starting_bias
from xmc_trainer.labels import features as label_features
from xmc_trainer.labels.features import LabelSums, whitener

TEXTS, LABELS, D = 60, 31, 20


@pytest.fixture
def texts(monkeypatch):
    """Return (features float16 [N, D], label lists). Label 7 has no text, and feature 3 is constant."""
    monkeypatch.setattr(label_features, "ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    lists = [sorted(set(rng.integers(0, LABELS, rng.integers(1, 5))) - {7}) for _ in range(TEXTS)]
    features = (rng.normal(size=(TEXTS, D)) * rng.uniform(0.2, 3, D) + rng.normal(size=D)).astype(np.float16)
    features[:, 3] = 1.5
    return features, lists


def sums_of(features, lists, rows=None):
    ids = np.array([label for labels in lists for label in labels], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, lists)])
    return LabelSums(features, Ragged(ids, offsets), LABELS, rows)


@pytest.mark.parametrize("rows", [None, np.array([40, 3, 17, 18, 59, 0, 22, 9, 31])])
def test_sums_and_moments(texts, rows):
    features, lists = texts
    sums = sums_of(features, lists, rows)
    counted = range(TEXTS) if rows is None else rows.tolist()
    exact = features[list(counted)].astype(np.float64)
    mean, deviation = sums.moments()
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation, exact.std(0), rtol=1e-5, atol=1e-6)
    for labels in (range(LABELS), range(5, 9), range(30, 31)):
        total, counts = sums.sums(labels)
        for place, label in enumerate(labels):
            own = [row for row in counted if label in lists[row]]
            assert counts[place] == len(own)
            np.testing.assert_allclose(total[place], features[own].astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)


def test_features_on_a_full_disk(tmp_path):
    """Space is reserved before the first write, so a full disk is an error and not a SIGBUS."""
    array = label_features.array_on_disk(tmp_path / "f.npy", (1000, 8))
    assert (array.dtype, array.shape) == (np.float16, (1000, 8)) and not array.any()
    assert (tmp_path / "f.npy").stat().st_blocks * 512 >= 16_000
    with pytest.raises(UserError, match=r": no space for features of 1000000000000 texts or labels, .*; set TMPDIR to"):
        label_features.array_on_disk(tmp_path / "g.npy", (10**12, 768))


def test_a_constant_with_float16_rounding_noise_is_constant(texts):
    features, lists = texts
    features[:, 5] = np.where(np.arange(TEXTS) % 2, np.float16(1.5), np.nextafter(np.float16(1.5), np.float16(2)))
    features[:, 6] = np.where(np.arange(TEXTS) % 2, 1.5, 1.51)
    deviation = sums_of(features, lists).moments()[1]
    assert deviation[5] == 0 and deviation[6] == pytest.approx(0.005, rel=0.1)


def test_a_feature_of_float16s_smallest_numbers_is_constant(texts):
    """all-MiniLM-L6-v2 has a feature that is 0 but for a few of them; divided by their deviation, weights grew to 4e8."""
    features, lists = texts
    features[:, 5] = np.where(np.arange(TEXTS) % 50, np.float16(0), np.float16(2**-24))
    assert sums_of(features, lists).moments()[1][5] == 0


def test_sums_of_segments_of_any_length(monkeypatch):
    monkeypatch.setattr(label_features, "_SEGMENT", 3)
    lengths = np.array([0, 1, 3, 7, 0, 0, 9, 2, 0])
    rows = torch.randn(lengths.sum(), 4, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([part.sum(0) for part in rows.split(lengths.tolist())])
    torch.testing.assert_close(label_features.segment_sums(rows, lengths), expected)


def standardised(features, lists):
    """Compute (z sums [L, D], counts [L], mean, deviation) in float64 by plain loops."""
    x = features.astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    z = np.divide(x - mean, deviation, out=np.zeros_like(x), where=deviation > 0)
    sums, counts = np.zeros((LABELS, D)), np.zeros(LABELS, dtype=np.int64)
    for row, labels in enumerate(lists):
        for label in labels:
            sums[label] += z[row]
            counts[label] += 1
    return tuple(torch.from_numpy(value) for value in (sums, counts, mean, deviation))


@pytest.mark.parametrize("fan_in, group_size, shards", [(6, 1, 1), (6, 1, 3), (6, 4, 2), (None, 1, 2), (20, 1, 1)])
def test_a_head_starts_from_the_features_of_its_labels_texts(texts, fan_in, group_size, shards):
    sums, counts, mean, deviation = standardised(*texts)
    options = dict(fan_in=fan_in, group_size=group_size, tile_labels=9, seed=2, first_bias=-3.0)
    for rank in range(shards):
        ranks = OneOf(rank, shards)
        head, random = (FixedFanInHead(D, LABELS, ranks=ranks, **options) for _ in range(2))
        head.start_from_texts(
            lambda labels: (sums[labels.start : labels.stop].float(), counts[labels.start : labels.stop]),
            index=True, centroid_scale=0.5, mean_d=mean.float(), deviation_d=deviation.float(),
        )  # fmt: skip
        for place, label in enumerate(head.labels):
            first = label // group_size * group_size
            group = range(first, min(first + group_size, LABELS))
            read = list(range(D))
            if fan_in is not None:
                strength = sum(sums[other] for other in group).abs()
                read = sorted(sorted(range(D), key=lambda f: (-strength[f].item(), f))[:fan_in])
                if not any(counts[other] for other in group):
                    read = random.index[place // group_size].tolist()
                assert head.index[place // group_size].tolist() == read
            if counts[label] == 0:
                assert torch.equal(head.weight[place], random.weight[place]) and head.bias[place] == -3
                continue
            z = sums[label, read] / counts[label]
            scale = torch.tensor([1 / deviation[f].item() if deviation[f] > 0 else 0.0 for f in read])
            weight = 0.5 * z / z.norm() * scale
            torch.testing.assert_close(head.weight[place].double(), weight, rtol=1e-4, atol=1e-6)
            assert head.bias[place].item() == pytest.approx(-3 - (weight * mean[read]).sum().item(), rel=1e-4)
    assert counts[7] == 0


@pytest.mark.parametrize("rows", [None, np.arange(0, TEXTS, 2)])
def test_correlations(texts, rows):
    features, lists = texts
    counted = features.astype(np.float64)[slice(None) if rows is None else rows]
    varies = [f for f in range(D) if f != 3]
    expected = np.zeros((D, D))
    expected[np.ix_(varies, varies)] = np.corrcoef(counted[:, varies], rowvar=False)
    np.testing.assert_allclose(sums_of(features, lists, rows).correlations(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_discriminant_index_is_that_of_ridge_regression(texts, group_size):
    """The discriminant's direction is the least squares fit of "has the label" on the features."""
    features, lists = texts
    # Pairs of strongly correlated features, for which discriminant and means disagree.
    rng = np.random.default_rng(1)
    features[:, D // 2 :] = features[:, : D // 2] + 0.3 * rng.normal(size=(TEXTS, D // 2))
    sums, counts, mean, deviation = standardised(features, lists)
    x = features.astype(np.float64)
    z = np.divide(x - mean.numpy(), deviation.numpy(), out=np.zeros_like(x), where=deviation.numpy() > 0)
    ridge = 0.3
    rows = np.concatenate([np.sqrt((1 - ridge) / TEXTS) * z, np.sqrt(ridge) * np.eye(D)])
    has = np.array([[label in labels for label in range(LABELS)] for labels in lists], dtype=np.float64)
    slopes = np.linalg.lstsq(rows, np.concatenate([has, np.zeros((D, LABELS))]), rcond=None)[0].T
    heads = [FixedFanInHead(D, LABELS, fan_in=6, group_size=group_size, tile_labels=9, seed=2) for _ in range(2)]
    given = whitener(sums_of(features, lists).correlations(), ridge), whitener(torch.eye(D, dtype=torch.float64), 1.0)
    for head, whitener_dd in zip(heads, given):
        head.start_from_texts(
            lambda labels: (sums[labels.start : labels.stop].float(), counts[labels.start : labels.stop]),
            index=True, whitener_dd=whitener_dd,
        )  # fmt: skip
    discriminant, informed = (head.index.tolist() for head in heads)
    for row, first in enumerate(range(0, LABELS, group_size)):
        group = [label for label in range(first, min(first + group_size, LABELS)) if counts[label]]
        if group:
            assert discriminant[row] == sorted(np.argsort(-np.abs(slopes[group].sum(0)))[:6])
            assert informed[row] == sorted(np.argsort(-sums[group].sum(0).abs().numpy())[:6])
    assert discriminant != informed


def test_both_parts_of_a_split_head_start_from_their_labels(texts):
    sums, counts, mean, deviation = standardised(*texts)
    head = SplitHead(FixedFanInHead(D, 5, fan_in=None), FixedFanInHead(D, LABELS - 5, fan_in=6))
    whole = FixedFanInHead(D, LABELS, fan_in=6)
    for one in (head, whole):
        one.start_from_texts(
            lambda labels: (sums[labels.start : labels.stop].float(), counts[labels.start : labels.stop]),
            index=True, centroid_scale=1.0, mean_d=mean.float(), deviation_d=deviation.float(),
        )  # fmt: skip
    known = counts[5:] > 0
    assert torch.equal(head.tail.index[known], whole.index[5:][known])
    torch.testing.assert_close(head.tail.weight[known], whole.weight[5:][known])
    dense = head.frequent.weight
    torch.testing.assert_close(
        dense * deviation.float(), torch.nn.functional.normalize(sums[:5].float(), dim=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_the_best_constant_has_a_zero_gradient(loss):
    from xmc_trainer.head.losses import LOSSES

    share = torch.tensor([0.001, 0.2, 0.9])
    logit = best_constant(loss, share)
    up, down = (
        LOSSES[loss](logit, torch.full_like(logit, positive, dtype=torch.bool))[1] for positive in (True, False)
    )
    torch.testing.assert_close(share * up + (1 - share) * down, torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("counts, texts, init, odds", [
    ([4, 4], 4, "prior", [8.5 / 0.5] * 2),  # every output is positive for every text
    ([0, 0], 4, "prior", [0.5 / 8.5] * 2),
    ([4, 4], 4, "frequency", [89] * 2),  # (4 + 8.5 / 9) of 5
    ([4, 0], 4, "frequency", [9, 1 / 9]),  # (4 + 0.5) and 0.5 of 5
    ([3], 4, "zero", [1]),
])  # fmt: skip
def test_starting_biases(counts, texts, init, odds):
    odds = torch.tensor(odds)
    torch.testing.assert_close(starting_bias("bce", init, torch.tensor(counts), texts), odds.log())
    expected = torch.zeros(len(counts)) if init == "zero" else 2 * odds / (1 + odds) - 1
    torch.testing.assert_close(starting_bias("squared_hinge", init, torch.tensor(counts), texts), expected)
    assert starting_bias("bce", init, torch.full((3,), 10**7), 10**7).isfinite().all()
