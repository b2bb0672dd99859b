"""The shortened step of ZeRO 1 and 2 trains as DeepSpeed's own, in float16 too, where steps overflow."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.integration.test_training import log_of
from xmc_trainer.builders import encoder as builder
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config
from xmc_trainer.encoder.flat import named_parts
from xmc_trainer.engine import accelerator as engine

ROOT = Path(__file__).parents[2]


def as_launched(monkeypatch):
    """Let the next training of this process run under DeepSpeed."""
    import deepspeed

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)  # both keep the process group of the training before
    monkeypatch.setattr(deepspeed.utils.groups, "_WORLD_GROUP", None)
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it for good
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def weights_of(folder):
    """Read a backbone's weights. Under ZeRO 3 transformers writes a BERT's norms by their old names, which it reads, too."""
    state = load_file(folder / "model.safetensors")
    return {name.replace("gamma", "weight").replace("beta", "bias"): value for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_train_and_merge_under_zero(toy_settings, tiny_encoder, stage, monkeypatch, fresh_accelerator):
    settings = [*toy_settings, "model.encoder.lora_rank=2", "training.optimization.encoder_lr=0.1", "training.optimization.max_steps=4",
                "training.optimization.warmup_steps=1", "model.encoder.pool_mode=last_token"]  # fmt: skip
    found = []
    for json_file in (None, str(ROOT / f"ds_configs/zero{stage}.json")):
        if json_file is not None:
            as_launched(monkeypatch)
        trainer = build_trainer(
            load_config([*settings, f"log_fname=lora-{json_file is None}"]), deepspeed_config=json_file
        )
        named = [
            name for _, members in named_parts(trainer.accelerator.unwrap_model(trainer.encoder)) for name, _ in members
        ]
        assert all(".lora_" in name for name in named)
        trainer.train()
        losses = [record["loss"] for record in log_of(trainer, "step")]
        found.append((losses, weights_of(trainer.run_folder / "model/encoder")))
        trainer.close()
    (losses, weights), (others, other_weights) = found
    assert others == pytest.approx(losses, rel=1e-4)
    assert weights.keys() == other_weights.keys() and not any("lora" in name for name in weights)
    before = weights_of(tiny_encoder)
    assert sum(not torch.equal(value, before[name]) for name, value in weights.items()) == 2 * 6  # linear layers
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_float16_overflows_are_skipped_as_by_deepspeed(
    toy_settings, accumulation, tmp_path, monkeypatch, fresh_accelerator
):
    # This CPU may multiply float16 slowly, but it does.
    monkeypatch.setattr(engine, "_cpu_takes_fp16", lambda: True)
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    # From 2^28 the scale falls for many tries. It must not rise: DeepSpeed then divides a gradient by the next step's scale.
    settings = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    settings["fp16"] |= {"initial_scale_power": 28, "loss_scale_window": 1000, "hysteresis": 1}
    (tmp_path / "zero2.json").write_text(json.dumps(settings))
    trained = []
    for shortened in (False, True):
        as_launched(monkeypatch)
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
