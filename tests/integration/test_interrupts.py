"""A signal ends a training with a checkpoint, and resuming gives the uninterrupted training. Checkpoints by time."""

from __future__ import annotations

import signal

import pytest

from tests.integration.test_resume import everything, new_process
from tests.integration.test_training import BY_THE_CLOCK, log_of, train
from xmc_trainer import signals
from xmc_trainer.config import load_config
from xmc_trainer.hooks import Hook
from xmc_trainer.run_folder import find_checkpoint
from xmc_trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

EVERYTHING = [
    "training.optimization.epochs=2", "training.optimization.dense_epochs=1", "training.optimization.lr_scheduler=ReduceLROnPlateau",
    "training.optimization.lr_patience=0", "training.evaluation.train_evaluate=true", "training.evaluation.train_evaluate_every=1",
    "model.encoder.embed_dropout=0.3",
]  # fmt: skip


class SignalAt(Hook):
    """Send a signal in the middle of a step, or during an evaluation on `split`."""

    def __init__(self, patch: pytest.MonkeyPatch, step: int, split: str | None = None) -> None:
        self.step, self.split, self.patch = step, split, patch

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step != self.step:
            return
        if self.split is None:
            self.patch.setattr(signals, "pending", lambda: signal.SIGUSR1)
            return
        evaluate = trainer.evaluate

        def interrupted(split: str) -> dict[str, float]:
            if split == self.split:
                self.patch.setattr(signals, "pending", lambda: signal.SIGUSR1)
            return evaluate(split)

        self.patch.setattr(trainer, "evaluate", interrupted)


@pytest.fixture(scope="module")
def whole(toy_settings_in, tmp_path_factory):
    new_process()
    return train([*toy_settings_in(tmp_path_factory.mktemp("whole")), *EVERYTHING, "log_fname=whole"])


# Of 40 steps, 20 per epoch: within an epoch, at the end of the first (where the head becomes sparse), and at the very end.
@pytest.mark.parametrize("step, split", [(9, None), (20, "train"), (40, None), (40, "test")])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(whole, toy_settings, step, split):
    settings = [*toy_settings, *EVERYTHING, "log_fname=cut", "training.resume=true", "training.checkpoint_interval=7"]
    new_process()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Interrupted) as caught:
        train(settings, hooks=[SignalAt(patch, step, split)])
    run_folder = load_config(settings).run_folder
    assert caught.value.number == signal.SIGUSR1
    assert (
        caught.value.said
        == f"after step {step}, with a checkpoint in {run_folder}; run the same command with training.resume=true to continue"
    )
    assert find_checkpoint(run_folder).name == f"checkpoint-{step}"
    new_process()
    trainer, metrics = train(settings)
    expected, metrics_of_whole = whole
    assert metrics == metrics_of_whole and not list(run_folder.glob("checkpoint*"))
    for event in ("step", "evaluate", "rewire"):
        logs = [
            [{k: v for k, v in record.items() if k not in BY_THE_CLOCK} for record in log_of(each, event)]
            for each in (expected, trainer)
        ]
        assert logs[0] == logs[1], event
    for name, value in everything(expected).items():
        assert value.equal(everything(trainer)[name]), name


def test_a_signal_at_the_end_waits_for_the_model(toy_settings, monkeypatch):
    class AtTheEnd(Hook):
        def on_save(self, trainer, folder):
            monkeypatch.setattr(signals, "pending", lambda: signal.SIGTERM)

    with pytest.raises(signals.Interrupted, match="after the training; the model is in "):
        train([*toy_settings, "training.optimization.max_steps=3"], hooks=[AtTheEnd()])


def test_without_checkpoints_a_signal_leaves_none(toy_settings, monkeypatch):
    settings = [*toy_settings, "training.checkpoint_interval=0", "training.checkpoint_minutes=0"]
    with pytest.raises(
        signals.Interrupted, match=r"after step 2, without a checkpoint \(training.checkpoint_interval=0"
    ):
        train(settings, hooks=[SignalAt(monkeypatch, 2)])
    assert not list(load_config(settings).run_folder.glob("checkpoint*"))


@pytest.mark.parametrize("minutes, saved", [(1.0, [2, 4, 6, 8]), (0.0, [5])])
def test_checkpoints_are_written_by_time(toy_settings, monkeypatch, minutes, saved):
    """By this clock a step takes 31 seconds, so two steps take more than a minute."""
    steps = []
    monkeypatch.setattr("xmc_trainer.hooks.checkpoint.time.monotonic", lambda: 31.0 * len(ends))
    ends = []

    def save(trainer, kept):
        steps.append(trainer.state.step)
        return trainer.run_folder

    monkeypatch.setattr("xmc_trainer.checkpoint.resume.save", save)

    class Clock(Hook):
        def on_step_end(self, trainer):
            ends.append(trainer.state.step)

    interval = 0 if minutes else 5
    settings = [
        f"training.checkpoint_minutes={minutes}",
        f"training.checkpoint_interval={interval}",
        "training.optimization.max_steps=9",
    ]
    train([*toy_settings, *settings], hooks=[Clock()])
    assert steps == saved
