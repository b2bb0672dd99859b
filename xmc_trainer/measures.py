"""Metrics of a data set's predictions as a whole, with bootstrap intervals, and the comparison of two models.

A decision point says which of a text's k best labels are predicted: the best 1, 3 or 5 ("@1"), or those with at least a
threshold's score ("@threshold", of which the k best can show no more than k). For each point, with tp true positives, p predicted and g
relevant labels:

    micro     P = tp / p, R = tp / g, F1 = 2 tp / (p + g), each count summed over all labels
    macro     the means of the labels' P, R and F1, over the labels that are relevant for some text
    sample    the means of the texts' P, R and F1
    coverage  the share of these labels that are predicted correctly for some text

0 / 0 is 0. micro, macro and coverage also exist for the labels of one frequency bucket alone: "head micro-F1@5".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from xmc_trainer.metrics import correct, ranking_terms

KS = (1, 3, 5)
BUCKETS = ("head", "middle", "tail")
_ROWS = 1 << 16  # texts at once
_KINDS = ("P", "R", "F1")


def buckets_of(label_counts: np.ndarray) -> np.ndarray:
    """Divide labels by frequency into three parts with about a third of all pairs of training text and label each.

    Labels with equally many texts are in the same bucket.

    Args:
        label_counts: training texts per label, int [L].
    Returns: int8 [L], places in BUCKETS; 0 holds the most frequent labels.
    """
    falling = np.sort(label_counts)[::-1]
    filled = np.cumsum(falling)
    least = falling[np.searchsorted(filled, filled[-1] * np.array([1, 2]) / 3)]  # texts of the last label of a bucket
    return (label_counts[:, None] < least).sum(1).astype(np.int8)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) > 0)


def p_r_f1(correct: np.ndarray, predicted: np.ndarray, relevant: np.ndarray) -> dict[str, np.ndarray]:
    """Return {"P", "R", "F1"} of counts of any shape."""
    values = _ratio(correct, predicted), _ratio(correct, relevant), _ratio(2 * correct, predicted + relevant)
    return dict(zip(_KINDS, values))


class LabelCounts(NamedTuple):
    """For each label, int64 or float64 [labels]: how often it is predicted correctly, predicted, and relevant."""

    correct: np.ndarray
    predicted: np.ndarray
    relevant: np.ndarray


class Measures:
    """The predictions for a data set's texts, and their metrics.

    Args:
        labels: int [texts, k], best first; -1 for no prediction.
        label_ids, label_counts: the relevant labels of each text, as in `ranking_terms`.
        buckets: int [labels], places in BUCKETS. Labels from there on, which training lacks, are in the last one.
        inverse_propensity: as in `ranking_terms`.
        chosen: bool [texts, k], the labels that a threshold lets through; None for no metrics at a threshold.

    Attributes:
        points: decision point ("1", "3", "5", "threshold") -> predicted labels, bool [texts, k].
        correct: bool [texts, k], whether a label is relevant.
        label_numbers: int [present], the labels that are relevant or among the k best of a text, ascending.
        buckets: int8 [present], their places in BUCKETS.
    """

    def __init__(
        self,
        labels: np.ndarray,
        label_ids: np.ndarray,
        label_counts: np.ndarray,
        *,
        buckets: np.ndarray,
        inverse_propensity: np.ndarray | None = None,
        chosen: np.ndarray | None = None,
    ) -> None:
        labels = np.pad(labels, ((0, 0), (0, max(max(KS) - labels.shape[1], 0))), constant_values=-1)
        texts, given = len(labels), labels >= 0
        self.points = {str(k): given & (np.arange(labels.shape[1]) < k) for k in KS}
        if chosen is not None:
            self.points["threshold"] = given & np.pad(chosen, ((0, 0), (0, labels.shape[1] - chosen.shape[1])))
        self.texts, self.correct = texts, np.zeros(labels.shape, bool)
        self._terms: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        offsets = np.concatenate([[0], np.cumsum(label_counts, dtype=np.int64)])
        for first in range(
            0, texts, _ROWS
        ):  # the terms of all texts at once would take several times the memory of their results
            rows = slice(first, first + _ROWS)
            ids = label_ids[offsets[first] : offsets[min(first + _ROWS, texts)]].astype(np.int64)
            self.correct[rows] = correct(labels[rows].astype(np.int64), ids, label_counts[rows])
            terms = ranking_terms(labels[rows], ids, label_counts[rows], KS, inverse_propensity)
            for name, pair in terms.items():
                every = self._terms.setdefault(name, (np.empty(texts), np.empty(texts)))
                every[0][rows], every[1][rows] = pair
        for point, mask in self.points.items():
            values = p_r_f1((mask & self.correct).sum(1), mask.sum(1), label_counts)
            self._terms |= {f"sample-{kind}@{point}": (value, np.ones(texts)) for kind, value in values.items()}
        # Labels that are neither predicted nor relevant do not matter, so the others are numbered anew.
        self.label_numbers = np.unique(np.concatenate([label_ids, labels[given]]))
        self._relevant = self._numbered(label_ids), np.repeat(np.arange(texts, dtype=np.int32), label_counts)
        numbered = self._numbered(np.where(given, labels, self.label_numbers[0]))
        self._pairs = {
            point: [(numbered[each], np.nonzero(each)[0].astype(np.int32)) for each in (mask & self.correct, mask)]
            for point, mask in self.points.items()
        }
        every_bucket = np.append(buckets, np.int8(len(BUCKETS) - 1))
        self.buckets = every_bucket[np.minimum(self.label_numbers, len(buckets))]

    def _numbered(self, labels: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.label_numbers, labels).astype(np.int32)

    def label_counts(self, weights: np.ndarray | None = None) -> dict[str, LabelCounts]:
        """Return decision point -> counts of `label_numbers`. Args: weights: float64 [texts], how often each text counts; None for once."""

        def count(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return np.bincount(labels, None if weights is None else weights[rows], len(self.label_numbers))

        relevant = count(*self._relevant)
        return {
            point: LabelCounts(count(*correct), count(*predicted), relevant)
            for point, (correct, predicted) in self._pairs.items()
        }

    def values(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return every metric, 0 to 1, but those over labels of which none is relevant. Args: weights: as in `label_counts`."""
        weights_of_sums = np.ones(self.texts) if weights is None else weights
        out: dict[str, float] = {}
        for name, (above, below) in self._terms.items():
            out[name] = float(_ratio(weights_of_sums @ above, weights_of_sums @ below))
        groups = {"": np.ones(len(self.label_numbers), bool)}
        groups |= {f"{bucket} ": self.buckets == number for number, bucket in enumerate(BUCKETS)}
        for point, counts in self.label_counts(weights).items():
            for group, members in groups.items():
                if counts.relevant[members].any():
                    found = _label_metrics(LabelCounts(*(count[members] for count in counts)))
                    out |= {f"{group}{name}@{point}": value for name, value in found.items()}
        return out

    def bucket_sizes(self) -> dict[str, tuple[int, int]]:
        """Return bucket -> (its relevant labels, their pairs with texts)."""
        relevant = np.bincount(self._relevant[0], minlength=len(self.label_numbers))
        groups = {name: relevant[(self.buckets == number) & (relevant > 0)] for number, name in enumerate(BUCKETS)}
        return {name: (len(group), int(group.sum())) for name, group in groups.items()}


