"""Learning-rate schedules: a factor on the peak rate as a function of the number of optimizer steps made.

All warm up linearly from 0 over `warmup_steps`; step 0 has the factor 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def usual_warmup(total_steps: int) -> int:
    """Return the steps of warm-up where none are set: a tenth of all steps, and at most 500."""
    return min(500, total_steps // 10)


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int) -> float:
    """Warm up, then follow half a cosine to 0 at `total_steps`, as transformers' get_cosine_schedule_with_warmup."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Schedule:
    """Base class. A schedule uses the fields that its docstring names, and ignores the others."""

    warmup_steps: int
    total_steps: int  # optimizer steps in the whole training
    steps_per_epoch: int
    milestones: Sequence[int] = ()
    gamma: float = 1.0
    patience: int = 0

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by after `step` optimizer steps."""
        raise NotImplementedError

    def observe(self, metric: float) -> None:
        """Report a metric, higher is better, after each evaluation on the test set."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that does not follow from the step, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def _warmup(self, step: int) -> float:
        return step / self.warmup_steps if step < self.warmup_steps else 1.0


class CosineScheduleWithWarmup(Schedule):
    """Follow half a cosine to 0 at `total_steps`."""

    def factor(self, step: int) -> float:
        return cosine_with_warmup(step, self.warmup_steps, self.total_steps)


class MultiStepLR(Schedule):
    """Multiply by `gamma` after each of the epochs `milestones`."""

    def factor(self, step: int) -> float:
        passed = sum(step >= epoch * self.steps_per_epoch for epoch in self.milestones)
        return self._warmup(step) * self.gamma**passed


class ReduceLROnPlateau(Schedule):
    """Multiply by `gamma` whenever more than `patience` evaluations in a row were no better than the best one."""

    best = -math.inf
    waited = reductions = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "reductions": self.reductions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.best, self.waited, self.reductions = state["best"], state["waited"], state["reductions"]

    def factor(self, step: int) -> float:
        return self._warmup(step) * self.gamma**self.reductions

    def observe(self, metric: float) -> None:
        if metric > self.best:
            self.best, self.waited = metric, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.reductions, self.waited = self.reductions + 1, 0


SCHEDULES = {kind.__name__: kind for kind in (CosineScheduleWithWarmup, MultiStepLR, ReduceLROnPlateau)}
