"""Learning rates for every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xmc_trainer.config import OptimizationConfig
from xmc_trainer.hooks.base import Hook
from xmc_trainer.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class ScheduleHook(Hook):
    """Sets the learning rates before each step: one schedule for encoder and meta branch, one for the head."""

    def __init__(self, config: OptimizationConfig) -> None:
        self.config = config
        self._peaks: list[float] = []
        self._loaded: dict[str, Any] = {"encoder": {}, "head": {}}

    def state_dict(self) -> dict[str, Any]:
        return {"encoder": self._encoder.state_dict(), "head": self._head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def on_train_start(self, trainer: Trainer) -> None:
        self._peaks = [group["lr"] for group in trainer.optimizer.param_groups]
        config, state = self.config, trainer.state

        def schedule(name: str) -> Schedule:
            return SCHEDULES[name](
                warmup_steps=config.warmup_steps, total_steps=state.total_steps, steps_per_epoch=state.steps_per_epoch,
                milestones=config.lr_milestones, gamma=config.lr_gamma, patience=config.lr_patience,
            )  # fmt: skip

        self._encoder, self._head = schedule(config.lr_scheduler), schedule(config.lr_scheduler_xmc)
        self._encoder.load_state_dict(self._loaded["encoder"])
        self._head.load_state_dict(self._loaded["head"])

    def on_step_begin(self, trainer: Trainer) -> None:
        factor = self._encoder.factor(trainer.state.step)
        for group, peak in zip(trainer.optimizer.param_groups, self._peaks):
            group["lr"] = peak * factor
        if trainer.meta_branch is not None:
            trainer.meta_branch.head.lr = self.config.meta_lr * factor
        trainer.head.lr = self.config.lr * self._head.factor(trainer.state.step)

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split == "test":
            self._encoder.observe(metrics["P@1"])
            self._head.observe(metrics["P@1"])
