"""The generated data and the small encoder of the other examples. A text is 8 words; each of its labels adds its own word."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

LABELS, WORDS, FEATURES = 101, 2048, 64


class Texts(Dataset):
    """`size` texts: item = {"words": int64 [8], "labels": int64 [1 to 3]}."""

    def __init__(self, size: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = [torch.randperm(LABELS, generator=draw)[: 1 + row % 3] for row in range(size)]
        noise = torch.randint(LABELS, WORDS, (size, 8), generator=draw)
        self.words = [torch.cat([own, more])[:8] for own, more in zip(self.labels, noise)]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"words": self.words[row], "labels": self.labels[row]}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make a batch: words [b, 8], and the labels as the head takes them, ragged: label_ids and label_counts [b]."""
    return {
        "words": torch.stack([row["words"] for row in rows]),
        "label_ids": torch.cat([row["labels"] for row in rows]),
        "label_counts": torch.tensor([len(row["labels"]) for row in rows]),
    }


class Encoder(nn.Module):
    """Words int64 [b, 8] -> features [b, FEATURES]. Take any text encoder instead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.EmbeddingBag(WORDS, FEATURES, mode="sum")
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(self.embedding(words))


def precision(head: nn.Module, features: Tensor, batch: dict[str, Tensor]) -> float:
    """Return P@1 of a batch."""
    best = head.topk(features, k=1)[1][:, 0].tolist()
    return sum(
        label in own for label, own in zip(best, batch["label_ids"].split(batch["label_counts"].tolist()))
    ) / len(best)
