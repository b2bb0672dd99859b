"""Trainings that are killed and go on with other engines and numbers of processes, really launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integration.test_launchers import assert_same, launch, outcome, settings_value, start_command

FAILING = "tests/distributed/failing_train.py"


def killed(settings: list[str], how: str, processes: int, after: int) -> None:
    command = [word.replace("launchers/train.py", FAILING) for word in start_command(how, processes)]
    done = launch(*command, "kill", "--after", str(after), *settings)
    assert done.returncode != 0
    found = Path(settings_value(settings, "output_dir=")) / settings_value(settings, "log_fname=") / "checkpoint" / "manifest.json"
    assert json.loads(found.read_text())["step"] == (after - 1) // 2 * 2, done.stdout + done.stderr


def test_goes_on_with_any_engine_and_number_of_processes(toy_settings):
    """In float32: four processes, two, one, three, without DeepSpeed and at every stage, as one that was never interrupted."""
    settings = [
        *toy_settings, "training.optimization.max_steps=20", "data.batch_size=12", "training.optimization.grad_accum_step=2",
        "training.checkpoint_interval=2", "training.resume=true",
    ]  # fmt: skip
    whole = outcome(settings, "python")
    last = "torchrun", 2
    moving = [*settings, f"log_fname={last[0]}-{last[1]}"]
    ways = [("deepspeed-3", 4), ("accelerate-2", 2), ("python", 1), ("deepspeed-1", 3), ("deepspeed-3_offload", 1), ("deepspeed-2_offload", 2)]
    for number, (how, processes) in enumerate(ways):
        killed(moving, how, processes, after=3 + 2 * number)
    assert_same(whole, outcome(moving, *last))


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
@pytest.mark.parametrize(("how", "processes", "dtype"), [("deepspeed-2", 2, "float16"), ("deepspeed-3", 2, "bfloat16")])
def test_the_same_engine_goes_on_bit_for_bit(toy_settings, how, processes, dtype):
    if dtype == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU does not multiply in float16")
    settings = [
        *toy_settings, "training.optimization.max_steps=10", "training.checkpoint_interval=2", "training.amp.enabled=true",
        f"training.amp.dtype={dtype}", "model.encoder.embed_dropout=0.3", "training.resume=true",
    ]  # fmt: skip
    whole = outcome(settings, how, processes)
    settings = [*settings, f"output_dir={settings_value(settings, 'output_dir=')}/again"]
    killed([*settings, f"log_fname={how}-{processes}"], how, processes, after=7)
    again = outcome(settings, how, processes)
    assert again["curve"] == whole["curve"] and again["moved"] == whole["moved"]
    assert all(torch.equal(value, again["tensors"][name]) for name, value in whole["tensors"].items())
