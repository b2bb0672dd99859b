"""XMCModel: a saved model in one Python call, for prediction."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xmc_trainer.checkpoint import SavedModel, load_model
from xmc_trainer.errors import UserError


class Prediction(NamedTuple):
    """One label of one text."""

    id: str
    text: str
    score: float  # probability for a model trained with bce, margin for squared_hinge


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
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {chosen}: there is no usable GPU; choose cpu")
        return cls(load_model(folder, chosen), chosen)

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [b, T] ids and mask on the model's device -> float32 features [b, d]."""
        return self.saved.encoder(input_ids, attention_mask)

    def predict(self, texts: list[str], k: int = 5, batch_size: int = 256) -> list[list[Prediction]]:
        """The k best labels of each text, best first. UserError for a text without content, and what is no list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("texts must be a list of strings")
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise UserError(f"text {number} of {len(texts)} is empty")
        if not 1 <= k <= self.saved.head.num_labels:
            raise UserError(f"k={k}: must be between 1 and the number of labels, {self.saved.head.num_labels}")
        ranks = self.saved.head.ranks
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # similar lengths together: less padding
        out: list[list[Prediction]] = [[] for _ in texts]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = self.saved.tokenizer(
                [texts[row] for row in rows],
                truncation=True,
                max_length=self.saved.max_len,
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            # Tokens of all ranks' texts: a text is padded to the same length whatever their number. A rank without any
            # encodes one in vain.
            parts = np.array_split(np.arange(len(rows)), ranks.size)
            mine, sizes = parts[ranks.rank], [len(part) for part in parts]
            chosen = torch.from_numpy(mine if len(mine) else np.zeros(1, np.int64)).to(self.device)
            features = self.encode(tokens["input_ids"][chosen], tokens["attention_mask"][chosen])[: len(mine)]
            scores, labels = (ranks.gather_rows(x, sizes) for x in self.saved.head.topk(features, k))
            if self.saved.head.loss_name == "bce":
                scores = scores.sigmoid()
            for row, row_scores, row_labels in zip(rows, scores.tolist(), labels.tolist()):
                out[row] = [self._prediction(label, score) for label, score in zip(row_labels, row_scores)]
        return out

    def _prediction(self, label: int, score: float) -> Prediction:
        return Prediction(self.saved.label_ids[label].as_py(), self.saved.label_texts[label].as_py(), score)
