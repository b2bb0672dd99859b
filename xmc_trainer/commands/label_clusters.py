"""The work of `xmc-trainer clusters`: compute label clusters with an encoder, or import Spartex's file.

A label's vector is the mean feature of its training texts, or the feature of its own text (`--features labels`), from
the encoder before training. `xmc_trainer.labels.clusters` builds a balanced tree of the vectors.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xmc_trainer.builders.data import corpus_of, sampled_rows_of
from xmc_trainer.builders.encoder import backbone_of, encoder_of, in_precision_of, tokenizer_of
from xmc_trainer.builders.engine import accelerator_of
from xmc_trainer.config import Config
from xmc_trainer.data import Corpus, batch_of_texts
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError, reason
from xmc_trainer.labels.clusters import LabelClusters, balanced_order, cluster_bounds
from xmc_trainer.labels.features import (
    ROWS_AT_ONCE,
    LabelSums,
    array_on_disk,
    encode_training_texts,
    resident,
    selected,
)


def label_vectors(
    config: Config,
    encoder: TextEncoder,
    corpus: Corpus,
    tokenizer: Any,
    features: str,
    folder: Path,
    device: torch.device,
) -> np.ndarray:
    """Compute one vector per label: float16 [L, d], memory-mapped in `folder`.

    Args: encoder: on `device`. Its penultimate layer is not used, because it is not trained yet.
        features: "texts" for the mean over each label's training texts, "labels" for the label's own text.
    """
    encode, width = in_precision_of(config, encoder.eval().pool, device), encoder.pooled_features
    batch_size = config.data.test_batch_size
    if features == "labels":
        texts = corpus.labels["text"]
        out = array_on_disk(folder / "labels.npy", (len(texts), width))
        for start in tqdm(range(0, len(texts), batch_size), desc="encode labels", unit="batch"):
            chunk = texts[start : start + batch_size]
            batch = batch_of_texts(tokenizer, chunk, config.data.max_len)
            with torch.no_grad():
                features_Bd = encode(batch["input_ids"], batch["attention_mask"])
            out[start : start + len(chunk)] = features_Bd.cpu().numpy()
        return out
    rows = sampled_rows_of(config, corpus)
    encoded = encode_training_texts(
        encode,
        corpus,
        folder / "texts.npy",
        width=width,
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        workers=config.data.num_workers,
        device=device,
        rows=rows,
        progress=True,
    )
    label_sums = LabelSums(encoded, corpus.train_labels(), corpus.num_labels, rows, device)
    out = array_on_disk(folder / "labels.npy", (corpus.num_labels, width))
    for start in range(0, corpus.num_labels, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, corpus.num_labels)
        total, counts = label_sums.sums(range(start, stop))
        out[start:stop] = (total / counts.clamp(min=1)[:, None]).cpu().numpy()
    return out


def compute(config: Config, clusters: int | None, features: str) -> tuple[LabelClusters, list[str]]:
    """Cluster the labels of a configuration's data set: the clusters, and the label ids in data order.

    Args: clusters: number of clusters; None for about 64 labels each.
        features: see `label_vectors`.
    """
    device = accelerator_of(config).device
    tokenizer = tokenizer_of(config)
    encoder = encoder_of(config, backbone_of(config, tokenizer, device)).to(device)
    corpus = corpus_of(config, tokenizer)
    labels = corpus.num_labels
    count = clusters or 2 ** max(1, round(math.log2(labels / 64)))  # a power of two gives clusters of equal size
    if not 2 <= count <= labels:
        raise UserError(f"--clusters={count}: must be between 2 and the number of labels, {labels}")
    if features == "labels" and corpus.labels["text"] == corpus.labels["id"]:  # without texts, the names stand in
        raise UserError(
            "--features=labels: these labels have no texts; set data.label_text_file, or use --features texts"
        )
    align = config.model.ffi.group_size
    with tempfile.TemporaryDirectory(prefix="xmc_trainer.") as folder:
        vectors = label_vectors(config, encoder, corpus, tokenizer, features, Path(folder), device)
        stored = resident(vectors, device)

        def vectors_of(numbers: np.ndarray) -> Tensor:
            return selected(stored, numbers, device)

        order = balanced_order(vectors_of, labels, align=align, seed=config.training.seed, progress=True)
    return LabelClusters(order, cluster_bounds(labels, count, align)), corpus.label_ids()


def imported(config: Config, path: Path, order: str | None) -> tuple[LabelClusters, list[str], str]:
    """Import a file for the labels of a configuration's data set: clusters, label ids, and how it was read (see `import_npy`)."""
    ids = corpus_of(config, tokenizer_of(config)).label_ids()
    clusters, read_as = import_npy(path, ids, order)
    return clusters, ids, read_as


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only the types of an object array, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray") or (module, name) == ("numpy", "dtype"):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return super().find_class("numpy._core.multiarray", name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _load_npy(path: Path) -> Any:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:
            return np.load(path, allow_pickle=False)
        return np.asarray(_ArraysOnly(file).load(), dtype=object).reshape(shape)


