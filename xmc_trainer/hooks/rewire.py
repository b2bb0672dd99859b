"""Make a dense head sparse, and rewire a sparse one, at their times."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from xmc_trainer.head import RewireRule
from xmc_trainer.head.rewire import scheduled_amount
from xmc_trainer.hooks.base import Hook

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class SparsifyHook(Hook):
    """Makes the head sparse after `dense_epochs` epochs with a dense one."""

    def __init__(self, dense_epochs: int, fan_in: int, group_size: int) -> None:
        self.dense_epochs, self.fan_in, self.group_size = dense_epochs, fan_in, group_size

    def on_epoch_end(self, trainer: Trainer) -> None:
        # If a signal ended the evaluation of this epoch, the resumed training already has a sparse head.
        if trainer.state.epoch + 1 == self.dense_epochs and trainer.head.index is None:
            trainer.head.become_sparse(self.fan_in, self.group_size)


class RewireHook(Hook):
    """Rewires a sparse head every `interval` steps until the fraction `end` of the training.

    Steps that fp16 skipped do not count.

    Args:
        rule: how to rewire; its amount is that of the first rewiring.
        last_amount: the amount decays to this by a cosine; None keeps it constant.
    """

    def __init__(self, interval: int, end: float, rule: RewireRule, last_amount: float | None) -> None:
        self.interval, self.end, self.rule, self.last_amount = interval, end, rule, last_amount
        self._real_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"real_steps": self._real_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._real_steps = state["real_steps"]

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.head.index is None:
            return
        self._real_steps += 1
        last_step = int(self.end * trainer.state.total_steps)
        if self._real_steps % self.interval or trainer.state.step > last_step:
            return
        amount = self.rule.amount
        if self.last_amount is not None:
            amount = scheduled_amount(amount, self.last_amount, trainer.state.step, last_step)
        wait = torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
        wait()
        begin = time.perf_counter()
        report = trainer.head.rewire(replace(self.rule, amount=amount))
        wait()
        report = replace(report, ms=1000 * (time.perf_counter() - begin))
        trainer.dispatch("on_rewire", report, amount)
