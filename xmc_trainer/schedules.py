"""Learning-rate schedules: pure functions of the number of optimizer steps made."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak rate: linear from 0 over `warmup_steps`, then half a cosine to 0 at `total_steps`.

    The seed's CosineScheduleWithWarmup, transformers' `get_cosine_schedule_with_warmup`: step 0 has the factor 0.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
