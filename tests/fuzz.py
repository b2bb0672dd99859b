"""How many examples the fuzzers try: few in the suite, many where XMC_FUZZ_EXAMPLES says so."""

from __future__ import annotations

import os


def examples(default: int) -> int:
    return int(os.environ.get("XMC_FUZZ_EXAMPLES", default))
