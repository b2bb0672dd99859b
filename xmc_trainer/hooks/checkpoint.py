"""Write checkpoints by steps and by time, and end the training after a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xmc_trainer import signals
from xmc_trainer.checkpoint import resume
from xmc_trainer.hooks.base import Hook

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class CheckpointHook(Hook):
    """Writes checkpoints, and ends the training after a signal.

    Signals and clocks differ between ranks, but all ranks must act at the same step. So they exchange their state at the
    start of each step, or of each batch of an evaluation, and act on the result one step or batch later, without waiting.

    Args:
        interval: optimizer steps between checkpoints; 0 for none.
        minutes: minutes between checkpoints; 0 for none.
        kept: latest checkpoints to keep.
    """

    def __init__(self, interval: int, minutes: float, kept: int) -> None:
        self.interval, self.seconds, self.kept = interval, 60 * minutes, kept
        self._answer: Callable[[], list[int]] = lambda: [0, 0]

    def on_train_start(self, trainer: Trainer) -> None:
        self._last_step, self._last_time = trainer.state.step, time.monotonic()
        self._saved = trainer.state.step, trainer.state.epoch

    def on_step_begin(self, trainer: Trainer) -> None:
        # Not at the end of a step, where other hooks may not have run yet.
        minutes_over = self._listen(trainer)
        step = trainer.state.step
        if step > self._last_step and (minutes_over or (self.interval and step % self.interval == 0)):
            self.save(trainer)
            self._last_step, self._last_time = step, time.monotonic()
        self._ask(trainer)

    def on_evaluation_batch(self, trainer: Trainer) -> None:
        self._listen(trainer)
        self._ask(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        self._listen(trainer)

    def on_interrupt(self, trainer: Trainer) -> None:
        if (self.interval or self.seconds) and self._saved != (trainer.state.step, trainer.state.epoch):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint, between two steps; every rank must call."""
        trainer.read_losses()  # waits for the device, so its queued steps do not count as time of the checkpoint
        begin = time.monotonic()
        folder = resume.save(trainer, self.kept)
        self._saved = trainer.state.step, trainer.state.epoch
        facts = {"took_s": round(time.monotonic() - begin, 3)}
        if trainer.ranks.rank == 0:
            facts["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        trainer.dispatch("on_timed", "checkpoint", facts)

    def _ask(self, trainer: Trainer) -> None:
        def values() -> list[int]:
            minutes_over = (
                trainer.ranks.rank == 0 and self.seconds and time.monotonic() - self._last_time >= self.seconds
            )
            return [signals.pending(), int(minutes_over)]

        self._answer = trainer.ranks.largest(values)

    def _listen(self, trainer: Trainer) -> int:
        """Return whether a checkpoint is due by time. Raises Interrupted, on every rank, if any of them received a signal."""
        number, minutes_over = self._answer()
        if not number:
            return minutes_over
        step = trainer.state.step
        if step == 0:
            said = "before the first step"
        elif self.interval or self.seconds:
            said = f"after step {step:,}, with a checkpoint in {trainer.run_folder}; run the same command with training.resume=true to continue"
        else:
            said = f"after step {step:,}, without a checkpoint (training.checkpoint_interval=0, training.checkpoint_minutes=0)"
        raise signals.Interrupted(number, said)
