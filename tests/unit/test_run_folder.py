"""A run's folder belongs to one training at a time, until that training has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xmc_trainer.config import load_config, to_yaml
from xmc_trainer.errors import NothingToDo, UserError
from xmc_trainer.parallel import Ranks
from xmc_trainer.run_folder import RunFolder

# A training that only uses its folder, with a loader process that outlives it.
HOLDER = """
import os, sys, time
from contextlib import nullcontext
from types import SimpleNamespace
from xmc_trainer.config import load_config
from xmc_trainer.run_folder import RunFolder
alone = SimpleNamespace(rank=0, together=nullcontext, broadcast=lambda value: value)
with RunFolder(load_config(sys.argv[1:]), alone).at_work():
    loader = os.fork()
    print(loader, flush=True) if loader else None
    time.sleep(60)
"""


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "out").mkdir()
    return ["dataset=wordnet", f"output_dir={tmp_path / 'out'}", "log_fname=run"]


def test_a_running_training_holds_the_lock_and_a_killed_one_does_not(settings, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *settings], stdout=subprocess.PIPE, text=True)
    loader = int(holder.stdout.readline())
    try:
        (tmp_path / "out" / "run" / "checkpoint-5").mkdir()
        (tmp_path / "out" / "run" / "checkpoint-5" / "manifest.json").write_text("{}")
        for more in ([], ["training.resume=true"], ["training.overwrite=true"]):
            with pytest.raises(UserError, match=rf"another training is using it \(process {holder.pid} on "):
                RunFolder(load_config([*settings, *more]), Ranks())
        holder.kill()
        holder.wait()
        os.kill(loader, 0)  # the folder exists
        with RunFolder(load_config([*settings, "training.overwrite=true"]), Ranks()).at_work():
            pass
    finally:
        holder.kill()
        os.kill(loader, signal.SIGKILL)


def test_the_next_free_name_is_offered(settings, tmp_path):
    for name, free in (("run", "run-2"), ("run-2", "run-3"), ("run", "run-3")):
        (tmp_path / "out" / name / "model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name / "model" / "manifest.json").write_text("{}")
        with pytest.raises(UserError, match=f"{name}: holds a finished run; choose another name .log_fname={free}"):
            RunFolder(load_config([*settings, f"log_fname={name}"]), Ranks())


@pytest.mark.parametrize(
    "more, said",
    [
        (
            [f"output_dir={'x' * 256}"],
            "cannot be written (File name too long); choose shorter names, or set output_dir",
        ),
        (
            ["output_dir=/proc/nowhere"],
            "/proc/nowhere/run: cannot be written (No such file or directory); check that disk, or set",
        ),
    ],
)
def test_unwritable_folders_are_refused_at_once(settings, more, said):
    with pytest.raises(UserError) as caught:
        RunFolder(load_config([*settings, *more]), Ranks())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_refused_runs_leave_no_files(settings, tmp_path):
    RunFolder(load_config([*settings, f"output_dir={tmp_path / 'new' / 'out'}"]), Ranks())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and not list(Path(tmp_path, "out").iterdir())


def test_a_run_that_was_finished_without_a_log_is_finished(settings, tmp_path):
    """The log is from its first, interrupted part."""
    config = load_config([*settings, "training.resume=true", "training.verbose.logging=false"])
    run = tmp_path / "out" / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "manifest.json").write_text("{}")
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "log.jsonl").write_text('{"event": "start"}\n{"event": "interrupt"}\n')
    with pytest.raises(NothingToDo, match="this run is finished"):
        RunFolder(config, Ranks())


@pytest.mark.parametrize(
    "name, said",
    [(".lock", "regular file"), ("log.jsonl", "regular file"), ("config.yaml", "regular file"), ("model", "folder")],
)
def test_files_in_place_of_folders_are_refused_at_once(settings, tmp_path, name, said):
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    (tmp_path / "out" / "run").mkdir()
    (tmp_path / "out" / "run" / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"run/{name}: is not a {said}, but a run"):
        RunFolder(load_config(settings), Ranks())
    assert victim.read_text() == "of somebody else"
