"""Load the data that a configuration names, order its labels, and build the metrics of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from xmc_trainer.builders.inputs import names_in, source_of
from xmc_trainer.config import Config
from xmc_trainer.data import Corpus, fingerprint_of, load_corpus, sample_rows
from xmc_trainer.data.split import Split
from xmc_trainer.errors import UserError, naming
from xmc_trainer.labels.clusters import LabelClusters
from xmc_trainer.metrics import RankingMetrics, inverse_propensity


def corpus_of(
    config: Config, tokenizer: PreTrainedTokenizerBase, progress: bool = True, split_file: Path | None = None
) -> Corpus:
    """Load the tokenised data set that a configuration names. Raises UserError for data that cannot be read.

    Args:
        split_file: the file of a run that says which texts it held out (`run_folder.SPLIT`). If the data have changed since,
            the same texts are held out as then.
    """
    source, data = source_of(config), config.data
    if split_file is not None and Split.load(split_file).made_for != fingerprint_of(source):
        source = source_of(config, split_file)
    with names_in(config):
        return load_corpus(
            source,
            tokenizer,
            max_len=data.max_len,
            cache_dir=data.cache_dir,
            num_labels=data.num_labels,
            progress=progress,
        )


def sampled_rows_of(config: Config, corpus: Corpus) -> np.ndarray | None:
    """Draw the training rows, int64, that `data.train_sample` asks for; None for all. Raises UserError if there are fewer."""
    with naming({"size": "data.train_sample"}):
        return sample_rows(len(corpus.train), config.data.train_sample, config.training.seed)


def train_rows_of(config: Config, corpus: Corpus) -> np.ndarray | None:
    """Return `sampled_rows_of`. Raises UserError if a step needs more rows."""
    rows = sampled_rows_of(config, corpus)
    texts = len(corpus.train) if rows is None else len(rows)
    accumulation, most = config.training.optimization.grad_accum_step, math.ceil(texts / config.data.batch_size)
    if accumulation > most:
        raise UserError(
            f"training.optimization.grad_accum_step={accumulation}: the {texts} training texts fill only {most} batches of "
            f"data.batch_size={config.data.batch_size}; set it to {most} at most"
        )
    return rows


def frequent_labels(config: Config, labels: int) -> int:
    """Return how many of `labels` labels count as frequent by model.ffi.head_ratio."""
    return round(config.model.ffi.head_ratio * labels)


def order_labels(config: Config, corpus: Corpus) -> tuple[Corpus, np.ndarray | None]:
    """Put the labels of the corpus into the head's order.

    Returns the corpus and the cluster of each label, int32 [L]; None if the run uses no clusters.
    """
    ffi = config.model.ffi
    order, cluster_of = np.arange(corpus.num_labels), None
    if config.needs_clusters:
        clusters = LabelClusters.load(config.cluster_file, corpus.label_ids())
        cluster_of = clusters.cluster_of
        if ffi.semantic_groups:
            order = clusters.order.astype(np.int64)
    if ffi.head_ratio:
        # The most frequent labels come first; the others stay in order.
        by_frequency = np.argsort(-corpus.label_counts(), kind="stable")
        frequent = by_frequency[: frequent_labels(config, corpus.num_labels)]
        order = np.concatenate([frequent, order[~np.isin(order, frequent)]])
    if ffi.semantic_groups or ffi.head_ratio:
        corpus = corpus.reordered(order)
    return corpus, None if cluster_of is None else cluster_of[order]


def metrics_of(config: Config, corpus: Corpus) -> RankingMetrics:
    """Build empty metrics. With `eval_psp` they weigh labels by inverse propensity in the whole training set."""
    evaluation = config.training.evaluation
    if not evaluation.eval_psp:
        return RankingMetrics()
    counts = np.pad(corpus.label_counts(), (0, corpus.unseen_labels))
    return RankingMetrics(inverse_propensity(counts, corpus.texts, evaluation.A, evaluation.B))
