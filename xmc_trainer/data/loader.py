"""Load one rank's batches of a plan in worker processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from xmc_trainer import signals
from xmc_trainer.data.batches import MicroBatch, TextBatches, plan_epoch, plan_eval, sample_rows
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
    """Build the loader of this rank's batches of a plan over a split; see `TextBatches`.

    Args:
        split: "train" or "test". Batches of "test" carry the filter pairs, if the corpus has any.
        workers: processes that make batches; 0 makes them in this one.
        device: destination of the batches; for a GPU they are put into pinned memory.
        least_rows: minimal number of rows of input_ids in a batch.
    """
    batches = TextBatches(
        corpus.train if split == "train" else corpus.test,
        plan,
        rank=rank,
        pad_token_id=pad_token_id,
        labels=corpus.num_labels if corpus.unseen_labels and split == "test" else None,
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


@dataclass(frozen=True, kw_only=True)
class Batches:
    """One rank's batches of all epochs and evaluations of a training.

    Args:
        seed: seed of the order of texts, and of the choice of training texts to evaluate.
        train_rows: int64, the training texts to use; None for all.
        texts_a_step: texts per optimizer step, over all ranks.
        micro_batches: micro-batches per step.
        length_grouped: whether texts of similar length share a step.
        eval_texts: texts per evaluation batch, over all ranks.
        fixed_rows: give all batches the same number of rows, as a compiled encoder needs.
    """

    corpus: Corpus
    rank: int
    world_size: int
    pad_token_id: int | None
    workers: int
    device: torch.device
    seed: int
    train_rows: np.ndarray | None
    texts_a_step: int
    micro_batches: int
    length_grouped: bool
    eval_texts: int
    fixed_rows: bool

    @property
    def train_texts(self) -> int:
        return len(self.corpus.train) if self.train_rows is None else len(self.train_rows)

    def plan(self, epoch: int) -> list[list[MicroBatch]]:
        """Return the optimizer steps of an epoch (from 0), each a list of micro-batches."""
        return plan_epoch(
            self.corpus.lengths("train"),
            batch_size=self.texts_a_step // self.micro_batches,
            accumulation=self.micro_batches,
            world_size=self.world_size,
            seed=self.seed,
            epoch=epoch,
            length_grouped=self.length_grouped,
            rows=self.train_rows,
        )

    def train(self, steps: list[list[MicroBatch]]) -> DataLoader:
        """Load the batches of steps of `plan`."""
        return self._load("train", [micro for step in steps for micro in step], self.texts_a_step // self.micro_batches)

    def evaluate(self, split: str) -> DataLoader:
        """Load the batches of the test rows that have labels of training, or of as many texts of "train"."""
        lengths, test_rows = self.corpus.lengths(split), self.corpus.test_rows()
        rows = test_rows if split == "test" else sample_rows(len(lengths), min(len(test_rows), len(lengths)), self.seed)
        plan = plan_eval(lengths, batch_size=self.eval_texts, world_size=self.world_size, rows=rows)
        return self._load(split, plan, self.eval_texts)

    def _load(self, split: str, plan: list[MicroBatch], texts: int) -> DataLoader:
        """Args: texts: maximal number of texts per batch, over all ranks."""
        return batch_loader(
            self.corpus,
            split,
            plan,
            rank=self.rank,
            pad_token_id=self.pad_token_id,
            workers=self.workers,
            device=self.device,
            least_rows=-(-texts // self.world_size) if self.fixed_rows else 1,
        )
