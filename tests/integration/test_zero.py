"""The shortened step of ZeRO 1 and 2 trains as DeepSpeed's own, in float16 too, where steps overflow."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.integration.test_training import log_of
from xmc_trainer.builders import encoder as builder
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config
from xmc_trainer.engine import accelerator as engine

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_float16_overflows_are_skipped_as_by_deepspeed(
    toy_settings, accumulation, tmp_path, monkeypatch, fresh_accelerator
):
    # This CPU may multiply float16 slowly, but it does.
    monkeypatch.setattr(engine, "_cpu_takes_fp16", lambda: True)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    # From 2^28 the scale falls for many tries. It must not rise: DeepSpeed then divides a gradient by the next step's scale.
    settings = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    settings["fp16"] |= {"initial_scale_power": 28, "loss_scale_window": 1000, "hysteresis": 1}
    (tmp_path / "zero2.json").write_text(json.dumps(settings))
    trained = []
    for shortened in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)  # both keep the process group of the training before
        monkeypatch.setattr(deepspeed.utils.groups, "_WORLD_GROUP", None)
        with socket.create_server(("", 0)) as server:
            port = str(server.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        words = [
            "training.amp.enabled=true", "training.amp.dtype=float16", "training.optimization.max_steps=12",
            f"data.micro_batches={accumulation}", f"log_fname=shortened-{shortened}",
        ]  # fmt: skip
        with monkeypatch.context() as patch:
            if not shortened:
                patch.setattr(builder, "shorten_step", lambda optimizer: None)
            trainer = build_trainer(load_config([*toy_settings, *words]), deepspeed_config=str(tmp_path / "zero2.json"))
        zero, tries = trainer.optimizer.optimizer, []
        step = zero.step

        def watched(step=step, zero=zero, tries=tries):
            step()
            tries.append((zero.overflow, float(zero.loss_scale)))

        zero.step = watched
        trainer.train()
        assert hasattr(zero.optimizer, "found_inf") == shortened
        weights = {name: value.clone() for name, value in trainer.encoder_module.state_dict().items()}
        trained.append(([record["loss"] for record in log_of(trainer, "step")], tries, weights))
        trainer.close()
    plain, short = trained
    assert sum(overflow for overflow, _ in plain[1]) > 10 and plain[1][-1][1] > 1
    assert short[:2] == plain[:2]
    assert all(torch.equal(value, short[2][name]) for name, value in plain[2].items())
    # The process's environment is as before: the next training may go without DeepSpeed.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    build_trainer(load_config([*toy_settings, "log_fname=without"])).close()
