"""Label clusters: every label's place in a tree of balanced 2-means, computed here and saved without pickle.

xmc-trainer clusters dataset=sidgnd dataset_path=./data model.encoder.encoder_model=data/minilm
xmc-trainer clusters dataset=sidgnd dataset_path=./data --import-npy label_group0.npy

A label's vector is the mean of its training texts' features, by the encoder as it stands, or of its own text
(`--features labels`). The set of labels is cut into two halves of equal size (to `model.ffi.group_size`), each of them again,
and so on: neighbours in the resulting order are similar, so that consecutive labels make semantic groups, and whole
subtrees make the clusters of the meta branch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from xmc_trainer.builders import accelerator_of, backbone_of, encoder_of, in_precision_of, tokenizer_of
from xmc_trainer.commands.cli import USAGE
from xmc_trainer.config import Config, load_config
from xmc_trainer.data import Corpus, batch_of_texts, sample_rows
from xmc_trainer.encoder import TextEncoder
from xmc_trainer.errors import UserError, reason
from xmc_trainer.evaluation import corpus_of
from xmc_trainer.files import PARTIAL, sync, writing
from xmc_trainer.labels.features import ROWS_AT_ONCE, LabelSums, array_on_disk, encode_training_texts
from xmc_trainer.rng import Stream, make_key, uniform

_FORMAT = "2"  # 2: a checksum
_REMEDY = "make it by xmc-trainer clusters, with the settings of this run"


@dataclass(frozen=True)
class LabelClusters:
    """order: int32 [L], the labels, cluster after cluster; offsets: int64 [C + 1], where each cluster starts in it."""

    order: np.ndarray
    offsets: np.ndarray

    @property
    def cluster_of(self) -> np.ndarray:
        """int32 [L]: the cluster of every label."""
        out = np.empty(len(self.order), dtype=np.int32)
        out[self.order] = np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int32), np.diff(self.offsets))
        return out

    def save(self, path: Path, label_ids: Iterable[str]) -> None:
        """Write a safetensors file that remembers which labels it is of, and vouches for itself."""
        tensors = {"order": self.order.astype(np.int32), "offsets": self.offsets.astype(np.int64)}
        labels = _digest(label_ids)
        metadata = {"format": _FORMAT, "labels_sha256": labels, "sha256": _checksum(labels, **tensors)}
        partial = path.with_name(path.name + PARTIAL)
        with writing(path, "name another file by --output"):
            try:
                save_file(tensors, partial, metadata)
                sync(partial)
                os.replace(partial, path)
                sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)

    @staticmethod
    def require(path: Path) -> None:
        """UserError where there is no file to load."""
        if not path.is_file():
            raise UserError(f"{path}: no such label clusters; {_REMEDY}")

    @classmethod
    def load(cls, path: Path, label_ids: Iterable[str]) -> LabelClusters:
        """Read a file of `save`. UserError if it is none, or of other labels."""
        cls.require(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                order, offsets = file.get_tensor("order"), file.get_tensor("offsets")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a file of label clusters ({error}); {_REMEDY}") from None
        found, labels = metadata.get("format"), _digest(label_ids)
        if found not in ("1", _FORMAT):
            raise UserError(f"{path}: format {found} of label clusters, this version reads 1 and {_FORMAT}; {_REMEDY}")
        if metadata.get("labels_sha256") != labels:
            raise UserError(f"{path}: of other labels than this data set's; {_REMEDY}")
        if found == _FORMAT and metadata.get("sha256") != _checksum(labels, order, offsets):
            raise UserError(f"{path}: damaged, it differs from its checksum; {_REMEDY}")
        whole = (
            order.dtype == np.int32
            and offsets.dtype == np.int64
            and order.ndim == offsets.ndim == 1
            and len(offsets) > 1
        )
        if not whole or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise UserError(f"{path}: does not hold each of its labels once; {_REMEDY}")
        if offsets[0] != 0 or offsets[-1] != len(order) or (np.diff(offsets) <= 0).any():
            raise UserError(f"{path}: its clusters do not follow each other; {_REMEDY}")
        return cls(order, offsets)


def _checksum(labels_sha256: str, order: np.ndarray, offsets: np.ndarray) -> str:
    return hashlib.sha256(labels_sha256.encode() + order.tobytes() + offsets.tobytes()).hexdigest()


def _digest(label_ids: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(label_ids).encode()).hexdigest()


# The tree: a pure function of the sizes. Only which label stands where depends on the vectors.


def middle(start: int, stop: int, align: int) -> int:
    """Where positions start..stop are cut in two: in the middle, at a multiple of `align` from the start."""
    half = round((stop - start) / 2 / align) * align
    return start + min(max(half, align), stop - start - 1)


def cluster_bounds(labels: int, clusters: int, align: int = 1) -> np.ndarray:
    """Offsets int64 [C + 1] of the subtrees that cut `labels` positions into `clusters` parts.

    Sizes are even where `clusters` is a power of two; otherwise some parts were cut once more than others. Fewer parts
    where none larger than `align` is left to cut.
    """
    parts = [(0, labels)]
    while len(parts) < clusters:
        # A whole level at a time, the larger parts first if it cannot be a whole one.
        largest = sorted(parts, key=lambda part: (part[0] - part[1], part[0]))[: clusters - len(parts)]
        cut = {part: middle(*part, align) for part in largest if part[1] - part[0] > align}
        if not cut:
            break
        parts = [
            half
            for part in parts
            for half in (((part[0], cut[part]), (cut[part], part[1])) if part in cut else (part,))
        ]
    return np.array([part[0] for part in parts] + [labels], dtype=np.int64)


def balanced_order(
    rows_of: Callable[[np.ndarray], Tensor],
    labels: int,
    *,
    align: int = 1,
    seed: int = 0,
    iterations: int = 5,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool = False,
) -> np.ndarray:
    """The labels in the order of balanced bisecting 2-means: int32 [L].

    Args:
        rows_of: label numbers int64 [n] -> their vectors, float32 [n, d] on the device to compute on. They are scaled to
            length 1 here; a vector of zeros may go anywhere.
        align: parts are cut at multiples of it, and parts no larger than it are not cut.
        iterations: of assigning labels and moving the two centres, a cut.
        rows_at_once: vectors in memory.
    Deterministic on one device; the same seed may give another order on another device.
    """
    order = np.arange(labels, dtype=np.int64)
    bar = tqdm(total=labels, desc="cluster", unit="label", disable=not progress)
    large, small = [(0, labels)], []
    while large:
        start, stop = large.pop()
        if stop - start <= rows_at_once:
            small.append((start, stop))
            continue
        # Too many rows for the device: several passes over them for one cut.
        part = order[start:stop]
        chunks = [part[at : at + rows_at_once] for at in range(0, len(part), rows_at_once)]
        cut = middle(start, stop, align)

        def vectors(chunks: list[np.ndarray] = chunks) -> Iterable[Tensor]:
            return (normalize(rows_of(chunk), dim=1) for chunk in chunks)

        order[start:stop] = part[
            _bisect(vectors, [0, len(part)], [cut - start], torch.from_numpy(part), seed, iterations)
        ]
        large += [(cut, stop), (start, cut)]
    for start, stop in small:
        part = order[start:stop]
        rows = normalize(rows_of(part), dim=1)
        bounds = [0, len(part)]
        while True:
            cuts = [middle(a, b, align) if b - a > align else None for a, b in zip(bounds, bounds[1:])]
            if not any(cuts):
                break
            moved = _bisect(lambda rows=rows: (rows,), bounds, cuts, torch.from_numpy(part), seed, iterations)
            part, rows = part[moved], rows[torch.from_numpy(moved).to(rows.device)]
            bounds = [at for a, cut in zip(bounds, cuts) for at in ((a,) if cut is None else (a, cut))] + [len(part)]
        order[start:stop] = part
        bar.update(stop - start)
    bar.close()
    return order.astype(np.int32)


def _bisect(
    chunks: Callable[[], Iterable[Tensor]],
    bounds: list[int],
    cuts: list[int | None],
    labels: Tensor,
    seed: int,
    iterations: int,
) -> np.ndarray:
    """Order rows so that in each node bounds[i]..bounds[i+1] the rows before cuts[i] are those nearer to its first centre.

    Args: chunks: gives the rows [n, d], in order, once for every call. cuts: None where a node stays whole. labels: int64
        [n], for random numbers that do not depend on places.
    Returns: int64 [n], for each new place the old one.
    """
    n = len(labels)
    sizes = torch.tensor(np.diff(bounds))
    whole = torch.tensor([cut is None for cut in cuts])
    left = torch.tensor([b if cut is None else cut for cut, b in zip(cuts, bounds[1:])]) - torch.tensor(bounds[:-1])
    halves = torch.stack([left, sizes - left], 1).flatten()  # rows of each half, node after node
    node = torch.repeat_interleave(torch.arange(len(cuts)), sizes)
    # First halves at random.
    score = uniform(make_key(seed, len(cuts), Stream.CLUSTER), labels, torch.zeros((), dtype=torch.int64))
    order = torch.arange(n)
    for done in range(iterations + 1):
        # Within each node by score, the highest first; a node that stays whole keeps its order.
        score = torch.where(whole[node], 0.0, score)
        by_score = torch.argsort(score, descending=True, stable=True)
        new = by_score[torch.argsort(node[by_score], stable=True)]
        unchanged, order = done > 0 and torch.equal(new, order), new
        if unchanged or done == iterations:
            break
        half = torch.empty(n, dtype=torch.int64)
        half[order] = torch.repeat_interleave(torch.arange(2 * len(cuts)), halves)
        total, at = None, 0
        for rows in chunks():
            # Rows of a half next to each other, added up in order: the same sum every time.
            part = half[at : at + len(rows)]
            sort = torch.argsort(part, stable=True)
            lengths = torch.bincount(part, minlength=2 * len(cuts)).to(rows.device)
            sums = torch.segment_reduce(rows[sort.to(rows.device)], "sum", lengths=lengths, axis=0)
            total = sums if total is None else total + sums
            at += len(rows)
        centre = normalize(total, dim=1)
        direction = centre[0::2] - centre[1::2]
        parts, at = [], 0
        for rows in chunks():
            part = node[at : at + len(rows)].to(rows.device)
            parts.append((rows * direction[part]).sum(1).cpu())
            at += len(rows)
        score = torch.cat(parts)
    return order.numpy()


# Label vectors.


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
