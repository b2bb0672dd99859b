"""The metrics against pyxclib's definitions, by hand and by independent dense code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp

from tests.data_helpers import instance, tiny_tokenizer, write_lf
from xmc_trainer.data import load_corpus, open_source
from xmc_trainer.evaluation import most_popular
from xmc_trainer.metrics import RankingMetrics, inverse_propensity, table


def test_metrics_worked_out_by_hand():
    metrics = RankingMetrics(np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), ks=(1, 3))
    # Text 0 has labels 1 and 5: a hit on the second place. Text 1 has label 0: a hit on the first.
    metrics.add(np.array([[2, 5, 0]]), np.array([1, 5]), np.array([2]))
    metrics.add(np.array([[0, 1, 2]]), np.array([0]), np.array([1]))
    result = metrics.result()
    assert result["P@1"] == pytest.approx(1 / 2)
    assert result["P@3"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert result["R@3"] == pytest.approx((1 / 2 + 1) / 2)
    dcg = 1 / math.log2(3)
    assert result["nDCG@1"] == pytest.approx(1 / 2)
    assert result["nDCG@3"] == pytest.approx((dcg / (1 + dcg) + 1) / 2)
    assert result["PSP@1"] == pytest.approx((0 + 1) / (32 + 1))
    assert result["PSP@3"] == pytest.approx((32 + 1) / (32 + 2 + 1))
    assert result["PSnDCG@3"] == pytest.approx((32 * dcg / (1 + dcg) + 1) / ((32 + 2 * dcg) / (1 + dcg) + 1))


def oracle(scores: np.ndarray, relevant: sp.csr_matrix, weight: np.ndarray, k: int) -> dict[str, float]:
    """Compute pyxclib's definitions on dense rows, one text at a time."""
    y = relevant.toarray()
    sums = dict.fromkeys(("P", "R", "nDCG", "psp", "psp_best", "psn", "psn_best"), 0.0)
    for row in range(len(y)):
        top = np.argsort(-scores[row], kind="stable")[:k]
        best = np.argsort(-(y[row] * weight), kind="stable")[:k]
        number = int(y[row].sum())
        ideal = sum(1 / math.log2(i + 2) for i in range(min(k, number))) if number else 1.0
        sums["P"] += y[row, top].sum() / k
        sums["R"] += y[row, top].sum() / max(number, 1)
        for name, order in (("", top), ("_best", best)):
            gains = y[row, order] * weight[order]
            sums["psp" + name] += gains.sum() / k
            sums["psn" + name] += sum(g / math.log2(i + 2) for i, g in enumerate(gains)) / ideal
        sums["nDCG"] += sum(y[row, label] / math.log2(i + 2) for i, label in enumerate(top)) / ideal
    out = {name: sums[name] / len(y) for name in ("P", "R", "nDCG")}
    return out | {"PSP": sums["psp"] / sums["psp_best"], "PSnDCG": sums["psn"] / sums["psn_best"]}


@pytest.mark.parametrize("labels, density", [(7, 0.3), (400, 0.01), (400, 0.2)])
def test_against_dense_definitions(labels, density):
    rng = np.random.default_rng(labels)
    texts = 83
    relevant = sp.random(texts, labels, density, format="csr", rng=rng)
    relevant.data[:] = 1
    relevant = sp.csr_matrix(relevant.multiply(np.arange(texts)[:, None] % 9 > 0))  # every ninth text has no label
    relevant.eliminate_zeros()
    relevant.sort_indices()
    scores = rng.normal(size=(texts, labels)) + relevant.toarray()
    train_counts = rng.integers(0, 500, labels)
    weight = inverse_propensity(train_counts, 10_000, 0.55, 1.5)
    metrics = RankingMetrics(weight)
    predicted = np.argsort(-scores, kind="stable", axis=1)[:, :5]
    for rows in np.array_split(np.arange(texts), 4):
        part = relevant[rows]
        metrics.add(predicted[rows], part.indices, np.diff(part.indptr))
    result = metrics.result()
    for k in (1, 3, 5):
        for name, value in oracle(scores, relevant, weight, k).items():
            assert result[f"{name}@{k}"] == pytest.approx(value, abs=1e-9), (name, k)


