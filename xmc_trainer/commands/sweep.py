"""Train a table of configurations with several seeds each, several runs at a time.

xmc-trainer sweep launchers/sweeps/sidgnd.yaml --jobs 4 dataset_path=./data
xmc-trainer sweep launchers/sweeps/sidgnd.yaml --table dataset_path=./data    # only print the table of finished runs

The YAML file:

    settings: [dataset=sidgnd, training.amp.enabled=true]       # for every run
    seeds: [1, 2, 3]
    rows:
      dense: [model.ffi.use_sparse_layer=false]                 # for this row
      seed's method: []
    splits: [dev, test]         # optional: evaluate each saved model on each data.test_split
    strengths: [0, 0.3]         # optional: and with each model.ffi.logit_adjustment (used only for ranking)

Each run is a process on this machine. Its folder is <output_dir>/<row>-<seed>/, and a .txt file beside it has its
output. Runs are distributed over the GPUs. Finished runs with the same settings are skipped, interrupted runs continue
from their checkpoint, and a run with other settings is never replaced. Missing label clusters are computed first, with
the settings of a row that needs them. The table has mean and standard deviation over the seeds, in per cent. The CSV has
one line per run (and split and strength), with metrics as fractions, settings, commit, device and versions.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, SequenceNode

from xmc_trainer import signals
from xmc_trainer.builders.recipe import require_applied
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.commands.cli import USAGE
from xmc_trainer.config import Config, flatten, load_config, saved_settings, yaml_nodes
from xmc_trainer.config.fields import settings_of
from xmc_trainer.errors import UserError, shown
from xmc_trainer.files import replacing, require_writable, write_text
from xmc_trainer.run_folder import find_checkpoint

METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5")
_FIGURES = "figures.json"  # in the run's folder: evaluations of its saved model
# Log records that are read: event -> {field: allowed types}.
_RECORDS: dict[str, dict[str, Any]] = {
    "start": {"head_bytes": int, "device": str, "torch": str, "version": str, "commit": str},
    "evaluate": {"split": str, "step": int, "seconds": (int, float), "P@1": (int, float)},
    "end": {"seconds": (int, float)},
}
_MAX_FAILURES = 3  # stop after this many failures without a success
_RESERVED = ("training.seed=", "log_fname=", "training.verbose.log_fname=", "training.resume=")


@dataclass(frozen=True)
class EvaluationGrid:
    """Splits and strengths to evaluate each saved model on. If both are empty, the training's own evaluation is used."""

    splits: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)

    def pairs(self, config: Config) -> list[tuple[str, float]]:
        """Return the (split, strength) pairs to evaluate a run on."""
        if not self.splits and not self.strengths:
            return []
        return list(
            product(self.splits or [config.data.test_split], self.strengths or [config.model.ffi.logit_adjustment])
        )


def plan(file: Path, more: list[str]) -> tuple[list[tuple[str, int, list[str]]], EvaluationGrid]:
    """Read a sweep file: (row, seed, `key=value` words) of each run, ordered by seed, and the evaluation grid.

    Args: more: settings for every run, from the command line.
    Raises UserError that names the fault in the file, including invalid settings of a row.
    """
    content = _read_sweep_file(file)
    seeds = [_seed(seed, file) for seed in content.seeds] or [42]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{file}: seeds: must be distinct whole numbers, not {shown(seeds)}")
    names = [re.sub(r"\W+", "_", row) for row in content.rows]
    if len(set(names)) < len(names):
        raise UserError(
            f"{file}: rows: names must differ in more than punctuation, because they name folders; rename one"
        )
    grid = EvaluationGrid(content.splits, [_strength(strength, file) for strength in content.strengths])
    runs = []
    for seed in seeds:
        for (row, own), name in zip(content.rows.items(), names):
            words = [*content.settings, *more, *own]
            try:
                for word in words:
                    if word.startswith(_RESERVED):
                        raise UserError(f"{word}: is set by the sweep; use `seeds` and `rows` instead")
                words = ["training.resume=true", *words, f"training.seed={seed}", f"log_fname={name}-{seed}"]
                splits: list[str | None] = [*grid.splits]
                for split in splits or [None]:  # find errors before anything runs
                    config = load_config([*words, *([] if split is None else [f"data.test_split={split}"])])
                    require_applied(config)
            except UserError as error:
                raise UserError(f"{file}: row {shown(repr(row))}: {error}") from None
            runs.append((row, seed, words))
    return runs, grid


