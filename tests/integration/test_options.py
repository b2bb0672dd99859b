"""Options by what they do, a few steps each; what they should do is worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from xmc_trainer.config import load_config
from xmc_trainer.hooks import Hook
from xmc_trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PLAIN = ["training.optimization.warmup_steps=0", "model.ffi.rewire_interval=0"]


def train(settings, *more, hooks=None):
    trainer = Trainer(load_config([*settings, *more]), hooks=hooks)
    trainer.train()
    return trainer


def log_of(trainer, event):
    lines = (trainer.run_folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_the_encoders_sgd_has_momentum_and_decays_matrices(toy_settings):
    seen = []

    class Watch(Hook):
        def on_train_start(self, trainer):
            trainer.optimizer.optimizer.register_step_pre_hook(self.keep)

        def keep(self, optimizer, *_):
            parts = [(group["params"][0].detach().clone(), group["params"][0].grad.clone()) for group in optimizer.param_groups]
            seen.append((parts, [group["lr"] for group in optimizer.param_groups]))

    optimization = {"encoder_optimizer": "sgd", "encoder_lr": 0.01, "wd_encoder": 0.5, "max_steps": 4}
    train(toy_settings, *PLAIN, *(f"training.optimization.{k}={v}" for k, v in optimization.items()), hooks=[Watch()])
    for group, decay in ((0, 0.5), (1, 0.0)):  # matrices; biases and norms
        buffer = 0.0
        for (now, rates), (after, _) in zip(seen, seen[1:]):
            weight, grad = now[group]
            buffer = 0.9 * buffer + grad + decay * weight
            torch.testing.assert_close(after[group][0], weight - rates[group] * buffer)
    assert len(seen) == 4
