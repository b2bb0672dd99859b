"""An interrupted training that goes on is the training that was not interrupted."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.integration.test_launchers import launch, run_here, start_command
from tests.integration.test_training import log_of, train
from xmc_trainer import resume
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.hooks import Hook
from xmc_trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class PowerCut(Exception):
    pass


class CutAfter(Hook):
    """Ends the process's training after a step, as a killed one ends: nothing is closed or written any more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            raise PowerCut


class Counter(Hook):
    """A user's hook with a state."""

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
    return [*toy_settings, f"log_fname={name}", "training.checkpoint_interval=7", "training.optimization.epochs=3", *more]


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
def test_goes_on_as_if_nothing_had_happened(toy_settings, case, cut):
    """Bit for bit, in the first epoch and in the second (of 20 steps each): losses, weights, metrics, rewirings, hooks."""
    whole, metrics = train(settings_of(toy_settings, "whole", *CASES[case]), hooks=[counted := Counter()])
    new_process()
    settings = settings_of(toy_settings, "cut", *CASES[case])
    with pytest.raises(PowerCut):
        train(settings, hooks=[Counter(), CutAfter(cut)])
    new_process()
    trainer, found = train([*settings, "training.resume=true"], hooks=[again := Counter()])
    assert found == metrics and again.steps == counted.steps
    for event in ("step", "evaluate", "rewire"):
        # Skipped steps are counted, and the speed is told, whenever a second is over.
        clock = ("seconds", "head_skipped", "texts_per_s", "encoder_ms", "head_ms", "waiting", "gib")
        logs = [[{k: v for k, v in record.items() if k not in clock} for record in log_of(each, event)] for each in (whole, trainer)]
        assert logs[0] == logs[1]
    assert [record["step"] for record in log_of(trainer, "resume")] == [cut // 7 * 7]
    assert {record["event"] for record in log_of(whole, "start")} == {record["event"] for record in log_of(trainer, "start")}
    expected = everything(whole)
    assert expected.keys() == everything(trainer).keys()
    for name, value in everything(trainer).items():
        assert torch.equal(value, expected[name]), name
    assert not list(trainer.run_folder.glob("checkpoint*"))  # it has done its work


@pytest.fixture
def interrupted(toy_settings):
    """Settings of a run that was cut off after step 9; its checkpoint is of step 7."""
    settings = settings_of(toy_settings, "cut")
    with pytest.raises(PowerCut):
        train(settings, hooks=[CutAfter(9)])
    new_process()
    return settings


def message_of(settings):
    with pytest.raises(UserError) as caught:
        Trainer(load_config(settings))
    return str(caught.value)


def run_message_of(settings):
    with pytest.raises(UserError) as caught:
        train(settings)
    return str(caught.value)


def test_a_run_does_not_undo_an_interrupted_or_a_finished_one(interrupted):
    assert "interrupted after step 7; go on with training.resume=true" in message_of(interrupted)
    new_process()
    train([*interrupted, "training.resume=true"])
    new_process()
    done = run_here("launchers/train.py", *interrupted, "training.resume=true")  # by a script that is always started again
    assert not done.returncode and "this run is finished" in done.stdout and "step" not in done.stdout
    train([*interrupted, "training.optimization.epochs=1", "training.resume=true"])  # another run: begins


def test_what_does_not_fit_is_refused(interrupted, toy_data, tmp_path):
    again = [*interrupted, "training.resume=true"]
    for more, message in {
        "model.ffi.fan_in=9": "was made with model.ffi.fan_in=12, not 9; set that again",
        "training.optimization.epochs=4": "was made with training.optimization.epochs=3, not 4",
    }.items():
        assert message in message_of([*again, more])
        new_process()
    other = tmp_path / "data" / "toy"
    shutil.copytree(toy_data / "toy", other)
    (other / "test_labels.txt").write_text((other / "test_labels.txt").read_text().replace("tag01", "tag02"))
    assert "other texts" in message_of([*again, f"dataset_path={other.parent}"])
    new_process()
    folder = load_config(interrupted).run_folder / "checkpoint"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    assert "format 99, this version reads" in message_of(again)
    new_process()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    file = folder / "encoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    message = message_of(again)
    assert "encoder.safetensors: damaged" in message and f"remove {folder} to begin anew" in message


def test_two_trainings_do_not_share_a_folder(interrupted):
    class Second(Hook):
        def on_step_end(self, trainer):
            done = launch(*start_command("python"), *interrupted, "training.resume=true")
            assert done.returncode == 2 and f"another training is at work in it (process {os.getpid()} on " in done.stderr
            raise PowerCut

    with pytest.raises(PowerCut):
        train([*interrupted, "training.resume=true"], hooks=[Second()])
    assert resume.find(load_config(interrupted).run_folder).step == 7
    new_process()
    file = load_config(interrupted).run_folder / "log.jsonl"
    assert "cannot be written (Not a directory); set output_dir" in run_message_of([*interrupted, f"output_dir={file}"])


def test_what_may_change_does(interrupted):
    trainer, _ = train(
        [
            *interrupted, "training.resume=true", "model.ffi.tile_labels=8", "data.test_batch_size=16", "training.checkpoint_interval=0",
            "data.micro_batches=4",
        ]
    )
    assert [record["step"] for record in log_of(trainer, "step")] == list(range(1, 61))


def test_a_checkpoint_that_was_being_replaced_is_found(interrupted):
    folder = load_config(interrupted).run_folder
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    (folder / "checkpoint.partial").mkdir()
    assert resume.find(folder).step == 7
    trainer, _ = train([*interrupted, "training.resume=true"])
    assert not list(folder.glob("checkpoint*")) and trainer.state.step == 60


def test_a_run_at_wandb_goes_on_too(toy_settings, monkeypatch):
    calls = []
    run = SimpleNamespace(id="run1", log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append((arguments["id"], arguments["resume"])) or run)
    settings = settings_of(toy_settings, "cut", "training.verbose.use_wandb=true")
    with pytest.raises(PowerCut):
        train(settings, hooks=[CutAfter(9)])
    new_process()
    train([*settings, "training.resume=true", "training.verbose.logging=false"])
    assert calls == [(None, "allow"), ("run1", "allow")]


def test_without_a_checkpoint_it_begins_and_says_so(toy_settings, capsys):
    trainer, _ = train(settings_of(toy_settings, "fresh", "training.resume=true", "training.optimization.max_steps=3"))
    assert len(log_of(trainer, "start")) == 1 and trainer.state.step == 3
    assert "no checkpoint to go on from; the training begins" in capsys.readouterr().out
