"""Evaluation: rank the labels of every text, over all ranks, and keep the best ones or their metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xmc_trainer.data import Corpus
from xmc_trainer.errors import UserError
from xmc_trainer.head import Head
from xmc_trainer.metrics import RankingMetrics, correct
from xmc_trainer.step_clock import StepClock


class Best(NamedTuple):
    """The k best labels of each text."""

    labels: np.ndarray  # int32 [texts, k], best first; -1 where there are fewer
    logits: np.ndarray  # float32 [texts, k]


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

    def add(rows: np.ndarray, logits: np.ndarray, labels: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> None:
        metrics.add(labels, ids, counts)

    _rank(encode, head, batches, metrics.k, device, add, progress, timed)
    return metrics.result()


def best_labels(
    encode: Callable[[Tensor, Tensor], Tensor],
    head: Head,
    batches: Iterable[dict[str, Any]],
    rows: np.ndarray,
    k: int,
    device: torch.device,
    progress: bool = False,
) -> Best:
    """Find the k best labels of the texts `rows`, int64 ascending, of a data set, the same on every rank; see `evaluate`.

    8 k bytes a text.
    """
    best = Best(np.full((len(rows), k), -1, np.int32), np.full((len(rows), k), -np.inf, np.float32))

    def add(found: np.ndarray, logits: np.ndarray, labels: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> None:
        places = np.searchsorted(rows, found)
        best.labels[places], best.logits[places] = labels, logits

    _rank(encode, head, batches, k, device, add, progress)
    return best


@torch.no_grad()
def _rank(
    encode: Callable[[Tensor, Tensor], Tensor],
    head: Head,
    batches: Iterable[dict[str, Any]],
    k: int,
    device: torch.device,
    add: Callable[..., None],
    progress: bool,
    timed: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Call `add` with each batch of all ranks: rows, logits and labels of the k best, relevant labels and their counts."""
    ranks, clock, begin, texts = head.ranks, StepClock(device), time.monotonic(), 0
    not_finite = torch.zeros((), dtype=torch.int64, device=device)  # texts
    add_previous: Callable[[], None] = lambda: None
    clock.mark(None)
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress, leave=False):
        sizes, pairs = batch["rank_sizes"]
        texts += sum(sizes)
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        clock.mark("data")
        counts = batch["label_counts"]
        features = encode(batch["input_ids"], batch["attention_mask"])[: counts.shape[0]]
        clock.mark("encoder")
        logits, labels = head.topk(features, k, batch.get("filter_ids"), batch.get("filter_counts"))
        not_finite += (logits.isnan().any(1) | ~features.isfinite().all(1)).sum()
        of_texts = (ranks.gather_rows(x, sizes) for x in (batch["rows"], logits, labels, counts))
        rows, logits, labels, counts = of_texts
        label_ids = ranks.gather_rows(batch["label_ids"], pairs)
        clock.mark("ranking")
        add_previous()  # while the device computes this batch
        add_previous = _adding(add, rows, logits, labels, label_ids, counts)
    add_previous()
    if ranks.sum(not_finite):
        raise UserError(
            f"evaluation: {int(not_finite)} of {texts} texts have features or scores that are not finite; train again "
            "with a lower `encoder_lr` or `lr`, or `dtype`=bfloat16 in place of float16"
        )
    if timed is not None:
        parts = {f"{part}_s": ms / 1000 for part, ms in clock.read().items()}
        timed({name: round(seconds, 3) for name, seconds in ({"took_s": time.monotonic() - begin} | parts).items()})


def _adding(add: Callable[..., None], *batch: Tensor) -> Callable[[], None]:
    """Start to copy a batch to the host. The returned function waits for the copy and calls `add` with it."""
    copied = [tensor.to("cpu", non_blocking=True) for tensor in batch]
    done = torch.cuda.Event() if batch[0].is_cuda else None
    if done is not None:
        done.record()

    def wait_and_add() -> None:
        if done is not None:
            done.synchronize()
        add(*(tensor.numpy() for tensor in copied))

    return wait_and_add


def most_popular(corpus: Corpus, metrics: RankingMetrics, unseen: bool = False) -> dict[str, float]:
    """Compute the metrics of always predicting the most frequent training labels: a floor for every model.

    Args:
        unseen: count labels that training lacks as missed; see `Corpus.test_rows`.
    """
    popular, rows = np.argsort(-corpus.label_counts(), kind="stable"), corpus.test_rows(unseen)
    relevant = corpus.test_labels(unseen).rows(rows)
    counts = np.diff(relevant.offsets)
    predicted = np.broadcast_to(popular[: metrics.k], (len(rows), min(metrics.k, len(popular))))
    if corpus.filter_pairs is not None:  # rank the labels of each text that it does not exclude, as `Head.topk` does
        pairs = corpus.filter_pairs.rows(rows)
        excluded = np.diff(pairs.offsets)
        most = metrics.k + int(excluded.max(initial=0))
        predicted = np.tile(popular[:most], (len(rows), 1))
        predicted[correct(predicted, pairs.ids.astype(np.int64), excluded)] = -1
        predicted = np.take_along_axis(predicted, np.argsort(predicted < 0, axis=1, kind="stable"), 1)
    metrics.add(predicted, relevant.ids, counts)
    return metrics.result()
