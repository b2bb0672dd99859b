"""The page of `xmc-trainer report`: one HTML file without scripts, external fonts or images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from xmc_trainer.commands.runs import Run
from xmc_trainer.commands.svg import COLOURS, Points, line_chart, thinned
from xmc_trainer.config import Config
from xmc_trainer.config.fields import settings_of
from xmc_trainer.errors import UserError

Lines = dict[str, list[Run]]  # line name -> its runs, which differ only in the seed
_EVALUATION = "evaluation.json"  # in a run's folder, what `xmc-trainer evaluate --json` prints
_BUCKETED = re.compile("(head|middle|tail) (micro-R|micro-F1|macro-F1|coverage)@5")
_LIGHT = ("#1f6fb4", "#c2540a", "#2a8a3e", "#8b4fb0", "#b3213a", "#6b5b4b", "#00808a", "#7a7a00")
_DARK = ("#6cb2f0", "#f0a060", "#6fce82", "#c79be6", "#f07f92", "#c4ac94", "#4fd0da", "#d0d050")
_STYLE = f"""
:root {{ color-scheme: light dark; --back: #fff; --text: #1c1c1c; --faint: #d8d8d8; --right: #1c7a30;
  {" ".join(f"--c{number}: {colour};" for number, colour in enumerate(_LIGHT))} }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #16181b; --text: #e6e6e6; --faint: #3c4046; --right: #6fce82;
  {" ".join(f"--c{number}: {colour};" for number, colour in enumerate(_DARK))} }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; background: var(--back); color: var(--text); max-width: 62rem;
  margin: 0 auto; padding: 0 1rem 3rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }} h3 {{ font-size: 1rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--faint); vertical-align: top; }}
