"""Finished runs: their settings and logs, grouped into lines that differ only in the seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xmc_trainer.commands.sweep import read_log
from xmc_trainer.config import flatten, saved_settings
from xmc_trainer.errors import UserError

# Settings that may differ between the runs of one line.
_IGNORED = (
    "training.seed", "log_fname", "training.verbose.log_fname", "output_dir", "training.verbose.wandb_runname",
    "training.evaluation.test_evaluate_every",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, Any]  # by dotted name
    log: list[dict[str, Any]]  # from "start" to "end"

    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.log if record["event"] == "evaluate" and record["split"] == "test"]


def find_runs(folders: list[Path]) -> list[Run]:
    """Find the finished runs in and below the folders. Raises UserError if there are none, or if one is damaged."""
    runs: dict[Path, Run] = {}  # by log file
    for folder in folders:
        for file in sorted(folder.rglob("log.jsonl")):
            log, config = read_log(file), file.with_name("config.yaml")
            if log is not None and config.is_file():
                runs.setdefault(file.resolve(), Run(file.parent, _settings(config), log))  # folders may overlap
    if not runs:
        raise UserError(
            f"{', '.join(map(str, folders))}: no finished run (a folder with config.yaml and log.jsonl); name the "
            "output_dir of a training"
        )
    return list(runs.values())


def _settings(file: Path) -> dict[str, Any]:
    settings = flatten(saved_settings(file))
    for name in ("training.seed", "data.dataset"):
        if name not in settings:
            raise UserError(f"{file}: has no {name}; the file is damaged, leave {file.parent} out")
    return settings


def lines_of(runs: list[Run], ignore: tuple[str, ...] = ()) -> dict[str, list[Run]]:
    """Group runs that differ only in the seed: line name -> runs.

    Args: ignore: further settings in which the runs of a line may differ.
    """
    ignored = {*_IGNORED, *ignore}
    settings = [{name: str(value) for name, value in run.settings.items() if name not in ignored} for run in runs]
    differ = [name for name in settings[0] if len({str(each.get(name)) for each in settings}) > 1]
    short = [name.rsplit(".", 1)[-1] for name in differ]
    shown = [name if short.count(last) > 1 else last for name, last in zip(differ, short)]
    lines: dict[str, list[Run]] = {}
    for run, each in zip(runs, settings):
        name = (
            ", ".join(f"{word}={each.get(full)}" for full, word in zip(differ, shown))
            or runs[0].settings["data.dataset"]
        )
        lines.setdefault(name, []).append(run)
    # Use folder names if all seeds of the same settings share one, and no other settings do.
    stems: dict[tuple[str, ...], set[str]] = {}
    for line, members in lines.items():
        for run in members:
            values = [str(run.settings.get(name)) for name in ignore]
            stems.setdefault((line, *values), set()).add(
                run.folder.name.removesuffix(f"-{run.settings['training.seed']}")
            )
    if all(len(names) == 1 for names in stems.values()) and len(set.union(*stems.values())) == len(stems):
        names_of_line = {line: [name for (owner, *_), (name,) in stems.items() if owner == line] for line in lines}
        return {", ".join(names_of_line[line]): members for line, members in lines.items()}
    return lines


def curve(runs: list[Run], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean minutes [n], metric [runs, n] in per cent) at the n evaluation steps that all runs share."""
    evaluations = [{record["step"]: record for record in run.evaluations()} for run in runs]
    steps = sorted(set.intersection(*map(set, evaluations)))
    minutes = np.array([[each[step]["seconds"] / 60 for step in steps] for each in evaluations])
    return minutes.mean(0), np.array([[100 * each[step][metric] for step in steps] for each in evaluations])
