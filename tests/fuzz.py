"""Number of fuzzing examples: seconds by default, about an hour with XMC_FUZZ_EXAMPLES=100000."""

from __future__ import annotations

import os


def examples(default: int) -> int:
    return int(os.environ.get("XMC_FUZZ_EXAMPLES", default))
