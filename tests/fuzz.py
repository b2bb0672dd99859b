"""How long the fuzzers run: seconds in the suite; an hour with, say, XMC_FUZZ_EXAMPLES=100000."""

from __future__ import annotations

import os


def examples(default: int) -> int:
    return int(os.environ.get("XMC_FUZZ_EXAMPLES", default))
