"""Every Triton kernel compiles for an H100, at shapes around the sizes of its tiles. The interpreter cannot show that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the Triton backend needs triton")


def test_every_launch_compiles_for_an_h100(pytestconfig):
    # Triton's cache is keyed by source, options and version, so it may be kept between runs.
    compiled = pytestconfig.cache.mkdir("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_for_hopper.py")],
        env=environment | {"TRITON_CACHE_DIR": str(compiled), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *failed, last = done.stdout.splitlines()
    assert not failed
    assert int(last.removesuffix(" kernels")) > 35
