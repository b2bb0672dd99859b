"""The head's benchmark runs and writes what it printed."""

from __future__ import annotations

import csv

from tests.integration.test_launchers import launch


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
