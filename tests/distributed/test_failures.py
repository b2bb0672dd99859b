"""A rank that dies takes the job down within a minute, its own error first; one that is out of reach, when time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_launchers import ROOT, free_port, launch, settings_value, start_command


# accelerate watches its processes as torchrun does, by the same agent; deepspeed has its own. Killed under deepspeed: in test_resume.
@pytest.mark.parametrize(("failure", "how"), [("raise", "accelerate-2"), ("raise", "deepspeed-1"), ("kill", "torchrun")])
def test_a_dying_rank_ends_the_job(toy_settings, failure, how):
    command = start_command(how, 2, "tests/distributed/failing_train.py")
    done = launch(*command, failure, *toy_settings, "training.optimization.epochs=1000")
    (failed,) = Path(settings_value(toy_settings, "output_dir=")).rglob("fails")
    assert time.time() - failed.stat().st_mtime < 60
    assert done.returncode != 0
    if failure == "raise":
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        assert "this rank's own error" in errors[0], done.stderr


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
