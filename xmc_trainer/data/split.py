"""Divide texts into training, test and dev part."""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xmc_trainer.data.sources import Ragged
from xmc_trainer.errors import UserError, reason

TRAIN, TEST, DEV = range(3)


class Split(NamedTuple):
    """Which rows of a source belong to which part.

    Rows with equal keys are in the same part. A key is the hash of a row's text, or of its value in `group_column`.
    """

    keys: np.ndarray  # uint64 [rows]
    parts: np.ndarray  # int8 [rows]: TRAIN, TEST or DEV
    made_for: str = ""  # fingerprint of the source

    def save(self, path: Path) -> None:
        np.savez(path, keys=self.keys, parts=self.parts, made_for=self.made_for)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Raises UserError for anything but a file of `save`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                split = cls(file["keys"], file["parts"], str(file["made_for"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}); restore it, or remove it") from None
        return split

    def repeated(self, keys: np.ndarray) -> Split:
        """Divide other rows, uint64 [rows], in the same way. Keys that this split does not know go to training."""
        known, first = np.unique(self.keys, return_index=True)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return Split(keys, np.where(known[at] == keys, self.parts[first[at]], np.int8(TRAIN)))


def divided(
    keys: np.ndarray, labels: Ragged, num_labels: int, test_share: float, dev_share: float, stratify: bool
) -> Split:
    """Divide rows by their keys, so that the order of the rows does not matter.

    Each part gets its share of the distinct keys: those with the smallest hashes, or with `stratify` those that
    `stratified` chooses. Rows whose key has the last text of a label stay in training.

    Args:
        keys: uint64 [rows].
        labels: labels of each row, numbers below `num_labels`.
    """
    units, unit_of = np.unique(keys, return_inverse=True)
    if stratify:
        part_of = stratified(_labels_of_units(unit_of, labels), num_labels, test_share, dev_share)
    else:
        part_of = np.full(len(units), TRAIN, np.int8)
        test = math.ceil(test_share * len(units))
        part_of[:test] = TEST
        part_of[test : test + math.ceil(dev_share * len(units))] = DEV
    _keep_labels(part_of, unit_of, labels, num_labels)
    return Split(keys, part_of[unit_of])


def _labels_of_units(unit_of: np.ndarray, labels: Ragged) -> Ragged:
    """Return the distinct labels of each unit, which may have several rows."""
    order = np.argsort(unit_of, kind="stable")
    by_unit = labels.rows(order)
    starts = np.flatnonzero(np.r_[True, np.diff(unit_of[order]) > 0])
    found = Ragged(by_unit.ids, by_unit.offsets[np.r_[starts, len(order)]])
    if len(starts) == len(order):  # one row each
        return found
    rows = [np.unique(found.ids[a:b]) for a, b in zip(found.offsets, found.offsets[1:])]
    return Ragged(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def _keep_labels(part_of: np.ndarray, unit_of: np.ndarray, labels: Ragged, num_labels: int) -> None:
    """Move units to training, in place, until each label has a training text."""
    row_of = np.repeat(np.arange(len(unit_of), dtype=np.int32), np.diff(labels.offsets))
    texts = np.bincount(labels.ids[part_of[unit_of[row_of]] == TRAIN], minlength=num_labels)
    by_unit = np.argsort(unit_of, kind="stable")
    first = np.searchsorted(unit_of[by_unit], np.arange(len(part_of) + 1))
    for unit in np.unique(unit_of[row_of[texts[labels.ids] == 0]]):
        found = labels.rows(by_unit[first[unit] : first[unit + 1]]).ids
        if (texts[found] == 0).any():
            part_of[unit] = TRAIN
            np.add.at(texts, found, 1)


def stratified(labels: Ragged, num_labels: int, test_share: float, dev_share: float) -> np.ndarray:
    """Divide texts by iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011). Returns parts, int8 [texts].

    The label with the fewest texts left comes first. Each of its texts goes to the part that lacks the most texts of this
    label, among equal ones to the part that lacks the most texts.

    Args:
        labels: distinct labels of each text.
    """
    from scipy.sparse import csr_matrix  # slow, and most runs do not come here

    texts, shares = len(labels.offsets) - 1, np.array([1 - test_share - dev_share, test_share, dev_share])
    parts = np.flatnonzero(shares).tolist()
    by_label = csr_matrix((np.ones(len(labels.ids), bool), labels.ids, labels.offsets), (texts, num_labels)).tocsc()
    left = np.diff(by_label.indptr).astype(np.int64)
    lacking = left[:, None] * shares  # of each label in each part
    lacking_texts = (texts * shares).tolist()
    part_of = np.full(texts, -1, np.int8)
    heap = [(count, label) for label, count in enumerate(left.tolist()) if count]
    heapq.heapify(heap)
    while heap:
        count, label = heapq.heappop(heap)
        if count != left[label]:
            continue  # its present count is in the heap, too
        own = by_label.indices[by_label.indptr[label] : by_label.indptr[label + 1]]
        own = own[part_of[own] < 0]
        lacks, chosen = lacking[label].tolist(), []
        for _ in own:
            part = max(parts, key=lambda part: (lacks[part], lacking_texts[part]))
            lacks[part] -= 1
            lacking_texts[part] -= 1
            chosen.append(part)
        part_of[own] = chosen
        found = labels.rows(own)
        np.subtract.at(lacking, (found.ids, np.repeat(chosen, np.diff(found.offsets))), 1)
        changed, counts = np.unique(found.ids, return_counts=True)
        left[changed] -= counts
        for other in changed[left[changed] > 0].tolist():
            heapq.heappush(heap, (int(left[other]), other))
    for text in np.flatnonzero(part_of < 0).tolist():  # without labels
        part_of[text] = part = max(parts, key=lacking_texts.__getitem__)
        lacking_texts[part] -= 1
    return part_of
