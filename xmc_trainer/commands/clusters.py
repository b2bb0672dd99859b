"""`xmc-trainer clusters`: label clusters from a data set and an encoder, or from Spartex's file.

xmc-trainer clusters dataset=sidgnd dataset_path=./data model.encoder.encoder_model=data/minilm
xmc-trainer clusters dataset=sidgnd dataset_path=./data --import-npy label_group0.npy

A label's vector is the mean of its training texts' features, by the encoder as it stands, or of its own text
(`--features labels`). `xmc_trainer.labels.clusters` makes the tree of them.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xmc_trainer.builders.data import corpus_of
from xmc_trainer.builders.encoder import backbone_of, encoder_of, in_precision_of, tokenizer_of
from xmc_trainer.builders.engine import accelerator_of
from xmc_trainer.commands.cli import USAGE
from xmc_trainer.config import Config, load_config
from xmc_trainer.data import Corpus, batch_of_texts, sample_rows
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError, reason
from xmc_trainer.labels.clusters import LabelClusters, balanced_order, cluster_bounds
from xmc_trainer.labels.features import ROWS_AT_ONCE, LabelSums, array_on_disk, encode_training_texts


def label_vectors(
    config: Config,
    encoder: TextEncoder,
    corpus: Corpus,
    tokenizer: Any,
    features: str,
    folder: Path,
    device: torch.device,
) -> np.ndarray:
    """float16 [L, d], a memory-mapped file in `folder`: means over each label's training texts, or of its own text.

    Args: encoder: on `device`; its penultimate layer, if any, says nothing before it is trained, and is left out.
        features: "texts" or "labels".
    """
    encode, width = in_precision_of(config, encoder.eval().pool, device), encoder.pooled_features
    batch_size = config.data.test_batch_size
    if features == "labels":
        texts = corpus.labels["text"]
        out = array_on_disk(folder / "labels.npy", (len(texts), width))
        for at in tqdm(range(0, len(texts), batch_size), desc="encode labels", unit="batch"):
            part = texts[at : at + batch_size]
            batch = batch_of_texts(tokenizer, part, config.data.max_len)
            with torch.no_grad():
                out[at : at + len(part)] = encode(**batch).cpu().numpy()
        return out
    rows = sample_rows(len(corpus.train), config.data.train_sample, config.training.seed)
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
    of_label = LabelSums(encoded, corpus.train_labels(), corpus.num_labels, rows)
    out = array_on_disk(folder / "labels.npy", (corpus.num_labels, width))
    for at in range(0, corpus.num_labels, ROWS_AT_ONCE):
        stop = min(at + ROWS_AT_ONCE, corpus.num_labels)
        total, counts = of_label.sums(range(at, stop))
        out[at:stop] = total / np.maximum(counts, 1)[:, None]
    return out


def compute(config: Config, clusters: int | None, features: str) -> tuple[LabelClusters, list[str]]:
    """The clusters of a configuration's data set and encoder, and the label ids."""
    device = accelerator_of(config).device
    tokenizer = tokenizer_of(config)
    encoder = encoder_of(config, backbone_of(config, tokenizer, device)).to(device)
    corpus = corpus_of(config, tokenizer)
    labels = corpus.num_labels
    count = clusters or 2 ** max(1, round(math.log2(labels / 64)))  # a power of two: clusters of even size
    if not 2 <= count <= labels:
        raise UserError(f"--clusters {count}: must be between 2 and the {labels} labels")
    if features == "labels" and corpus.labels["text"] == corpus.labels["id"]:  # a label without a text goes by its name
        raise UserError(
            "--features labels: these labels have no texts; set data.label_text_file, or take --features texts"
        )
    align = config.model.ffi.group_size
    with tempfile.TemporaryDirectory(prefix="xmc_trainer.") as folder:
        vectors = label_vectors(config, encoder, corpus, tokenizer, features, Path(folder), device)

        def rows_of(numbers: np.ndarray) -> Tensor:
            return torch.from_numpy(np.asarray(vectors[numbers])).to(device).float()

        order = balanced_order(rows_of, labels, align=align, seed=config.training.seed, progress=True)
    return LabelClusters(order, cluster_bounds(labels, count, align)), corpus.labels["id"]


