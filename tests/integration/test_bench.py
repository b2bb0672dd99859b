"""The head's benchmark runs and writes what it printed."""

from __future__ import annotations

import csv
import sys

import pytest

from tests.integration.test_launchers import ROOT, launch
from xmc_trainer import cli
from xmc_trainer.bench import head as bench_head
from xmc_trainer.bench import scaling


@pytest.fixture
def bench(monkeypatch, capsys):
    """A function: what `xmc-trainer bench` writes, in this process; it may start others."""

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
    slow = bench_head.slower_rows(tmp_path / "head.csv", [row | {"ms": 1.04 * float(row["ms"])} for row in rows[:2]])
    assert len(slow) == 2 and rows[0]["what"] in slow[0]
    assert not bench_head.slower_rows(tmp_path / "head.csv", [row | {"ms": 1.02 * float(row["ms"])} for row in rows] + [rows[0] | {"batch": "17"}])
    with pytest.raises(SystemExit, match="2"):
        bench(*words, "--optimizers", "adam")
    assert "--optimizers: adam" in capsys.readouterr().err


def test_zero_benchmark_writes_its_table_and_names_what_fails(bench, tmp_path):
    words = ["zero", "--precision", "bf16", "--hidden", "32", "--layers", "1", "--batch", "4", "--max-len", "8", "--repeat", "1"]
    for processes, files, whats in [("2", ["ds_configs/zero2.json"], ["zero2"]), ("1", ["nowhere.json", "none"], ["without DeepSpeed"])]:
        output = bench(*words, "--processes", processes, "--csv", tmp_path / "zero.csv", *files)
        with (tmp_path / "zero.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["what"] for row in rows] == whats
        assert all(float(row["ms"]) > 0 and row["ranks"] == processes and row["deepspeed"] for row in rows)
    assert "nowhere.json" in output and "error" in output


def test_scaling_benchmark_compares_numbers_of_processes(tmp_path):
    words = ["xmc-trainer", "bench", "scaling", "--launchers", "deepspeed", "--stages", "1", "--precision", "no", "--hidden", "32"]
    more = ["--layers", "1", "--batch", "3", "--max-len", "8", "--labels", "301", "--fan-in", "8", "--positives", "4"]
    done = launch(*words, *more, "--repeat", "1", "--exact-steps", "3", "--csv", tmp_path / "scaling.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "scaling.csv").open(newline="") as file:
        one, two = csv.DictReader(file)
    assert one["processes"] == "1" and float(one["efficiency"]) == 1 and float(one["gather_bytes"]) == 0
    # Two ranks: each sends its 3 texts' features, counts and 12 labels, and gets 3 texts' gradients, all to or from one other.
    assert float(two["gather_bytes"]) == 3 * 32 * 4 + 3 * 8 + 12 * 8 and float(two["scatter_bytes"]) == 3 * 32 * 4
    assert two["processes"] == "2" and float(two["loss_difference"]) < 1e-5, done.stdout
    assert float(two["efficiency"]) == pytest.approx(float(two["texts_s"]) / float(one["texts_s"]) / 2, abs=1e-3)


def test_scaling_benchmark_refuses_other_launchers(capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.parse(["--launchers", "mpirun"])
    assert "--launchers: mpirun" in capsys.readouterr().err
