"""Checkpoints by steps and by time, and the end of a training for a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xmc_trainer import signals
from xmc_trainer.hooks.base import Hook

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class CheckpointHook(Hook):
    """Writes the training's checkpoint every `interval` optimizer steps and every `minutes`, and ends the training for a signal.

    0 turns an interval off. Ranks get signals, and see minutes pass, at different moments, but must act before the same
    step: they ask each other at the beginning of a step and hear the answer a step later, when it has long arrived.
    """

    def __init__(self, interval: int, minutes: float) -> None:
        self.interval, self.seconds = interval, 60 * minutes
        self._answer: Callable[[], list[int]] = lambda: [0, 0]

    def on_train_start(self, trainer: Trainer) -> None:
        self._last_step, self._last_time = trainer.state.step, time.monotonic()

    def on_step_begin(self, trainer: Trainer) -> None:
        # Not at the end of a step: every hook is to be through with it.
        number, minutes_over = self._answer()
        if number:
            trainer.stop(number)
        step = trainer.state.step
        if step > self._last_step and (minutes_over or (self.interval and step % self.interval == 0)):
            trainer.save_checkpoint()
            self._last_step, self._last_time = step, time.monotonic()

        def ask() -> list[int]:
            minutes_over = (
                trainer.ranks.rank == 0 and self.seconds and time.monotonic() - self._last_time >= self.seconds
            )
            return [signals.pending(), int(minutes_over)]

        self._answer = trainer.ranks.largest(ask)

    def on_epoch_end(self, trainer: Trainer) -> None:
        number, _ = self._answer()
        if number:
            trainer.stop(number)
