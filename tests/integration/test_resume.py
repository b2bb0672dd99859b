"""A resumed training equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.test_launchers import run_here
from tests.integration.test_training import BY_THE_CLOCK, log_of, train
from tests.saved_folders import no_file_longer_than
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.hooks import Hook
from xmc_trainer.run_folder import checkpoints, find_checkpoint
from xmc_trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class PowerCut(Exception):
    pass


class CutAfter(Hook):
    """Ends the training after a step as a kill would: nothing more is written or closed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            raise PowerCut


class Counter(Hook):
    """A user-defined hook with state."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, trainer: Trainer) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {f"encoder.{name}": value for name, value in trainer.encoder_module.state_dict().items()}
    return found | {f"head.{name}": value.clone() for name, value in trainer.head.state_dict().items()}


def new_process() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def settings_of(toy_settings, name, *more):
    return [
        *toy_settings,
        f"log_fname={name}",
        "training.checkpoint_interval=7",
        "training.optimization.epochs=3",
        "training.overwrite=false",
        *more,
    ]


CASES = {
    "dropout, momentum": ["model.encoder.embed_dropout=0.3", "training.optimization.xmc_optimizer=sgd", "training.optimization.lr=0.01"],
    "accumulation, bfloat16 weights, states in a byte, groups": [
        "training.optimization.grad_accum_step=2", "data.batch_size=16", "model.ffi.weight_dtype=bfloat16", "model.ffi.group_size=4",
        "training.optimization.xmc_optimizer=adamw_8bit",
    ],
    "growth by gradient, split head": [
        "model.ffi.growth_mode=gradient", "model.ffi.prune_mode=fraction", "model.ffi.growth_batches=3", "model.ffi.head_ratio=0.2", "model.ffi.head_fan_in=20",
    ],
    "informed index, plateau, encoder by sgd": [
        "model.ffi.index_init=informed", "model.ffi.weight_init=centroid", "training.optimization.lr_scheduler=ReduceLROnPlateau",
        "training.optimization.lr_patience=0", "training.optimization.encoder_optimizer=sgd",
    ],
    "a dense epoch first, one state a label": [
        "training.optimization.dense_epochs=1", "training.optimization.xmc_optimizer=rowwise_rmsprop",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case, cut", [("dropout, momentum", 9), *((case, 33) for case in CASES)])
def test_resuming_gives_the_uninterrupted_training(toy_settings, case, cut):
    """Losses, weights, metrics, rewirings and hooks are bitwise equal, for interruptions in the first and second epoch."""
    whole, metrics = train(settings_of(toy_settings, "whole", *CASES[case]), hooks=[counted := Counter()])
    new_process()
    settings = settings_of(toy_settings, "cut", *CASES[case])
    with pytest.raises(PowerCut):
        train(settings, hooks=[Counter(), CutAfter(cut)])
    new_process()
    trainer, found = train([*settings, "training.resume=true"], hooks=[again := Counter()])
    assert found == metrics and again.steps == counted.steps
    for event in ("step", "evaluate", "rewire"):
        logs = [
            [{k: v for k, v in record.items() if k not in BY_THE_CLOCK} for record in log_of(each, event)]
            for each in (whole, trainer)
        ]
        assert logs[0] == logs[1]
    assert [record["step"] for record in log_of(trainer, "resume")] == [cut // 7 * 7]
    assert {record["event"] for record in log_of(whole, "start")} == {
        record["event"] for record in log_of(trainer, "start")
    }
    expected = everything(whole)
    assert expected.keys() == everything(trainer).keys()
    for name, value in everything(trainer).items():
        assert torch.equal(value, expected[name]), name
    assert not list(trainer.run_folder.glob("checkpoint*"))  # no longer needed


@pytest.fixture
def interrupted(toy_settings):
    """Return settings of a run that was killed after step 9; its checkpoint is from step 7."""
    settings = settings_of(toy_settings, "cut")
    with pytest.raises(PowerCut):
        train(settings, hooks=[CutAfter(9)])
    new_process()
    return settings


def message_of(settings):
    with pytest.raises(UserError) as caught:
        build_trainer(load_config(settings))
    return str(caught.value)


def run_message_of(settings, hooks=None):
    with pytest.raises(UserError) as caught:
        train(settings, hooks=hooks)
    return str(caught.value)


def test_a_run_does_not_overwrite_an_interrupted_or_finished_one(interrupted):
    held = "cut: holds an interrupted run (checkpoint-7); continue it with training.resume=true"
    other = "choose another name (log_fname=cut-2)"
    assert held in (message := message_of(interrupted)) and other in message
    new_process()
    trainer, _ = train([*interrupted, "training.resume=true"])
    new_process()
    before = {
        path: path.read_bytes() for path in trainer.run_folder.rglob("*") if path.is_file() and path.name != ".lock"
    }
    done = run_here(
        "launchers/train.py", *interrupted, "training.resume=true"
    )  # as by a script that is restarted automatically
    assert not done.returncode and "this run is finished" in done.stdout and "step" not in done.stdout
    shorter = [*interrupted, "training.optimization.epochs=1"]
    assert "cut: holds a finished run; " in (message := message_of(shorter)) and other in message
    new_process()
    assert "a finished run with training.optimization.epochs=3, not 1; restore these settings" in message_of(
        [*shorter, "training.resume=true"]
    )
    assert before == {path: path.read_bytes() for path in before}


def test_a_replaced_run_is_kept_until_the_new_one_is_finished(interrupted):
    """A finished run is replaced by an interrupted one, and that by a third."""
    folder = load_config(interrupted).run_folder
    train([*interrupted, "training.resume=true"])
    finished = (folder / "model" / "manifest.json").read_bytes()
    again = [*interrupted, "training.overwrite=true", "training.optimization.epochs=2"]
    for cut, aside in ((9, "replaced"), (8, "replaced-2")):
        new_process()
        with pytest.raises(PowerCut):
            train(again, hooks=[CutAfter(cut)])
        assert not (folder / "model").exists() and find_checkpoint(folder).name == "checkpoint-7"
        assert (folder / aside).is_dir() and (folder / "replaced" / "model" / "manifest.json").read_bytes() == finished
    new_process()
    train([*again, "training.resume=true"])
    assert {path.name for path in folder.iterdir()} == {".lock", "config.yaml", "log.jsonl", "model"}
    assert json.loads((folder / "model" / "manifest.json").read_text())["step"] == 40
    # Starting from the stored settings replaces nothing.
    new_process()
    message = message_of(
        [f"dataset={folder / 'config.yaml'}", "training.resume=false", "training.optimization.epochs=1"]
    )
    assert "holds a finished run" in message


def test_the_last_checkpoints_are_kept(toy_settings):
    settings = settings_of(toy_settings, "kept", "training.checkpoints_kept=3", "training.checkpoint_interval=2")
    with pytest.raises(PowerCut):
        train(settings, hooks=[CutAfter(9)])
    folder = load_config(settings).run_folder
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    saved = {record["step"]: record["bytes"] for record in records if record["event"] == "checkpoint_time"}
    assert list(saved) == [2, 4, 6, 8]
    assert saved[8] == sum(file.stat().st_size for file in (folder / "checkpoint-8").iterdir())
    shutil.rmtree(folder / "checkpoint-8")
    new_process()
    trainer, _ = train([*settings, "training.resume=true"])
    resumed = log_of(trainer, "resume")[0]
    assert resumed["step"] == 6 and resumed["start_s"]["checkpoint"] >= 0 and not checkpoints(folder)


def test_checkpoints_that_do_not_fit_are_refused(interrupted, toy_data, tmp_path):
    again = [*interrupted, "training.resume=true"]
    for more, message in {
        "model.ffi.fan_in=9": "(checkpoint-7) with model.ffi.fan_in=12, not 9; restore these settings",
        "training.optimization.epochs=4": "with training.optimization.epochs=3, not 4",
    }.items():
        assert message in message_of([*again, more])
        new_process()
    other = tmp_path / "data" / "toy"
    shutil.copytree(toy_data / "toy", other)
    (other / "test_labels.txt").write_text((other / "test_labels.txt").read_text().replace("tag01", "tag02"))
    assert "other texts" in message_of([*again, f"dataset_path={other.parent}"])
    new_process()
    folder = find_checkpoint(load_config(interrupted).run_folder)
    file = folder / "encoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    message = message_of(again)
    assert "encoder.safetensors: is damaged" in message and f"remove {folder} to continue without it" in message


def test_two_trainings_do_not_share_a_folder(interrupted):
    """The lock is held during a training, and released after it."""
    lock = load_config(interrupted).run_folder / ".lock"
    take = f"import fcntl; fcntl.lockf(open({str(lock)!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def taken() -> bool:
        return b"BlockingIOError" in subprocess.run([sys.executable, "-c", take], capture_output=True).stderr

    class Second(Hook):
        def on_step_end(self, trainer):
            assert taken() and lock.read_text().startswith(f"process {os.getpid()} on ")
            raise PowerCut

    assert not taken()
    with pytest.raises(PowerCut):
        train([*interrupted, "training.resume=true"], hooks=[Second()])
    assert not taken()
    new_process()
    file = load_config(interrupted).run_folder / "log.jsonl"
    assert (
        "cannot be written (Not a directory); remove the file that is in place of a folder, or set output_dir to another folder"
        in run_message_of([*interrupted, f"output_dir={file}"])
    )


@pytest.mark.parametrize("kilobytes, file", [(60, "checkpoint-14.partial"), (0, "log.jsonl")])
def test_a_full_disk_ends_the_run_with_one_line(interrupted, kilobytes, file):
    """Whichever file cannot be written, the previous checkpoint stays and can be resumed."""

    class Full(Hook):
        def on_step_end(self, trainer):
            if trainer.state.step == 9:
                context.enter_context(no_file_longer_than(kilobytes << 10))

    with ExitStack() as context:
        message = run_message_of([*interrupted, "training.resume=true"], hooks=[Full()])
    folder = load_config(interrupted).run_folder
    assert message.startswith(f"{folder / file}: cannot be written (File too large); ")
    assert message.endswith("; then resume from checkpoint-7 with training.resume=true") and "\n" not in message
    assert not list(folder.glob("*.partial"))
    new_process()
    trainer, _ = train([*interrupted, "training.resume=true", "training.checkpoint_interval=0"])
    assert [record["step"] for record in log_of(trainer, "step")] == list(range(1, 61))


def test_some_settings_may_change_on_resume(interrupted):
    trainer, _ = train(
        [
            *interrupted,
            "training.resume=true",
            "model.ffi.tile_labels=8",
            "data.test_batch_size=16",
            "training.checkpoint_interval=0",
            "data.micro_batches=4",
        ]
    )
    assert [record["step"] for record in log_of(trainer, "step")] == list(range(1, 61))


def test_a_checkpoint_of_the_previous_format_is_refused_and_kept(interrupted):
    folder = load_config(interrupted).run_folder
    manifest = json.loads((folder / "checkpoint-7" / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    (folder / "checkpoint-7" / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    (folder / "checkpoint-7").rename(folder / "checkpoint.old")  # under its old name, interrupted between two renames
    message = message_of([*interrupted, "training.resume=true"])
    assert (
        "checkpoint/manifest.json: has format 1, but this version reads 2 of a checkpoint; use the version that wrote it"
        in message
    )
    assert (folder / "checkpoint" / "encoder.safetensors").is_file()


def test_a_wandb_run_is_resumed_too(toy_settings, monkeypatch):
    calls = []
    run = SimpleNamespace(id="run1", log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append((arguments["id"], arguments["resume"])) or run)
    settings = settings_of(toy_settings, "cut", "training.verbose.use_wandb=true")
    with pytest.raises(PowerCut):
        train(settings, hooks=[CutAfter(9)])
    new_process()
    train([*settings, "training.resume=true", "training.verbose.logging=false"])
    assert calls == [(None, "allow"), ("run1", "allow")]


def test_tensorboard_has_every_step_of_a_resumed_run_once(toy_settings):
    settings = settings_of(toy_settings, "cut", "training.verbose.tracker=tensorboard")
    with pytest.raises(PowerCut):
        train(settings, hooks=[CutAfter(9)])  # after the checkpoint
    new_process()
    trainer, _ = train([*settings, "training.resume=true"])
    events = EventAccumulator(str(trainer.run_folder / "tensorboard")).Reload().Scalars("train/loss")
    logged = [(record["step"], pytest.approx(record["loss"])) for record in log_of(trainer, "step")]
    assert [(event.step, event.value) for event in events] == logged


def test_without_a_checkpoint_the_run_starts_over_and_says_so(toy_settings, capsys):
    trainer, _ = train(settings_of(toy_settings, "fresh", "training.resume=true", "training.optimization.max_steps=3"))
    assert len(log_of(trainer, "start")) == 1 and trainer.state.step == 3
    assert "no checkpoint to resume from; training from the beginning" in capsys.readouterr().out
