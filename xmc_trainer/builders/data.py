"""Load the data that a configuration names, order its labels, and build the metrics of an evaluation."""

from __future__ import annotations

import math

import numpy as np
from transformers import PreTrainedTokenizerBase

from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data import Corpus, load_corpus, sample_rows
from xmc_trainer.errors import UserError, naming
from xmc_trainer.labels.clusters import LabelClusters
from xmc_trainer.metrics import RankingMetrics, inverse_propensity

# Parameter of `load_corpus` -> its setting, for error messages.
NAMES = SETTINGS | {"folder": "dataset_path or data.folder", "layout": "data.is_lf_data"}


def require_data(config: Config) -> None:
    """Raise UserError if the data or the label clusters of a training are missing, before anything is loaded."""
    if config.data.hf_source is None and not config.data_folder.is_dir():
        raise UserError(f"{config.data_folder}: no such folder; set dataset_path or data.folder")
    if config.needs_clusters:
        LabelClusters.require(config.cluster_file)


def corpus_of(config: Config, tokenizer: PreTrainedTokenizerBase, progress: bool = True) -> Corpus:
    """Load the tokenised data set that a configuration names. Raises UserError for data that cannot be read."""
    data = config.data
    with naming(NAMES):
        return load_corpus(
            folder=config.data_folder,
            layout="hf" if data.hf_source else "lf" if data.is_lf_data else "raw",
            tokenizer=tokenizer,
            max_len=data.max_len,
            cache_dir=data.cache_dir,
            hf_source=data.hf_source,
            hf_train_split=data.hf_train_split,
            hf_test_split=data.hf_test_split,
            text_column=data.text_column,
            label_column=data.label_column,
            label_separator=data.label_separator,
            test_share=data.test_share,
            label_text_file=data.label_text_file,
            test_split=data.test_split,
            augment_label_data=data.augment_label_data,
            use_filter_eval=data.use_filter_eval,
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