def _label_metrics(counts: LabelCounts) -> dict[str, float]:
    of_relevant = LabelCounts(*(count[counts.relevant > 0] for count in counts))
    out = {f"micro-{kind}": float(value) for kind, value in p_r_f1(*(count.sum() for count in counts)).items()}
    out |= {f"macro-{kind}": float(value.mean()) for kind, value in p_r_f1(*of_relevant).items()}
    return out | {"coverage": float((of_relevant.correct > 0).mean())}


# Bootstrap -------------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """A metric of a second model less that of the first, its 95 % interval, and the p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p: float


def _resamples(texts: int, number: int) -> Iterator[np.ndarray]:
    """Yield how often each text is drawn in `number` samples with replacement, float64 [texts]. Always the same ones."""
    rng = np.random.Generator(np.random.Philox(0))
    for _ in range(number):
        yield np.bincount(rng.integers(0, texts, texts), minlength=texts).astype(np.float64)


def _bootstrap(
    texts: int, number: int, values: Callable[[np.ndarray], dict[str, float]], names: list[str]
) -> dict[str, np.ndarray]:
    """Return name -> values over `number` samples. A metric that a sample has none of counts as 0."""
    found = [values(weights) for weights in _resamples(texts, number)]
    return {name: np.array([each.get(name, 0.0) for each in found]) for name in names}


def intervals(measures: Measures, samples: int) -> dict[str, Interval]:
    """Return the 95 % percentile interval of every metric over bootstrap samples of the texts."""
    found = _bootstrap(measures.texts, samples, measures.values, list(measures.values()))
    return {name: Interval(*np.percentile(values, (2.5, 97.5)).tolist()) for name, values in found.items()}


def differences(first: Measures, second: Measures, samples: int) -> dict[str, Difference]:
    """Compare two models on the same texts, with the same bootstrap samples for both (paired bootstrap).

    p is twice the share of samples in which the difference is not on the observed side of 0, at most 1. With n samples it is at least
    2 / (n + 1).
    """

    def of(weights: np.ndarray | None = None) -> dict[str, float]:
        one, two = first.values(weights), second.values(weights)
        return {name: two[name] - one[name] for name in one if name in two}

    observed = of()
    out = {}
    for name, values in _bootstrap(first.texts, samples, of, list(observed)).items():
        beyond = min((values <= 0).sum(), (values >= 0).sum())
        p = min(1.0, 2 * (1 + float(beyond)) / (samples + 1))
        low, high = np.percentile(values, (2.5, 97.5)).tolist()
        out[name] = Difference(observed[name], low, high, p)
    return out
