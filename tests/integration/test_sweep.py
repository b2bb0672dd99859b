"""A sweep trains the missing runs, skips finished ones, and tabulates their metrics."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.integration.test_launchers import ROOT
from xmc_trainer.commands.sweep import (
    EvaluationGrid,
    check_splits,
    main,
    make_clusters,
    plan,
    refuse_to_replace,
    results,
    run_one,
    table,
    train,
)
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.labels.clusters import LabelClusters
from xmc_trainer.model import XMCModel


@pytest.fixture
def file(toy_settings, tmp_path):
    settings = [*toy_settings, "training.optimization.max_steps=6", "data.train_sample=100"]
    path = tmp_path / "toy.sweep.yaml"
    rows = {"dense": ["model.ffi.use_sparse_layer=false"], "F = 12": [], "broken": ["data.folder=nowhere"]}
    path.write_text(json.dumps({"settings": settings, "seeds": [1, 2], "rows": rows}))
    return path


@pytest.mark.slow
def test_a_sweep_runs_resumes_and_tabulates(file, tmp_path, monkeypatch, capsys, fresh_accelerator):
    words = ["xmc-trainer", "sweep", str(file), "--jobs", "2", "--csv", str(tmp_path / "toy.csv")]
    sweep = json.loads(file.read_text())
    sweep["seeds"], sweep["rows"] = [1], {"F = 12": [], "broken": ["data.folder=nowhere"]}
    file.write_text(json.dumps(sweep))
    run_one(plan(file, [])[0][0][2], EvaluationGrid())
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().out
    assert "2 runs, 1 already finished" in said and "1 of 2 runs finished" in said
    assert "broken-1: failed: error: " in said and "nowhere: no such folder" in said

    log = tmp_path / "out/F_12-1/log.jsonl"
    log.write_text(
        "".join(log.read_text().splitlines(keepends=True)[:-1])
    )  # without its last line, so the run is trained again
    sweep["seeds"], sweep["rows"] = [1, 2], {"F = 12": []}
    file.write_text(json.dumps(sweep))
    main()
    said = capsys.readouterr().out
    assert "2 runs, 0 already finished" in said and "2 of 2 runs" in said
    with (tmp_path / "toy.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["row"], row["seed"]) for row in rows] == [("F = 12", "1"), ("F = 12", "2")]
    for row in rows:
        log = [json.loads(line) for line in (tmp_path / f"out/F_12-{row['seed']}/log.jsonl").read_text().splitlines()]
        last = [record for record in log if record["event"] == "evaluate"][-1]
        assert float(row["P@1"]) == last["P@1"] and row["device"].startswith(("CPU", "NVIDIA")) and row["commit"]
        # AdamW: weights and two states, biases too; a counter of skipped steps; the index is int16.
        assert float(row["head_mib"]) * 2**20 == pytest.approx(12 * 41 * 13 + 2 * 41 * 12 + 8)
    values = [100 * float(row["PSP@3"]) for row in rows]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in said

    # Finished runs are not repeated, and --table only reads them.
    monkeypatch.setattr(subprocess, "Popen", None)
    last_row = said.strip().splitlines()[-3]
    for more, expected in [([], "2 runs, 2 already finished"), (["--table"], "2 of 2 runs")]:
        monkeypatch.setattr(sys, "argv", [*words[1:], *more])
        main()
        assert expected in (out := capsys.readouterr().out) and last_row in out
    monkeypatch.setattr(sys, "argv", [*words[1:], "--table", "training.optimization.max_steps=7"])
    with pytest.raises(UserError, match="none of its 2 runs in .* is finished"):
        main()


@pytest.mark.slow
def test_models_are_evaluated_on_every_split_with_every_strength(toy_settings, toy_data, tmp_path, fresh_accelerator):
    """With label clusters computed by the sweep. The expected metrics come from the saved model's scores."""
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    for kind in ("raw_texts", "labels"):
        (data / f"toy/dev_{kind}.txt").write_text("".join((data / f"toy/train_{kind}.txt").open().readlines()[:150]))
    row = ["model.ffi.group_size=4", "model.ffi.semantic_groups=true", "model.auxiliary.group_y_group=7"]
    settings = [
        *toy_settings,
        f"dataset_path={data}",
        "environment.device=cpu",
        "training.optimization.max_steps=60",
        "model.ffi.weight_init=zero",
    ]
    file = tmp_path / "views.yaml"
    file.write_text(
        json.dumps({"settings": settings, "rows": {"a": row}, "splits": ["dev", "test"], "strengths": [0, 2]})
    )
    [(_, seed, words)], grid = plan(file, [])
    config = load_config(words)
    make_clusters([words])
    assert LabelClusters.load(config.cluster_file, [f"tag{n:02d}" for n in range(41)]).order.shape == (41,)
    assert seed == 42 and results(config, grid) is None
    run_one(words, grid)
    entries = results(config, grid)
    assert [(entry["split"], entry["strength"]) for entry in entries] == [
        ("dev", 0),
        ("dev", 2),
        ("test", 0),
        ("test", 2),
    ]

    model = XMCModel.load(config.run_folder / "model", "cpu")
    counts = Counter(label for line in (data / "toy/train_labels.txt").open() for label in line.split())
    ids = model.saved.label_ids.to_pylist()
    shift = torch.tensor([math.log(counts[name] * len(ids) / counts.total()) for name in ids])
    for entry in entries:
        texts, true = (
            (data / f"toy/{entry['split']}_{kind}.txt").read_text().splitlines() for kind in ("raw_texts", "labels")
        )
        every = model.predict(texts, k=len(ids))
        score = torch.tensor(
            [[{p.id: p.score for p in one}[name] for name in ids] for one in every], dtype=torch.float64
        ).logit()
        best = (score - entry["strength"] * shift).argmax(1)
        right = [ids[label] in line.split() for label, line in zip(best.tolist(), true)]
        assert entry["P@1"] == pytest.approx(
            sum(right) / len(right), abs=1.01 / len(right)
        )  # two labels may tie for a text
    assert len({entry["P@1"] for entry in entries}) == 4 and len({entry["minutes"] for entry in entries}) == 1

    log = config.run_folder / "log.jsonl"
    before = log.stat().st_mtime_ns
    more = EvaluationGrid(["test"], [0, 2, 1])
    assert results(config, more) is None
    run_one(words, more)
    assert (
        log.stat().st_mtime_ns == before and results(config, more)[0] == entries[2] and results(config, grid) == entries
    )
    with pytest.raises(
        UserError, match=rf"1 of the 1 runs would replace .*{config.run_folder} \(data.batch_size=32, not 16\)"
    ):
        refuse_to_replace([[*words, "data.batch_size=16"]])
    refuse_to_replace([words])
    check_splits([words], grid)
    with pytest.raises(
        UserError, match=r"valid_raw_texts.txt or .* is missing, .*; the split is data.test_split=valid"
    ):
        check_splits([words], EvaluationGrid(["dev", "valid"]))
    with log.open("a") as file:
        file.write(log.read_text().splitlines()[-1] + "\n")  # as if of another training
    assert results(config, grid) is None


