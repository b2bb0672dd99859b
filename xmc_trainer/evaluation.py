"""Evaluation: rank the labels of every text, over all ranks, and compute the ranking metrics."""

from __future__ import annotations

import time
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
from xmc_trainer.step_clock import StepClock


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor, Tensor], Tensor],
    head: Head,
    batches: Iterable[dict[str, Any]],
    metrics: RankingMetrics,
    device: torch.device,
    progress: bool = False,
    timed: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Compute the metrics of a data set, the same on every rank.

    Args:
        encode: (input_ids, attention_mask) -> features [b, d].
        batches: this rank's items of `TextBatches`; every rank must have the same number.
        metrics: empty; texts are added to it.
        timed: gets the seconds of the evaluation: "took_s", and of its parts "data_s", "encoder_s" and "ranking_s".
    Raises UserError, on every rank, if features or scores are not finite, because their ranking would look like a result.
    """
    ranks, clock, begin = head.ranks, StepClock(device), time.monotonic()
    not_finite = torch.zeros((), dtype=torch.int64, device=device)  # texts
    add: Callable[[], None] = lambda: None
    clock.mark(None)
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress, leave=False):
        rows, pairs = batch["rank_sizes"]
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        clock.mark("data")
        counts = batch["label_counts"]
        features = encode(batch["input_ids"], batch["attention_mask"])[: counts.shape[0]]
        clock.mark("encoder")
        scores, predicted = head.topk(features, metrics.k, batch.get("filter_ids"), batch.get("filter_counts"))
        not_finite += (scores.isnan().any(1) | ~features.isfinite().all(1)).sum()
        label_ids = ranks.gather_rows(batch["label_ids"], pairs)
        predicted, counts = ranks.gather_rows(predicted, rows), ranks.gather_rows(counts, rows)
        clock.mark("ranking")
        add()  # the previous batch, while the device computes this one
        add = _adding(metrics, predicted, label_ids, counts)
    add()
    if ranks.sum(not_finite):
        raise UserError(
            f"evaluation: {int(not_finite)} of {metrics.texts} texts have features or scores that are not finite; train again "
            "with a lower `encoder_lr` or `lr`, or `dtype`=bfloat16 in place of float16"
        )
    if timed is not None:
        parts = {f"{part}_s": ms / 1000 for part, ms in clock.read().items()}
        timed({name: round(seconds, 3) for name, seconds in ({"took_s": time.monotonic() - begin} | parts).items()})
    return metrics.result()


def _adding(metrics: RankingMetrics, *batch: Tensor) -> Callable[[], None]:
    """Start to copy a batch to the host. The returned function waits for the copy and adds it to the metrics."""
    copied = [tensor.to("cpu", non_blocking=True) for tensor in batch]
    done = torch.cuda.Event() if batch[0].is_cuda else None
    if done is not None:
        done.record()

    def add() -> None:
        if done is not None:
            done.synchronize()
        metrics.add(*(tensor.numpy() for tensor in copied))

    return add


def most_popular(corpus: Corpus, metrics: RankingMetrics) -> dict[str, float]:
    """Compute the metrics of always predicting the most frequent training labels: a floor for every model."""
    popular = np.argsort(-corpus.label_counts(), kind="stable")[: metrics.k]
    relevant = corpus.test_labels().rows(corpus.test_rows())
    counts = np.diff(relevant.offsets)
    metrics.add(np.broadcast_to(popular, (len(counts), len(popular))), relevant.ids, counts)
    return metrics.result()
