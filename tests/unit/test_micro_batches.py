"""The number of micro-batches per step, and how the engine gets it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xmc_trainer.config import load_config
from xmc_trainer.engine.accelerator import set_accumulation
from xmc_trainer.engine.micro_batches import fewest_parts
from xmc_trainer.errors import UserError


@pytest.mark.parametrize(
    ("texts", "ranks", "free", "parts"),
    [
        (256, 1, 256, 1),
        (256, 1, 255, 2),
        (256, 2, 128, 1),
        (256, 1, 60, 8),
        (30, 1, 14, 3),
        (30, 3, 4, 5),
        (256, 1, 0, 256),
    ],
)
def test_the_fewest_parts_that_fit(texts, ranks, free, parts):
    """Here a text takes one byte."""
    assert fewest_parts(texts, ranks, 1, free) == parts


def test_the_engine_gets_the_number():
    settings = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 64, "train_batch_size": 256}
    plugin = SimpleNamespace(deepspeed_config=settings)
    accelerator = SimpleNamespace(gradient_accumulation_steps=2, state=SimpleNamespace(deepspeed_plugin=plugin))
    set_accumulation(accelerator, 1)
    assert accelerator.gradient_accumulation_steps == 1
    assert settings == {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 128,
        "train_batch_size": 256,
    }


def test_impossible_numbers_are_refused():
    for value, message in {
        "0": "auto or a whole number above 0",
        "all": "auto or a whole number",
        "3": "does not divide the 256 texts",
    }.items():
        with pytest.raises(UserError, match=f"data.micro_batches=.?{value}.?: .*{message}"):
            load_config(["dataset=amazon3m", f"data.micro_batches={value}"])
