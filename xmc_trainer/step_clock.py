"""Where the time of training steps goes, measured without a wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class StepClock:
    """Adds up the time of a step's parts, on a GPU by events on its own time line.

    `mark(part)` ends a part: it took from the mark before to this one. What lies before `mark(None)` belongs to none.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, torch.cuda.Event | float]] = []

    def mark(self, part: str | None) -> None:
        if self._gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))

    def read(self) -> dict[str, float]:
        """Milliseconds of each part since the last call. On a GPU the caller has waited for the last mark."""
        marks, self._marks = self._marks, []
        parts: dict[str, float] = defaultdict(float)
        for (_, before), (part, moment) in zip(marks, marks[1:]):
            if part is not None:
                parts[part] += before.elapsed_time(moment) if self._gpu else 1000 * (moment - before)
        return dict(parts)
