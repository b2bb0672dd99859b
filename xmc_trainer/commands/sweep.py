"""Many trainings of one table: rows of settings, several seeds each, some at a time; goes on where it was left.

xmc-trainer sweep launchers/sweeps/sidgnd.yaml --jobs 4 dataset_path=./data
xmc-trainer sweep launchers/sweeps/sidgnd.yaml --table dataset_path=./data    # only the table, of the runs finished with these settings

The YAML file:

    settings: [dataset=sidgnd, training.amp.enabled=true]       # of every run
    seeds: [1, 2, 3]
    rows:
      dense: [model.ffi.use_sparse_layer=false]                 # a row's own
      seed's method: []
    splits: [dev, test]         # data.test_split; if it stands here, every saved model is evaluated on each of these,
    strengths: [0, 0.3]         # and with each of these model.ffi.logit_adjustment, which only ranking reads

Every run is a process of its own on this machine, in <output_dir>/<row>-<seed>/, its output beside it in .txt; several GPUs are shared out among them. A
finished run with the same settings is not repeated, an interrupted one goes on from its checkpoint, and what has other settings is not replaced. Label clusters that a row needs and that are not there are made first, with that row's settings.
The table has mean and standard deviation over the seeds, in per cent; the CSV, in fractions, one line a run (and split, and strength), with its
settings, commit, device and versions.
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
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.commands.cli import USAGE
from xmc_trainer.config import Config, flatten, load_config, saved_settings, yaml_nodes
from xmc_trainer.config.fields import settings_of
from xmc_trainer.errors import UserError, shown
from xmc_trainer.files import replacing, write_text
from xmc_trainer.run_folder import find_checkpoint

METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5")
_FIGURES = "figures.json"  # in a run's folder: its saved model's evaluations
# Of a log's records, what is read and which types that may have.
_RECORDS: dict[str, dict[str, Any]] = {
    "start": {"head_bytes": int, "device": str, "torch": str, "version": str, "commit": str},
    "evaluate": {"split": str, "step": int, "seconds": (int, float), "P@1": (int, float)},
    "end": {"seconds": (int, float)},
}
_FAILURES = 3  # after so many, and no success, nothing more is tried
_OURS = ("training.seed=", "log_fname=", "training.verbose.log_fname=", "training.resume=")


@dataclass(frozen=True)
class Views:
    """How the saved model of every run is evaluated; by neither: as its training did last."""

    splits: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)

    def of(self, config: Config) -> list[tuple[str, float]]:
        """(split, strength) of each evaluation of that run."""
        if not self.splits and not self.strengths:
            return []
        return list(
            product(self.splits or [config.data.test_split], self.strengths or [config.model.ffi.logit_adjustment])
        )


def plan(file: Path, more: list[str]) -> tuple[list[tuple[str, int, list[str]]], Views]:
    """(row, seed, `key=value` words) of every run, seed by seed, and how they are evaluated. UserError names what is wrong in the file.

    Args: more: settings of the command line, for every run.
    """
    said = _read_plan(file)
    seeds = [_seed(seed, file) for seed in said.seeds] or [42]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{file}: seeds: must be different whole numbers, not {shown(seeds)}")
    names = [re.sub(r"\W+", "_", row) for row in said.rows]
    if len(set(names)) < len(names):
        raise UserError(f"{file}: rows whose names differ in more than punctuation are needed; they name folders")
    views = Views(said.splits, [_strength(strength, file) for strength in said.strengths])
    runs = []
    for seed in seeds:
        for (row, own), name in zip(said.rows.items(), names):
            words = [*said.settings, *more, *own]
            try:
                for word in words:
                    if word.startswith(_OURS):
                        raise UserError(f"{word}: a sweep seeds and names its runs itself, by `seeds` and `rows`")
                words = ["training.resume=true", *words, f"training.seed={seed}", f"log_fname={name}-{seed}"]
                for split in views.splits or [None]:  # refuses what is wrong before anything runs
                    load_config([*words, *([] if split is None else [f"data.test_split={split}"])])
            except UserError as error:
                raise UserError(f"{file}: row {shown(repr(row))}: {error}") from None
            runs.append((row, seed, words))
    return runs, views


@dataclass
class _Plan:
    """What a sweep's file says, as it is written."""

    settings: list[str] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)
    strengths: list[str] = field(default_factory=list)


