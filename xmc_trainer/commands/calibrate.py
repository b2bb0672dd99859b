"""Fit probabilities and thresholds of a saved model, and store them with it.

xmc-trainer calibrate outputs/mine/model data.test_split=dev
xmc-trainer calibrate outputs/mine/model data.test_split=dev --method isotonic --thresholds label --average macro
xmc-trainer predict outputs/mine/model texts.txt --threshold fitted -k 20

Use texts that served neither for training nor for the reported metrics. Only the -k best labels of each text count, as in a
prediction; labels that training lacks count as missed. A score is then the probability that the label is right. Before, it is the sigmoid
that `bce` trains, or the margin of `squared_hinge`, which is no probability.

The figures "after" are of texts that were not fitted on: each half of the texts is measured with the fit on the other half. What is
stored is fitted on all of them. `xmc-trainer adjust --keep` removes it, because it changes the scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from xmc_trainer import calibration
from xmc_trainer.builders.inputs import require_data
from xmc_trainer.calibration import Calibration
from xmc_trainer.checkpoint.model_config import MODEL_SETTINGS, config_of_model
from xmc_trainer.checkpoint.model_manifest import require_replaceable
from xmc_trainer.errors import UserError

if TYPE_CHECKING:
    from xmc_trainer.evaluation import Best

_FITS = {"temperature": calibration.fit_temperature, "isotonic": calibration.fit_isotonic}


def fit(
    best: Best, correct: np.ndarray, relevant: np.ndarray, options: argparse.Namespace, num_labels: int
) -> Calibration:
    """Fit on the best labels of some texts. Args: correct: bool [texts, k]; relevant: int [labels], texts of each label."""
    given = best.labels >= 0
    labels, logits, correct = best.labels[given], best.logits[given], correct[given]
    # The thresholds are for scores, which need the fitted probabilities first.
    fitted = _FITS[options.method](logits, correct)
    scores = Calibration(np.zeros(1, np.float32), **fitted).scores(logits)
    pairs = scores, correct, labels, relevant, options.average
    if options.thresholds == "label":
        return Calibration(calibration.fit_label_thresholds(*pairs, options.fewest, num_labels), **fitted)
    return Calibration(calibration.fit_threshold(*pairs), **fitted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help=f"override a setting of the model: {', '.join(MODEL_SETTINGS)}"
    )
    parser.add_argument("--method", choices=_FITS, default="temperature", help="map from logits to probabilities")
    parser.add_argument(
        "--thresholds", choices=("one", "label"), default="one", help="one for all labels, or one per label"
    )
    parser.add_argument(
        "--average", choices=("micro", "macro"), default="micro", help="F1 that the thresholds maximise"
    )
    parser.add_argument(
        "--fewest",
        type=int,
        help="with --thresholds label: labels that are relevant for fewer texts share the threshold of all labels (default 5)",
    )
    parser.add_argument("-k", type=int, default=20, help="labels per text to fit on (default 20)")
    options = parser.parse_intermixed_args()
    if options.fewest is None:
        options.fewest = 5
    elif options.thresholds == "one":
        parser.error("--fewest: applies to --thresholds label only")
    if options.k < 1 or options.fewest < 1:
        parser.error("-k and --fewest: must be at least 1")
    config = config_of_model(options.model, options.settings)
    require_replaceable(options.model)
    require_data(config, options.model)

    # torch and transformers import slowly; the checks above do not wait for them.
    import torch

    from xmc_trainer.builders.saved_model import best_of_saved, corpus_of_saved, measures_of
    from xmc_trainer.checkpoint.saved_model import replace_model
    from xmc_trainer.evaluation import Best
    from xmc_trainer.model import XMCModel

    device = torch.device(config.environment.device_name())
    saved = XMCModel.load(options.model, device).saved
    corpus = corpus_of_saved(saved, config)
    if len(corpus.test_rows(unseen=True)) < 2:
        raise UserError(f"{options.model}: two halves need at least 2 texts; name a larger data.test_split")
    best = best_of_saved(saved, config, corpus, options.k, device, unseen=True)

    def measured(scores: np.ndarray, chosen: np.ndarray) -> list[float]:
        found = measures_of(config, corpus, best, unseen=True, chosen=chosen)
        given = best.labels >= 0
        error = calibration.calibration_error(scores[given], found.correct[:, : scores.shape[1]][given])
        values = found.values()
        return [error, values["micro-F1@threshold"], values["macro-F1@threshold"]]

    every = measures_of(config, corpus, best, unseen=True)
    correct = every.correct[:, : best.labels.shape[1]]
    relevant = corpus.test_labels(unseen=True).rows(corpus.test_rows(unseen=True))
    counted = saved.head.num_labels + corpus.unseen_labels

    def fit_on(rows: np.ndarray) -> Calibration:
        counts = np.bincount(relevant.rows(rows).ids, minlength=counted)
        part = Best(best.labels[rows], best.logits[rows])
        return fit(part, correct[rows], counts, options, saved.head.num_labels)

    texts = len(best.labels)
    halves = np.array_split(np.random.Generator(np.random.Philox(0)).permutation(texts), 2)
    scores, chosen = np.empty(best.logits.shape, np.float32), np.empty(best.logits.shape, bool)
    for own, other in (halves, halves[::-1]):
        fitted = fit_on(other)
        scores[own] = fitted.scores(best.logits[own])
        chosen[own] = fitted.chosen(scores[own], best.labels[own])
    # Without a calibration, both losses separate relevant from other labels at a logit of 0.
    is_bce = saved.head.loss_name == "bce"
    before = measured(expit(best.logits), best.logits >= 0)
    after, kept = measured(scores, chosen), fit_on(np.arange(texts))

    def change(copy: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        kept.save(copy)
        return {}

    replace_model(saved, change)
    print(f"{texts} texts, {best.labels.shape[1]} best labels of each, per cent; stored in {options.model}")
    print(f"{'':24}{'before':>10}{'after':>10}")
    for name, one, two in zip(("calibration error (ECE)", "micro-F1", "macro-F1"), before, after):
        first = f"{100 * one:.2f}" if is_bce or name != "calibration error (ECE)" else "-"
        print(f"{name:24}{first:>10}{100 * two:>10.2f}")
    low, high = kept.thresholds.min(), kept.thresholds.max()
    print(
        f"before: labels with {'a score of 0.5' if is_bce else 'a margin of 0'} or more; after: "
        f"{f'{low:.3f}' if low == high else f'{low:.3f} to {high:.3f}, by label,'} or more"
    )
