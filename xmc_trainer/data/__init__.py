"""Data: sources (files and hub) -> corpus (tokenised, memory-mapped) -> batches (planned, padded)."""

from xmc_trainer.data.batches import (
    MicroBatch,
    TextBatches,
    batch_of_texts,
    padded_width,
    plan_epoch,
    plan_eval,
    sample_rows,
)
from xmc_trainer.data.corpus import Corpus, load_corpus
from xmc_trainer.data.loader import Batches, batch_loader
from xmc_trainer.data.sources import Ragged

__all__ = [
    "Batches",
    "Corpus",
    "MicroBatch",
    "Ragged",
    "TextBatches",
    "batch_loader",
    "batch_of_texts",
    "load_corpus",
    "padded_width",
    "plan_epoch",
    "plan_eval",
    "sample_rows",
]