def _read_plan(file: Path) -> _Plan:
    root, said = yaml_nodes.read_file(file, "a sweep"), _Plan()
    if isinstance(root, MappingNode):
        for name, node in yaml_nodes.entries(root, str(file)):
            if name not in _Plan.__dataclass_fields__:
                raise UserError(
                    f"{yaml_nodes.location(node, str(file))}: {shown(name)}: write settings, seeds, rows, splits and strengths only"
                )
            if name != "rows":
                setattr(said, name, _words(node, name, file))
            elif isinstance(node, MappingNode):
                said.rows = {
                    row: _words(own, f"rows: {shown(row)}", file) for row, own in yaml_nodes.entries(node, str(file))
                }
    if not said.rows:
        raise UserError(f"{file}: must have `rows`, each a name and a list of settings")
    return said


def _words(node: Node, name: str, file: Path) -> list[str]:
    if yaml_nodes.is_null(node):
        return []
    if not isinstance(node, SequenceNode):
        place = yaml_nodes.location(node, str(file))
        raise UserError(
            f"{place}: {name}: must be a list, in brackets or with a dash a line, not a {yaml_nodes.kind(node)}"
        )
    return [yaml_nodes.scalar(word, str(file)) for word in node.value]


def _seed(text: str, file: Path) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise UserError(f"{file}: seeds: must be different whole numbers, not {shown(text)}")
    return int(text)


def _strength(text: str, file: Path) -> float:
    domain = settings_of(Config)["model.ffi.logit_adjustment"].domain
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if strength not in domain:
        raise UserError(f"{file}: strengths: must be numbers in {domain.text}, not {shown(text)}")
    return strength


def finished(config: Config) -> list[dict[str, Any]] | None:
    """The log of a finished training with exactly this configuration; None if there is none."""
    return None if _differences(config) else read_log(config.run_folder / "log.jsonl")


def read_log(file: Path) -> list[dict[str, Any]] | None:
    """The records of a finished training, from "start" to "end"; None where there is none, or it is not finished.

    Its last line may be torn, where the training was killed while it wrote. Any other fault is a UserError with the line.
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
            problem = "is no record of a training"
        if problem and number == len(lines):
            return None
        if problem:
            raise UserError(
                f"{file}, line {number}: {problem}; the log is damaged, remove {file.parent} and train again"
            )
        records.append(record)
    return records if records and (records[0]["event"], records[-1]["event"]) == ("start", "end") else None


def _differences(config: Config) -> list[str]:
    """In what the run that lies in the run's folder was set otherwise: "name=there, not here"; none where there is no run."""
    file = config.run_folder / "config.yaml"
    if not file.is_file():
        return []
    there, here = flatten(saved_settings(file)), flatten(asdict(config))
    here["training.overwrite"] = there.get("training.overwrite")  # of one start; no run's file has it
    return [
        f"{name}={shown(there.get(name))}, not {shown(here.get(name))}"
        for name in here | there
        if there.get(name) != here.get(name)
    ]


def refuse_to_replace(runs: list[list[str]]) -> None:
    """UserError where the folder of a run holds another's result or checkpoint: hours of somebody's work."""
    others = []
    for words in runs:
        config = load_config(words)
        differences = _differences(config)
        if differences and (read_log(config.run_folder / "log.jsonl") or find_checkpoint(config.run_folder)):
            others.append(f"{config.run_folder} ({'; '.join(differences[:3])})")
    if others:
        raise UserError(
            f"{len(others)} of the {len(runs)} runs would replace one that was set otherwise, the first {others[0]}; set output_dir "
            "to another folder, or remove what is not needed any more"
        )


