"""How long the fuzzers run: seconds in the suite, as long as XMC_FUZZ_EXAMPLES says otherwise."""

from __future__ import annotations

import os


def examples(default: int) -> int:
    """Of a fuzz test, as many as the environment says."""
    return int(os.environ.get("XMC_FUZZ_EXAMPLES", default))
