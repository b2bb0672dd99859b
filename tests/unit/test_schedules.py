"""The schedule against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from xmc_trainer.schedules import cosine_with_warmup


@pytest.mark.parametrize("warmup, total", [(10, 100), (0, 7), (5, 5), (50, 20)])
def test_equals_transformers(warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 3):
        assert cosine_with_warmup(step, warmup, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
