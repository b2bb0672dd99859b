"""XMCModel: a saved model in one Python call, for prediction."""

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
    """One label of one text."""

    id: str
    text: str
    score: float  # probability for a model trained with bce, margin for squared_hinge


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1; None: the GPU if there is one. UserError for one that is not there."""
    usable = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if usable else "cpu"))
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: choose cpu, cuda, or one of several GPUs by its number, such as cuda:1")
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

    In a process group (`torch.distributed`) each rank loads a share of the labels. Then every rank must predict the same
    texts; they share the work, and all receive all predictions.
    """

    def __init__(self, saved: SavedModel, device: torch.device) -> None:
        self.saved, self.device = saved, device

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> XMCModel:
        """Read a model folder onto `device` (default: the GPU if there is one). UserError if it is not one."""
        chosen = device_of(device)
        return cls(load_model(folder, chosen), chosen)

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [b, T] ids and mask on the model's device -> float32 features [b, d]."""
        return self.saved.encoder(input_ids, attention_mask)

    def predict(self, texts: Iterable[str], k: int = 5, batch_size: int = 256) -> list[list[Prediction]]:
        """The k best labels of each text, best first, in the order of the texts.

        Args:
            texts: a list, a tuple, a generator, a numpy array, a pandas Series (whatever its index), a column of a data set ...
                An empty text is predicted from no words.
            k: 1 to the number of labels.
            batch_size: texts a batch; no score depends on it.
        Raises UserError, which names the position, for what is no text, and for arguments out of range.
        """
        k = _whole_number("k", k, highest=self.saved.head.num_labels, is_what=", the number of labels")
        batch_size = _whole_number("batch_size", batch_size)
        texts = _checked(texts)
        ranks = self.saved.head.ranks
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # similar lengths together: less padding
        out: list[list[Prediction]] = [[] for _ in texts]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = batch_of_texts(self.saved.tokenizer, [texts[row] for row in rows], self.saved.max_len)
            # A batch of all ranks' texts: a text is padded to the same length whatever their number. A rank without any
            # encodes one in vain.
            parts = np.array_split(np.arange(len(rows)), ranks.size)
            mine, sizes = parts[ranks.rank], [len(part) for part in parts]
            chosen = torch.from_numpy(mine if len(mine) else np.zeros(1, np.int64))
            own = {name: value[chosen].to(self.device) for name, value in batch.items()}
            features = self.encode(**own)[: len(mine)]
            scores, labels = (ranks.gather_rows(x, sizes) for x in self.saved.head.topk(features, k))
            if not scores.isfinite().all():
                raise UserError(
                    f"{self.saved.folder}: gives scores that are not finite; train the model again, with lower rates"
                )
            if self.saved.head.loss_name == "bce":
                scores = scores.sigmoid()
            for row, row_scores, row_labels in zip(rows, scores.tolist(), labels.tolist()):
                out[row] = [self._prediction(label, score) for label, score in zip(row_labels, row_scores)]
        return out

    def _prediction(self, label: int, score: float) -> Prediction:
        return Prediction(self.saved.label_ids[label].as_py(), self.saved.label_texts[label].as_py(), score)


def _whole_number(name: str, value: Any, highest: int | None = None, is_what: str = "") -> int:
    """`value`, which is 1 or more. UserError for anything else."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value <= (highest or value):
        up_to = "at least 1" if highest is None else f"1 to {highest}{is_what}"
        said = f"{hex(value)[:20]}..." if whole and abs(value) >> 64 else repr(value)  # Python prints no 5,000 digits
        raise UserError(f"{name}={said}: must be a whole number, {up_to}")
    return int(value)


def _checked(texts: Any) -> list[str]:
    """The texts, in their order."""
    # Of a mapping or a table these would be the names, and a set has no order.
    unordered = isinstance(texts, (str, bytes, Mapping, Set)) or hasattr(texts, "columns")
    no_column = getattr(texts, "ndim", 1) == 0  # a numpy array of one value, which says that it is iterable
    if unordered or no_column or not isinstance(texts, Iterable):
        raise UserError(
            f"texts: must be a list of strings, or something else that gives them one by one (a column, a generator ...), not "
            f"{type(texts).__name__}"
        )
    checked = []
    for number, text in enumerate(texts, start=1):
        text = text.as_py() if hasattr(text, "as_py") else text  # of an Arrow column
        if not isinstance(text, str):
            what = str(text) if text is None or isinstance(text, float) else f"of type {type(text).__name__}"
            raise UserError(
                f"text {number} is {what}, not a string; give every text as a string, an empty one for none"
            )
        check_unicode(text, f"text {number}")
        checked.append(str(text))  # numpy's strings are of a type of their own
    return checked
