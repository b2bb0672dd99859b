"""Set the learning rates of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xmc_trainer.hooks.base import Hook
from xmc_trainer.schedules import Schedule

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class ScheduleHook(Hook):
    """Sets the learning rates before each step: one schedule for encoder and meta branch, one for the head.

    The encoder's peak rates are those that its optimizer was made with.

    Args:
        encoder, head: (total_steps, steps_per_epoch) -> schedule.
        lr, meta_lr: peak rates of head and meta branch.
    """

    def __init__(
        self,
        encoder: Callable[[int, int], Schedule],
        head: Callable[[int, int], Schedule],
        *,
        lr: float,
        meta_lr: float,
    ) -> None:
        self._make_encoder, self._make_head, self._lr, self._meta_lr = encoder, head, lr, meta_lr
        self._peaks: list[float] = []
        self._loaded: dict[str, Any] = {"encoder": {}, "head": {}}

    def state_dict(self) -> dict[str, Any]:
        return {"encoder": self._encoder.state_dict(), "head": self._head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def on_train_start(self, trainer: Trainer) -> None:
        self._peaks = [group["lr"] for group in trainer.optimizer.param_groups]
        steps = trainer.state.total_steps, trainer.state.steps_per_epoch
        self._encoder, self._head = self._make_encoder(*steps), self._make_head(*steps)
        self._encoder.load_state_dict(self._loaded["encoder"])
        self._head.load_state_dict(self._loaded["head"])

    def on_step_begin(self, trainer: Trainer) -> None:
        factor = self._encoder.factor(trainer.state.step)
        for group, peak in zip(trainer.optimizer.param_groups, self._peaks):
            group["lr"] = peak * factor
        if trainer.meta_branch is not None:
            trainer.meta_branch.head.lr = self._meta_lr * factor
        trainer.head.lr = self._lr * self._head.factor(trainer.state.step)

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split == "test":
            self._encoder.observe(metrics["P@1"])
            self._head.observe(metrics["P@1"])
