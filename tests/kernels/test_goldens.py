"""Five steps reproduce goldens.json, which the reference wrote. GPU kernels may differ by rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels.goldens import CASES, digest

GOLDENS = json.loads(Path(__file__).with_name("goldens.json").read_text())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device, options, rel", [
    ("cpu", {"backend": "reference"}, 1e-4), pytest.param("cuda", {}, 2e-2, marks=pytest.mark.gpu),
])  # fmt: skip
def test_five_steps_are_what_they_were(name, device, options, rel):
    found, golden = digest(name, device, **options), GOLDENS[name]
    assert found.keys() == golden.keys()
    for key, value in golden.items():
        # The tolerance is relative to the sum of absolute values, because the sum itself may cancel.
        size = abs(golden.get(f"|{key}|", value))
        allowed = 0.0 if key in ("index", "|index|", "skipped", "|skipped|") else rel * size
        assert found[key] == pytest.approx(value, abs=allowed + 1e-12), key
