"""A rank that is out of reach takes the job down when time is up. One that dies, within a minute: in test_engines and test_resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.integration.test_launchers import ROOT, free_port


def test_a_long_wait_is_announced_and_a_lost_rank_is_not_waited_for():
    """Two ranks that wait 3 seconds for each other: not while one works alone, which takes longer."""
    code = """
import os, sys, time, torch
from datetime import timedelta
from xmc_trainer import parallel
parallel.TIMEOUT = timedelta(seconds=3)
with parallel.joined_ranks(torch.device("cpu")):
    ranks = parallel.Ranks()
    with ranks.one_a_machine_first():
        time.sleep(5 if ranks.rank == 0 else 0)
    print(ranks.broadcast("together"), flush=True)
    if ranks.rank == 1:
        time.sleep(1000)
    begin = time.monotonic()
    try:
        ranks.sum(torch.zeros(1))
    except RuntimeError:
        print("lost after", round(time.monotonic() - begin), flush=True)
    os._exit(0)
"""
    port, running = free_port(), []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(
            subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        )
    try:
        output, _ = running[0].communicate(timeout=60)
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
    assert output.splitlines() in (["together", "lost after 3"], ["together", "lost after 4"])
