"""Sums of encoder features over the training texts of each label.

The encoder passes over the training texts once and writes their features to a file. Sums are then computed for any
range of labels in tiles, so memory grows neither with the texts nor with the labels. Label clusters, the informed and
discriminant initial indices, and initial weights along centroids use these sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from tqdm import tqdm

from xmc_trainer.data import Corpus, MicroBatch, Ragged, batch_loader, plan_eval
from xmc_trainer.errors import UserError
from xmc_trainer.parallel import Ranks

# Rows of features in memory at a time. In float32 with 768 features they take 0.4 GiB.
ROWS_AT_ONCE = 1 << 17
_ROUNDING = 2**-11  # relative rounding error of float16


def array_on_disk(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """Create a file and memory-map it as a float16 array of zeros. UserError if it cannot be written.

    The disk space is allocated at once: a page write that finds the disk full would kill the process without a message.
    """
    try:
        out = np.lib.format.open_memmap(file, "w+", np.float16, shape)
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        size = 2 * shape[0] * shape[1] / 2**30
        raise UserError(
            f"{file.parent}: no space for features of {shape[0]} texts or labels, {size:.1f} GiB "
            f"({error.strerror or error}); set TMPDIR to a folder with enough space"
        ) from None
    return out


def encode_training_texts(
    encode: Callable[[Tensor, Tensor], Tensor],
    corpus: Corpus,
    file: Path,
    *,
    width: int,
    batch_size: int,
    pad_token_id: int | None,
    workers: int,
    device: torch.device,
    rows: np.ndarray | None = None,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Encode the training texts into a memory-mapped file, float16 [N, width]. Texts not in `rows` stay zero.

    Args:
        encode: (input_ids, attention_mask) int64 [b, T] -> features [b, width], on `device`.
        file: created here. Every rank needs its own.
        rows: int64, the texts to encode; None means all.
        ranks: the ranks that share the work. Each receives all features. One rank encodes a whole batch, so that
            padding, and with it the last digit, does not depend on the number of ranks.
    """
    ranks = ranks or Ranks()
    lengths = corpus.lengths("train")
    batches = [micro.rows[0] for micro in plan_eval(lengths, batch_size=batch_size, world_size=1, rows=rows)]
    empty = np.zeros(0, dtype=np.int64)
    batches += [empty] * (-len(batches) % ranks.size)
    plan = [MicroBatch(tuple(batches[at : at + ranks.size]), 0) for at in range(0, len(batches), ranks.size)]
    loader = batch_loader(
        corpus, "train", plan, rank=ranks.rank, pad_token_id=pad_token_id, workers=workers, device=device
    )
    out = array_on_disk(file, (len(lengths), width))
    for micro, batch in zip(plan, tqdm(loader, desc="encode texts", unit="batch", disable=not progress)):
        with torch.no_grad():
            features = encode(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        gathered = ranks.gather_rows(features[: len(batch["rows"])].half(), batch["rank_sizes"][0])
        out[np.concatenate(micro.rows)] = gathered.cpu().numpy()
    return out


class LabelSums:
    """Sums of features over each label's texts.

    Args:
        features: float16 [N, d], the features of N texts.
        labels: the labels of the same texts.
        num_labels: L.
        rows: int64, the texts to use; None means all.
    """

    def __init__(self, features: np.ndarray, labels: Ragged, num_labels: int, rows: np.ndarray | None = None) -> None:
        self._features = features
        rows = np.arange(len(features)) if rows is None else np.sort(rows)
        self._rows = rows
        chosen = labels.rows(rows)
        of_text = scipy.sparse.csr_matrix(
            (np.ones(len(chosen.ids), np.float32), chosen.ids, chosen.offsets), shape=(len(rows), num_labels)
        )
        self._of_label = of_text.T.tocsr()

    def sums(self, labels: range) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of features, float32 [n, d], and numbers of texts, int [n], of a range of n labels."""
        part = self._of_label[labels.start : labels.stop]
        total = np.zeros((len(labels), self._features.shape[1]), np.float32)
        used = np.unique(part.indices)
        for first in range(0, len(used), ROWS_AT_ONCE):
            texts = used[first : first + ROWS_AT_ONCE]
            total += part[:, texts] @ self._features[self._rows[texts]].astype(np.float32)
        return total, np.diff(part.indptr)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each feature over the texts in use, float32 [d] each.

        A deviation within float16's rounding error becomes 0, because initial weights are divided by deviations.
        """
        total, squares = (np.zeros(self._features.shape[1]) for _ in range(2))
        for first in range(0, len(self._rows), ROWS_AT_ONCE):
            part = self._features[self._rows[first : first + ROWS_AT_ONCE]].astype(np.float64)
            total += part.sum(0)
            squares += np.square(part).sum(0)
        mean = total / len(self._rows)
        deviation = np.sqrt(np.maximum(squares / len(self._rows) - np.square(mean), 0))
        deviation[deviation < np.abs(mean) * _ROUNDING] = 0
        return mean.astype(np.float32), deviation.astype(np.float32)

    def correlations(self) -> np.ndarray:
        """Return the correlations of features over the texts in use, float64 [d, d]; 0 for constant features."""
        mean, deviation = self.moments()
        inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        products = np.zeros((len(mean), len(mean)))
        for first in range(0, len(self._rows), ROWS_AT_ONCE):
            z = (self._features[self._rows[first : first + ROWS_AT_ONCE]].astype(np.float32) - mean) * inverse
            products += z.T @ z
        return products / len(self._rows)


def whitener(correlations: np.ndarray, ridge: float) -> np.ndarray:
    """Return ((1 - ridge) * correlations + ridge * identity)^-1, float64 [d, d].

    Its product with a label's mean, in standardised features, is the direction of Fisher's linear discriminant between
    the label and all texts. A label's mean stands out on all features that correlate; the discriminant separates their
    parts.
    """
    d = len(correlations)
    return np.linalg.inv((1 - ridge) * correlations + ridge * np.eye(d))
