"""A rank that dies takes the job down within a minute, its own error first."""

from __future__ import annotations

import time

import pytest

from tests.integration.test_launchers import launch, start_command


@pytest.mark.parametrize("how", ["accelerate-2", "deepspeed-1", "torchrun"])
@pytest.mark.parametrize("failure", ["raise", "kill"])
def test_a_dying_rank_ends_the_job(toy_settings, failure, how):
    command = [
        word.replace("launchers/train.py", "tests/distributed/failing_train.py") for word in start_command(how, 2)
    ]
    begin = time.monotonic()
    done = launch(*command, failure, *toy_settings, "training.optimization.epochs=1000")
    # Starting takes some ten seconds of it.
    assert time.monotonic() - begin < 60
    assert done.returncode != 0
    if failure == "raise":
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        assert "this rank's own error" in errors[0], done.stderr
