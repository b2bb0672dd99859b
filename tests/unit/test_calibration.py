"""Probabilities that hold, and thresholds against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from xmc_trainer.calibration import (
    FILE,
    Calibration,
    calibration_error,
    fit_isotonic,
    fit_label_thresholds,
    fit_temperature,
    fit_threshold,
)


def test_the_temperature_of_known_probabilities_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=40_000).astype(np.float32) * 3
    correct = rng.random(40_000) < expit(logits / 2.5)
    fitted = Calibration(np.zeros(1, np.float32), **fit_temperature(logits, correct))
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert calibration_error(fitted.scores(logits), correct) < 0.01 < 0.1 < calibration_error(expit(logits), correct)


def test_isotonic_follows_any_ascending_curve():
    rng = np.random.default_rng(1)
    logits = rng.uniform(-2, 2, 40_000).astype(np.float32)
    truth = np.where(logits > 0.5, 0.9, 0.2)
    correct = rng.random(40_000) < truth
    fitted = Calibration(np.zeros(1, np.float32), **fit_isotonic(logits, correct))
    probabilities = fitted.scores(np.sort(logits))
    assert probabilities.dtype == np.float32 and (np.diff(probabilities) >= 0).all()
    assert np.abs(fitted.scores(np.float32([-9, -1, 0.2, 0.8, 9])) - [0.2, 0.2, 0.2, 0.9, 0.9]).max() < 0.25
    assert calibration_error(fitted.scores(logits), correct) < 0.01


def test_isotonic_gives_equal_logits_one_probability():
    rng = np.random.default_rng(2)
    for _ in range(30):
        logits = rng.integers(-3, 4, 40).astype(np.float32)
        correct = rng.random(40) < expit(logits)
        fitted = fit_isotonic(logits, correct)
        # A step holds whole levels, and its probability is the share of its pairs that are right.
        levels = np.unique(logits)
        oracle = IsotonicRegression().fit(logits, correct).predict(levels)
        assert (np.diff(fitted["logits"]) > 0).all() and fitted["probabilities"] == pytest.approx(np.unique(oracle))
        steps = [logits[np.isin(logits, levels[oracle == value])].mean() for value in np.unique(oracle)]
        assert fitted["logits"] == pytest.approx(steps)
        order = rng.permutation(40)
        again = fit_isotonic(logits[order], correct[order])
        assert all(again[name] == pytest.approx(fitted[name]) for name in fitted)


def test_the_calibration_error_by_hand():
    probabilities = np.array([0.1, 0.12, 0.95, 1.0])  # two bins: 0.1 and 0.12; 0.95 and 1
    assert calibration_error(probabilities, np.array([0, 1, 1, 0])) == pytest.approx(
        (abs(0.22 - 1) + abs(1.95 - 1)) / 4
    )


def pairs(seed: int, texts: int = 9, labels: int = 5, k: int = 3):
    """Return scores with ties, correct, labels of the k best of each text, and relevant texts per label."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (texts, labels)).astype(np.float32) / 8
    relevant = rng.random((texts, labels + 1)) < 0.35  # training lacks the last label
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    rows = np.arange(texts)[:, None]
    return scores[rows, best].ravel(), relevant[rows, best].ravel(), best.ravel(), relevant.sum(0)


def f1(thresholds, scores, correct, labels, relevant, average) -> float:
    """Compute the F1 of a threshold per label."""
    kept = scores >= np.asarray(thresholds)[labels]
    tp, p = (np.bincount(labels[each], minlength=len(relevant)) for each in (kept & correct, kept))
    if average == "micro":
        return 2 * tp.sum() / (p.sum() + relevant.sum())
    used = relevant > 0
    return float(np.mean(2 * tp[used] / (p[used] + relevant[used])))


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_thresholds_are_the_best_of_all(average):
    for seed in range(25):
        given = pairs(seed)
        levels = np.float32(np.arange(10) / 8 - 0.05)
        (one,) = found = fit_threshold(*given, average)
        assert found.dtype == np.float32 and found.shape == (1,)
        reached = f1([one] * 5, *given, average)
        assert reached == pytest.approx(max(f1([level] * 5, *given, average) for level in levels)), seed
        each = fit_label_thresholds(*given, average, 0, 5)
        assert each.dtype == np.float32 and each.shape == (5,)
        every = max(f1(levels, *given, average) for levels in itertools.product(levels[::2], repeat=5))
        assert f1(each, *given, average) >= max(every, reached) - 1e-9, seed


def test_rare_labels_share_the_common_threshold():
    given = pairs(3, texts=40)
    relevant = given[3]
    limit = int(np.median(relevant[:5]))
    for average in ("micro", "macro"):
        common, each = fit_threshold(*given, average)[0], fit_label_thresholds(*given, average, limit, 5)
        assert (each[relevant[:5] < limit] == common).all() and len({*each.tolist()}) > 1
        assert f1(each, *given, average) >= f1([common] * 5, *given, average)
        assert (fit_label_thresholds(*given, average, 10_000, 5) == common).all()


def test_a_file_is_read_back_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    logits, correct = rng.normal(size=50).astype(np.float32), rng.random(50) < 0.5
    for fitted in (fit_temperature(logits, correct), fit_isotonic(logits, correct)):
        written = Calibration(np.float32([0.1, 0.5, 0.3]), **fitted)
        written.save(tmp_path)
        found = Calibration.load(tmp_path / FILE, 3)
        np.testing.assert_array_equal(found.scores(logits), written.scores(logits))
        chosen = found.chosen(np.float32([[0.4, 0.4], [0.4, 0.05]]), np.array([[1, 2], [0, 0]]))
        assert chosen.tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="has 3 thresholds for 7 labels"):
        Calibration.load(tmp_path / FILE, 7)
    Calibration(np.float32([0.5])).save(tmp_path)
    with pytest.raises(ValueError, match="holds thresholds, which is no calibration"):
        Calibration.load(tmp_path / FILE, 7)
