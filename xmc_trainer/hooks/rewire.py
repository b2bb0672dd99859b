"""When the head becomes sparse, and when it is rewired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xmc_trainer.config import FFIConfig
from xmc_trainer.head import RewireRule
from xmc_trainer.head.rewire import scheduled_amount
from xmc_trainer.hooks.base import Hook

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class SparsifyHook(Hook):
    """Makes the head sparse after `dense_epochs` epochs with a dense one."""

    def __init__(self, dense_epochs: int, ffi: FFIConfig) -> None:
        self.dense_epochs, self.ffi = dense_epochs, ffi

    def on_epoch_end(self, trainer: Trainer) -> None:
        # A training resumed at the end of this epoch, after a signal in its evaluation, has a sparse head already.
        if trainer.state.epoch + 1 == self.dense_epochs and trainer.head.index is None:
            trainer.head.become_sparse(self.ffi.fan_in, self.ffi.group_size)


class RewireHook(Hook):
    """Rewires a sparse head every `rewire_interval` steps until the fraction `rewire_end_epoch` of the training.

    Steps that fp16 skipped do not count.
    """

    def __init__(self, ffi: FFIConfig) -> None:
        self.ffi = ffi
        self._real_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"real_steps": self._real_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._real_steps = state["real_steps"]

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.head.index is None:
            return
        self._real_steps += 1
        last_step = int(self.ffi.rewire_end_epoch * trainer.state.total_steps)
        if self._real_steps % self.ffi.rewire_interval or trainer.state.step > last_step:
            return
        by_threshold = self.ffi.prune_mode == "threshold"
        amount = self.ffi.rewire_threshold if by_threshold else self.ffi.rewire_fraction
        if self.ffi.use_rewire_scheduling:
            end = min(self.ffi.rewire_end_threshold, amount) if by_threshold else 0.0
            amount = scheduled_amount(amount, end, trainer.state.step, last_step)
        rule = RewireRule(self.ffi.prune_mode, amount, self.ffi.growth_init_mode, self.ffi.growth_mode)
        report = trainer.head.rewire(rule)
        trainer.dispatch("on_rewire", report, amount)
