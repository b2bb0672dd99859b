"""The report's page: its numbers against the log and the model, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from xmc_trainer.builders.training import build_trainer
from xmc_trainer.commands import report
from xmc_trainer.commands.report_page import Sample, _labels_of_features, _samples, _seconds
from xmc_trainer.commands.runs import find_runs
from xmc_trainer.commands.samples import samples_of
from xmc_trainer.commands.svg import line_chart, thinned, ticks
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Shows a page in a frame of a given width, and says what the browser made of it.
FRAME = """<!doctype html><html style="color-scheme: light dark"><iframe width="{width}" height="700" srcdoc="{page}"
style="border: 0; color-scheme: light dark"></iframe><pre></pre><script>onload = () => {{
const page = document.querySelector("iframe").contentDocument, shown = [...page.querySelectorAll("svg")];
document.querySelector("pre").textContent = JSON.stringify({{scroll: page.documentElement.scrollWidth,
widths: shown.map(each => each.getBoundingClientRect().width), back: getComputedStyle(page.body).backgroundColor,
outside: shown.flatMap(svg => [...svg.querySelectorAll("text, circle, polyline")].filter(each => {{
  const a = each.getBoundingClientRect(), b = svg.getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1; }}).map(each => each.outerHTML)),
requests: page.defaultView.performance.getEntriesByType("resource").length}}); }};</script></html>"""


@pytest.fixture(scope="module")
def runs(toy_settings_in, tmp_path_factory):
    """Train two runs that differ in the fan-in and are rewired. Returns the folder of their folders."""
    folder = tmp_path_factory.mktemp("report")
    settings = [*toy_settings_in(folder), "training.optimization.epochs=3"]
    for fan_in in (8, 12):
        trainer = build_trainer(load_config([*settings, f"model.ffi.fan_in={fan_in}", f"log_fname=<fan-in> {fan_in}"]))
        trainer.train()
        trainer.close()
    metrics = {
        "P@1": 0.5,
        "tail micro-R@5": 0.1234,
        "head micro-R@5": 0.5,
        "tail micro-P@1": 0.2,
        "intervals": {"P@1": [0, 1]},
    }
    (folder / "out" / "<fan-in> 8" / "evaluation.json").write_text(json.dumps(metrics))
    return folder / "out"


@pytest.fixture(scope="module")
def page(runs):
    file = runs.parent / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", str(runs), "--output", str(file), "--samples", "7"])
        report.main()
    return file.read_text(encoding="utf-8")


def test_the_page_stands_alone_and_has_every_section(page):
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Training", "Metrics by label frequency", "Connectivity", "Time and memory", "Predictions", "Settings", "Where it ran",
    ]  # fmt: skip
    assert not re.search(r"https?:|<script|<link|@import|url\(|<img", page)
    assert "<fan-in>" not in page and "&lt;fan-in&gt; 12" in page  # what the user named is escaped
    assert "tail micro-R@5</td><td>12.34</td>" in page and "intervals" not in page and "micro-P" not in page
    assert "<tr><td>model.ffi.fan_in</td><td>12</td><td>8</td></tr>" in page
    assert page.count('<td class="text">') == 2 * 2 * 7 and "✓" in page and "✗" in page


def test_its_numbers_are_those_of_log_and_model(runs):
    (run, _) = find_runs([runs])
    steps = [record for record in run.log if record["event"] == "step"]
    seconds = _seconds(run)
    means = [(n, record) for n, record in enumerate(steps, 1) if "head_ms" in record]
    counts = np.diff([0, *(n for n, _ in means)])
    assert seconds["head"] == pytest.approx(sum(n * r["head_ms"] for n, (_, r) in zip(counts, means)) / 1000)
    assert sum(seconds.values()) == pytest.approx(run.log[-1]["seconds"] + sum(run.log[0]["start_s"].values()))
    index = load_file(run.folder / "model" / "head-00000-of-00001.safetensors")["index"]
    read = np.sort([(index == feature).sum() for feature in range(32)])[::-1]
    assert [y for _, y in _labels_of_features(run)] == read[: len(_labels_of_features(run))].tolist()


def test_samples_are_marked_as_the_evaluation_counts(runs):
    (run, _) = find_runs([runs])
    every = samples_of(run.folder / "model", 101)
    nothing_left = [Sample("a text whose labels are all filter pairs", ["tag00"], [])]
    assert "is right for 0 of 1 test texts" in _samples("one", nothing_left)
    assert len(every) == 101 and all(len(sample.predicted) == 5 for sample in every)
    for k, right in (1, [s.predicted[0][1] for s in every]), (5, [r for s in every for _, r in s.predicted]):
        assert np.mean(right) == pytest.approx(run.evaluations()[-1][f"P@{k}"], abs=1e-9)
    assert all({label for label, right in s.predicted if right} <= set(s.wanted) for s in every)
    assert every[0].wanted[0].startswith("name of ") and re.search(r"\bw\d", every[0].text)


def test_a_run_with_little_in_it_has_a_page(runs, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    source = find_runs([runs])[0].folder
    shutil.copy(source / "config.yaml", bare)
    kept = [json.loads(line) for line in (source / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in r.items() if not k.startswith("PSP") and k not in ("start_s", "host_gib")}
            for r in kept if r["event"] in ("start", "end") or r is kept[-3] or r.get("step") == 1 or r["event"] == "evaluate"]  # fmt: skip
    (bare / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    monkeypatch.setattr(sys, "argv", ["report", str(bare), "--output", str(tmp_path / "bare.html")])
    report.main()
    page = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "Connectivity" not in page and "PSP@1" not in page and "by label frequency" not in page
    assert "<td>model.ffi.fan_in</td><td>12</td><td>128</td>" in page or "<td>8</td><td>128</td>" in page
    (bare / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match="evaluation.json: is not what"):
        report.main()
    monkeypatch.setattr(sys, "argv", ["report", str(bare), "--samples", "3"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "--samples: needs --output" in capsys.readouterr().err


def test_ticks_and_thinning():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.12, 0.26) == [0.15, 0.2, 0.25] and ticks(3, 3) == [3]
    assert ticks(9_900, 250_000) == [50_000, 100_000, 150_000, 200_000, 250_000]
    assert thinned([(n, 2 * n) for n in range(5)], most=2) == [(1, 2), (3.5, 7)] and thinned([]) == []
    chart = line_chart([(9, [(0, 0), (1, float("nan")), (10, 4)])], "x & y", "z", marks=True)
    # 570 x 210 units of paper, from (58, 220) at the origin to (628, 10).
    assert 'class="c1" points="58.0,220.0 628.0,10.0"' in chart and "x &amp; y" in chart and chart.count("<circle") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser; on Debian: apt-get install chromium")
@pytest.mark.parametrize("width, dark", [(390, True), (1000, False)])
def test_a_browser_shows_it(page, tmp_path, width, dark):
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", str(tmp_path / "frame.html")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    seen = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", done.stdout, re.S)[1]))
    assert seen["scroll"] <= width and seen["outside"] == [] and seen["requests"] == 0
    assert len(seen["widths"]) == page.count("<svg") >= 6 and all(300 < each <= width - 32 for each in seen["widths"])
    assert seen["back"] == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
