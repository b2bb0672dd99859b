"""Trainings that are killed and go on with other engines and numbers of processes, really launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.trainings import Cut, CutBefore
from tests.integration.test_launchers import (
    FLOAT16,
    assert_same,
    launch,
    needs_float16,
    outcome,
    outcome_of,
    records_of,
    settings_value,
    start_command,
    train_here,
    train_in_turn,
)


def killed(settings: list[str], how: str, processes: int, after: int) -> None:
    done = launch(*start_command(how, processes, "tests/distributed/failing_train.py"), "kill", "--after", str(after), *settings)
    assert done.returncode != 0
    found = Path(settings_value(settings, "output_dir=")) / settings_value(settings, "log_fname=") / "checkpoint" / "manifest.json"
    assert json.loads(found.read_text())["step"] == (after - 1) // 2 * 2, done.stdout + done.stderr


def test_goes_on_with_any_engine_and_number_of_processes(toy_settings, tmp_path):
    """In float32: three processes, two, one, two, without DeepSpeed and at every stage, as one that was never interrupted."""
    settings = [
        *toy_settings, "training.optimization.max_steps=20", "data.batch_size=12", "training.optimization.grad_accum_step=2",
        "training.checkpoint_interval=2", "training.resume=true",
    ]  # fmt: skip
    whole = outcome(settings, "here")
    moving = [*settings, "log_fname=torchrun-2"]
    killed(moving, "deepspeed-3", 3, after=3)
    stages = {5: "2", 7: "1", 9: "3_offload", 11: "2_offload", 13: "0"}
    trainings = [{"settings": moving, "deepspeed_config": f"ds_configs/zero{stage}.json", "cut": cut} for cut, stage in stages.items()]
    train_in_turn("deepspeed", 2, trainings, tmp_path)
    with pytest.raises(Cut):
        train_here(moving, hooks=[CutBefore(15)])
    assert_same(whole, outcome(moving, "torchrun", 2))
    resumed = [record["step"] for record in records_of(tmp_path / "out" / "torchrun-2") if record["event"] == "resume"]
    assert resumed == [2, 4, 6, 8, 10, 12, 14]


@pytest.mark.gpu
def test_half_of_the_gpus_go_on(toy_settings):
    """What all GPUs began, at most four: half of them by another launcher and stage, then one without DeepSpeed."""
    gpus = min(4, torch.cuda.device_count())
    if gpus < 2:
        pytest.skip("needs two GPUs")
    settings = [*toy_settings, "training.optimization.max_steps=20", "training.checkpoint_interval=2", "training.resume=true"]
    whole = outcome(settings, "accelerate-2", gpus)
    moving = [*settings, f"output_dir={settings_value(settings, 'output_dir=')}/again", "log_fname=python-1"]
    killed(moving, "deepspeed-3", gpus, after=7)
    killed(moving, "accelerate-2", gpus // 2, after=13)
    assert_same(whole, outcome(moving, "python"))


# The engine's own precision: its copies, and fp16's loss scale.
STAGES = {"bfloat16": "3"} | ({"float16": "2"} if FLOAT16 else {})


@pytest.fixture(scope="module")
def cut_and_whole(toy_settings_in, tmp_path_factory):
    """Runs of two processes in each precision: whole ones, and such as went on, in other processes, after a cut."""
    folder = tmp_path_factory.mktemp("same")
    settings = [
        *toy_settings_in(folder), "training.optimization.max_steps=10", "training.checkpoint_interval=2",
        "training.amp.enabled=true", "model.encoder.embed_dropout=0.3", "training.resume=true",
    ]  # fmt: skip

    def training(kind, dtype, cut=None):
        own = [*settings, f"training.amp.dtype={dtype}", f"log_fname={kind}-{dtype}"]
        return {"settings": own, "deepspeed_config": f"ds_configs/zero{STAGES[dtype]}.json", "cut": cut}

    train_in_turn("deepspeed", 2, [training("whole", each) for each in STAGES] + [training("cut", each, 7) for each in STAGES], folder)
    train_in_turn("deepspeed", 2, [training("cut", dtype) for dtype in STAGES], folder)
    return folder / "out"


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=needs_float16)])
def test_the_same_engine_goes_on_bit_for_bit(cut_and_whole, dtype):
    assert [record["step"] for record in records_of(cut_and_whole / f"cut-{dtype}") if record["event"] == "resume"] == [6]
    whole, again = (outcome_of(cut_and_whole / f"{kind}-{dtype}", 2) for kind in ("whole", "cut"))
    assert again["curve"] == whole["curve"] and again["moved"] == whole["moved"]
    assert all(torch.equal(value, again["tensors"][name]) for name, value in whole["tensors"].items())
