"""Evaluate a saved model, or compare two, by default on the test set of its training data.

xmc-trainer evaluate outputs/wordnet/model
xmc-trainer evaluate outputs/wordnet/model dataset_path=/elsewhere data.test_batch_size=512 --json
xmc-trainer evaluate outputs/wordnet/model --threshold fitted --labels labels.csv
xmc-trainer evaluate outputs/one/model outputs/two/model data.test_split=dev    # differences, two less one
torchrun --nproc_per_node 2 launchers/evaluate.py outputs/wordnet/model     # the processes share the labels

Intervals are of 95 per cent over bootstrap samples of the texts. Labels that training lacks count as missed; --gold seen leaves them
out, with the texts that have no others, as the metrics in a training's log do.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xmc_trainer.builders.inputs import require_data
from xmc_trainer.checkpoint.model_config import MODEL_SETTINGS, config_of_model
from xmc_trainer.checkpoint.model_manifest import facts_of_model
from xmc_trainer.commands.prediction_files import require_thresholds, threshold
from xmc_trainer.errors import UserError
from xmc_trainer.files import replacing, require_writable

if TYPE_CHECKING:
    import torch

    from xmc_trainer.config import Config
    from xmc_trainer.data import Corpus
    from xmc_trainer.measures import Difference, Interval, Measures

# Metrics that are printed; --json has all of them.
_RANKING = [f"{kind}@{k}" for kind in ("P", "nDCG", "R", "PSP", "PSnDCG") for k in (1, 3, 5)]
_DECISIONS = ("micro-P", "micro-R", "micro-F1", "macro-P", "macro-R", "macro-F1", "sample-F1", "coverage")
_BUCKET_METRICS = ("micro-R", "micro-F1", "macro-F1", "coverage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="[model] key=value",
        help=f"a second model to compare with, and settings to override: {', '.join(MODEL_SETTINGS)}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all metrics as fractions")
    parser.add_argument("--gold", choices=("all", "seen"), default="all", help="relevant labels to count (default all)")
    parser.add_argument(
        "--threshold",
        type=threshold,
        help="also measure the labels that score at least this, or `fitted` (default: fitted if there are any)",
    )
    parser.add_argument("-k", type=int, help="labels of a text that a threshold can let through (default 20)")
    parser.add_argument(
        "--samples", type=int, default=1000, help="bootstrap samples; 0 for no intervals (default 1000)"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE.csv", help="write counts, P, R and F1 of each label there")
    arguments = parser.parse_intermixed_args()
    settings = [word for word in arguments.settings if "=" in word and not Path(word).is_dir()]
    folders = [Path(word) for word in (arguments.model, *arguments.settings) if word not in settings]
    if len(folders) > 2 or (len(folders) == 2 and arguments.labels):
        parser.error("name one or two models; --labels takes one")
    most = 20 if arguments.k is None else arguments.k
    if most < 1 or arguments.samples < 0 or (len(folders) == 2 and not arguments.samples):
        parser.error("-k must be at least 1, and --samples at least 0; a comparison needs samples")
    configs = [config_of_model(folder, settings) for folder in folders]
    rules = {(each.training.evaluation.A, each.training.evaluation.B, each.data.use_filter_eval) for each in configs}
    if len(rules) > 1:
        raise UserError(
            f"{folders[0]} and {folders[1]}: differ in training.evaluation.A, training.evaluation.B or data.use_filter_eval, by which "
            "metrics are computed; give these settings"
        )
    facts = [facts_of_model(folder) for folder in folders]
    if arguments.k is not None and arguments.threshold is None and not any(each.is_calibrated for each in facts):
        raise UserError(f"-k={arguments.k}: says how many labels a threshold can let through; give a --threshold, too")
    for folder, config, each in zip(folders, configs, facts):
        require_thresholds(folder, each, arguments.threshold)
        require_data(config, folder)
    if arguments.labels:
        require_writable(arguments.labels, "--labels", [".csv"])

    # torch and transformers import slowly; the checks above do not wait for them.
    import torch

    from xmc_trainer import measures
    from xmc_trainer.builders.data import metrics_of
    from xmc_trainer.builders.saved_model import best_of_saved, corpus_of_saved, measures_of
    from xmc_trainer.evaluation import most_popular
    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import joined_ranks

    unseen = arguments.gold == "all"
    config = configs[0]
    device, timeout = torch.device(config.environment.device_name()), config.environment.timeout

    def measured(folder: Path, config: Config, device: torch.device) -> tuple[Measures, Corpus]:
        saved = XMCModel.load(folder, device).saved
        limit = "fitted" if arguments.threshold is None and saved.calibration is not None else arguments.threshold
        corpus = corpus_of_saved(saved, config)
        best = best_of_saved(saved, config, corpus, 5 if limit is None else max(most, 5), device, unseen)
        if limit is None:
            return measures_of(config, corpus, best, unseen), corpus
        chosen = saved.chosen(saved.scores(best.logits), best.labels, limit)
        chosen[:, most:] = False  # the metrics at 5 need more labels than a -k below 5
        return measures_of(config, corpus, best, unseen, chosen), corpus

    with joined_ranks(device, timeout, "environment.timeout_minutes") as own_device:
        found = [measured(folder, config, own_device) for folder, config in zip(folders, configs)]
    if os.environ.get("RANK", "0") != "0":
        return
    first, corpus = found[0]
    title = f"{config.data.test_split}: {first.texts} texts, {corpus.num_labels} labels, per cent"
    if corpus.unseen_labels:
        lost = len(corpus.test_labels(unseen=True).ids) - len(corpus.test_labels().ids)
        how = "count as missed" if unseen else "are left out"
        title += f"; {lost} relevant labels ({corpus.unseen_labels} different ones) that training lacks {how}"
    if len(found) == 2:
        _require_same_texts(corpus, found[1][1], folders)
        second = found[1][0]
        compared = measures.differences(first, second, arguments.samples)
        _print_comparison(title, first, second, compared, arguments.json)
        return
    intervals = measures.intervals(first, arguments.samples) if arguments.samples else {}
    if arguments.labels:
        _write_labels(arguments.labels, first, corpus)
    if arguments.json:
        print(json.dumps(first.values() | ({"intervals": intervals} if intervals else {})))
        return
    _print_metrics(title, first, intervals, most_popular(corpus, metrics_of(config, corpus), unseen))


def _require_same_texts(first: Corpus, second: Corpus, folders: list[Path]) -> None:
    """Raise UserError unless both data sets have the same labels and, for each test text, the same relevant ones."""
    names, others = first.label_ids(), second.label_ids()
    place = {name: number for number, name in enumerate(others)}
    same = place.keys() == set(names) and len(first.test) == len(second.test)
    if same:
        if names != others:
            second = second.reordered(np.array([place[name] for name in names]))
        same = np.array_equal(_pairs(first), _pairs(second))
    if not same:
        raise UserError(
            f"{folders[0]} and {folders[1]}: their test sets differ in texts or labels; name one for both, such as dataset_path=..."
        )


def _pairs(corpus: Corpus) -> np.ndarray:
    """Number the pairs of test row and relevant label, ascending."""
    relevant = corpus.test_labels(unseen=True)
    rows = np.repeat(np.arange(len(corpus.test)), np.diff(relevant.offsets))
    return np.sort(rows * (corpus.num_labels + corpus.unseen_labels) + relevant.ids)


def _write_labels(path: Path, measured: Measures, corpus: Corpus) -> None:
    """Write a row for each label of training that is relevant for a text, or predicted."""
    from xmc_trainer.measures import BUCKETS, p_r_f1

    points = measured.label_counts()
    columns: dict[str, np.ndarray] = {"relevant": points["1"].relevant}
    for point, counts in points.items():
        columns |= {f"predicted@{point}": counts.predicted, f"correct@{point}": counts.correct}
        columns |= {f"{kind}@{point}": value.round(6) for kind, value in p_r_f1(*counts).items()}
    training_texts = corpus.label_counts()
    with replacing(path, newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", "text", "training_texts", "bucket", *columns])
        values = zip(*(column.tolist() for column in columns.values()))
        for number, bucket, row in zip(measured.label_numbers.tolist(), measured.buckets.tolist(), values):
            if number < corpus.num_labels:
                label = corpus.labels[number]
                table.writerow([label["id"], label["text"], training_texts[number], BUCKETS[bucket], *row])


def _print_metrics(title: str, measured: Measures, intervals: dict[str, Interval], baseline: dict[str, float]) -> None:
    from xmc_trainer.metrics import table

    values = measured.values()
    print(title)
    low, high = ({name: interval[side] for name, interval in intervals.items()} for side in (0, 1))
    between = {"  95 % from": low, "  to": high} if intervals else {}
    for kinds in (("P", "PSP"), ("nDCG", "PSnDCG"), ("R",)):
        columns = tuple(name for name in _RANKING if name.split("@")[0] in kinds and name in values)
        print(table({"this model": values} | between | {"most popular labels": baseline}, columns))
    rows: dict[str, dict[str, float]] = {}
    for point in measured.points:
        for name, of in {"": values, " from": low, " to": high}.items():
            if of:
                rows[f"@{point}{name}"] = {kind: of[f"{kind}@{point}"] for kind in _DECISIONS}
    print(table(rows, _DECISIONS))
    point, rows = list(measured.points)[-1], {}
    for bucket, (labels, pairs) in measured.bucket_sizes().items():
        if labels:
            rows[f"{bucket}, {labels} labels, {pairs} pairs, @{point}"] = {
                kind: values[f"{bucket} {kind}@{point}"] for kind in _BUCKET_METRICS
            }
    print(table(rows, _BUCKET_METRICS))


def _print_comparison(
    title: str, first: Measures, second: Measures, found: dict[str, Difference], as_json: bool
) -> None:
    one, two = first.values(), second.values()
    if as_json:
        rows = {name: {"first": one[name], "second": two[name], **each._asdict()} for name, each in found.items()}
        print(json.dumps(rows))
        return
    points = [point for point in first.points if point in second.points]
    names = [name for name in _RANKING if name in found]
    names += [f"{kind}@{point}" for point in points for kind in _DECISIONS]
    names += [
        name
        for name in found
        if name.endswith(f"@{points[-1]}") and name.split("@")[0].split(" ")[-1] in _BUCKET_METRICS and " " in name
    ]
    print(title)
    print(f"{'':24}{'first':>10}{'second':>10}{'difference':>12}{'95 % interval':>20}{'p':>8}")
    for name in names:
        each = found[name]
        interval = f"{100 * each.low:+.2f} to {100 * each.high:+.2f}"
        print(
            f"{name:24}{100 * one[name]:>10.2f}{100 * two[name]:>10.2f}{100 * each.difference:>+12.2f}{interval:>20}{each.p:>8.3f}"
        )
