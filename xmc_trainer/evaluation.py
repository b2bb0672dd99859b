"""Evaluation: the top labels of every text, over all ranks, into the ranking metrics; in training and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from xmc_trainer.checkpoint.saved_model import SavedModel
from xmc_trainer.config import Config, EvaluationConfig
from xmc_trainer.data import Corpus, batch_loader, load_corpus, plan_eval
from xmc_trainer.errors import UserError
from xmc_trainer.head import Head
from xmc_trainer.metrics import RankingMetrics, inverse_propensity


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor, Tensor], Tensor],
    head: Head,
    batches: Iterable[dict[str, Any]],
    metrics: RankingMetrics,
    device: torch.device,
    progress: bool = False,
) -> dict[str, float]:
    """The metrics of a data set; the same on every rank.

    Args:
        encode: (input_ids, attention_mask) -> features.
        batches: of `TextBatches`, this rank's; every rank must have the same number of them.
        metrics: empty.
    Raises UserError, on every rank, where features or scores are not finite: they would count as a ranking.
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
            "with a lower training.optimization.encoder_lr or lr, or training.amp.dtype=bfloat16 in place of float16"
        )
    return metrics.result()


def corpus_of(config: Config, tokenizer: Any, progress: bool = True) -> Corpus:
    """The tokenised data set that a configuration names."""
    data = config.data
    layout = "hf" if data.hf_source else "lf" if data.is_lf_data else "raw"
    return load_corpus(
        folder=config.data_folder,
        layout=layout,
        tokenizer=tokenizer,
        max_len=data.max_len,
        cache_dir=data.cache_dir,
        hf_source=data.hf_source,
        hf_train_split=data.hf_train_split,
        hf_test_split=data.hf_test_split,
        text_column=data.text_column,
        label_column=data.label_column,
        label_text_file=data.label_text_file,
        test_split=data.test_split,
        augment_label_data=data.augment_label_data,
        use_filter_eval=data.use_filter_eval,
        num_labels=data.num_labels,
        progress=progress,
    )


def metrics_of(config: EvaluationConfig, corpus: Corpus) -> RankingMetrics:
    """Empty metrics, with the propensities of the whole training set if they are asked for."""
    if not config.eval_psp:
        return RankingMetrics()
    return RankingMetrics(inverse_propensity(corpus.label_counts(), corpus.texts, config.A, config.B))


def most_popular(corpus: Corpus, metrics: RankingMetrics) -> dict[str, float]:
    """The floor of every comparison: the most frequent training labels, predicted for every test text."""
    popular = np.argsort(-corpus.label_counts(), kind="stable")[: metrics.k]
    relevant = corpus.test_labels()
    counts = np.diff(relevant.offsets)
    metrics.add(np.broadcast_to(popular, (len(counts), len(popular))), relevant.ids, counts)
    return metrics.result()


def corpus_of_saved(saved: SavedModel, config: Config) -> Corpus:
    """The data set that `config` names, its labels in the model's order. UserError if they are not the model's."""
    ranks = saved.head.ranks
    with ranks.one_a_machine_first():
        corpus = corpus_of(config, saved.tokenizer, progress=ranks.rank == 0)
    if corpus.num_labels != saved.head.num_labels:
        raise UserError(
            f"{config.data_folder}: has {corpus.num_labels} labels, the model {saved.head.num_labels}; name the data set "
            "that it was trained on (dataset_path, data.folder)"
        )
    ids, model_ids = corpus.labels["id"], saved.label_ids.to_pylist()
    if ids == model_ids:
        return corpus
    place = {name: number for number, name in enumerate(ids)}
    if len(place) != len(ids) or place.keys() != set(model_ids):
        raise UserError(
            f"{config.data_folder}: its labels are others than the model's; name the data set that it was trained on "
            "(dataset_path, data.folder)"
        )
    return corpus.reordered(np.array([place[name] for name in model_ids]))


def loader_of_tests(saved: SavedModel, corpus: Corpus, config: Config, device: torch.device) -> DataLoader:
    """This rank's batches of the test set."""
    ranks = saved.head.ranks
    plan = plan_eval(corpus.lengths("test"), batch_size=config.data.test_batch_size, world_size=ranks.size)
    return batch_loader(
        corpus,
        "test",
        plan,
        rank=ranks.rank,
        pad_token_id=saved.tokenizer.pad_token_id,
        workers=config.data.num_workers,
        device=device,
    )


def evaluate_saved(saved: SavedModel, config: Config, device: torch.device) -> tuple[dict[str, float], Corpus]:
    """Metrics of a saved model on the test set that `config` names, and that data set; the same on every rank of its head.

    Raises UserError if the data set's labels are not the model's.
    """
    corpus = corpus_of_saved(saved, config)
    loader, metrics = loader_of_tests(saved, corpus, config, device), metrics_of(config.training.evaluation, corpus)
    return evaluate(saved.encoder, saved.head, loader, metrics, device, progress=saved.head.ranks.rank == 0), corpus
