"""An unreachable rank ends the job after the timeout. Ranks that die: test_engines and test_resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.integration.test_launchers import ROOT, free_port
from xmc_trainer import parallel

pytestmark = pytest.mark.slow

# The timeout is 6 seconds. Work on one rank that takes longer must not end the job, because its heartbeat goes on.
RANK = """
import sys, time, torch
from datetime import timedelta
from xmc_trainer import parallel
from xmc_trainer.commands import cli

def main():
    with parallel.joined_ranks(torch.device("cpu"), timedelta(seconds=6), "the setting"):
        ranks = parallel.Ranks()
        with ranks.one_a_machine_first():
            time.sleep(8 if ranks.rank == 0 else 0)
        print(ranks.broadcast("together"), flush=True)
        if ranks.rank == int(sys.argv[1]):
            ranks.barrier()
        else:
            time.sleep(1000)

cli.run(main)
"""


@pytest.mark.parametrize(
    "stopped, said",
    [
        (1, "rank 1 gave no sign of life for 0.1 min (the setting); check its machine"),
        (
            0,
            "rank 0 or the launcher on its machine, 127.0.0.1:{port}, gave no sign of life",
        ),  # it keeps the job's store
    ],
)
def test_a_silent_rank_is_named_and_ends_the_job(stopped, said):
    port, running = free_port(), []
    for rank in range(2):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(1 - stopped)],
                cwd=ROOT,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    try:
        assert running[0].stdout.readline() == running[1].stdout.readline() == "together\n"
        running[stopped].send_signal(signal.SIGSTOP)
        _, err = running[1 - stopped].communicate(timeout=60)
    finally:
        for process in running:
            process.kill()
    lines = [line for line in err.splitlines() if line]
    assert running[1 - stopped].returncode == 2 and len(lines) == 1
    assert lines[0].startswith(f"error (rank {1 - stopped}): {said.format(port=port)}")


@pytest.mark.parametrize(
    "own, said", [(0, "rank 0 gave"), (9, "rank 0 or the launcher"), (10, "rank 0 or the launcher")]
)
def test_a_lost_store_is_told_from_a_silent_rank(own, said, monkeypatch):
    """Without the store, both counters stop, this rank's up to an interval after rank 0's."""
    watch, ends = parallel._Heartbeat.__new__(parallel._Heartbeat), []
    watch._rank, watch._limit, watch._interval, watch._silent = 1, 6.0, 0.6, [10, own]
    watch._host, watch._port, watch._timeout_is = "127.0.0.1", 29500, "its timeout"
    watch._stopped = SimpleNamespace(wait=lambda seconds: bool(ends))
    monkeypatch.setattr(watch, "_end", ends.append)
    watch._watch()
    assert ends[0].startswith(said)
