"""XMCModel: load a saved model and predict with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xmc_trainer.checkpoint.saved_model import SavedModel, load_model
from xmc_trainer.data import batch_of_texts
from xmc_trainer.data.texts import check_unicode
from xmc_trainer.errors import UserError


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
    """

    def __init__(self, saved: SavedModel, device: torch.device) -> None:
        self.saved, self.device = saved, device

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> XMCModel:
        """Load a model folder onto `device` (default: the GPU if there is one). Raises UserError."""
        chosen = device_of(device)
        return cls(load_model(folder, chosen), chosen)

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute features, float32 [b, d], from token ids and mask, int64 [b, T], on the model's device."""
        return self.saved.encoder(input_ids, attention_mask)

    def predict(
        self, texts: Iterable[str], k: int = 5, batch_size: int = 256, threshold: float | str | None = None
    ) -> list[list[Prediction]]:
        """Return the k best labels of each text, best first, in the order of the texts; for arguments and errors see `topk`.

        Args:
            threshold: leave out labels with a lower score; "fitted" for the thresholds of `xmc-trainer calibrate`.
        """
        scores, labels = self.topk(texts, k, batch_size)
        return self.predictions(scores, labels, self.saved.chosen(scores, labels, threshold))

    def topk(self, texts: Iterable[str], k: int = 5, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Rank labels: return scores, float32 [texts, k], and numbers of labels, int64 [texts, k], best first.

        Args:
            texts: any iterable of strings: list, tuple, generator, numpy array, pandas Series, column of a data set ...
                Empty texts are allowed.
            k: 1 to the number of labels.
            batch_size: texts per batch. Scores do not depend on it.
        Raises UserError for an item that is not a string, with its position, and for arguments out of range.
        """
        k = _whole_number("k", k, highest=self.saved.head.num_labels, meaning=", the number of labels")
        batch_size = _whole_number("batch_size", batch_size)
        texts = checked_texts(texts)
        ranks = self.saved.head.ranks
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # similar lengths together: less padding
        best_scores, best_labels = np.empty((len(texts), k), np.float32), np.empty((len(texts), k), np.int64)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = batch_of_texts(self.saved.tokenizer, [texts[row] for row in rows], self.saved.max_len)
            # Pad before splitting, so that a text's padding does not depend on the number of ranks. A rank without
            # texts encodes the first one and drops the result.
            parts = np.array_split(np.arange(len(rows)), ranks.size)
            own_rows, sizes = parts[ranks.rank], [len(part) for part in parts]
            encoded_rows = torch.from_numpy(own_rows if len(own_rows) else np.zeros(1, np.int64))
            inputs = {name: value[encoded_rows].to(self.device) for name, value in batch.items()}
            features = self.encode(**inputs)[: len(own_rows)]
            scores, labels = (ranks.gather_rows(x, sizes) for x in self.saved.head.topk(features, k))
            if not scores.isfinite().all():
                raise UserError(
                    f"{self.saved.folder}: gives scores that are not finite; train it again with lower learning rates"
                )
            best_scores[rows], best_labels[rows] = self.saved.scores(scores.cpu().numpy()), labels.cpu()
        return best_scores, best_labels

    def predictions(self, scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> list[list[Prediction]]:
        """Return the labels of each text that `kept`, bool [texts, k], marks in a result of `topk`."""
        ids, names = self.saved.label_ids, self.saved.label_texts
        return [
            [
                Prediction(ids[n].as_py(), names[n].as_py(), score)
                for score, n in zip(score_k[kept_k].tolist(), label_k[kept_k].tolist())
            ]
            for score_k, label_k, kept_k in zip(scores, labels, kept)
        ]


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