th, td:first-child:not(.text) {{ white-space: nowrap; }} td + td {{ font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figcaption {{ font-weight: 600; font-size: 0.9rem; }}
svg {{ width: 100%; height: auto; }} svg text {{ fill: var(--text); font-size: 13px; }}
.grid {{ stroke: var(--faint); fill: none; }} polyline {{ fill: none; stroke-width: 2; }}
{" ".join(f".c{n} {{ stroke: var(--c{n}); }} circle.c{n}, .b{n} {{ fill: var(--c{n}); background: var(--c{n}); }}" for n in range(COLOURS))}
.key {{ display: inline-block; margin-right: 1.2rem; }} .key i, .bar i {{ display: inline-block; height: 0.8rem; }}
.key i {{ width: 0.8rem; margin-right: 0.4rem; }} .bar {{ display: flex; }}
.right {{ color: var(--right); font-weight: 600; }} .text {{ max-width: 28rem; overflow-wrap: anywhere; }}
"""


class Sample(NamedTuple):
    """A text of the test set with its labels and predictions."""

    text: str
    wanted: list[str]
    predicted: list[tuple[str, bool]]  # best first; whether the label is right


def page(lines: Lines, summary: list[list[str]], samples: dict[str, list[Sample]]) -> str:
    """Return the page of some runs.

    Args:
        summary: cells of the table of metrics, the header first.
        samples: line name -> predictions; may lack lines.
    """
    names = list(dict.fromkeys(str(run.settings["data.dataset"]) for runs in lines.values() for run in runs))
    title = f"{', '.join(names)}: {len(lines)} {'run' if len(lines) == 1 else 'lines of runs'}"
    title = title if len(lines) > 1 or len(next(iter(lines.values()))) == 1 else f"{', '.join(names)}: one line of runs"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        "<p>Metrics of the last evaluation, in per cent; with several seeds mean and standard deviation.</p>",
        _table(summary),
        _legend(lines),
        _section("Training", _training(lines)),
        _section("Metrics by label frequency", _buckets(lines)),
        _section("Connectivity", _connectivity(lines)),
        _section("Time and memory", _time(lines)),
        _section("Predictions", "".join(_samples(name, found) for name, found in samples.items())),
        _section("Settings", _settings(lines)),
        _section("Where it ran", _places(lines)),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(rows: list[list[str]]) -> str:
    header, *body = rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="wide"><table><tr>{head}</tr>{cells}</table></div>'


def _key(colour: int, name: str) -> str:
    return f'<span class="key"><i class="b{colour % COLOURS}"></i>{escape(name)}</span>'


def _legend(lines: Lines) -> str:
    return f"<p>{''.join(_key(colour, name) for colour, name in enumerate(lines))}</p>" if len(lines) > 1 else ""


def _chart(title: str, series: Iterable[tuple[int, Points]], x: str, marks: bool = False) -> str:
    drawn = [(colour, points) for colour, points in series if points]
    if not any(len(points) > 1 for _, points in drawn):
        return ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{line_chart(drawn, x, title, marks)}</figure>"


def _charts(charts: Iterable[str]) -> str:
    content = "".join(charts)
    return f'<div class="charts">{content}</div>' if content else ""


def _each(lines: Lines) -> list[tuple[int, Run]]:
    """Return every run with the number of its line."""
    return [(number, run) for number, runs in enumerate(lines.values()) for run in runs]


def _records(run: Run, event: str) -> list[dict[str, Any]]:
    return [record for record in run.log if record["event"] == event]


def _training(lines: Lines) -> str:
    losses = [(n, thinned([(r["step"], r["loss"]) for r in _records(run, "step")])) for n, run in _each(lines)]
    charts = [_chart("Loss", losses, "step")]
    for metric in ("P@1", "P@5", "PSP@1", "PSP@5"):
        points = [
            (n, [(r["seconds"] / 60, 100 * r[metric]) for r in run.evaluations() if metric in r])
            for n, run in _each(lines)
        ]
        charts.append(_chart(f"{metric}, per cent", points, "minutes", marks=True))
    return _charts(charts)


def _buckets(lines: Lines) -> str:
    """Show the metrics of head, middle and tail labels, from the first run of each line that has them."""
    columns: dict[str, dict[str, float]] = {}
    for name, runs in lines.items():
        found = next((metrics for run in runs if (metrics := _bucket_metrics(run))), None)
        if found:
            columns[name] = found
    rows = list(dict.fromkeys(metric for metrics in columns.values() for metric in metrics))
    cells = [[row, *(f"{100 * m[row]:.2f}" if row in m else "" for m in columns.values())] for row in rows]
    return _table([["labels, metric", *columns], *cells]) if cells else ""


def _bucket_metrics(run: Run) -> dict[str, float]:
    file = run.folder / _EVALUATION
    if not file.is_file():
        return {}
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in metrics.items() if _BUCKETED.fullmatch(name)}
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"{file}: is not what `xmc-trainer evaluate --json` prints; write it again, or remove it"
        ) from None


def _connectivity(lines: Lines) -> str:
    moved = [(n, [(r["step"], 100 * r["share"]) for r in _records(run, "rewire")]) for n, run in _each(lines)]
    survivors = [(n, [(r["step"], r["survivors"]) for r in _records(run, "rewire")]) for n, run in _each(lines)]
    read = [(n, _labels_of_features(run)) for n, run in _each(lines)]
    return _charts(
        [
            _chart("Slots moved by a rewiring, per cent", moved, "step", marks=True),
            _chart("Slots that survived a rewiring", survivors, "step", marks=True),
            _chart("Labels that read a feature", read, "features, most read first"),
        ]
    )


def _labels_of_features(run: Run) -> Points:
    """Count how many labels, or groups of labels, read each feature of the saved model; empty if there is no model or no index."""
    manifest = run.folder / "model" / "manifest.json"
    if not manifest.is_file():
        return []
    heads = json.loads(manifest.read_text(encoding="utf-8"))["heads"]
    counts = np.zeros(max(head["arguments"]["in_features"] for head in heads), dtype=np.int64)
    for head in heads:
        if head["arguments"]["fan_in"] is not None:
            for shard in head["shards"]:
                with safe_open(manifest.parent / shard["file"], framework="numpy") as file:
                    counts += np.bincount(file.get_tensor(f"{head['prefix']}index").ravel(), minlength=len(counts))
    return thinned(list(enumerate(np.sort(counts)[::-1].tolist(), start=1))) if counts.any() else []


def _time(lines: Lines) -> str:
    parts = {name: _seconds(runs[0]) for name, runs in lines.items()}
    kinds = list(dict.fromkeys(kind for seconds in parts.values() for kind in seconds))
    longest = max(sum(seconds.values()) for seconds in parts.values()) or 1
    keys = "".join(_key(number, kind) for number, kind in enumerate(kinds))
    bars = ""
    for name, seconds in parts.items():
        widths = "".join(
            f'<i class="b{kinds.index(kind)}" style="width:{100 * value / longest:.2f}%" title="{kind}: {value:.1f} s"></i>'
            for kind, value in seconds.items()
        )
        bars += f"<div>{escape(name)}: {sum(seconds.values()) / 60:.1f} minutes</div><div class='bar'>{widths}</div>"
    header = ["", *(f"{kind}, s" for kind in kinds), "texts/s", "head MiB", "host GiB", "GPU GiB"]
    rows = []
    for name, runs in lines.items():
        start, end, steps = runs[0].log[0], runs[0].log[-1], _records(runs[0], "step")
        speeds = [record["texts_per_s"] for record in steps if "texts_per_s" in record]
        memory = [
            f"{np.median(speeds):,.0f}" if speeds else "",
            f"{start['head_bytes'] / 2**20:,.1f}",
            _number(max((r["host_gib"] for r in (start, end) if "host_gib" in r), default=None)),
            _number(max((r["gib"] for r in steps if "gib" in r), default=None)),
        ]
        rows.append([name, *(_number(parts[name].get(kind), 1) for kind in kinds), *memory])
    return f"<p>{keys}</p>{bars}<p></p>{_table([header, *rows])}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _seconds(run: Run) -> dict[str, float]:
    """Divide the time of a run: seconds of each part. Records of steps hold means over the steps since the last such record."""
    start = sum(sum(record.get("start_s", {}).values()) for record in run.log)
    parts = dict.fromkeys(
        ("start", "encoder", "head", "waiting for data", "evaluation", "rewiring", "checkpoints"), 0.0
    )
    steps = 0
    for record in run.log:
        if record["event"] == "step":
            steps += 1
            if "encoder_ms" in record:
                computed = steps * (record["encoder_ms"] + record["head_ms"]) / 1000
                parts["encoder"] += steps * record["encoder_ms"] / 1000
                parts["head"] += steps * record["head_ms"] / 1000
                parts["waiting for data"] += computed * record["waiting"] / max(1 - record["waiting"], 1e-9)
                steps = 0
        elif record["event"] == "rewire":
            parts["rewiring"] += record.get("ms", 0.0) / 1000
        elif record["event"] in ("evaluation_time", "checkpoint_time"):
            part = "evaluation" if record["event"] == "evaluation_time" else "checkpoints"
            parts[part] += record.get("took_s", 0.0)
    rest = max(run.log[-1]["seconds"] - sum(parts.values()), 0.0)
    return {kind: value for kind, value in (parts | {"start": start, "rest": rest}).items() if value}


def _samples(name: str, samples: list[Sample]) -> str:
    best = sum(right for sample in samples for _, right in sample.predicted[:1])  # filter pairs may leave no label
    rows = ""
    for sample in samples:
        marked = "<br>".join(
            f'<span class="right">✓ {escape(label)}</span>' if right else f"✗ {escape(label)}"
            for label, right in sample.predicted
        )
        wanted = escape("; ".join(sample.wanted))
        rows += f'<tr><td class="text">{escape(sample.text)}</td><td>{marked}</td><td class="text">{wanted}</td></tr>'
    return (
        f"<h3>{escape(name)}: the best label is right for {best} of {len(samples)} test texts</h3>"
        f'<div class="wide"><table><tr><th>text</th><th>predicted</th><th>its labels</th></tr>{rows}</table></div>'
    )


def _settings(lines: Lines) -> str:
    """Show the settings in which lines differ or, for a single line, those that are not at their default."""
    firsts = {name: runs[0].settings for name, runs in lines.items()}
    every = list(dict.fromkeys(setting for settings in firsts.values() for setting in settings))
    shown = {setting: [str(settings.get(setting, "")) for settings in firsts.values()] for setting in every}
    if len(lines) > 1:
        rows = [[setting, *values] for setting, values in shown.items() if len(set(values)) > 1]
        return _table([["differs", *firsts], *rows]) if rows else ""
    defaults = {setting: str(known.default) for setting, known in settings_of(Config).items()}
    rows = [
        [setting, value, defaults.get(setting, "")]
        for setting, (value,) in shown.items()
        if value != defaults.get(setting)
    ]
    return _table([["setting", "value", "default"], *rows])


def _places(lines: Lines) -> str:
    facts = ("device", "engine", "processes", "torch", "version", "commit")
    rows = [[name, *(str(runs[0].log[0].get(fact, "")) for fact in facts)] for name, runs in lines.items()]
    return _table([["", *facts], *rows])
