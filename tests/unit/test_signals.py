"""The effect of signals on a script. Each case is a separate process without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

# A script that prints "ready" when it listens. `hang` waits where no Python handler runs, like a collective.
SCRIPT = """
import contextlib, ctypes, os, sys, time
from xmc_trainer import signals
from xmc_trainer.commands.cli import run

signals._GRACE_SECONDS = 0.5

def ready():
    print("ready", flush=True)

def raises():
    ready()
    time.sleep(60)

def defers():
    with signals.deferred():
        ready()
        while not signals.pending():
            time.sleep(0.01)
        time.sleep(0.7)  # a checkpoint, longer than the grace
        raise signals.Interrupted(signals.pending(), "after step 7")

def hang():
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    ready()
    lock(mutex)

def hangs():
    with signals.deferred():
        hang()

def has_children():
    from multiprocessing import get_context
    for init in (lambda: None, signals.ignore_in_worker):
        get_context("fork").Process(target=lambda: (init(), time.sleep(0.3)), daemon=True).start()
    raises()

run(globals()[sys.argv[1]])
"""


@pytest.fixture
def start(monkeypatch):
    """Return a function that starts the script in a new process group and waits until it is ready."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CROSS_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def go(case, command=(sys.executable, "-c", SCRIPT), **environment):
        process = subprocess.Popen(
            [*command, case], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | environment,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_a_script_with_one_line_and_its_status(start, number):
    process = start("raises")
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + number, f"{number.name}: ended before it finished\n")


def test_a_script_may_defer_a_signal_that_arrives_twice(start):
    process = start("defers")
    os.killpg(process.pid, signal.SIGINT)  # from the terminal
    process.send_signal(signal.SIGTERM)  # from the launcher
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "SIGINT: ended after step 7\n")


def test_a_second_signal_ends_a_process_that_hangs(start):
    process = start("hangs")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "\nSIGINT again: ended at once\n")


def test_the_first_signal_ends_a_hanging_process_outside_deferred_blocks(start):
    process = start("hang")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (143, "\nSIGTERM did not end the process within 0 s: ended at once\n")


def test_children_print_nothing(start):
    process = start("has_children")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "SIGINT: ended before it finished\n")


# The process trees of torchrun, accelerate and deepspeed (two launchers, nested), when the first process is killed.
LAUNCH = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@pytest.mark.parametrize(("variable", "depth"), [("TORCHELASTIC_RUN_ID", 1), ("CROSS_RANK", 2)])
def test_the_death_of_the_launcher_is_a_sigterm(start, variable, depth):
    launcher = start(
        "defers", [*[sys.executable, "-c", LAUNCH] * depth, sys.executable, "-c", SCRIPT], **{variable: "0"}
    )
    launcher.kill()
    _, err = launcher.communicate(timeout=10)  # until the script has closed its outputs
    assert "SIGTERM: ended after step 7\n" in err


def test_without_a_launcher_the_parent_may_end(start):
    shell = start("raises", [sys.executable, "-c", LAUNCH, sys.executable, "-c", SCRIPT])
    shell.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        shell.communicate(timeout=2)
    os.killpg(shell.pid, signal.SIGTERM)
    assert "SIGTERM: ended" in shell.communicate(timeout=10)[1]