@dataclass
class _SweepFile:
    """The unparsed contents of a sweep file."""

    settings: list[str] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)
    strengths: list[str] = field(default_factory=list)


def _read_sweep_file(file: Path) -> _SweepFile:
    root, content = yaml_nodes.read_file(file, "a sweep"), _SweepFile()
    if isinstance(root, MappingNode):
        for name, node in yaml_nodes.entries(root, str(file)):
            if name not in _SweepFile.__dataclass_fields__:
                raise UserError(
                    f"{yaml_nodes.location(node, str(file))}: {shown(name)}: unknown key; write settings, "
                    "seeds, rows, splits or strengths"
                )
            if name != "rows":
                setattr(content, name, _words(node, name, file))
            elif isinstance(node, MappingNode):
                content.rows = {
                    row: _words(own, f"rows: {shown(row)}", file) for row, own in yaml_nodes.entries(node, str(file))
                }
    if not content.rows:
        raise UserError(f"{file}: has no `rows`; write each as a name and a list of settings")
    return content


def _words(node: Node, name: str, file: Path) -> list[str]:
    if yaml_nodes.is_null(node):
        return []
    if not isinstance(node, SequenceNode):
        place = yaml_nodes.location(node, str(file))
        raise UserError(f"{place}: {name}: must be a list, not a {yaml_nodes.kind(node)}")
    return [yaml_nodes.scalar(word, str(file)) for word in node.value]


def _seed(text: str, file: Path) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise UserError(f"{file}: seeds: must be distinct whole numbers, not {shown(text)}")
    return int(text)


def _strength(text: str, file: Path) -> float:
    domain = settings_of(Config)["model.ffi.logit_adjustment"].domain
    assert domain is not None
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if strength not in domain:
        raise UserError(f"{file}: strengths: must be numbers in {domain.text}, not {shown(text)}")
    return strength


def finished(config: Config) -> list[dict[str, Any]] | None:
    """Return the log records of a finished training with exactly this configuration, else None."""
    return None if _differences(config) else read_log(config.run_folder / "log.jsonl")


def read_log(file: Path) -> list[dict[str, Any]] | None:
    """Return the records of a finished training, from "start" to "end". None if it is missing or not finished.

    The last line may be cut off, if the training was killed while writing. Any other damage raises UserError.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            event = record["event"]
            missing = [
                name for name, kinds in _RECORDS.get(event, {}).items() if not isinstance(record.get(name), kinds)
            ]
            missing += [
                name for name in METRICS if event == "evaluate" and not isinstance(record.get(name, 0.0), (int, float))
            ]
            problem = f"its {event} record has no valid {missing[0]}" if missing else ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            problem = "is not a log record"
        if problem and number == len(lines):
            return None
        if problem:
            raise UserError(
                f"{file}, line {number}: {problem}; the log is damaged, remove {file.parent} and train again"
            )
        records.append(record)
    return records if records and (records[0]["event"], records[-1]["event"]) == ("start", "end") else None


def _differences(config: Config) -> list[str]:
    """List the settings of an existing run in this folder that differ: "name=there, not here". Empty without a run."""
    file = config.run_folder / "config.yaml"
    if not file.is_file():
        return []
    there, here = flatten(saved_settings(file)), flatten(asdict(config))
    here["training.overwrite"] = there.get("training.overwrite")  # applies to a single start and is not saved as true
    return [
        f"{name}={shown(there.get(name))}, not {shown(here.get(name))}"
        for name in here | there
        if there.get(name) != here.get(name)
    ]


def refuse_to_replace(runs: list[list[str]]) -> None:
    """Raise UserError if a run's folder contains the result or checkpoint of a run with other settings."""
    conflicts = []
    for words in runs:
        config = load_config(words)
        differences = _differences(config)
        if differences and (read_log(config.run_folder / "log.jsonl") or find_checkpoint(config.run_folder)):
            conflicts.append(f"{config.run_folder} ({'; '.join(differences[:3])})")
    if conflicts:
        raise UserError(
            f"{len(conflicts)} of the {len(runs)} runs would replace a run with other settings, the first {conflicts[0]}; "
            "set output_dir to another folder, or remove the old runs"
        )