@pytest.mark.slow
def test_ending_a_sweep_ends_its_runs(file, tmp_path):
    sweep = subprocess.Popen(
        [sys.executable, "-m", "xmc_trainer", "sweep", str(file)], cwd=ROOT, stdout=subprocess.DEVNULL
    )

    def runs():
        words = [command_of(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        return [each for each in words if b"--run" in each and str(file).encode() in each]

    assert eventually(runs, seconds=120)
    sweep.terminate()
    assert sweep.wait(timeout=60) == 128 + signal.SIGTERM
    assert eventually(lambda: not runs(), seconds=60)


def command_of(pid):
    """Return a process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def eventually(happens, seconds):
    """Return whether `happens()` becomes true in time."""
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.1)
    return happens()


def test_runs_are_distributed_over_the_gpus(file, monkeypatch):
    """CUDA_VISIBLE_DEVICES stands in for a machine with GPUs."""
    at_work = []  # (GPU, process), in start order

    def start(command, *, env, **arguments):
        process = popen([sys.executable, "-c", "import time; time.sleep(1)"], env=env, **arguments)
        live = [gpu for gpu, other in at_work if other.poll() is None]
        at_work.append((env["CUDA_VISIBLE_DEVICES"], process))
        counts.append(Counter([*live, env["CUDA_VISIBLE_DEVICES"]]))
        return process

    popen, counts = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    words = [words for _, _, words in plan(file, [])[0]]
    train(words, EvaluationGrid(), file, jobs=4)
    assert [gpu for gpu, _ in at_work[:4]] == ["2", "5", "2", "5"] and len(at_work) == 6
    assert all(max(count.values()) <= 2 for count in counts)
    at_work.clear()
    train([[*words[0], "environment.cuda_device_id=1"]], EvaluationGrid(), file, jobs=1)
    assert {gpu for gpu, _ in at_work} == {"2,5"}  # an explicit cuda_device_id is respected


def test_a_sweep_stops_after_only_failures(file, monkeypatch, capsys):
    started = []

    def fail(command, **arguments):
        started.append(command)
        return popen([sys.executable, "-c", "raise SystemExit('error: of all')"], **arguments)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", fail)
    runs, grid = plan(file, [])
    train([words for _, _, words in runs], grid, file, jobs=1)
    said = capsys.readouterr().out
    assert (
        len(started) == 3
        and said.count("failed: error: of all") == 3
        and "3 runs not started, because the first 3 failed" in said
    )


def test_errors_in_a_sweep_file_come_before_anything_runs(file, tmp_path):
    for content, message in [
        ("rows: 3", "has no `rows`"),
        ("{rows: {a: []}, steps: 3}", "steps: unknown key; write settings, seeds, rows, splits or strengths"),
        ("{rows: {a: []}, strengths: [many]}", r"strengths: must be numbers in \[0, 100\], not many"),
        ("{rows: {a: []}, settings: dataset=sidgnd}", "settings: must be a list, not a single value"),
        ("{rows: {a: dataset=sidgnd}}", "rows: a: must be a list"),
        ("{rows: {a: [{model: 3}]}}", "line 1: a mapping where a single value is needed"),
        ("{rows: {a: []}, seeds: 1}", "seeds: must be a list"),
        ("{rows: {a: []}, seeds: [1, x]}", "seeds: must be distinct whole numbers"),
        ("{rows: {a: []}, seeds: [1, 1]}", "seeds: must be distinct whole numbers"),
        ("{rows: {a: [training.seed=3]}}", "row 'a': training.seed=3: is set by the sweep"),
        ("{rows: {a: []}, strengths: [-1]}", r"strengths: must be numbers in \[0, 100\], not -1"),
        ("{rows: {a: [dataset=lfyso]}, splits: [dev]}", "data.test_split: applies to the raw layout only"),
        ("{rows: {a b: [], a-b: []}}", "names must differ in more than punctuation"),
        ("{rows: {a: [dataset=wordnet, model.ffi.fanin=3]}}", "wrong.yaml: row 'a': .*fanin"),
        ("{rows", "not valid YAML"),
    ]:
        (tmp_path / "wrong.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            plan(tmp_path / "wrong.yaml", ["dataset=wordnet"])
    with pytest.raises(UserError, match="missing.yaml"):
        plan(Path("missing.yaml"), [])


def test_settings_of_a_row_override_the_common_ones(file):
    runs, grid = plan(file, ["model.ffi.use_sparse_layer=true", "model.ffi.fan_in=7"])
    assert grid.pairs(load_config(runs[0][2])) == []
    assert [(row, seed) for row, seed, _ in runs[:3]] == [("dense", 1), ("F = 12", 1), ("broken", 1)]
    words = runs[0][2]
    assert words.index("model.ffi.use_sparse_layer=false") > words.index("model.ffi.use_sparse_layer=true")
    assert words[-2:] == ["training.seed=1", "log_fname=dense-1"]


def test_shipped_sweeps_are_valid():
    runs = {file.stem: len(plan(file, [])[0]) for file in (ROOT / "launchers/sweeps").glob("*.yaml")}
    assert runs == {
        "sidgnd": 21, "sidgnd_label_texts": 9, "sidgnd_starts": 8, "sidgnd_rewiring": 36, "sidgnd_options": 30, "other_data": 30,
        "sidgnd_states": 6,
    }  # fmt: skip


def test_one_seed_has_no_spread():
    found = {"P@1": 0.5, "head_mib": 2.0, "best_P@1_minutes": 3.0}
    assert table([("a", 1, found)]).splitlines()[-1] == "| a | 1 | 50.00 | 2.0 | 3.0 |"
