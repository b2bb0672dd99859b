"""The head's benchmark runs and writes what it printed."""

from __future__ import annotations

import csv

import pytest

from tests.integration.test_launchers import launch
from xmc_trainer.bench import scaling


def test_head_benchmark_writes_its_table(tmp_path):
    words = ["xmc-trainer", "bench", "head", "--labels", "2000", "--features", "32", "--fan-in", "8"]
    more = ["--batch", "16", "--repeat", "1", "--group-sizes", "1,4", "--optimizers", "sgd,adamw"]
    done = launch(*words, *more, "--csv", tmp_path / "head.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "head.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and all(row["what"] in done.stdout for row in rows)
    assert all(float(row["ms"]) > 0 and row["device"] and row["torch"] for row in rows)
    done = launch(*words, "--optimizers", "adam")
    assert done.returncode == 2 and "--optimizers: adam" in done.stderr


def test_zero_benchmark_writes_its_table_and_names_what_fails(tmp_path):
    words = ["xmc-trainer", "bench", "zero", "--precision", "bf16", "--hidden", "32", "--layers", "1"]
    more = ["--batch", "4", "--max-len", "8", "--repeat", "1", "--processes", "2", "--csv", tmp_path / "zero.csv"]
    done = launch(*words, *more, "none", "ds_configs/zero2.json", "nowhere.json")
    assert done.returncode == 0, done.stderr
    assert "nowhere.json" in done.stdout and "error" in done.stdout
    with (tmp_path / "zero.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["without DeepSpeed", "zero2"]
    assert all(float(row["ms"]) > 0 and row["ranks"] == "2" and row["deepspeed"] for row in rows)


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
