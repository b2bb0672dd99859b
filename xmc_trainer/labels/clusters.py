"""Label clusters from a tree of balanced 2-means, saved without pickle.

The labels are split into two halves of equal size, rounded to the head's group size, and each half is split again.
Neighbours in the resulting order are similar: consecutive labels form the head's groups, and subtrees form the clusters
of the meta branch. `xmc-trainer clusters` computes the label vectors and calls this module.
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
from xmc_trainer.labels.features import ROWS_AT_ONCE, segment_sums
from xmc_trainer.rng import Stream, make_key, uniform

_FORMAT = "2"  # format 2 added a checksum


_REMEDY = "create it by xmc-trainer clusters with the settings of this run"


@dataclass(frozen=True)
class LabelClusters:
    """L labels in C clusters.

    Attributes:
        order: int32 [L], the labels, cluster by cluster.
        offsets: int64 [C + 1]; cluster c is order[offsets[c]:offsets[c + 1]].
    """

    order: np.ndarray
    offsets: np.ndarray

    @property
    def cluster_of(self) -> np.ndarray:
        """The cluster of each label, int32 [L]."""
        out = np.empty(len(self.order), dtype=np.int32)
        out[self.order] = np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int32), np.diff(self.offsets))
        return out

    def save(self, path: Path, label_ids: Iterable[str]) -> None:
        """Write a safetensors file with a hash of the label ids and a checksum. Raises CannotWrite."""
        tensors: dict[str, np.ndarray] = {
            "order": self.order.astype(np.int32),
            "offsets": self.offsets.astype(np.int64),
        }
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

    @classmethod
    def load(cls, path: Path, label_ids: Iterable[str]) -> LabelClusters:
        """Read a file of `save`. UserError if it is missing, damaged or made for other labels."""
        if not path.is_file():
            raise UserError(f"{path}: no such label clusters; {_REMEDY}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                order, offsets = file.get_tensor("order"), file.get_tensor("offsets")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is not a label cluster file ({error}); {_REMEDY}") from None
        found, labels = metadata.get("format"), _digest(label_ids)
        if found not in ("1", _FORMAT):
            raise UserError(f"{path}: has format {found}, but this version reads 1 and {_FORMAT}; {_REMEDY}")
        if metadata.get("labels_sha256") != labels:
            raise UserError(f"{path}: was made for other labels than those of this data set; {_REMEDY}")
        if found == _FORMAT and metadata.get("sha256") != _checksum(labels, order, offsets):
            raise UserError(f"{path}: is damaged, its checksum differs; {_REMEDY}")
        valid = (
            order.dtype == np.int32
            and offsets.dtype == np.int64
            and order.ndim == offsets.ndim == 1
            and len(offsets) > 1
        )
        if not valid or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise UserError(f"{path}: does not hold each label exactly once; {_REMEDY}")
        if offsets[0] != 0 or offsets[-1] != len(order) or (np.diff(offsets) <= 0).any():
            raise UserError(f"{path}: its clusters are empty, overlap or leave gaps; {_REMEDY}")
        return cls(order, offsets)


def _checksum(labels_sha256: str, order: np.ndarray, offsets: np.ndarray) -> str:
    return hashlib.sha256(labels_sha256.encode() + order.tobytes() + offsets.tobytes()).hexdigest()


def _digest(label_ids: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(label_ids).encode()).hexdigest()


# The shape of the tree depends only on sizes. The label vectors decide only which label is at which position.


def cut_position(start: int, stop: int, align: int) -> int:
    """Return where to cut the positions start..stop in two: near the middle, a multiple of `align` from `start`."""
    half = round((stop - start) / 2 / align) * align
    return start + min(max(half, align), stop - start - 1)


def cluster_bounds(labels: int, clusters: int, align: int = 1) -> np.ndarray:
    """Return the offsets of `clusters` subtrees over `labels` positions, int64 [C + 1].

    Sizes are equal if `clusters` is a power of two; otherwise some parts are cut once more than others. C is smaller
    than `clusters` if no part larger than `align` is left to cut.
    """
    parts = [(0, labels)]
    while len(parts) < clusters:
        # Cut a whole level of the tree, or only its largest parts if fewer cuts are needed.
        largest = sorted(parts, key=lambda part: (part[0] - part[1], part[0]))[: clusters - len(parts)]
        cut = {part: cut_position(*part, align) for part in largest if part[1] - part[0] > align}
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
    """Order the labels by balanced bisecting 2-means. Returns int32 [L].

    The result is deterministic on one device. Another device may give another order for the same seed.

    Args:
        rows_of: label numbers int64 [n] -> their vectors, float32 [n, d], on the device to compute on. They are scaled
            to length 1 here; a zero vector may end up anywhere.
        align: cut at multiples of this, and do not cut parts that are no larger.
        iterations: rounds of assigning labels and moving the two centres, per cut.
        rows_at_once: maximal number of vectors in memory.
    """
    order = np.arange(labels, dtype=np.int64)
    bar = tqdm(total=labels, desc="cluster", unit="label", disable=not progress)
    large, small = [(0, labels)], []
    while large:
        start, stop = large.pop()
        if stop - start <= rows_at_once:
            small.append((start, stop))
            continue
        # Too many rows for the device: make several passes over them for one cut.
        part = order[start:stop]
        chunks = [part[at : at + rows_at_once] for at in range(0, len(part), rows_at_once)]
        cut = cut_position(start, stop, align)

        def vectors(chunks: list[np.ndarray] = chunks) -> Iterable[Tensor]:
            return (normalize(rows_of(chunk), dim=1) for chunk in chunks)

        order[start:stop] = part[_bisect(vectors, [0, len(part)], [cut - start], part, seed, iterations)]
        large += [(cut, stop), (start, cut)]
    for start, stop in small:
        part = order[start:stop]
        rows = normalize(rows_of(part), dim=1)
        bounds = [0, len(part)]
        while True:
            cuts = [cut_position(a, b, align) if b - a > align else None for a, b in zip(bounds, bounds[1:])]
            if not any(cuts):
                break

            def all_rows(rows: Tensor = rows) -> Iterable[Tensor]:
                return (rows,)

            moved = _bisect(all_rows, bounds, cuts, part, seed, iterations)
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
    labels: np.ndarray,
    seed: int,
    iterations: int,
) -> np.ndarray:
    """Split every node bounds[i]..bounds[i+1] at cuts[i]: rows nearer to its first centre come before the cut.

    Args:
        chunks: each call yields the rows, float32 [n, d], in order and in pieces.
        cuts: None for a node that is not split.
        labels: int64 [n], the labels of the rows, so that random numbers do not depend on row positions.
    Returns: int64 [n], the old position of the row at each new position.
    """
    n, device = len(labels), next(iter(chunks())).device
    sizes = torch.tensor(np.diff(bounds))
    whole = torch.tensor([cut is None for cut in cuts]).to(device)
    left = torch.tensor([b if cut is None else cut for cut, b in zip(cuts, bounds[1:])]) - torch.tensor(bounds[:-1])
    halves = torch.stack([left, sizes - left], 1).flatten()  # number of rows in each half, node by node
    half_at = torch.repeat_interleave(torch.arange(2 * len(cuts)), halves).to(device)  # of each new position
    node = torch.repeat_interleave(torch.arange(len(cuts)), sizes).to(device)
    # Start with random halves.
    zero = torch.zeros((), dtype=torch.int64, device=device)
    score = uniform(make_key(seed, len(cuts), Stream.CLUSTER), torch.from_numpy(labels).to(device), zero)
    order = torch.arange(n, device=device)
    for done in range(iterations + 1):
        # Sort each node by descending score. Equal scores keep the order of a node that is not split.
        score = torch.where(whole[node], 0.0, score)
        by_score = torch.argsort(score, descending=True, stable=True)
        new = by_score[torch.argsort(node[by_score], stable=True)]
        unchanged, order = done > 0 and torch.equal(new, order), new
        if unchanged or done == iterations:
            break
        half = torch.empty_like(order)
        half[order] = half_at
        total: Tensor | None = None
        at = 0
        for rows in chunks():
            # Sum the rows of each half in a fixed order, so that the result is deterministic.
            part = half[at : at + len(rows)]
            sort = torch.argsort(part, stable=True)
            sums = segment_sums(rows[sort], torch.bincount(part, minlength=2 * len(cuts)).cpu().numpy())
            total = sums if total is None else total + sums
            at += len(rows)
        assert total is not None
        centre = normalize(total, dim=1)
        direction = centre[0::2] - centre[1::2]
        parts, at = [], 0
        for rows in chunks():
            part = node[at : at + len(rows)]
            parts.append((rows * direction[part]).sum(1))
            at += len(rows)
        score = torch.cat(parts)
    return order.cpu().numpy()
