"""Calibration: from logits to probabilities that hold, and from scores to decisions. Stored beside a model's weights.

Both are fitted on texts that were not used in training, and on the k best labels of each text, because predictions show no
others. A map to probabilities never changes the order of the labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import expit

FILE = "calibration.safetensors"
_BINS = 15  # of the calibration error, as in Guo et al., On calibration of modern neural networks, 2017


@dataclass(frozen=True)
class Calibration:
    """What `xmc-trainer calibrate` stores with a model.

    Attributes:
        temperature: float32 [1]: the probability of a logit is sigmoid(logit / temperature). None: see below.
        logits, probabilities: float32 [n], ascending: the probability is interpolated between these points, and constant beyond
            them. None with a temperature.
        thresholds: float32 [1] for all labels or [L]; a label is predicted if its probability is at least that.
    """

    thresholds: np.ndarray
    temperature: np.ndarray | None = None
    logits: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities, float32, for logits of any shape."""
        if self.temperature is not None:
            return expit(logits / self.temperature)
        assert self.logits is not None and self.probabilities is not None
        return np.interp(logits, self.logits, self.probabilities).astype(np.float32)

    def chosen(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Tell which labels are predicted, bool [texts, k]. Args: scores, labels: [texts, k]; label numbers from 0."""
        return scores >= self.thresholds[labels if len(self.thresholds) > 1 else np.zeros_like(labels)]

    def save(self, folder: Path) -> None:
        save_file({name: value for name, value in vars(self).items() if value is not None}, folder / FILE)

    @classmethod
    def load(cls, path: Path, labels: int) -> Calibration:
        """Read a file of `save`. Raises ValueError unless it fits a model with `labels` labels."""
        found = load_file(path)
        kinds = ({"thresholds", "temperature"}, {"thresholds", "logits", "probabilities"})
        if found.keys() not in kinds or any(
            x.dtype != np.float32 or x.ndim != 1 or not np.isfinite(x).all() for x in found.values()
        ):
            raise ValueError(f"{path.name} holds {', '.join(sorted(found))}, which is no calibration")
        if len(found["thresholds"]) not in (1, labels):
            raise ValueError(f"{path.name} has {len(found['thresholds'])} thresholds for {labels} labels")
        return cls(**found)


# Probabilities ---------------------------------------------------------------------------------------------------------


def fit_temperature(logits: np.ndarray, correct: np.ndarray) -> dict[str, np.ndarray]:
    """Fit the temperature with the largest likelihood. Args: logits, correct (bool): [pairs]."""
    from scipy.optimize import minimize_scalar  # slow, and needed to fit alone

    def loss(log_temperature: float) -> float:
        z = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, z) - z * correct))

    found = minimize_scalar(loss, bounds=(-6, 6), method="bounded")
    return {"temperature": np.exp([found.x]).astype(np.float32)}


def fit_isotonic(logits: np.ndarray, correct: np.ndarray) -> dict[str, np.ndarray]:
    """Fit the ascending step function with the least squared error; its steps become points at their mean logits."""
    from scipy.optimize import isotonic_regression  # slow, and needed to fit alone

    # Equal logits, as of a text that occurs twice, get one probability whatever their order.
    levels, level, pairs = np.unique(logits, return_inverse=True, return_counts=True)
    found = isotonic_regression(np.bincount(level, correct) / pairs, weights=pairs)
    starts = found.blocks[:-1]
    means = np.add.reduceat(levels.astype(np.float64) * pairs, starts) / np.add.reduceat(pairs, starts)
    return {"logits": means.astype(np.float32), "probabilities": found.x[starts].astype(np.float32)}


def calibration_error(probabilities: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error over 15 bins of equal width. Args: [pairs]."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(bins, probabilities - correct, _BINS)
    return float(np.abs(gap).sum() / len(probabilities))


# Thresholds ------------------------------------------------------------------------------------------------------------


def fit_threshold(
    scores: np.ndarray, correct: np.ndarray, labels: np.ndarray, relevant: np.ndarray, average: str
) -> np.ndarray:
    """Fit the threshold for all labels that gives the largest F1.

    Args:
        scores, correct (bool), labels: [pairs], the k best labels of all texts.
        relevant: int [labels], texts that each label is relevant for; longer than `labels` reach if training lacks some.
        average: "micro" or "macro", as in `xmc_trainer.measures`.
    Returns: float32 [1], halfway between two scores.
    """
    order = np.argsort(-scores, kind="stable")
    scores, correct, labels = scores[order], correct[order], labels[order]
    if average == "micro":
        value = 2 * np.cumsum(correct) / (np.arange(1, len(scores) + 1) + relevant.sum())
    else:
        # Lowering the threshold past a pair changes the F1 of its label alone.
        by_label = np.argsort(labels, kind="stable")
        f1 = _f1_of_label(correct[by_label], labels[by_label], relevant)
        first = np.diff(labels[by_label], prepend=-1) > 0
        change = np.empty(len(scores))
        change[by_label] = f1 - np.where(first, 0, np.roll(f1, 1))
        value = np.cumsum(change)
    last = np.append(scores[1:] < scores[:-1], True)  # of equal scores
    best = np.array([np.argmax(np.where(last, value, -1))])
    return _halfway(scores, best, np.minimum(best + 1, len(scores) - 1))


def _halfway(scores: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the means of scores at the places `above` and `below`, float32; the upper one where they have no float between them."""
    middle = ((scores[above].astype(np.float64) + scores[below]) / 2).astype(np.float32)
    return np.where(middle > scores[below], middle, scores[above])


def _f1_of_label(correct: np.ndarray, labels: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Return, for pairs grouped by label, the F1 of the pair's label if the pairs of its group up to this one are predicted."""
    hits, predicted = _running(correct, labels)
    return 2 * hits / (predicted + relevant[labels])


def _running(correct: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for pairs grouped by label, how many of the group up to each pair are correct, and how many there are."""
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    sizes = np.diff(np.append(starts, len(labels)))
    total = np.cumsum(correct)
    return total - np.repeat(total[starts] - correct[starts], sizes), np.arange(len(labels)) - np.repeat(
        starts, sizes
    ) + 1


def fit_label_thresholds(
    scores: np.ndarray,
    correct: np.ndarray,
    labels: np.ndarray,
    relevant: np.ndarray,
    average: str,
    fewest: int,
    num_labels: int,
) -> np.ndarray:
    """Fit a threshold per label. Labels that are relevant for less than `fewest` texts get that of `fit_threshold`.

    "macro" maximises each label's own F1. "micro" maximises F = 2 tp / (p + g) over all labels together: where F is largest, each label
    maximises 2 tp - F p on its own, and repeating this from any lower F converges (Dinkelbach, 1967).

    Args: as in `fit_threshold`; num_labels: L.
    Returns: float32 [L].
    """
    common = fit_threshold(scores, correct, labels, relevant, average)[0]
    thresholds = np.full(num_labels, common, np.float32)
    order = np.lexsort((-scores, labels))
    order = order[relevant[labels[order]] >= fewest]
    if not len(order):
        return thresholds
    rest = (relevant[labels] < fewest) & (scores >= common)
    scores, correct, labels, rest_correct = scores[order], correct[order], labels[order], correct[rest].sum()
    hits, predicted = _running(correct, labels)
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    sizes = np.diff(np.append(starts, len(labels)))
    same = np.append(np.diff(labels) == 0, False)  # the next pair has the same label
    last = ~same | np.append(scores[1:] < scores[:-1], True)  # of equal scores

    def best_of(value: np.ndarray) -> np.ndarray:
        """Return the place of each label's largest value; of equal ones that with the highest threshold."""
        value = np.where(last, value, -np.inf)
        places = np.flatnonzero(value == np.repeat(np.maximum.reduceat(value, starts), sizes))
        return places[np.diff(labels[places], prepend=-1) > 0]

    if average == "macro":
        best = best_of(2 * hits / (predicted + relevant[labels]))
        good = hits[best] > 0
    else:
        f1, larger = -1.0, 0.0
        while larger > f1:
            f1 = larger
            value = 2 * hits - f1 * predicted
            best = best_of(value)
            good = value[best] > 0
            tp, p = hits[best[good]].sum() + rest_correct, predicted[best[good]].sum() + rest.sum()
            larger = 2 * tp / (p + relevant.sum())
        # Every text of the fit scores below these labels' thresholds.
        thresholds[labels[starts[~good]]] = np.nextafter(scores[starts[~good]], np.float32(np.inf))
    best = best[good]
    thresholds[labels[best]] = _halfway(scores, best, best + same[best])
    return thresholds
