"""Evaluate a saved model on the data set that a configuration names."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from xmc_trainer.builders.data import corpus_of, metrics_of
from xmc_trainer.builders.inputs import check_number_of_labels, held_out_file, set_the_data_of
from xmc_trainer.checkpoint.saved_model import SavedModel
from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data import Corpus, batch_loader, plan_eval
from xmc_trainer.errors import UserError, naming
from xmc_trainer.evaluation import Best, best_labels, evaluate
from xmc_trainer.measures import Measures, buckets_of


def corpus_of_saved(saved: SavedModel, config: Config) -> Corpus:
    """Load the data set with its labels in the model's order. Raises UserError if its labels are not the model's."""
    ranks = saved.head.ranks
    with ranks.one_a_machine_first():
        split_file = held_out_file(saved.folder)
        corpus = corpus_of(config, saved.tokenizer, progress=ranks.rank == 0, split_file=split_file)
    check_number_of_labels(config, corpus.num_labels, saved.head.num_labels)
    ids, model_ids = corpus.label_ids(), saved.label_ids.to_pylist()
    if ids == model_ids:
        return corpus
    place = {name: number for number, name in enumerate(ids)}
    if len(place) != len(ids) or place.keys() != set(model_ids):
        raise UserError(f"{config.data_name}: its labels differ from the model's; {set_the_data_of(config)}")
    return corpus.reordered(np.array([place[name] for name in model_ids]))


def loader_of_test_set(
    saved: SavedModel, corpus: Corpus, config: Config, device: torch.device, unseen: bool = False
) -> DataLoader:
    """Build the loader of this rank's batches of the test rows. Args: unseen: as in `Corpus.test_rows`."""
    ranks = saved.head.ranks
    plan = plan_eval(
        corpus.lengths("test"),
        batch_size=config.data.test_batch_size,
        world_size=ranks.size,
        rows=corpus.test_rows(unseen),
    )
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
    """Compute the metrics of a saved model as its training does, equal on every rank. Returns them and the data set.

    Raises UserError if the labels of the data set are not the model's.
    """
    corpus = corpus_of_saved(saved, config)
    loader, metrics = loader_of_test_set(saved, corpus, config, device), metrics_of(config, corpus)
    with naming(SETTINGS):
        return evaluate(saved.encoder, saved.head, loader, metrics, device, progress=saved.head.ranks.rank == 0), corpus


def best_of_saved(
    saved: SavedModel, config: Config, corpus: Corpus, k: int, device: torch.device, unseen: bool
) -> Best:
    """Find the k best labels of the test rows, equal on every rank. Args: unseen: as in `Corpus.test_rows`."""
    loader, rows = loader_of_test_set(saved, corpus, config, device, unseen), corpus.test_rows(unseen)
    k = min(k, saved.head.num_labels)
    with naming(SETTINGS):
        return best_labels(saved.encoder, saved.head, loader, rows, k, device, progress=saved.head.ranks.rank == 0)


def measures_of(config: Config, corpus: Corpus, best: Best, unseen: bool, chosen: np.ndarray | None = None) -> Measures:
    """Compare the best labels of the test rows with the relevant ones.

    Args:
        best: of the rows `corpus.test_rows(unseen)`.
        chosen: as in `Measures`.
    """
    relevant = corpus.test_labels(unseen).rows(corpus.test_rows(unseen))
    return Measures(
        best.labels,
        relevant.ids,
        np.diff(relevant.offsets),
        buckets=buckets_of(corpus.label_counts()),
        inverse_propensity=metrics_of(config, corpus).inverse_propensity,
        chosen=chosen,
    )