def import_npy(path: Path, ids: list[str], order: str | None) -> tuple[LabelClusters, str]:
    """Import `label_group*.npy` of Spartex or LightXML: an array of one list of label names or numbers per cluster.

    An array of lists is a pickle; only arrays, lists, strings and numbers are read from it.

    Args:
        ids: label names, in data order.
        order: meaning of numbers: "ours" for positions in `ids`, "sorted" for positions in the sorted names. None is an
            error if the two differ.
    Returns: the clusters, and how the file was read: "names", "ours" or "sorted".
    Raises UserError if the file has another format, or the meaning of its numbers is ambiguous.
    """
    try:
        groups = _load_npy(path)
    except OSError as error:
        raise UserError(f"--import-npy={path}: {error.strerror or error}; name Spartex's file") from None
    except Exception as error:  # unpickling can raise any exception
        raise UserError(
            f"--import-npy={path}: is not a valid .npy file ({reason(error)}); name Spartex's file"
        ) from None
    nested = isinstance(groups, np.ndarray) and (groups.ndim > 1 or groups.ndim == 1 and groups.dtype == object)
    members = [np.asarray(group, dtype=object).ravel().tolist() for group in groups] if nested else [[None]]
    entries = [entry for group in members for entry in group]
    number: dict[Any, int]
    if all(isinstance(entry, str) for entry in entries):
        number, read_as = {name: number for number, name in enumerate(ids)}, "names"
    elif all(isinstance(entry, (int, np.integer)) and not isinstance(entry, bool) for entry in entries):
        by_text = sorted(range(len(ids)), key=ids.__getitem__)
        if order is None and by_text != list(range(len(ids))):
            raise UserError(
                f"--import-npy={path}: contains numbers, which may count the labels in data order or by sorted names; "
                "add --npy-order sorted for files of Spartex and LightXML for raw text data, or --npy-order ours for "
                "data order (numeric names by value)"
            )
        read_as = order or "ours"
        number = dict(enumerate(by_text if read_as == "sorted" else range(len(ids))))
    else:
        raise UserError(
            f"--import-npy={path}: clusters must be lists of label names or of whole numbers; name Spartex's file"
        )
    remedy = "name its data set (dataset, dataset_path)"
    for entry in entries:
        if entry not in number:
            raise UserError(f"--import-npy={path}: {entry!r} is not one of the data set's {len(ids)} labels; {remedy}")
    labels = np.array([number[entry] for entry in entries], dtype=np.int32)
    if len(labels) != len(ids) or len(np.unique(labels)) != len(ids):
        raise UserError(
            f"--import-npy={path}: clusters do not contain each of the data set's {len(ids)} labels exactly once; "
            f"{remedy}"
        )
    return LabelClusters(labels, np.cumsum([0, *(len(group) for group in members if group)])), read_as
