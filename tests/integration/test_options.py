"""The effect of single options in a few steps, against results worked out by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.hooks import Hook
from xmc_trainer.labels.clusters import LabelClusters
from xmc_trainer.model import XMCModel

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PLAIN = ["training.optimization.warmup_steps=0", "model.ffi.rewire_interval=0", "environment.device=cpu"]


def train(settings, *more, hooks=None):
    trainer = build_trainer(load_config([*settings, *more]), hooks=hooks)
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
            parts = [
                (group["params"][0].detach().clone(), group["params"][0].grad.clone())
                for group in optimizer.param_groups
            ]
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


class FirstStep(Hook):
    """Return the head's weights and biases before and after a single step."""

    def on_train_start(self, trainer):
        self.before = trainer.head.weight.clone(), trainer.head.bias.clone()

    def on_step_end(self, trainer):
        self.after = trainer.head.weight.clone(), trainer.head.bias.clone()


def test_weight_decay_and_loss_reduction_of_the_head(toy_settings):
    sgd = {"xmc_optimizer": "sgd", "xmc_momentum": 0.0, "lr": 0.01, "max_steps": 1, "wd": 0.0}
    settings = [*toy_settings, *PLAIN, *(f"training.optimization.{name}={value}" for name, value in sgd.items())]
    seen, losses = [], []
    for more in ([], ["training.optimization.wd=0.5"], ["training.optimization.loss_reduction=mean"]):
        watch = FirstStep()
        trainer = train(settings, *more, hooks=[watch])
        seen.append(watch)
        losses.append(log_of(trainer, "step")[0]["loss"])
    plain, decayed, mean = seen
    assert losses[1] == losses[0] and losses[2] == pytest.approx(
        losses[0] / 32, rel=1e-5
    )  # bce sums over the 32 texts by default
    torch.testing.assert_close(plain.after[0] - decayed.after[0], 0.01 * 0.5 * plain.before[0], rtol=1e-3, atol=1e-7)
    assert torch.equal(plain.after[1], decayed.after[1])
    for part in (0, 1):
        torch.testing.assert_close(
            32 * (mean.after[part] - mean.before[part]), plain.after[part] - plain.before[part], rtol=1e-2, atol=1e-5
        )
    assert (plain.after[0] - plain.before[0]).abs().max() > 1e-3


def test_the_logit_adjustment_follows_label_frequencies(toy_settings):
    trainer = train(
        toy_settings, "model.ffi.logit_adjustment=0.3", "model.ffi.head_ratio=0.2", "training.optimization.max_steps=1"
    )
    counts = trainer.corpus.label_counts()
    expected = 0.3 * (np.log(counts) - np.log(counts.sum() / len(counts)))
    found = torch.cat([trainer.head.frequent.logit_shift, trainer.head.tail.logit_shift]).numpy()
    assert found == pytest.approx(expected, abs=1e-5) and expected.min() < 0 < expected.max()


def test_the_meta_branchs_rate_and_file(toy_settings, toy_data):
    path = toy_data / "toy" / "label_group2.safetensors"
    LabelClusters(np.arange(41, dtype=np.int32), np.array([0, 10, 20, 41])).save(
        path, [f"tag{n:02d}" for n in range(41)]
    )
    moved = []

    class Watch(Hook):
        def on_train_start(self, trainer):
            self.before = trainer.meta_branch.head.weight.clone()

        def on_step_end(self, trainer):
            moved.append(trainer.meta_branch.head.weight - self.before)

    more = [
        "model.auxiliary.use_meta_branch=true",
        "model.auxiliary.group_y_group=2",
        "training.optimization.max_steps=1",
    ]
    try:
        trainer = train(
            toy_settings,
            *PLAIN,
            *more,
            "training.optimization.meta_lr=0.003",
            "training.optimization.wd=0.0",
            hooks=[Watch()],
        )
    finally:
        path.unlink()
    assert trainer.meta_branch.head.num_labels == 3
    # AdamW's first step is the rate, whatever the gradient.
    torch.testing.assert_close(moved[0].abs(), torch.full((3, 32), 0.003), rtol=1e-2, atol=0)


