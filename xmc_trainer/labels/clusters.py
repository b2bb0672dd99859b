"""Label clusters: every label's place in a tree of balanced 2-means, saved without pickle.

The set of labels is cut into two halves of equal size (to `model.ffi.group_size`), each of them again, and so on:
neighbours in the resulting order are similar, so that consecutive labels make semantic groups, and whole subtrees make
the clusters of the meta branch. `xmc-trainer clusters` computes the labels' vectors and calls this.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from xmc_trainer.errors import UserError
from xmc_trainer.files import PARTIAL, sync, writing
from xmc_trainer.labels.features import ROWS_AT_ONCE
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
