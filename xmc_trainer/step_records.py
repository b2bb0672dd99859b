"""Collect one record per training step, measure speed, and check that losses are finite."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.errors import UserError
from xmc_trainer.step_clock import StepClock

# With float16, features may overflow in this many consecutive steps.
_MOST_OVERFLOWS = 50


class StepRecords:
    """Collects records of steps and leaves their losses on the device, because reading one waits for the device.

    Args:
        texts_a_step: texts of an optimizer step, over all ranks.
        fp16: whether features may overflow occasionally; encoder and head skip such steps.

    Attributes:
        clock: measures the parts of a step: "data", "forward", "head", "engine".
        not_finite: number of consecutive latest steps with a non-finite loss.
        seconds: minimal time between two readings.
    """

    def __init__(self, device: torch.device, texts_a_step: int, fp16: bool) -> None:
        self.clock, self.not_finite, self.seconds = StepClock(device), 0, 1.0
        self._device, self._texts_a_step = device, texts_a_step
        self._most_not_finite = _MOST_OVERFLOWS if fp16 else 0
        self._start_peak = 0
        if device.type == "cuda":
            # While graphs are recorded, the allocator counts their memory, which `captured_bytes` is later.
            self._start_peak = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._unread: list[tuple[dict[str, Any], Tensor]] = []
        self._read_at = time.monotonic()

    def add(self, record: dict[str, Any], loss: Tensor) -> None:
        """Add a step. `loss` is a scalar on the device."""
        self._unread.append((record, loss))

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return time.monotonic() - self._read_at >= self.seconds

    def read(self, skipped: Tensor, captured_bytes: int = 0) -> list[dict[str, Any]]:
        """Return the records since the last reading, each with its "loss". The last one also has their mean speed.

        Args:
            skipped: number of steps that the head has skipped, int64 scalar on the device.
            captured_bytes: GPU memory in use that the allocator does not count.
        """
        if not self._unread:
            return []
        values = torch.stack([loss for _, loss in self._unread]).tolist()
        records = [record | {"loss": value} for (record, _), value in zip(self._unread, values)]
        self._unread, self._read_at = [], time.monotonic()
        records[-1]["head_skipped"] = int(skipped)
        records[-1] |= self._speed(len(records), captured_bytes)
        return records

    def require_finite(self, records: list[dict[str, Any]]) -> None:
        """Count consecutive non-finite losses. Raises UserError if there are too many."""
        for record in records:
            self.not_finite = 0 if math.isfinite(record["loss"]) else self.not_finite + 1
            if self.not_finite > self._most_not_finite:
                raise UserError(
                    f"the loss is not finite at step {record['step']}; lower `encoder_lr` or `lr`, or set `max_grad_norm`=1.0"
                )

    def _speed(self, steps: int, captured_bytes: int) -> dict[str, float]:
        """Compute texts/s, ms of encoder and head per step, the share of waiting for data, and a GPU's peak GiB."""
        parts = self.clock.read()
        ms = sum(parts.values())
        speed = {
            "texts_per_s": 1000 * steps * self._texts_a_step / ms,  # an epoch's last step may have fewer
            "encoder_ms": (parts["forward"] + parts["engine"]) / steps,
            "head_ms": parts["head"] / steps,
            "waiting": parts["data"] / ms,
        }
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            speed["gib"] = max(self._start_peak, allocated + captured_bytes) / 2**30
        return {name: round(value, 4) for name, value in speed.items()}
