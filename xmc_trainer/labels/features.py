"""What the encoder, as it stands, says about the labels: sums of its features over each label's training texts.

The encoder passes over the training texts once; sums are then made for any range of labels, a tile at a time, so that
memory grows neither with the texts (their features lie in a file) nor with the labels. Label clusters, the informed and
discriminant first indices and weights along centroids are made of them.
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

# Rows of features in memory at a time, in float32: at 768 features 0.4 GiB.
ROWS_AT_ONCE = 1 << 17
_ROUNDING = 2**-11  # of float16, half of the step between two numbers


def array_on_disk(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """A float16 array of zeros, memory-mapped to a file that is made here. UserError if it cannot be.

    Its room is taken at once: a disk found full by the first write to a page would end the process without a word.
    """
    try:
        out = np.lib.format.open_memmap(file, "w+", np.float16, shape)
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        size = 2 * shape[0] * shape[1] / 2**30
        raise UserError(
            f"{file.parent}: no room for features of {shape[0]} texts or labels, {size:.1f} GiB ({error.strerror or error}); set "
            "TMPDIR to a folder with room"
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
    """Features of the training texts: float16 [N, width], a memory-mapped file; zero where `rows` leaves a text out.

    Args:
        encode: (input_ids, attention_mask) -> features, on `device`.
        file: made here; every rank needs its own.
        rows: int64, the texts to encode; None: all.
        ranks: share the work, and each receives all features. A batch is always one rank's, so that what it is padded to,
            and with it the last digit, does not depend on their number.
    """
    ranks = ranks or Ranks()
    lengths = corpus.lengths("train")
    batches = [micro.rows[0] for micro in plan_eval(lengths, batch_size=batch_size, world_size=1, rows=rows)]
    nothing = np.zeros(0, dtype=np.int64)
    batches += [nothing] * (-len(batches) % ranks.size)
    plan = [MicroBatch(tuple(batches[at : at + ranks.size]), 0) for at in range(0, len(batches), ranks.size)]
    loader = batch_loader(
        corpus, "train", plan, rank=ranks.rank, pad_token_id=pad_token_id, workers=workers, device=device
    )
    out = array_on_disk(file, (len(lengths), width))
    for micro, batch in zip(plan, tqdm(loader, desc="encode texts", unit="batch", disable=not progress)):
        with torch.no_grad():
            features = encode(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        every = ranks.gather_rows(features[: len(batch["rows"])].half(), batch["rank_sizes"][0])
        out[np.concatenate(micro.rows)] = every.cpu().numpy()
    return out


class LabelSums:
    """Sums over each label's texts.

    Args:
        features: float16 [N, d], of texts.
        labels: of the same texts.
        num_labels: L.
        rows: int64, the texts that count; None: all.
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
        """(float32 [T, d] sums of features, int64 [T] numbers of texts) of a range of labels."""
        part = self._of_label[labels.start : labels.stop]
        total = np.zeros((len(labels), self._features.shape[1]), np.float32)
        used = np.unique(part.indices)
        for first in range(0, len(used), ROWS_AT_ONCE):
            texts = used[first : first + ROWS_AT_ONCE]
            total += part[:, texts] @ self._features[self._rows[texts]].astype(np.float32)
        return total, np.diff(part.indptr)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of every feature over the texts that count, float32 [d].

        What float16 alone makes of a constant feature is no deviation: first weights would be divided by it.
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
        """Of the features over the texts that count, float64 [d, d]; a constant feature correlates with none, itself included."""
        mean, deviation = self.moments()
        inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        products = np.zeros((len(mean), len(mean)))
        for first in range(0, len(self._rows), ROWS_AT_ONCE):
            z = (self._features[self._rows[first : first + ROWS_AT_ONCE]].astype(np.float32) - mean) * inverse
            products += z.T @ z
        return products / len(self._rows)


def whitener(correlations: np.ndarray, ridge: float) -> np.ndarray:
    """float64 [d, d]: the inverse of correlations shrunk by the share `ridge` towards none.

    Times a label's mean, in standardised features, it is the direction of Fisher's linear discriminant of the label against
    all texts. Where features say the same, their mean stands out on all of them; the discriminant tells them apart.
    """
    d = len(correlations)
    return np.linalg.inv((1 - ridge) * correlations + ridge * np.eye(d))
