"""Communication does not grow with the number of labels; memory per rank shrinks with the number of ranks."""

from __future__ import annotations

import csv
import sys

import pytest

from tests.integration.test_launchers import free_port, launch
from xmc_trainer.commands.bench import ranks

pytestmark = pytest.mark.slow


def test_sent_bytes_depend_on_the_batch_and_memory_on_the_share_of_labels(tmp_path, monkeypatch, capsys):
    rows = {}
    for size in (1, 3):
        path = tmp_path / f"{size}.csv"
        words = [
            "--labels",
            "3000,9000",
            "--batch",
            "12,48",
            "--features",
            "32,64",
            "--fan-in",
            "8",
            "--repeat",
            "1",
            "--csv",
            str(path),
        ]
        if size == 1:
            monkeypatch.setattr(sys, "argv", ["ranks", *words])
            ranks.main()
            output = capsys.readouterr().out
        else:
            start = [
                "torchrun",
                "--nproc_per_node",
                str(size),
                "--master_port",
                free_port(),
                "-m",
                "xmc_trainer",
                "bench",
                "ranks",
            ]
            done = launch(*start, *words)
            assert done.returncode == 0, done.stderr
            output = done.stdout
        with path.open(newline="") as file:
            rows[size] = {
                (int(row["labels"]), int(row["batch"]), int(row["features"])): row for row in csv.DictReader(file)
            }
        assert len(rows[size]) == 8 and f"{size} ranks" in output
    for (labels, batch, features), row in rows[1].items():
        assert int(row["sent_bytes"]) == 0
        case, part = rows[3][labels, batch, features], batch // 3
        # Sent: features, their gradient (float32), 5 label ids per text (int64), counts (int64), the loss.
        assert int(case["sent_bytes"]) == round(2 * part * (2 * 4 * features + 5 * 8 + 8) + 2 * 2 / 3 * 4)
        assert float(case["head_mib"]) <= float(row["head_mib"]) / 3 + 0.01
