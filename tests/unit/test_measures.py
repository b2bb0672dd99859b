"""F1, precision, recall and coverage by dense code, one text and one label at a time; bootstrap and comparison."""

from __future__ import annotations

import numpy as np
import pytest

from xmc_trainer.measures import BUCKETS, Measures, buckets_of, differences, intervals
from xmc_trainer.metrics import RankingMetrics, inverse_propensity

TEXTS, LABELS, UNSEEN = 83, 37, 4  # of 41 labels, training lacks the last four


def made(seed: int, k: int = 7, threshold: float = 0.8):
    """Return scores [texts, L], relevant [texts, L + U], the k best labels and their scores."""
    rng = np.random.default_rng(seed)
    relevant = np.random.default_rng(0).random((TEXTS, LABELS + UNSEEN)) < np.linspace(0.3, 0.005, LABELS + UNSEEN)
    relevant[::9] = False  # texts without labels
    scores = rng.normal(size=(TEXTS, LABELS)) + relevant[:, :LABELS]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best[3, 2:] = -1  # fewer labels than k
    return relevant, best, np.take_along_axis(scores, np.maximum(best, 0), 1) >= threshold


COUNTS = np.maximum(200 // (np.arange(LABELS) + 1), 1)
WEIGHT = inverse_propensity(np.pad(COUNTS, (0, UNSEEN)), 1000, 0.55, 1.5)


def measures(relevant, best, chosen) -> Measures:
    return Measures(
        best,
        np.nonzero(relevant)[1],
        relevant.sum(1),
        buckets=buckets_of(COUNTS),
        inverse_propensity=WEIGHT,
        chosen=chosen,
    )


def divided(above: float, below: float) -> float:
    return above / below if below else 0.0


def oracle(relevant, predicted, members) -> dict[str, float]:
    """Compute the metrics of a decision, bool [texts, labels], over the labels `members`."""
    labels = [label for label in members if relevant[:, label].any()]
    hits = relevant & predicted
    tp, p, g = (sum(int(x[:, label].sum()) for label in members) for x in (hits, predicted, relevant))
    out = {"micro-P": divided(tp, p), "micro-R": divided(tp, g), "micro-F1": divided(2 * tp, p + g)}
    by_label = [(hits[:, n].sum(), predicted[:, n].sum(), relevant[:, n].sum()) for n in labels]
    out["macro-P"] = np.mean([divided(t, p) for t, p, _ in by_label])
    out["macro-R"] = np.mean([divided(t, g) for t, _, g in by_label])
    out["macro-F1"] = np.mean([divided(2 * t, p + g) for t, p, g in by_label])
    return out | {"coverage": np.mean([t > 0 for t, _, _ in by_label])}


def expected(relevant, best, chosen) -> dict[str, float]:
    """Compute everything but the ranking metrics, densely."""
    of_bucket = np.append(buckets_of(COUNTS), [2] * UNSEEN)
    out = {}
    for point in ("1", "3", "5", "threshold"):
        predicted = np.zeros_like(relevant)
        for row in range(len(best)):
            for place, label in enumerate(best[row]):
                if label >= 0 and (chosen[row, place] if point == "threshold" else place < int(point)):
                    predicted[row, label] = True
        found = oracle(relevant, predicted, range(LABELS + UNSEEN))
        for number, name in enumerate(BUCKETS):
            members = np.flatnonzero(of_bucket == number)
            found |= {f"{name} {kind}": value for kind, value in oracle(relevant, predicted, members).items()}
        rows = [((relevant & predicted)[n].sum(), predicted[n].sum(), relevant[n].sum()) for n in range(len(best))]
        found["sample-P"] = np.mean([divided(t, p) for t, p, _ in rows])
        found["sample-R"] = np.mean([divided(t, g) for t, _, g in rows])
        found["sample-F1"] = np.mean([divided(2 * t, p + g) for t, p, g in rows])
        out |= {f"{name}@{point}": value for name, value in found.items()}
    return out


def ranking(relevant, best) -> dict[str, float]:
    metrics = RankingMetrics(WEIGHT)
    metrics.add(best, np.nonzero(relevant)[1], relevant.sum(1))
    return metrics.result()


def test_against_dense_definitions():
    relevant, best, chosen = made(1)
    found = measures(relevant, best, chosen).values()
    assert found == pytest.approx(expected(relevant, best, chosen) | ranking(relevant, best))
    assert found["sample-P@1"] == found["micro-P@1"] == found["P@1"] > 0.2 and found["tail coverage@5"] < 1


def test_texts_weigh_as_copies_of_them(monkeypatch):
    monkeypatch.setattr("xmc_trainer.measures._ROWS", 17)  # several parts
    relevant, best, chosen = made(2)
    weights = np.random.default_rng(5).integers(0, 4, TEXTS)
    rows = np.repeat(np.arange(TEXTS), weights)
    copied = relevant[rows], best[rows], chosen[rows]
    found = measures(relevant, best, chosen).values(weights.astype(float))
    assert found == pytest.approx(expected(*copied) | ranking(*copied[:2]))


def test_fewer_than_five_labels_and_no_threshold():
    relevant, best = np.array([[1, 0], [1, 1], [0, 1]], bool), np.array([[0, 1], [1, 0], [0, 1]])
    found = Measures(best, np.nonzero(relevant)[1], relevant.sum(1), buckets=np.zeros(2, np.int8)).values()
    assert found["micro-F1@1"] == pytest.approx(2 * 2 / (3 + 4)) and found["P@5"] == pytest.approx(4 / 15)
    assert found["macro-F1@1"] == pytest.approx((2 * 1 / (2 + 2) + 2 * 1 / (1 + 2)) / 2)
    assert found["sample-F1@5"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3) and found["coverage@1"] == 1
    assert not [name for name in found if "threshold" in name or name.startswith(("middle", "tail", "PSP"))]


def test_buckets_hold_a_third_of_the_pairs_each():
    counts = np.array(
        [1, 50, 1, 30, 1, 10, 10, 50, 1, 1, 1, 1, 1, 1, 1]
    )  # 160 pairs; a third is reached with the second 50, two thirds with 30
    assert buckets_of(counts).tolist() == [2, 0, 2, 1, 2, 2, 2, 0, 2, 2, 2, 2, 2, 2, 2]
    assert buckets_of(np.full(5, 3)).tolist() == [0] * 5
    for seed in range(20):
        counts = np.random.default_rng(seed).zipf(1.5, 200).clip(max=1000)
        found = buckets_of(counts)
        assert (np.diff(found[np.argsort(-counts)]) >= 0).all()  # more frequent labels are never in a later bucket
        assert all(len({*found[counts == n].tolist()}) == 1 for n in counts)
        shares = np.bincount(found, counts, 3) / counts.sum()
        assert shares[0] >= 1 / 3 and shares[:2].sum() >= 2 / 3


def test_intervals_are_percentiles_over_resampled_texts():
    relevant, best, chosen = made(3)
    measured = measures(relevant, best, chosen)
    found, again = (intervals(measured, 200) for _ in range(2))
    assert found == again and found.keys() == measured.values().keys()
    # The interval of a mean of independent texts is known: 1.96 standard errors on either side.
    hits = np.take_along_axis(relevant[:, :LABELS], best[:, :1], 1).mean(1)
    error = hits.std() / np.sqrt(TEXTS)
    low, high = found["P@1"]
    assert low < hits.mean() < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_a_comparison_is_paired():
    relevant, best, chosen = made(4)
    same = differences(measures(relevant, best, chosen), measures(relevant, best, chosen), 50)
    assert all(each == (0, 0, 0, 1) for each in same.values())
    # A second model that is right about the first place of a few texts more: certain although the intervals of both overlap.
    better = best.copy()
    wrong = [n for n in range(TEXTS) if relevant[n, :LABELS].any() and not relevant[n, best[n, 0]]][:12]
    for row in wrong:
        label = int(np.flatnonzero(relevant[row, :LABELS])[0])
        others = [each for each in best[row] if each != label]
        better[row] = [label, *others[: best.shape[1] - 1]]
    one, two = measures(relevant, best, chosen), measures(relevant, better, chosen)
    found = differences(one, two, 199)["P@1"]
    assert found.difference == pytest.approx(12 / TEXTS) == pytest.approx(two.values()["P@1"] - one.values()["P@1"])
    assert 0 < found.low < found.difference < found.high and found.p == pytest.approx(2 / 200)
    assert intervals(one, 199)["P@1"].high > intervals(two, 199)["P@1"].low
    back = differences(two, one, 199)["P@1"]
    assert back.difference == -found.difference and back.p == found.p and back.low == pytest.approx(-found.high)
