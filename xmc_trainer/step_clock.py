"""Measure where the time of a training's start and of its steps goes, without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


def _milliseconds(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, float):
        assert isinstance(after, float)  # the marks of a clock are of one kind
        return 1000 * (after - before)
    assert not isinstance(after, float)
    return before.elapsed_time(after)


class StepClock:
    """Adds up the time of a step's parts; on a GPU with CUDA events.

    `mark(part)` assigns the time since the previous mark to `part`. Time before `mark(None)` is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, torch.cuda.Event | float]] = []

    def mark(self, part: str | None) -> None:
        moment: torch.cuda.Event | float
        if self._gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))

    def read(self) -> dict[str, float]:
        """Return the ms of each part since the last call. On a GPU, wait for the last mark first."""
        marks, self._marks = self._marks, []
        parts: dict[str, float] = defaultdict(float)
        for (_, before), (part, moment) in zip(marks, marks[1:]):
            if part is not None:
                parts[part] += _milliseconds(before, moment)
        return dict(parts)


class StartClock:
    """Divides the seconds that building a training takes into named parts.

    `mark(part)` assigns the time since the previous mark, or since this clock was made, to `part`.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now
