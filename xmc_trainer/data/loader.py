"""The loader of batches: processes that make one rank's batches of a plan."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from xmc_trainer import signals
from xmc_trainer.data.batches import MicroBatch, TextBatches
from xmc_trainer.data.corpus import Corpus


def batch_loader(
    corpus: Corpus,
    split: str,
    plan: list[MicroBatch],
    *,
    rank: int,
    pad_token_id: int | None,
    workers: int,
    device: torch.device,
    least_rows: int = 1,
) -> DataLoader:
    """This rank's batches of a plan over a split, as `TextBatches` makes them.

    Args:
        split: "train" or "test". Batches of "test" carry the filter pairs, if the corpus has any.
        workers: processes that make batches; 0 makes them in this one.
        device: where the batches will go; for a GPU they lie in pinned memory.
        least_rows: rows of input_ids in a batch, at least.
    """
    batches = TextBatches(
        corpus.train if split == "train" else corpus.test,
        plan,
        rank=rank,
        pad_token_id=pad_token_id,
        places=corpus.places,
        filter_pairs=corpus.filter_pairs if split == "test" else None,
        least_rows=least_rows,
    )
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(plan)),
        pin_memory=device.type == "cuda",
        worker_init_fn=signals.ignore_in_worker,
    )
