"""Sums of encoder features over the training texts of each label.

The encoder passes over the training texts once and writes their features to a file, 2 d bytes a text. Sums are then
computed for any range of labels in tiles. GPU memory does not grow beyond a quarter of what is free; host memory holds 4
bytes per pair of text and label. Label clusters, the informed and
discriminant initial indices, and initial weights along centroids use these sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
_SEGMENT = 256
_ROUNDING = 2**-11  # relative rounding error of float16
_STEP = 2**-24  # float16's smallest number, and its step near 0


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


def resident(rows: np.ndarray, device: torch.device) -> Tensor:
    """Return memory-mapped rows as a tensor: a copy on a GPU if it takes at most a quarter of its free memory, else the file itself."""
    tensor = torch.from_numpy(rows)
    if device.type == "cuda" and rows.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
        return tensor.to(device)
    return tensor


def selected(rows: Tensor, numbers: np.ndarray, device: torch.device) -> Tensor:
    """Return some of `resident` rows, float32 on `device`."""
    return rows[torch.from_numpy(numbers).to(rows.device)].to(device).float()


def segment_sums(rows: Tensor, lengths: np.ndarray) -> Tensor:
    """Sum consecutive rows, float32 [n, d] -> [segments, d], in a fixed order. There must be a row.

    Args:
        lengths: int [segments], rows of each.
    """
    # A GPU sums each segment one row after the other, so cut long segments into parts and sum these first.
    parts = -(-lengths // _SEGMENT)
    cut = np.full(parts.sum(), _SEGMENT)
    last = np.cumsum(parts)[parts > 0] - 1
    cut[last] = (lengths - (parts - 1) * _SEGMENT)[parts > 0]
    for each in (cut, parts):
        rows = torch.segment_reduce(rows, "sum", lengths=torch.from_numpy(each).to(rows.device), axis=0)
    return rows


class LabelSums:
    """Sums of features over each label's texts, computed on a device.

    Args:
        features: float16 [N, d], the features of N texts.
        labels: the labels of the same texts.
        num_labels: L.
        rows: int64, the texts to use; None means all.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: Ragged,
        num_labels: int,
        rows: np.ndarray | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._features = resident(features, self._device)
        self._rows = np.arange(len(features)) if rows is None else np.sort(rows)
        chosen = labels if rows is None else labels.rows(self._rows)
        of_text = scipy.sparse.csr_matrix(
            (np.ones(len(chosen.ids), np.int8), chosen.ids, chosen.offsets), shape=(len(self._rows), num_labels)
        )
        of_label = of_text.T.tocsr()
        self._texts, self._bounds = of_label.indices, of_label.indptr.astype(np.int64)

    def sums(self, labels: range) -> tuple[Tensor, Tensor]:
        """Return the sums of features, float32 [n, d], and numbers of texts, int64 [n], of a range of n labels, on the device."""
        bounds = self._bounds[labels.start : labels.stop + 1]
        total = torch.zeros(len(labels), self._features.shape[1], device=self._device)
        start = 0
        while start < len(labels):
            # As many labels as have ROWS_AT_ONCE texts; the texts of a label that has more come in several pieces.
            most = np.searchsorted(bounds, bounds[start] + ROWS_AT_ONCE, side="right") - 1
            stop = min(max(most, start + 1), len(labels))
            for first in range(bounds[start], bounds[stop], ROWS_AT_ONCE):
                last = min(first + ROWS_AT_ONCE, bounds[stop])
                part = selected(self._features, self._rows[self._texts[first:last]], self._device)
                total[start:stop] += segment_sums(part, np.diff(np.clip(bounds[start : stop + 1], first, last)))
            start = stop
        return total, torch.from_numpy(np.diff(bounds)).to(self._device)

    def _parts(self) -> Iterator[Tensor]:
        """Yield the features of the texts in use, float64."""
        for first in range(0, len(self._rows), ROWS_AT_ONCE):
            yield selected(self._features, self._rows[first : first + ROWS_AT_ONCE], self._device).double()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each feature over the texts in use, float32 [d] each.

        A deviation within float16's rounding error becomes 0, because initial weights are divided by deviations.
        """
        total, squares = (torch.zeros(self._features.shape[1], dtype=torch.float64, device=self._device) for _ in "ab")
        for part in self._parts():
            total += part.sum(0)
            squares += part.square().sum(0)
        mean = total / len(self._rows)
        deviation = (squares / len(self._rows) - mean.square()).clamp(min=0).sqrt()
        deviation[deviation < (mean.abs() * _ROUNDING).clamp(min=_STEP)] = 0
        return mean.float(), deviation.float()

    def correlations(self) -> Tensor:
        """Return the correlations of features over the texts in use, float64 [d, d]; 0 for constant features."""
        mean, deviation = self.moments()
        inverse = torch.where(deviation > 0, 1 / deviation.double(), 0.0)
        products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=self._device)
        for part in self._parts():
            z = (part - mean) * inverse
            products += z.T @ z
        return products / len(self._rows)


def whitener(correlations: Tensor, ridge: float) -> Tensor:
    """Return ((1 - ridge) * correlations + ridge * identity)^-1, float64 [d, d].

    Its product with a label's mean, in standardised features, is the direction of Fisher's linear discriminant between
    the label and all texts. A label's mean stands out on all features that correlate; the discriminant separates their
    parts.
    """
    return torch.linalg.inv((1 - ridge) * correlations + ridge * torch.eye(len(correlations)).to(correlations))
