"""Ranking metrics of extreme classification, as defined by the Extreme Classification Repository's pyxclib.

For a text with relevant labels Y, predictions p_1, p_2, ... and weights q_l (1, or the inverse propensity):

    P@k    = mean over texts of (1/k) sum_{i<=k} [p_i in Y]
    R@k    = mean of (1/|Y|) sum_{i<=k} [p_i in Y]
    nDCG@k = mean of (sum_{i<=k} [p_i in Y] / log2(i+1)) / (sum_{i<=min(k,|Y|)} 1 / log2(i+1))
    PSP@k, PSnDCG@k: P@k and nDCG@k with the terms weighted by q_{p_i}, divided by the score of the best possible
    ranking (relevant labels by descending q). This is a ratio of means, not a mean of ratios.
"""

from __future__ import annotations

import math

import numpy as np


def inverse_propensity(label_counts: np.ndarray, texts: int, a: float, b: float) -> np.ndarray:
    """Compute 1 / propensity of each label (Jain et al., KDD 2016): 1 + C (n_l + B)^-A, C = (log N - 1)(B + 1)^A.

    For N < e, C would be negative and propensities above 1, so C is set to 0.

    Args:
        label_counts: n_l, training texts per label, [L].
        texts: N, the number of training texts.
        a: A >= 0.
        b: B > 0.
    Returns: float64 [L], finite and at least 1. Raises ValueError for invalid constants.
    """
    if not (0 <= a < math.inf and 0 < b < math.inf):
        raise ValueError(f"a={a}, b={b}: must be finite, a at least 0 and b above 0")
    c = max(math.log(max(texts, 1)) - 1, 0.0) * (b + 1) ** a
    return 1 + c * (np.asarray(label_counts, dtype=np.float64) + b) ** -a


def correct(predicted: np.ndarray, label_ids: np.ndarray, label_counts: np.ndarray) -> np.ndarray:
    """Tell which predictions are relevant, bool [B, n].

    Args:
        predicted: int64 [B, n], label ids; -1 for no prediction.
        label_ids: int64 [sum of label_counts], the relevant labels, text by text.
        label_counts: int64 [B].
    """
    rows = np.arange(len(label_counts))
    width = max(label_ids.max(initial=0), predicted.max(initial=0)) + 1
    keys = label_ids + np.repeat(rows, label_counts) * width
    return np.isin(predicted + rows[:, None] * width, keys) & (predicted >= 0)


def ranking_terms(
    predicted: np.ndarray,
    label_ids: np.ndarray,
    label_counts: np.ndarray,
    ks: tuple[int, ...] = (1, 3, 5),
    inverse_propensity: np.ndarray | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the terms of each ranking metric: name -> two arrays, float64 [B]. The metric is the ratio of their sums.

    Args:
        predicted: int [B, n], label ids, best first; -1 for no prediction. Columns after the largest k are ignored, missing
            ones count as no prediction.
        label_ids: int [sum of label_counts], the distinct relevant labels, text by text.
        label_counts: int [B], the number of relevant labels of each text.
        inverse_propensity: float64 [labels], for PSP and PSnDCG; None leaves them out.
    """
    k, rows = max(ks), len(label_counts)
    predicted = np.asarray(predicted, dtype=np.int64)[:, :k]
    predicted = np.pad(predicted, ((0, 0), (0, k - predicted.shape[1])), constant_values=-1)
    label_ids, counts = np.asarray(label_ids, dtype=np.int64), np.asarray(label_counts, dtype=np.int64)
    relevant = correct(predicted, label_ids, counts)
    discount = 1 / np.log2(np.arange(k) + 2)
    ideal = np.concatenate([[1.0], np.cumsum(discount)])  # [n]: best DCG of n labels; 1 for n = 0 avoids 0 / 0
    norm = ideal[np.minimum(counts[:, None], np.arange(1, k + 1))]
    ones = np.ones((rows, k))
    found = {
        "P": (np.cumsum(relevant, 1) / np.arange(1, k + 1), ones),
        "nDCG": (np.cumsum(relevant * discount, 1) / norm, ones),
        "R": (np.cumsum(relevant, 1) / np.maximum(counts, 1)[:, None], ones),
    }
    if inverse_propensity is not None:
        gain = relevant * inverse_propensity[np.maximum(predicted, 0)]
        best = _best_gains(inverse_propensity[label_ids], counts, k)
        found["PSP"] = np.cumsum(gain, 1), np.cumsum(best, 1)
        found["PSnDCG"] = np.cumsum(gain * discount, 1) / norm, np.cumsum(best * discount, 1) / norm
    return {f"{name}@{k}": (above[:, k - 1], below[:, k - 1]) for name, (above, below) in found.items() for k in ks}


def _best_gains(weight: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest weights of each text's relevant labels, float64 [B, k], descending, padded with 0."""
    row_of = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-weight, row_of))
    place = np.arange(len(weight)) - np.repeat(np.cumsum(counts) - counts, counts)
    best = np.zeros((len(counts), k))
    kept = place < k
    best[row_of[kept], place[kept]] = weight[order][kept]
    return best


class RankingMetrics:
    """Accumulates batches of predictions. `result` returns the metrics as fractions in [0, 1].

    Args:
        inverse_propensity: float64 [labels], for PSP and PSnDCG; None leaves them out.
    """

    def __init__(self, inverse_propensity: np.ndarray | None = None, ks: tuple[int, ...] = (1, 3, 5)) -> None:
        self.ks, self.inverse_propensity = ks, inverse_propensity
        self.texts = 0
        self._sums: dict[str, np.ndarray] = {}

    @property
    def k(self) -> int:
        """The number of predictions needed per text."""
        return max(self.ks)

    def add(self, predicted: np.ndarray, label_ids: np.ndarray, label_counts: np.ndarray) -> None:
        """Add one batch; for the arguments see `ranking_terms`."""
        self.texts += len(label_counts)
        terms = ranking_terms(predicted, label_ids, label_counts, self.ks, self.inverse_propensity)
        for name, (above, below) in terms.items():
            self._sums[name] = self._sums.get(name, 0) + np.array([above.sum(), below.sum()])

    def result(self) -> dict[str, float]:
        """Return {"P@1": ..., "nDCG@1": ..., "R@1": ..., "PSP@1": ..., "PSnDCG@1": ..., ...} for every k."""
        if not self.texts:
            raise ValueError("no texts were added")
        return {name: float(above / below) if below else 0.0 for name, (above, below) in self._sums.items()}


def table(rows: dict[str, dict[str, float]], columns: tuple[str, ...] = ()) -> str:
    """Format the metrics of several models as a text table in per cent. `columns` defaults to P and PSP at 1, 3, 5."""
    first = next(iter(rows.values()))
    columns = columns or tuple(f"{name}@{k}" for name in ("P", "PSP") for k in (1, 3, 5) if f"{name}@{k}" in first)
    width = max(len(name) for name in rows)
    widths = {column: max(8, len(column) + 2) for column in columns}
    lines = [" " * width + "".join(f"{column:>{widths[column]}}" for column in columns)]
    for name, metrics in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{100 * metrics[column]:{widths[column]}.2f}" for column in columns))
    return "\n".join(lines)
