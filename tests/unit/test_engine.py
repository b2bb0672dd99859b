"""How the engine is set up, as far as it shows without a GPU or a launcher."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from xmc_trainer import engine
from xmc_trainer.errors import UserError

ARGUMENTS = dict(
    device="cuda", cuda_device_id=0, accumulation=1, micro_batch=8, max_grad_norm=0.0, deepspeed_config=None
)


@pytest.mark.parametrize("precision, first_scale", [("fp16", 4096.0), ("bf16", None)])
def test_the_loss_scale_starts_at_4096_with_and_without_deepspeed(precision, first_scale, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        engine, "Accelerator", lambda **kwargs: given.update(kwargs) or SimpleNamespace(num_processes=1)
    )
    engine.build_accelerator(mixed_precision=precision, **ARGUMENTS)
    scales = [handler.to_kwargs()["init_scale"] for handler in given["kwargs_handlers"]]
    assert scales == ([first_scale] if first_scale else [])

    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    settings = engine.deepspeed_settings(str(tmp_path / "zero1.json"), precision, 1, 8, 0.0)
    assert not first_scale or 2 ** settings["fp16"]["initial_scale_power"] == first_scale


def test_the_gpu_is_chosen_by_number_unless_a_launcher_does(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(engine, "Accelerator", lambda **kwargs: SimpleNamespace(num_processes=1))
    engine.build_accelerator(mixed_precision="no", **ARGUMENTS | {"cuda_device_id": 3})
    assert chosen == [3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="environment.cuda_device_id: leave it at 0 with several processes"):
        engine.build_accelerator(mixed_precision="no", **ARGUMENTS | {"cuda_device_id": 3})


@pytest.mark.gpu
def test_the_scaler_on_a_gpu_starts_there(fresh_accelerator):
    assert engine.build_accelerator(mixed_precision="fp16", **ARGUMENTS).scaler.get_scale() == 4096.0