def _known_figures(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """split -> strength -> metrics, of the model that was trained last in the run's folder."""
    try:
        known = json.loads((config.run_folder / _FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    # What is not as `run_one` writes it is made again.
    if (
        not isinstance(known, dict)
        or known.get("log_sha256") != _digest(config)
        or not isinstance(known.get("figures"), dict)
    ):
        return {}
    return {split: of_split for split, of_split in known["figures"].items() if isinstance(of_split, dict)}


def _digest(config: Config) -> str:
    return hashlib.sha256((config.run_folder / "log.jsonl").read_bytes()).hexdigest()


def results(config: Config, views: Views) -> list[dict[str, Any]] | None:
    """What a run has to say, an entry for each of its evaluations; None if it has not got there."""
    log = finished(config)
    if log is None:
        return None
    wanted = views.of(config)
    if not wanted:
        return [result(log)]
    known = _known_figures(config)
    if any(f"{strength:g}" not in known.get(split, {}) for split, strength in wanted):
        return None
    of_training = {name: value for name, value in result(log).items() if name not in METRICS}
    found = [(split, strength, known[split][f"{strength:g}"]) for split, strength in wanted]
    return [
        {"split": split, "strength": strength}
        | {name: metrics[name] for name in METRICS if name in metrics}
        | of_training
        for split, strength, metrics in found
    ]


def run_one(words: list[str], views: Views) -> None:
    """Train, unless that is done, and evaluate what was saved."""
    config = load_config(words)
    if finished(config) is None:
        from xmc_trainer.trainer import Trainer

        Trainer(config).train()
    known = _known_figures(config)
    missing = [(split, strength) for split, strength in views.of(config) if f"{strength:g}" not in known.get(split, {})]
    if not missing:
        return
    import torch

    from xmc_trainer.commands.adjust import figures
    from xmc_trainer.evaluation import corpus_of_saved
    from xmc_trainer.model import XMCModel

    device, folder = torch.device(config.environment.device_name()), config.run_folder / "model"
    saved = XMCModel.load(folder, device).saved
    for split, of_split in groupby(missing, key=itemgetter(0)):
        of_model = config_of_model(folder, [f"data.test_split={split}"])
        corpus = corpus_of_saved(saved, of_model)
        found = figures(saved, of_model, corpus, [strength for _, strength in of_split], device)
        known.setdefault(split, {}).update({f"{strength:g}": metrics for strength, metrics in found.items()})
    write_text(config.run_folder / _FIGURES, json.dumps({"log_sha256": _digest(config), "figures": known}) + "\n")


def result(log: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's log says: the last test metrics (0 to 1), head memory, time, and when P@1 was best."""
    start, end = log[0], log[-1]
    tests = [record for record in log if record["event"] == "evaluate" and record["split"] == "test"]
    if not tests:
        raise UserError("a finished run without an evaluation on its test set; train it again")
    best = max(tests, key=lambda record: record["P@1"])
    return {name: tests[-1][name] for name in METRICS if name in tests[-1]} | {
        "head_mib": start["head_bytes"] / 2**20,
        "minutes": end["seconds"] / 60,
        "best_P@1_minutes": best["seconds"] / 60,
        **{name: start[name] for name in ("device", "torch", "version", "commit")},
    }


def table(runs: list[tuple[str, int, dict[str, Any]]]) -> str:
    """Markdown, a line a row: mean and standard deviation over its seeds."""
    shown = [name for name in METRICS if all(name in found for _, _, found in runs)]
    lines = [
        "| " + " | ".join(["", "seeds", *shown, "head MiB", "minutes to the best P@1"]) + " |",
        "|" + "---|" * (len(shown) + 4),
    ]
    for row in dict.fromkeys(row for row, _, _ in runs):
        own = [found for name, _, found in runs if name == row]
        cells = []
        for name in shown:
            values = [100 * found[name] for found in own]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells += [f"{own[0]['head_mib']:.1f}", f"{statistics.mean(found['best_P@1_minutes'] for found in own):.1f}"]
        lines.append(f"| {row} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the sweep's YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of every run; a row's own come after them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; on several GPUs they are shared out")
    parser.add_argument("--csv", type=Path, help="file to write; default: the YAML file's name in the current folder")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--run", metavar="VIEWS", help=argparse.SUPPRESS)  # this process is a run; `settings` are all
    options = parser.parse_intermixed_args()
    if options.run:
        run_one(options.settings, Views(**json.loads(options.run)))
        return
    if options.jobs < 1:
        parser.error("--jobs: at least 1")
    runs, views = plan(options.file, options.settings)
    if not options.table:
        every = [words for _, _, words in runs]
        refuse_to_replace(every)
        find_splits(every, views)
        make_clusters([words for words in every if finished(load_config(words)) is None])
        with signals.deferred():
            train(every, views, options.file, options.jobs)
    found = [(row, seed, words, results(load_config(words), views)) for row, seed, words in runs]
    done = [(row, seed, words, entries) for row, seed, words, entries in found if entries is not None]
    if not done:
        where = load_config(runs[0][2]).run_folder.parent
        raise UserError(
            f"{options.file}: none of its {len(runs)} runs is finished in {where} with just these settings (key=value)"
        )
    target = options.csv or Path(options.file.with_suffix(".csv").name)
    lines = [
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
        print(table([(_row_name(line, views), line["seed"], line) for line in own]) + "\n")
    print(f"{len(done)} of {len(runs)} runs; written to {target}")
    if len(done) < len(runs):
        sys.exit(1)


def _row_name(line: dict[str, Any], views: Views) -> str:
    return f"{line['row']}, ranked with {line['strength']:g}" if len(views.strengths) > 1 else line["row"]


def find_splits(runs: list[list[str]], views: Views) -> None:
    """UserError where the files of a split are missing: after the trainings would be late."""
    from xmc_trainer.data.sources import raw_source

    configs = [load_config(words) for words in runs]
    for folder, names in dict.fromkeys((config.data_folder, config.data.label_text_file) for config in configs):
        for split in views.splits:
            raw_source(folder, names, test_split=split)


def make_clusters(runs: list[list[str]]) -> None:
    """The files of label clusters that are missing, each with the settings of the first run that needs it."""
    missing: dict[Path, list[str]] = {}
    for words in runs:
        config = load_config(words)
        if config.needs_clusters and not config.cluster_file.is_file():
            missing.setdefault(config.cluster_file, words)
    for file, words in missing.items():
        print(f"{file}: ", end="", flush=True)
        done = subprocess.run([sys.executable, "-m", "xmc_trainer", "clusters", *words], capture_output=True, text=True)
        # Without them the runs say what they lack: the others can go on.
        print(
            "made" if done.returncode == 0 else f"failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}",
            flush=True,
        )


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def train(runs: list[list[str]], views: Views, file: Path, jobs: int) -> None:
    """Train and evaluate the runs that are not finished, `jobs` at a time, in processes of their own; each writes its output to <run folder>.txt."""
    waiting = [words for words in runs if results(load_config(words), views) is None]
    going_on = sum(find_checkpoint(load_config(words).run_folder) is not None for words in waiting)
    also = f", {going_on} with a checkpoint" if going_on else ""
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before{also}", flush=True)
    if waiting:
        first = load_config(waiting[0]).run_folder
        print(f"{min(jobs, len(waiting))} at a time; what the first one says is in {first}.txt, and so on", flush=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    }
    gpus = visible_gpus()
    live: dict[str, tuple[subprocess.Popen, Path, float, str | None]] = {}
    succeeded = failed = 0
    try:
        while waiting or live:
            if number := signals.pending():
                raise signals.Interrupted(number, "before all runs were done; the same command goes on with the others")
            if waiting and failed >= _FAILURES and not succeeded:
                print(
                    f"{len(waiting)} runs are not started: the first {failed} failed, most likely for one reason",
                    flush=True,
                )
                waiting = []
            while waiting and len(live) < jobs:
                words = waiting.pop(0)
                config = load_config(words)
                folder = config.run_folder
                log = folder.with_name(f"{folder.name}.txt")
                try:
                    log.parent.mkdir(parents=True, exist_ok=True)
                    log.touch()
                except OSError as error:
                    raise UserError(
                        f"{log}: cannot be written ({error.strerror}); set output_dir to a folder of yours"
                    ) from None
                gpu = None
                if len(gpus) > 1 and config.environment.cuda_device_id == 0:  # another number was chosen
                    gpu = min(gpus, key=[own for *_, own in live.values()].count)
                with log.open("w") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "xmc_trainer", "sweep", str(file), *words, "--run", json.dumps(asdict(views))],
                        stdout=output, stderr=subprocess.STDOUT, env=environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
                    )  # fmt: skip
                live[folder.name] = process, log, time.monotonic(), gpu
            time.sleep(0.2)
            for name in [name for name, (process, *_) in live.items() if process.poll() is not None]:
                process, output, begin, _ = live.pop(name)
                lines = output.read_text(errors="replace").strip().splitlines() or ["no output"]
                errors = [line for line in lines if line.startswith("error")] or lines[-1:]
                succeeded, failed = succeeded + (process.returncode == 0), failed + (process.returncode != 0)
                said = "done" if process.returncode == 0 else f"failed: {errors[0]} (see {output})"
                print(
                    f"{name}: {said}, {(time.monotonic() - begin) / 60:.1f} min, {len(waiting) + len(live)} to go",
                    flush=True,
                )
    finally:
        for process, *_ in live.values():
            process.terminate()
        for process, *_ in live.values():
            process.wait()  # they write checkpoints