class _ArraysOnly(pickle.Unpickler):
    """Knows the few names that an array of objects needs, so that a file can run nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray") or (module, name) == ("numpy", "dtype"):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return super().find_class("numpy._core.multiarray", name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _load_npy(path: Path) -> Any:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:
            return np.load(path, allow_pickle=False)
        return np.asarray(_ArraysOnly(file).load(), dtype=object).reshape(shape)


def import_npy(path: Path, ids: list[str], order: str | None) -> tuple[LabelClusters, str]:
    """Spartex's or LightXML's `label_group*.npy`: an array with one list a cluster, of label names or of whole numbers.

    An array of lists is a pickle, of which nothing but arrays, lists, strings and numbers is read.

    Args:
        ids: names of the data's labels, in their order.
        order: what whole numbers count: "ours", labels in the order of `ids`, or "sorted", in that of the names sorted
            as text. None where it makes no difference.
    Returns: the clusters, and what was read: "names", "ours" or "sorted".
    Raises UserError if the file is something else, or its numbers may mean either.
    """
    try:
        groups = _load_npy(path)
    except OSError as error:
        raise UserError(f"--import-npy {path}: {error.strerror or error}") from None
    except Exception as error:  # a pickle can raise anything
        raise UserError(f"--import-npy {path}: not a .npy file ({reason(error)}); name Spartex's file") from None
    nested = isinstance(groups, np.ndarray) and (groups.ndim > 1 or groups.ndim == 1 and groups.dtype == object)
    members = [np.asarray(group, dtype=object).ravel().tolist() for group in groups] if nested else [[None]]
    entries = [entry for group in members for entry in group]
    if all(isinstance(entry, str) for entry in entries):
        number, read_as = {name: number for number, name in enumerate(ids)}, "names"
    elif all(isinstance(entry, (int, np.integer)) and not isinstance(entry, bool) for entry in entries):
        by_text = sorted(range(len(ids)), key=ids.__getitem__)
        if order is None and by_text != list(range(len(ids))):
            raise UserError(
                f"--import-npy {path}: holds whole numbers, and the data's labels are not in the order of their names: "
                "add --npy-order sorted if they count the names sorted as text, as in files of Spartex and LightXML for "
                "raw text data, or --npy-order ours for the order of the data (numeric names by value)"
            )
        read_as = order or "ours"
        number = dict(enumerate(by_text if read_as == "sorted" else range(len(ids))))
    else:
        raise UserError(f"--import-npy {path}: its clusters must be lists of label names or of whole numbers")
    remedy = "name the data set that it is of (dataset, dataset_path)"
    for entry in entries:
        if entry not in number:
            raise UserError(f"--import-npy {path}: {entry!r} is none of the data set's {len(ids)} labels; {remedy}")
    found = np.array([number[entry] for entry in entries], dtype=np.int32)
    if len(found) != len(ids) or len(np.unique(found)) != len(ids):
        raise UserError(
            f"--import-npy {path}: its clusters do not hold each of the data set's {len(ids)} labels exactly once; {remedy}"
        )
    return LabelClusters(found, np.cumsum([0, *(len(group) for group in members if group)])), read_as


def _output(config: Config, chosen: Path | None) -> Path:
    """Where the result goes; whether it can be written is found out here, before the work."""
    path = chosen or config.cluster_file
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file by --output")
    try:
        if chosen is None and config.data.hf_source:
            # The data lie elsewhere: this folder is for the clusters alone.
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.is_dir():
            remedy = "set dataset_path or data.folder" if chosen is None else "make it, or name another by --output"
            raise UserError(f"{path.parent}: no such folder; {remedy}")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file by --output") from None
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the training that will use the clusters")
    parser.add_argument(
        "--clusters", type=int, help="of the meta branch; default: the power of two that gives about 64 labels each"
    )
    parser.add_argument(
        "--features", choices=("texts", "labels"), default="texts", help="what a label's vector is made of"
    )
    parser.add_argument(
        "--output", type=Path, help="default: label_group<group_y_group>.safetensors in the data folder"
    )
    parser.add_argument("--import-npy", type=Path, metavar="FILE", help="convert Spartex's file instead")
    parser.add_argument(
        "--npy-order",
        choices=("sorted", "ours"),
        help="of --import-npy: what whole numbers in that file count: the labels' names sorted as text, as Spartex and "
        "LightXML do for raw text data, or the labels in the order of the data (default for data.is_lf_data)",
    )
    options = parser.parse_intermixed_args()
    config = load_config(options.settings)
    if options.npy_order and not options.import_npy:
        raise UserError("--npy-order: of --import-npy; name that file too, or leave it out")
    if options.import_npy and (options.clusters or options.features == "labels"):
        raise UserError("--import-npy: the file has its clusters; leave --clusters and --features out")
    output, report = _output(config, options.output), {}
    if options.import_npy:
        corpus = corpus_of(config, tokenizer_of(config))
        ids = corpus.labels["id"]
        order = options.npy_order or ("ours" if config.data.is_lf_data else None)
        found, report["read_as"] = import_npy(options.import_npy, ids, order)
    else:
        found, ids = compute(config, options.clusters, options.features)
    found.save(output, ids)
    sizes = np.diff(found.offsets)
    report |= {"labels": len(found.order), "clusters": len(sizes)}
    report |= {"smallest": int(sizes.min()), "largest": int(sizes.max())}
    print(json.dumps(report))
    print(f"written to {output}")


# Label vectors.
