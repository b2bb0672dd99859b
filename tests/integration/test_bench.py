"""The benchmarks run, print a table and write it as CSV."""

from __future__ import annotations

import csv
import sys

import pytest

from tests.integration.test_launchers import ROOT, free_port, launch
from xmc_trainer.commands import cli
from xmc_trainer.commands.bench.head_times import slower_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch, capsys):
    """Return a function that runs `xmc-trainer bench` in this process and returns its output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["xmc-trainer", "bench", *map(str, words)])
        cli.main()
        return capsys.readouterr().out

    monkeypatch.chdir(ROOT)
    return run


def test_head_benchmark_writes_its_table(bench, tmp_path, capsys):
    words = ["head", "--labels", "2000", "--features", "32", "--fan-in", "8"]
    more = ["--batch", "16", "--repeat", "1", "--group-sizes", "1,4", "--optimizers", "sgd,adamw_8bit"]
    output = bench(*words, *more, "--csv", tmp_path / "head.csv")
    with (tmp_path / "head.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and all(row["what"] in output for row in rows)
    assert all(float(row["ms"]) > 0 and row["device"] and row["torch"] for row in rows)
    slow = slower_rows(tmp_path / "head.csv", [row | {"ms": 1.04 * float(row["ms"])} for row in rows[:2]])
    assert len(slow) == 2 and rows[0]["what"] in slow[0]
    assert not slower_rows(
        tmp_path / "head.csv", [row | {"ms": 1.02 * float(row["ms"])} for row in rows] + [rows[0] | {"batch": "17"}]
    )
    with pytest.raises(SystemExit, match="2"):
        bench(*words, "--optimizers", "adam")
    assert "--optimizers: adam" in capsys.readouterr().err


def test_train_benchmark_times_whole_steps(bench, tmp_path):
    """Generated data in one process, then two processes under DeepSpeed, compared with the first CSV."""
    settings = ["dataset=amazon3m", "data.num_labels=601", "data.max_len=16", "data.batch_size=8", "data.num_workers=0"]
    settings += [
        "model.encoder.encoder_ftr_dim=32",
        "model.ffi.fan_in=8",
        "training.amp.enabled=false",
        f"output_dir={tmp_path}",
    ]
    words = [
        "--steps",
        "2",
        "--texts",
        "200",
        "--tokens",
        "8",
        "--positives",
        "4",
        "--layers",
        "1",
        "--csv",
        str(tmp_path / "train.csv"),
    ]
    output = bench("train", *words, *settings)
    assert "100 % of 1 times one process's texts/s" in output and "generated data of 601 labels" in output
    done = launch(
        "torchrun",
        "--nproc_per_node",
        "2",
        "--master_port",
        free_port(),
        "-m",
        "xmc_trainer",
        "bench",
        "train",
        *words,
        "--no-floor",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "train.csv").open(newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["ranks"], two["ranks"], one["texts_a_step"], one["micro_batches"]) == ("1", "2", "16", "2")
    for row in (one, two):
        parts = [float(row[f"{part}_ms"]) for part in ("data", "forward", "head", "backward", "engine")]
        assert min(parts) > 0 and sum(parts) < float(row["ms"]) and row["device"] and row["torch"]
        assert float(row["texts_s"]) == pytest.approx(16e3 / float(row["ms"]), rel=0.01)
    assert (
        float(one["ratio"]) == pytest.approx(float(one["encoder_ms"]) / float(one["floor_ms"]), rel=0.01)
        and not two["ratio"]
    )
    assert float(two["efficiency"]) == pytest.approx(float(two["texts_s"]) / float(one["texts_s"]) / 2, abs=1e-3)
    assert not list(tmp_path.glob("run"))  # nothing is trained


def test_train_benchmark_needs_a_shape(bench, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("train", "dataset=wordnet", f"dataset_path={tmp_path}", "data.num_labels=null")
    assert (
        "no such folder; set dataset_path or data.folder, or set data.num_labels to generate data"
        in capsys.readouterr().err
    )