def test_inverse_propensity_by_hand():
    n, a, b = 1000, 0.55, 1.5
    got = inverse_propensity(np.array([0, 10]), n, a, b)
    c = (math.log(n) - 1) * 2.5**a
    assert got == pytest.approx([1 + c / 1.5**a, 1 + c / 11.5**a])
    # Jain et al. write the propensity itself: 1 / (1 + C exp(-A log(N_l + B))).
    assert 1 / got[1] == pytest.approx(1 / (1 + c * math.exp(-a * math.log(10 + b))))


def test_propensities_are_at_most_one():
    counts = np.array([0, 1, 10**9])
    for texts in (0, 1, 2, 3, 10**9):
        for a, b in ((0.0, 0.001), (10.0, 0.001), (10.0, 1000.0), (0.55, 1.5)):  # the bounds of the settings
            weight = inverse_propensity(counts, texts, a, b)
            assert np.isfinite(weight).all() and (weight >= 1).all() and (np.diff(weight) <= 0).all()
    assert inverse_propensity(counts, 2, 0.55, 0.001).tolist() == [1, 1, 1]
    for a, b in ((math.nan, 1.5), (0.55, 0.0), (0.55, math.nan), (math.inf, 1.5), (-1.0, 1.5)):
        with pytest.raises(ValueError, match="must be finite, a at least 0"):
            inverse_propensity(counts, 10, a, b)


def test_missing_predictions_count_as_wrong():
    metrics = RankingMetrics(np.ones(4))
    metrics.add(np.array([[3, -1, -1, -1, -1]]), np.array([0, 3]), np.array([2]))
    result = metrics.result()
    assert result["P@1"] == 1 and result["P@5"] == pytest.approx(1 / 5) and result["PSP@3"] == pytest.approx(1 / 2)


def test_places_beyond_the_labels_count_as_wrong():
    few, padded = RankingMetrics(), RankingMetrics()
    few.add(np.array([[1, 0]]), np.array([0]), np.array([1]))
    padded.add(np.array([[1, 0, -1, -1, -1]]), np.array([0]), np.array([1]))
    assert few.result() == padded.result() and few.result()["P@5"] == pytest.approx(1 / 5)


def test_no_texts_are_an_error():
    with pytest.raises(ValueError, match="no texts"):
        RankingMetrics().result()


def test_table_is_in_per_cent():
    text = table({"ours": {"P@1": 0.5, "P@3": 0.25, "P@5": 0.125}, "floor": {"P@1": 0.01, "P@3": 0.0, "P@5": 0.0}})
    assert text.splitlines()[1].split() == ["ours", "50.00", "25.00", "12.50"] and "PSP" not in text


def test_the_most_popular_labels_leave_out_filter_pairs(tmp_path):
    train = [instance("w0", [0, 1, 2]), instance("w1", [0, 1]), instance("w2", [0])]
    write_lf(tmp_path, train, [instance("w3", [1, 2]), instance("w4", [0])])
    found = {}
    for filtered in (False, True):
        (tmp_path / "filter_labels_test.txt").write_text("0 0\n0 1\n")
        source = open_source(None, tmp_path, is_lf_data=True, use_filter_eval=filtered)
        corpus = load_corpus(source, tiny_tokenizer(), max_len=8, cache_dir=tmp_path / "cache", progress=False)
        found[filtered] = most_popular(corpus, RankingMetrics())
    # Text 0 is ranked 0, 1, 2; filtered it is 2 alone. Text 1 is ranked 0, 1, 2.
    assert (found[False]["P@1"], found[True]["P@1"]) == (0.5, 1)
    assert (found[False]["P@3"], found[True]["P@3"]) == pytest.approx((1 / 2, 1 / 3))
