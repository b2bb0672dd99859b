"""XMCModel: load a saved model and predict with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor
from tqdm import tqdm

from xmc_trainer.checkpoint.saved_model import SavedModel, load_model
from xmc_trainer.data.batches import padded_texts
from xmc_trainer.data.texts import check_unicode, encode_texts
from xmc_trainer.errors import UserError

_BATCHES_A_BLOCK = 16  # texts are tokenised, and sorted by their number of tokens, in blocks of this many batches
# The encoder's intermediate results of this many tokens nearly fit into a CPU's cache; 32,768 take a third longer.
_CPU_TOKENS = 4096


class Prediction(NamedTuple):
    """A label predicted for a text."""

    id: str
    text: str
    score: float  # a probability for calibrated models and those trained with bce, a margin for squared_hinge


def device_of(name: str | torch.device | None) -> torch.device:
    """Return the device named cpu, cuda, cuda:1 and so on; for None the GPU if there is one. Raises UserError."""
    usable = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if usable else "cpu"))
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: is not valid; choose cpu, cuda, or a GPU by its number, such as cuda:1")
    if device.type == "cuda" and not usable:
        raise UserError(f"device {device}: there is no usable GPU; choose cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0; choose one of them"
        )
    return device


class XMCModel:
    """A trained model.

    model = XMCModel.load("outputs/wordnet/model")
    for label in model.predict(["a small domesticated carnivore"], k=5)[0]:
        print(label.id, label.text, label.score)

    In a process group (`torch.distributed`), each rank loads a share of the labels. Every rank must then predict the
    same texts; the ranks share the work, and each receives all predictions.

    `embed`, `topk` and `predict` take:
        texts: any iterable of strings: list, tuple, generator, numpy array, pandas or polars Series, column of a data
            set ... Empty texts are allowed.
        batch_size: texts per batch. Results do not depend on it.
        show_progress: show a progress bar on stderr.
    They raise UserError for an item that is not a string, with its position, and for arguments out of range.
    """

    def __init__(self, saved: SavedModel, device: torch.device) -> None:
        self.saved, self.device = saved, device

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype = "float32"
    ) -> XMCModel:
        """Load a model folder. Raises UserError.

        Args:
            device: cpu, cuda, cuda:1 ...; None for the GPU if there is one.
            dtype: of the encoder's weights: float32, bfloat16 or float16. The head computes in float32.
        """
        chosen, precision = device_of(device), _dtype_of(dtype)
        saved = load_model(folder, chosen)
        saved.encoder.to(precision)
        return cls(saved, chosen)

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute features, float32 [b, d], from token ids and mask, int64 [b, T], on the model's device."""
        return self.saved.encoder(input_ids, attention_mask).float()

    def embed(self, texts: Iterable[str], batch_size: int = 256, show_progress: bool = False) -> np.ndarray:
        """Return the features that the head reads, float32 [texts, d], in the order of the texts."""
        checked = checked_texts(texts)
        out = np.empty((len(checked), self.saved.encoder.out_features), np.float32)
        for rows, own, sizes in self._features(checked, batch_size, show_progress):
            out[rows] = self.saved.head.ranks.gather_rows(own, sizes).cpu().numpy()
        return out

    def topk(
        self, texts: Iterable[str], k: int = 5, batch_size: int = 256, show_progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k best labels of each text, best first. Equal scores are in label order.

        Args:
            k: 1 to the number of labels.
        Returns: scores, float32 [texts, k], as in `Prediction`; numbers of the labels, int64 [texts, k], which are rows of
            labels.parquet.
        """
        head = self.saved.head
        k = _whole_number("k", k, highest=head.num_labels, meaning=", the number of labels")
        checked = checked_texts(texts)
        scores, labels = np.empty((len(checked), k), np.float32), np.empty((len(checked), k), np.int64)
        for rows, own, sizes in self._features(checked, batch_size, show_progress):
            found, numbers = (head.ranks.gather_rows(x, sizes) for x in head.topk(own, k))
            if not found.isfinite().all():
                raise UserError(
                    f"{self.saved.folder}: gives scores that are not finite; train it again with lower learning rates"
                )
            scores[rows] = self.saved.scores(found.cpu().numpy())
            labels[rows] = numbers.cpu().numpy()
        return scores, labels

    def predict(
        self,
        texts: Iterable[str],
        k: int = 5,
        batch_size: int = 256,
        threshold: float | str | None = None,
        show_progress: bool = False,
    ) -> list[list[Prediction]]:
        """Return the k best labels of each text, best first, in the order of the texts; see `topk`.

        Args:
            threshold: leave out labels with a lower score; "fitted" for the thresholds of `xmc-trainer calibrate`.
        """
        scores, labels = self.topk(texts, k, batch_size, show_progress)
        return self.predictions(scores, labels, self.saved.chosen(scores, labels, threshold))

    def predictions(self, scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> list[list[Prediction]]:
        """Return the labels of each text that `kept`, bool [texts, k], marks in a result of `topk`."""
        numbers = pyarrow.array(labels[kept])
        columns = (column.take(numbers).to_pylist() for column in (self.saved.label_ids, self.saved.label_texts))
        found = map(Prediction, *columns, scores[kept].tolist())
        return [list(islice(found, count)) for count in kept.sum(1)]

    def _features(
        self, texts: list[str], batch_size: int, show_progress: bool
    ) -> Iterator[tuple[list[int], Tensor, list[int]]]:
        """Yield, for each batch: its rows of `texts`, the features of this rank's share of them, and every rank's share."""
        batch_size = _whole_number("batch_size", batch_size)
        ranks, tokenizer, longest = self.saved.head.ranks, self.saved.tokenizer, self.saved.max_len
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # similar lengths together: less padding
        with tqdm(total=len(texts), desc="texts", unit="text", disable=not show_progress or ranks.rank > 0) as bar:
            for start in range(0, len(order), batch_size * _BATCHES_A_BLOCK):
                block = order[start : start + batch_size * _BATCHES_A_BLOCK]
                tokens = dict(zip(block, encode_texts(tokenizer, [texts[row] for row in block], longest)))
                block.sort(key=lambda row: len(tokens[row]))
                for first in range(0, len(block), batch_size):
                    rows = block[first : first + batch_size]
                    sizes = [len(part) for part in np.array_split(rows, ranks.size)]
                    own = range(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
                    yield rows, self._encode_share([tokens[row] for row in rows], own), sizes
                    bar.update(len(rows))

    def _encode_share(self, tokens: list[list[int]], own: range) -> Tensor:
        """Return the features of the texts `own` of a batch, float32 [len(own), d]. `tokens` are in order of length."""
        step = len(tokens)
        if self.device.type == "cpu":
            step = max(1, _CPU_TOKENS // len(tokens[-1]))
        features = [torch.empty(0, self.saved.encoder.out_features, device=self.device)]
        for start in range(0, len(tokens), step):
            # Pad before selecting this rank's texts, so that a text's padding does not depend on the number of ranks.
            inputs = padded_texts(tokens[start : start + step], self.saved.tokenizer, self.saved.max_len)
            share = slice(max(own.start - start, 0), max(own.stop - start, 0))
            if inputs["input_ids"][share].shape[0]:
                features.append(self.encode(**{name: value[share].to(self.device) for name, value in inputs.items()}))
        return torch.cat(features)


def _dtype_of(name: str | torch.dtype) -> torch.dtype:
    precision = getattr(torch, name, None) if isinstance(name, str) else name
    if precision not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {name}: is not valid; choose float32, bfloat16 or float16")
    return precision


def _whole_number(name: str, value: Any, highest: int | None = None, meaning: str = "") -> int:
    """Return `value` as an int. UserError unless it is a whole number from 1 to `highest`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value <= (highest or value):
        bounds = "at least 1" if highest is None else f"1 to {highest}{meaning}"
        text = f"{hex(value)[:20]}..." if whole and abs(value) >> 64 else repr(value)  # repr raises for huge integers
        raise UserError(f"{name}={text}: must be a whole number, {bounds}")
    return int(value)


def checked_texts(texts: Any) -> list[str]:
    """Return the texts as a list of strings. UserError names the first item that is not a string."""
    # Iterating a mapping or a table gives its keys or column names, and a set has no order.
    unordered = isinstance(texts, (str, bytes, Mapping, Set)) or hasattr(texts, "columns")
    scalar = getattr(texts, "ndim", 1) == 0  # a numpy scalar array is an Iterable but cannot be iterated
    if unordered or scalar or not isinstance(texts, Iterable):
        raise UserError(
            f"texts: must be a list or another iterable of strings, such as a column, not {type(texts).__name__}"
        )
    checked = []
    for number, text in enumerate(texts, start=1):
        text = text.as_py() if hasattr(text, "as_py") else text  # an Arrow scalar
        if not isinstance(text, str):
            what = str(text) if text is None or isinstance(text, float) else f"of type {type(text).__name__}"
            raise UserError(f"text {number} is {what}, not a string; pass every text as a string, a missing one as ''")
        check_unicode(text, f"text {number}")
        checked.append(str(text))  # numpy's strings are a subclass of str
    return checked
