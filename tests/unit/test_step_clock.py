"""Where the time of a start goes."""

from __future__ import annotations

import time

import pytest

from xmc_trainer.step_clock import StartClock


def test_the_parts_of_a_start_add_up(monkeypatch):
    moments = iter([7.0, 9.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = StartClock()
    for part in ("data", "head", "data"):
        clock.mark(part)
    assert clock.parts == pytest.approx({"data": 3.0, "head": 3.0})
