"""Data: sources (files and hub) -> corpus (tokenised, memory-mapped) -> batches (planned, padded)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xmc_trainer.data.batches import (
        MicroBatch,
        TextBatches,
        batch_of_texts,
        padded_width,
        plan_epoch,
        plan_eval,
        sample_rows,
    )
    from xmc_trainer.data.corpus import Corpus, fingerprint_of, load_corpus
    from xmc_trainer.data.layouts import open_source
    from xmc_trainer.data.loader import Batches, batch_loader
    from xmc_trainer.data.sources import Ragged, Source

# Loaded at the first use, because mistakes in files are found without torch, transformers and datasets.
_MODULES = {
    "batches": (
        "MicroBatch",
        "TextBatches",
        "batch_of_texts",
        "padded_width",
        "plan_epoch",
        "plan_eval",
        "sample_rows",
    ),
    "corpus": ("Corpus", "fingerprint_of", "load_corpus"),
    "layouts": ("open_source",),
    "loader": ("Batches", "batch_loader"),
    "sources": ("Ragged", "Source"),
}
__all__ = [
    "Batches",
    "Corpus",
    "MicroBatch",
    "Ragged",
    "Source",
    "TextBatches",
    "batch_loader",
    "batch_of_texts",
    "fingerprint_of",
    "load_corpus",
    "open_source",
    "padded_width",
    "plan_epoch",
    "plan_eval",
    "sample_rows",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
