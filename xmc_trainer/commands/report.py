"""Compare runs: a table, learning curves, and a metric plotted against a setting.

xmc-trainer report outputs/sidgnd
xmc-trainer report outputs/sidgnd --curves curves.svg
xmc-trainer report outputs/sidgnd --against model.ffi.fan_in --picture fan_in.svg

Each folder is a run or contains runs, at any depth. Runs that differ only in the seed form one line: their mean, with a
band from minimum to maximum. A line is named after its run folders without the seed ("dense" for "dense-1" and
"dense-2") or, if those names are ambiguous, by the settings in which it differs from the other lines. With --against, a
line that has only one value of the setting is drawn dashed across the plot. Plots need matplotlib
(pip install 'xmc_trainer[report]'); the file name's extension selects the format.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xmc_trainer.commands.sweep import log_summary, read_log, table
from xmc_trainer.config import flatten, saved_settings
from xmc_trainer.errors import UserError

# Settings that may differ between the runs of one line.
_IGNORED = (
    "training.seed", "log_fname", "training.verbose.log_fname", "output_dir", "training.verbose.wandb_runname",
    "training.evaluation.test_evaluate_every",
)  # fmt: skip
_METRICS = ("P@1", "PSP@1")


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, Any]  # by dotted name
    log: list[dict[str, Any]]  # from "start" to "end"

    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.log if record["event"] == "evaluate" and record["split"] == "test"]


def find_runs(folders: list[Path]) -> list[Run]:
    """Find the finished runs in and below the folders. Raises UserError if there are none, or if one is damaged."""
    runs = []
    for folder in folders:
        for file in sorted(folder.rglob("log.jsonl")):
            log, config = read_log(file), file.with_name("config.yaml")
            if log is not None and config.is_file():
                runs.append(Run(file.parent, _settings(config), log))
    if not runs:
        raise UserError(
            f"{', '.join(map(str, folders))}: no finished run (a folder with config.yaml and log.jsonl); name the "
            "output_dir of a training"
        )
    return runs


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


def against(runs: list[Run], setting: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the last metric, in per cent, for each of the n values of a setting.

    Returns: values [n], ascending, numbers or else strings; mean metric [n]; minimum and maximum metric [2, n].
    """
    run_values = [run.settings[setting] for run in runs]
    as_axis = float if all(type(value) in (int, float) for value in run_values) else str
    metrics: dict[float | str, list[float]] = {}
    for run, value in zip(runs, run_values):
        metrics.setdefault(as_axis(value), []).append(100 * run.evaluations()[-1][metric])
    values = sorted(metrics)
    return (
        np.array(values),
        np.array([np.mean(metrics[value]) for value in values]),
        np.array([[min(metrics[value]) for value in values], [max(metrics[value]) for value in values]]),
    )


def picture(
    file: Path, lines: dict[str, list[Run]], x_label: str, draw: Callable[[Any, str, list[Run], str], None]
) -> None:
    """Save a figure with one panel per metric; `draw(panel, name, runs, metric)` draws a line into it."""

    def draw_all(panels: Any) -> None:
        for metric, panel in zip(_METRICS, panels):
            for name, runs in lines.items():
                draw(panel, name, runs, metric)
            panel.set(xlabel=x_label, ylabel=f"{metric}, per cent")

    save_figure(file, len(_METRICS), draw_all)


def save_figure(file: Path, panels: int, draw: Callable[[Any], None]) -> None:
    """Save a figure with `panels` panels in a row, which `draw` fills, and one legend."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{file}: plots need matplotlib; pip install matplotlib")
    from matplotlib.figure import Figure  # unlike pyplot, needs no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(axes)
    for panel in axes:
        panel.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    columns = 1 if len(max(names, key=len, default="")) > 60 else 2
    figure.legend(handles, names, loc="outside lower center", fontsize="small", ncols=columns)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be written ({error}); name another file") from None
    print(f"written to {file}")


def _draw_curve(panel: Any, name: str, runs: list[Run], metric: str) -> None:
    minutes, values = curve(runs, metric)
    (line,) = panel.plot(minutes, values.mean(0), marker=".", label=name)
    panel.fill_between(minutes, values.min(0), values.max(0), alpha=0.2, color=line.get_color())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders that contain runs")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="plot P@1 and PSP@1 over training time in minutes")
    parser.add_argument(
        "--against", metavar="SETTING", help="plot the last P@1 and PSP@1 against this setting; needs --picture"
    )
    parser.add_argument("--picture", type=Path, help="file for the --against plot")
    options = parser.parse_args()
    if (options.against is None) != (options.picture is None):
        parser.error("--against and --picture: give both or neither")
    runs = find_runs(options.folders)
    missing = [run.folder for run in runs if not run.evaluations() or _METRICS[-1] not in run.evaluations()[-1]]
    if missing:
        raise UserError(
            f"{missing[0]}: was evaluated without PSP; train it with training.evaluation.eval_psp=true, or leave it out"
        )
    lines = lines_of(runs)
    print(
        table(
            [
                (name, run.settings["training.seed"], log_summary(run.log))
                for name, members in lines.items()
                for run in members
            ]
        )
    )
    if options.curves:
        picture(options.curves, lines, "minutes", _draw_curve)
    if options.against:
        if any(options.against not in run.settings for run in runs):
            raise UserError(
                f"--against={options.against}: not every run has this setting; xmc-trainer settings lists the names"
            )
        if len({run.settings[options.against] for run in runs}) == 1:
            raise UserError(
                f"--against={options.against}: is {runs[0].settings[options.against]} in every run; name a setting "
                "that differs"
            )

        def draw(panel: Any, name: str, members: list[Run], metric: str) -> None:
            values, mean, (low, high) = against(members, options.against, metric)
            if len(values) == 1:  # for example a dense head, which has no fan-in
                (line,) = panel.plot([], [], label=name, linestyle="--")
                panel.axhline(mean[0], linestyle="--", color=line.get_color())
                return
            panel.errorbar(values, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=name)

        picture(options.picture, lines_of(runs, (options.against,)), options.against, draw)