@pytest.mark.parametrize("scheduled", [True, False])
def test_the_rewiring_threshold_decays_or_stays(toy_settings, scheduled):
    ffi = {"use_rewire_scheduling": scheduled, "rewire_end_threshold": 0.02, "rewire_end_epoch": 1.0}
    trainer = train(
        toy_settings,
        "training.optimization.max_steps=20",
        *(f"model.ffi.{name}={value}" for name, value in ffi.items()),
    )
    cosine = [0.02 + 0.03 * 0.5 * (1 + np.cos(np.pi * step / 20)) for step in (5, 10, 15, 20)]
    assert [record["amount"] for record in log_of(trainer, "rewire")] == pytest.approx(
        cosine if scheduled else [0.05] * 4
    )


def test_gamma_environment_and_no_propensities(toy_settings, toy_data):
    more = [
        "training.optimization.lr_scheduler=MultiStepLR",
        "training.optimization.lr_milestones=[1]",
        "training.optimization.lr_gamma=0.4",
    ]
    more += ["training.optimization.epochs=2", "training.evaluation.eval_psp=false", "dataset_path=null"]
    more += [f"environment.env2path.here={toy_data}", "environment.running_env=here"]
    trainer = train(toy_settings, *PLAIN, *more)
    rates = [record["encoder_lr"] for record in log_of(trainer, "step")]
    assert rates == pytest.approx([2e-3] * 20 + [2e-3 * 0.4] * 20)
    assert set(trainer.metrics["test"]) == {f"{kind}@{k}" for kind in ("P", "nDCG", "R") for k in (1, 3, 5)}


def test_propensities_use_the_constants(toy_settings, toy_data):
    constants = ["training.evaluation.A=0.7", "training.evaluation.B=3.0"]
    trainer = train(toy_settings, *PLAIN, *constants, "training.optimization.epochs=1")
    lines = {
        name: (toy_data / "toy" / f"{name}.txt").read_text().splitlines()
        for name in ("train_labels", "test_labels", "test_raw_texts")
    }
    counts = Counter(name for line in lines["train_labels"] for name in line.split())
    constant = (math.log(611) - 1) * 4.0**0.7
    weight = {name: 1 + constant * (count + 3.0) ** -0.7 for name, count in counts.items()}
    predicted = XMCModel.load(trainer.run_folder / "model").predict(lines["test_raw_texts"], k=1)
    reached = best = 0.0
    for line, (label,) in zip(lines["test_labels"], predicted, strict=True):
        best += max(weight[name] for name in line.split())
        reached += weight[label.id] * (label.id in line.split())
    assert 0 < reached < best and trainer.metrics["test"]["PSP@1"] == pytest.approx(reached / best, rel=1e-6)


@pytest.mark.parametrize("name, expected", [("mine", "mine"), ("none", None)])
def test_the_run_name_in_wandb(toy_settings, monkeypatch, name, expected):
    calls, logged = [], []
    run = SimpleNamespace(
        id="run1", log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append(arguments) or run)
    train(
        toy_settings,
        "training.verbose.use_wandb=true",
        f"training.verbose.wandb_runname={name}",
        "training.optimization.max_steps=2",
    )
    assert calls[0]["name"] == expected and calls[0]["config"]["data.dataset"] == "toy"
    assert [step for step, values in logged[:-1] if "train/loss" in values] == [1, 2] and logged[-1] == "finished"
    assert any("test/P@1" in values for _, values in logged[:-1])


def test_a_training_of_only_warm_up_steps_prints_a_warning_and_its_kernels(toy_settings, capsys):
    steps = ["training.optimization.max_steps=2", "environment.device=cpu"]
    trainer = train(toy_settings, *steps, "training.optimization.warmup_steps=2")
    said = capsys.readouterr().out
    assert (
        "all 2 steps are warm-up (training.optimization.warmup_steps=2)" in said
        and "without DeepSpeed, 1 process on cpu, built in" in said
        and "\nkernels  reference, tiles of 16 labels\n" in said
    )
    assert log_of(trainer, "start")[0]["engine"] == "without DeepSpeed"
    train(toy_settings, *steps, "training.optimization.warmup_steps=1")
    assert "warm-up" not in capsys.readouterr().out


def test_missing_clusters_are_noticed_before_the_texts_are_read(toy_settings, monkeypatch):
    monkeypatch.setattr("xmc_trainer.builders.training.corpus_of", lambda *_, **__: pytest.fail("texts were read"))
    with pytest.raises(
        UserError, match="label_group7.safetensors: no such label clusters; create it by xmc-trainer clusters"
    ):
        train(toy_settings, *PLAIN, "model.auxiliary.use_meta_branch=true", "model.auxiliary.group_y_group=7")