def _saved_evaluations(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """Return the saved evaluations of the run's current model: split -> strength -> metrics."""
    try:
        content = json.loads((config.run_folder / _FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    # Anything that `run_one` did not write is evaluated again.
    if (
        not isinstance(content, dict)
        or content.get("log_sha256") != _digest(config)
        or not isinstance(content.get("figures"), dict)
    ):
        return {}
    return {split: by_strength for split, by_strength in content["figures"].items() if isinstance(by_strength, dict)}


def _digest(config: Config) -> str:
    return hashlib.sha256((config.run_folder / "log.jsonl").read_bytes()).hexdigest()


def results(config: Config, grid: EvaluationGrid) -> list[dict[str, Any]] | None:
    """Return one table entry per evaluation of a run, or None if the run or an evaluation is not finished."""
    log = finished(config)
    if log is None:
        return None
    pairs = grid.pairs(config)
    if not pairs:
        return [log_summary(log)]
    evaluations = _saved_evaluations(config)
    if any(f"{strength:g}" not in evaluations.get(split, {}) for split, strength in pairs):
        return None
    training_values = {name: value for name, value in log_summary(log).items() if name not in METRICS}
    evaluated = [(split, strength, evaluations[split][f"{strength:g}"]) for split, strength in pairs]
    return [
        {"split": split, "strength": strength}
        | {name: metrics[name] for name in METRICS if name in metrics}
        | training_values
        for split, strength, metrics in evaluated
    ]


def run_one(words: list[str], grid: EvaluationGrid) -> None:
    """Train a run unless it is finished, then evaluate its saved model and write figures.json."""
    config = load_config(words)
    if finished(config) is None:
        from xmc_trainer.builders.training import build_trainer

        build_trainer(config).train()
    evaluations = _saved_evaluations(config)
    missing = [
        (split, strength) for split, strength in grid.pairs(config) if f"{strength:g}" not in evaluations.get(split, {})
    ]
    if not missing:
        return
    import torch

    from xmc_trainer.builders.saved_model import corpus_of_saved
    from xmc_trainer.commands.adjust import evaluate_strengths
    from xmc_trainer.model import XMCModel

    device, folder = torch.device(config.environment.device_name()), config.run_folder / "model"
    saved = XMCModel.load(folder, device).saved
    for split, pairs in groupby(missing, key=itemgetter(0)):
        model_config = config_of_model(folder, [f"data.test_split={split}"])
        corpus = corpus_of_saved(saved, model_config)
        by_strength = evaluate_strengths(saved, model_config, corpus, [strength for _, strength in pairs], device)
        evaluations.setdefault(split, {}).update(
            {f"{strength:g}": metrics for strength, metrics in by_strength.items()}
        )
    write_text(config.run_folder / _FIGURES, json.dumps({"log_sha256": _digest(config), "figures": evaluations}) + "\n")


def log_summary(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise a log: last test metrics (0 to 1), head memory in MiB, minutes in total and until the best P@1."""
    start, end = log[0], log[-1]
    tests = [record for record in log if record["event"] == "evaluate" and record["split"] == "test"]
    if not tests:
        raise UserError("a finished run has no evaluation on its test set; train it again")
    best = max(tests, key=lambda record: record["P@1"])
    return {name: tests[-1][name] for name in METRICS if name in tests[-1]} | {
        "head_mib": start["head_bytes"] / 2**20,
        "minutes": end["seconds"] / 60,
        "best_P@1_minutes": best["seconds"] / 60,
        **{name: start[name] for name in ("device", "torch", "version", "commit")},
    }


def table(runs: list[tuple[str, int, dict[str, Any]]]) -> str:
    """Return a Markdown table with one line per row: mean and standard deviation over its seeds."""
    header, *rows = [f"| {' | '.join(cells)} |" for cells in table_cells(runs)]
    return "\n".join([header, "|" + "---|" * (header.count(" | ") + 1), *rows])


def table_cells(runs: list[tuple[str, int, dict[str, Any]]]) -> list[list[str]]:
    """Return the cells of `table`, the header first."""
    shown = [name for name in METRICS if all(name in entry for _, _, entry in runs)]
    lines = [["", "seeds", *shown, "head MiB", "minutes to the best P@1"]]
    for row in dict.fromkeys(row for row, _, _ in runs):
        entries = [entry for name, _, entry in runs if name == row]
        cells = []
        for name in shown:
            values = [100 * entry[name] for entry in entries]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells += [
            f"{entries[0]['head_mib']:.1f}",
            f"{statistics.mean(entry['best_P@1_minutes'] for entry in entries):.1f}",
        ]
        lines.append([row, str(len(entries)), *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the sweep's YAML file")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings for every run; a row's own settings override them"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they are distributed over the GPUs")
    parser.add_argument(
        "--csv", type=Path, help="output file; default: the YAML file's name with .csv, in the current folder"
    )
    parser.add_argument("--table", action="store_true", help="train nothing; print the table of the finished runs")
    parser.add_argument("--run", metavar="GRID", help=argparse.SUPPRESS)  # internal: train one run with `settings`
    options = parser.parse_intermixed_args()
    if options.run:
        run_one(options.settings, EvaluationGrid(**json.loads(options.run)))
        return
    if options.jobs < 1:
        parser.error("--jobs: must be at least 1")
    target = options.csv or Path(options.file.with_suffix(".csv").name)
    require_writable(target, "--csv")
    runs, grid = plan(options.file, options.settings)
    if not options.table:
        every = [words for _, _, words in runs]
        refuse_to_replace(every)
        check_splits(every, grid)
        make_clusters([words for words in every if finished(load_config(words)) is None])
        with signals.deferred():
            train(every, grid, options.file, options.jobs)
    found = [(row, seed, words, results(load_config(words), grid)) for row, seed, words in runs]
    done = [(row, seed, words, entries) for row, seed, words, entries in found if entries is not None]
    if not done:
        where = load_config(runs[0][2]).run_folder.parent
        raise UserError(
            f"{options.file}: none of its {len(runs)} runs in {where} is finished with these settings; give "
            "the settings they were trained with"
        )
    lines: list[dict[str, Any]] = [
        {"row": row, "seed": seed, "settings": " ".join(words)} | entry
        for row, seed, words, entries in done
        for entry in entries
    ]
    with replacing(target, newline="") as file:
        columns = dict.fromkeys(name for line in lines for name in line if name not in ("row", "seed", "settings"))
        writer = csv.DictWriter(file, ["row", "seed", *columns, "settings"])
        writer.writeheader()
        writer.writerows(lines)
    for split in dict.fromkeys(line.get("split") for line in lines):
        if split is not None:
            print(f"{split}:\n")
        own = [line for line in lines if line.get("split") == split]
        print(table([(_row_name(line, grid), line["seed"], line) for line in own]) + "\n")
    print(f"{len(done)} of {len(runs)} runs finished; written to {target}")
    if len(done) < len(runs):
        sys.exit(1)


def _row_name(line: dict[str, Any], grid: EvaluationGrid) -> str:
    return f"{line['row']}, ranked with {line['strength']:g}" if len(grid.strengths) > 1 else line["row"]


def check_splits(runs: list[list[str]], grid: EvaluationGrid) -> None:
    """Raise UserError, before any training, if a split's files are missing."""
    from xmc_trainer.builders.inputs import source_of

    for words in runs:
        for split in grid.splits:
            source_of(load_config([*words, f"data.test_split={split}"]))


def make_clusters(runs: list[list[str]]) -> None:
    """Compute missing label cluster files, each with the settings of the first run that needs it."""
    missing: dict[Path, list[str]] = {}
    for words in runs:
        config = load_config(words)
        if config.needs_clusters and not config.cluster_file.is_file():
            missing.setdefault(config.cluster_file, words)
    for file, words in missing.items():
        print(f"{file}: ", end="", flush=True)
        done = subprocess.run([sys.executable, "-m", "xmc_trainer", "clusters", *words], capture_output=True, text=True)
        # A failure is not fatal: runs without clusters report it, and the others continue.
        print(
            "written" if done.returncode == 0 else f"failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}",
            flush=True,
        )


def visible_gpus() -> list[str]:
    """Return the usable GPUs as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def train(runs: list[list[str]], grid: EvaluationGrid, file: Path, jobs: int) -> None:
    """Train and evaluate the unfinished runs in separate processes.

    Args: runs: `key=value` words of each run.
        file: the sweep file.
        jobs: processes at a time. Each writes its output to <run folder>.txt.
    """
    waiting = [words for words in runs if results(load_config(words), grid) is None]
    resumable = sum(find_checkpoint(load_config(words).run_folder) is not None for words in waiting)
    also = f", {resumable} to resume" if resumable else ""
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} already finished{also}", flush=True)
    if waiting:
        first = load_config(waiting[0]).run_folder
        print(f"running {min(jobs, len(waiting))} at a time; the output of the first is in {first}.txt", flush=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    }
    gpus = visible_gpus()
    running: dict[str, tuple[subprocess.Popen, Path, float, str | None]] = {}
    succeeded = failed = 0
    try:
        while waiting or running:
            if number := signals.pending():
                raise signals.Interrupted(number, "before all runs finished; run the same command again to continue")
            if waiting and failed >= _MAX_FAILURES and not succeeded:
                print(
                    f"{len(waiting)} runs not started, because the first {failed} failed",
                    flush=True,
                )
                waiting = []
            while waiting and len(running) < jobs:
                words = waiting.pop(0)
                config = load_config(words)
                folder = config.run_folder
                log = folder.with_name(f"{folder.name}.txt")
                try:
                    log.parent.mkdir(parents=True, exist_ok=True)
                    log.touch()
                except OSError as error:
                    raise UserError(
                        f"{log}: cannot be written ({error.strerror}); set output_dir to a writable folder"
                    ) from None
                gpu = None
                if len(gpus) > 1 and config.environment.cuda_device_id == 0:  # not chosen by the user
                    gpu = min(gpus, key=[own for *_, own in running.values()].count)
                with log.open("w") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "xmc_trainer", "sweep", str(file), *words, "--run", json.dumps(asdict(grid))],
                        stdout=output, stderr=subprocess.STDOUT, env=environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
                    )  # fmt: skip
                running[folder.name] = process, log, time.monotonic(), gpu
            time.sleep(0.2)
            for name in [name for name, (process, *_) in running.items() if process.poll() is not None]:
                process, log, begin, _ = running.pop(name)
                lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
                errors = [line for line in lines if line.startswith("error")] or lines[-1:]
                succeeded, failed = succeeded + (process.returncode == 0), failed + (process.returncode != 0)
                outcome = "done" if process.returncode == 0 else f"failed: {errors[0]} (see {log})"
                print(
                    f"{name}: {outcome}, {(time.monotonic() - begin) / 60:.1f} min, {len(waiting) + len(running)} left",
                    flush=True,
                )
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()  # they write their checkpoints first
