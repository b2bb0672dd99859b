"""The schedules against transformers' and torch's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from xmc_trainer.builders.hooks import schedule_hook_of
from xmc_trainer.config import load_config, shipped_configs
from xmc_trainer.schedules import SCHEDULES, cosine_with_warmup, usual_warmup


@pytest.mark.parametrize("warmup, total", [(10, 100), (0, 7), (5, 5), (50, 20)])
def test_equals_transformers(warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 3):
        assert cosine_with_warmup(step, warmup, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def made(name, **settings):
    return SCHEDULES[name](**{"warmup_steps": 4, "total_steps": 100, "steps_per_epoch": 10} | settings)


def test_multi_step_follows_torch_after_the_warm_up():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    epochs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5], gamma=0.5)
    schedule = made("MultiStepLR", milestones=[2, 5], gamma=0.5)
    assert [schedule.factor(step) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    for epoch in range(10):
        for step in range(max(4, 10 * epoch), 10 * epoch + 10):
            assert schedule.factor(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        epochs.step()


def test_plateau_follows_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=1, threshold=0.0)
    schedule = made("ReduceLROnPlateau", gamma=0.1, patience=1)
    for metric in (0.1, 0.2, 0.2, 0.1, 0.15, 0.1, 0.3, 0.2, 0.2, 0.2, 0.2):
        schedule.observe(metric)
        theirs.step(metric)
        assert schedule.factor(50) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.reductions == 4 and schedule.factor(2) == pytest.approx(0.5 * 0.1**4)


def test_the_warm_up_fits_the_steps_unless_it_is_set():
    assert [usual_warmup(steps) for steps in (1, 9, 10, 205, 5_000, 10**6)] == [0, 0, 1, 20, 500, 500]
    own = [load_config([f"dataset={name}"]).training.optimization.warmup_steps for name in shipped_configs()]
    assert own and None not in own
    config = load_config(["data.source=x.csv"])
    hook, state = schedule_hook_of(config), SimpleNamespace(total_steps=30, steps_per_epoch=10, step=2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    trainer = SimpleNamespace(optimizer=optimizer, state=state, meta_branch=None, head=SimpleNamespace(lr=None))
    hook.on_train_start(trainer)
    hook.on_step_begin(trainer)
    assert optimizer.param_groups[0]["lr"] == trainer.head.lr / config.training.optimization.lr == pytest.approx(2 / 3)
