"""Compare runs: a table, a page with charts, and single plots.

xmc-trainer report outputs/sidgnd
xmc-trainer report outputs/sidgnd --output report.html
xmc-trainer report outputs/quickstart --output report.html --samples 20
xmc-trainer report outputs/sidgnd --curves curves.svg
xmc-trainer report outputs/sidgnd --against model.ffi.fan_in --picture fan_in.svg

The page is a single HTML file without scripts and shows losses, metrics, rewiring, time, memory and settings. With --samples it
also shows predictions for texts of each run's test set, which needs its model and data. If a run's folder holds
evaluation.json, which `xmc-trainer evaluate RUN/model --json > RUN/evaluation.json` writes, the page shows metrics by label
frequency.

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
from pathlib import Path
from typing import Any

import numpy as np

from xmc_trainer.builders.inputs import require_data
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.commands.report_page import page
from xmc_trainer.commands.runs import Run, curve, find_runs, lines_of
from xmc_trainer.commands.sweep import log_summary, table, table_cells
from xmc_trainer.errors import UserError
from xmc_trainer.files import require_writable, write_text, writing

_METRICS = ("P@1", "PSP@1")


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


def require_picture(file: Path, option: str) -> None:
    """Raise UserError if a figure cannot be saved. Args: option: the command's option that names the file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{option}={file}: plots need matplotlib; pip install 'xmc_trainer[report]'")
    from matplotlib.backend_bases import FigureCanvasBase

    require_writable(file, option, [f".{ending}" for ending in FigureCanvasBase.get_supported_filetypes()])


def save_figure(file: Path, panels: int, draw: Callable[[Any], None]) -> None:
    """Save a figure with `panels` panels in a row, which `draw` fills, and one legend."""
    from matplotlib.figure import Figure  # unlike pyplot, needs no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(axes)
    for panel in axes:
        panel.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    columns = 1 if len(max(names, key=len, default="")) > 60 else 2
    figure.legend(handles, names, loc="outside lower center", fontsize="small", ncols=columns)
    with writing(file, "name another file"):
        figure.savefig(file)
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
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page, an HTML file")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="show predictions for N test texts of each line on the page"
    )
    options = parser.parse_args()
    if options.samples and options.output is None:
        parser.error("--samples: needs --output, the page that shows them")
    if options.samples < 0:
        parser.error("--samples: must be at least 0")
    if (options.against is None) != (options.picture is None):
        parser.error("--against and --picture: give both or neither")
    if options.output:
        require_writable(options.output, "--output", (".html", ".htm"))
    for option in ("curves", "picture"):
        if (file := getattr(options, option)) is not None:
            require_picture(file, f"--{option}")
    runs = find_runs(options.folders)
    missing = [run.folder for run in runs if not run.evaluations() or _METRICS[-1] not in run.evaluations()[-1]]
    if missing and (options.curves or options.picture):
        raise UserError(
            f"{missing[0]}: was evaluated without PSP; train it with training.evaluation.eval_psp=true, or leave it out"
        )
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
    lines = lines_of(runs)
    if options.samples:
        for members in lines.values():
            model = members[0].folder / "model"
            require_data(config_of_model(model, []), model)
    summaries = [
        (name, run.settings["training.seed"], log_summary(run.log))
        for name, members in lines.items()
        for run in members
    ]
    print(table(summaries))
    if options.output:
        samples = {}
        if options.samples:
            from xmc_trainer.commands.samples import samples_of  # imports torch and transformers, which takes seconds

            samples = {
                name: samples_of(members[0].folder / "model", options.samples) for name, members in lines.items()
            }
        write_text(options.output, page(lines, table_cells(summaries), samples))
        print(f"written to {options.output}")
    if options.curves:
        picture(options.curves, lines, "minutes", _draw_curve)
    if options.against:

        def draw(panel: Any, name: str, members: list[Run], metric: str) -> None:
            values, mean, (low, high) = against(members, options.against, metric)
            if len(values) == 1:  # for example a dense head, which has no fan-in
                (line,) = panel.plot([], [], label=name, linestyle="--")
                panel.axhline(mean[0], linestyle="--", color=line.get_color())
                return
            panel.errorbar(values, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=name)

        picture(options.picture, lines_of(runs, (options.against,)), options.against, draw)
