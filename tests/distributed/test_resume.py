"""Killed trainings resume with other engines and numbers of processes, started by real launchers."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from tests.distributed.trainings import Cut, CutBefore
from tests.integration.test_launchers import (
    FLOAT16,
    assert_ended,
    assert_same,
    needs_float16,
    outcome,
    outcome_of,
    records_of,
    settings_value,
    train_here,
    train_in_turn,
)
from xmc_trainer.config import load_config
from xmc_trainer.run_folder import find_checkpoint

pytestmark = pytest.mark.slow

# State that depends on precision: the engine's copies of the weights, and fp16's loss scale.
STAGES = {"bfloat16": "3"} | ({"float16": "2"} if FLOAT16 else {})


def checkpoint_step(settings: list[str]) -> int:
    return json.loads((find_checkpoint(load_config(settings).run_folder) / "manifest.json").read_text())["step"]


@pytest.fixture(scope="module")
def runs(toy_settings_in, tmp_path_factory):
    """Return the folder of the runs of two launches of two processes. The first was killed, the second was signalled.

    In float32: `whole` is one process without interruption; `moved` is the killed run, resumed by one process, by two at every
    stage, and without DeepSpeed. `whole-` and `cut-`: two processes in each precision, without interruption and resumed.
    """
    folder = tmp_path_factory.mktemp("resume")
    always = [*toy_settings_in(folder), "training.checkpoint_interval=2", "training.resume=true"]
    exact = [
        *always,
        "training.optimization.max_steps=20",
        "data.batch_size=12",
        "training.optimization.grad_accum_step=2",
    ]
    exact += [
        "model.penultimate.use_penultimate_layer=true",
        "model.penultimate.penultimate_size=25",
    ]  # a bias too short to be split between two processes
    low = [
        *always,
        "training.optimization.max_steps=10",
        "training.amp.enabled=true",
        "model.encoder.embed_dropout=0.3",
    ]
    moved = [*exact, "log_fname=moved"]

    def training(kind, dtype, cut=None):
        own = [*low, f"training.amp.dtype={dtype}", f"log_fname={kind}-{dtype}"]
        return {"settings": own, "deepspeed_config": f"ds_configs/zero{STAGES[dtype]}.json", "cut": cut}

    trainings = [training("whole", each) for each in STAGES] + [training("cut", each, 7) for each in STAGES]
    trainings.append({"settings": moved, "deepspeed_config": "ds_configs/zero3.json", "fails": ["kill", 3]})
    train_in_turn("deepspeed", 2, trainings, folder)
    assert checkpoint_step(moved) == 2
    with pytest.raises(Cut):
        train_here(moved, hooks=[CutBefore(5)])
    trainings = [training("cut", dtype) for dtype in STAGES]
    for cut, stage in {7: "2", 9: "1", 11: "3_offload", 13: "2_offload", 15: "0"}.items():
        trainings.append({"settings": moved, "deepspeed_config": f"ds_configs/zero{stage}.json", "cut": cut})
    # deepspeed does not forward signals. Its ranks notice a step later that it has died.
    trainings.append({"settings": moved, "signal": [signal.SIGTERM, "launcher", 16]})
    assert_ended(train_in_turn("deepspeed", 2, trainings, folder), signal.SIGTERM, 17)
    assert checkpoint_step(moved) == 17
    train_here(moved)
    train_here([*exact, "log_fname=whole"])
    return folder / "out"


def test_resumes_with_any_engine_and_number_of_processes(runs):
    assert_same(outcome_of(runs / "whole", 1), outcome_of(runs / "moved", 1))
    resumed = [record["step"] for record in records_of(runs / "moved") if record["event"] == "resume"]
    assert resumed == [2, 4, 6, 8, 10, 12, 14, 17]


@pytest.mark.gpu
def test_half_of_the_gpus_can_resume(toy_settings, tmp_path):
    """A run on up to four GPUs is resumed on half of them with another launcher and stage, then on one without DeepSpeed."""
    gpus = min(4, torch.cuda.device_count())
    if gpus < 2:
        pytest.skip("needs two GPUs")
    settings = [
        *toy_settings,
        "training.optimization.max_steps=20",
        "training.checkpoint_interval=2",
        "training.resume=true",
    ]
    whole = outcome(settings, "accelerate-2", gpus)
    moving = [*settings, f"output_dir={settings_value(settings, 'output_dir=')}/again", "log_fname=python-1"]
    begun = {"settings": moving, "deepspeed_config": "ds_configs/zero3.json", "fails": ["kill", 7]}
    train_in_turn("deepspeed", gpus, [begun], tmp_path)
    assert checkpoint_step(moving) == 6
    train_in_turn("accelerate-2", gpus // 2, [{"settings": moving, "fails": ["kill", 13]}], tmp_path)
    assert checkpoint_step(moving) == 12
    assert_same(whole, outcome(moving, "python"))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=needs_float16)])
def test_the_same_engine_resumes_bit_for_bit(runs, dtype):
    assert [record["step"] for record in records_of(runs / f"cut-{dtype}") if record["event"] == "resume"] == [6]
    whole, again = (outcome_of(runs / f"{kind}-{dtype}", 2) for kind in ("whole", "cut"))
    assert again["curve"] == whole["curve"] and again["moved"] == whole["moved"]
    assert all(torch.equal(value, again["tensors"][name]) for name, value in whole["tensors"].items())
