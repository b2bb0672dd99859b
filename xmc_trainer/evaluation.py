"""Evaluation: rank the labels of every text, over all ranks, and compute the ranking metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xmc_trainer.data import Corpus
from xmc_trainer.errors import UserError
from xmc_trainer.head import Head
from xmc_trainer.metrics import RankingMetrics


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor, Tensor], Tensor],
    head: Head,
    batches: Iterable[dict[str, Any]],
    metrics: RankingMetrics,
    device: torch.device,
    progress: bool = False,
) -> dict[str, float]:
    """Compute the metrics of a data set, the same on every rank.

    Args:
        encode: (input_ids, attention_mask) -> features [b, d].
        batches: this rank's items of `TextBatches`; every rank must have the same number.
        metrics: empty; texts are added to it.
    Raises UserError, on every rank, if features or scores are not finite, because their ranking would look like a result.
    """
    ranks = head.ranks
    not_finite = torch.zeros((), dtype=torch.int64, device=device)  # texts
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress, leave=False):
        rows, pairs = batch["rank_sizes"]
        batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        counts = batch["label_counts"]
        features = encode(batch["input_ids"], batch["attention_mask"])[: counts.shape[0]]
        scores, predicted = head.topk(features, metrics.k, batch.get("filter_ids"), batch.get("filter_counts"))
        not_finite += (scores.isnan().any(1) | ~features.isfinite().all(1)).sum()
        label_ids = ranks.gather_rows(batch["label_ids"], pairs)
        predicted, counts = ranks.gather_rows(predicted, rows), ranks.gather_rows(counts, rows)
        metrics.add(predicted.cpu().numpy(), label_ids.cpu().numpy(), counts.cpu().numpy())
    if ranks.sum(not_finite):
        raise UserError(
            f"evaluation: {int(not_finite)} of {metrics.texts} texts have features or scores that are not finite; train again "
            "with a lower `encoder_lr` or `lr`, or `dtype`=bfloat16 in place of float16"
        )
    return metrics.result()


def most_popular(corpus: Corpus, metrics: RankingMetrics) -> dict[str, float]:
    """Compute the metrics of always predicting the most frequent training labels: a floor for every model."""
    popular = np.argsort(-corpus.label_counts(), kind="stable")[: metrics.k]
    relevant = corpus.test_labels()
    counts = np.diff(relevant.offsets)
    metrics.add(np.broadcast_to(popular, (len(counts), len(popular))), relevant.ids, counts)
    return metrics.result()
