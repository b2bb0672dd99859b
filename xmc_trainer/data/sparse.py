"""Read sparse label files beside texts, as Renee, DEXML and PECOS lay out the Extreme Classification Repository's data."""

from __future__ import annotations

import json
import os
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xmc_trainer.data.processes import spread
from xmc_trainer.data.sources import (
    Contents,
    Lines,
    Ragged,
    Row,
    Source,
    check_lines,
    count_empty,
    count_unlabelled,
    cut,
    filter_pairs_of,
    find_file,
    lines_with_labels,
    read_lines,
    texts_of,
)
from xmc_trainer.errors import UserError, reason, shown

_MOST = 1 << 31  # rows and labels
_FOLDERS = ("", "raw", "raw_data", "raw_text")
LABEL_FILES = {"train": ["Y.trn.npz", "trn_X_Y.txt"], "test": ["Y.tst.npz", "tst_X_Y.txt"]}
_TEXT_FILES = {
    "train": ["trn_X.txt", "X.trn.txt", "trn_X.trn.txt", "train.raw.txt", "train_raw_texts.txt"],
    "test": ["tst_X.txt", "X.tst.txt", "tst_X.tst.txt", "test.raw.txt", "test_raw_texts.txt"],
}
_LABEL_TEXTS = ["Y.txt", "lbl_X.txt", "label.raw.txt", "output-labels.txt", "output-items.txt"]
_FILTERS = ["filter_labels_test.txt", "tst_filter_labels.txt"]
_LAYOUT = "sparse layout: {Y.trn.npz,Y.tst.npz} or {trn,tst}_X_Y.txt, and one text a line in {trn,tst}_X.txt or X.{trn,tst}.txt"


def sparse_source(folder: Path, augment: bool = False, with_filter: bool = False) -> Source:
    """Find the sparse layout.

    Y.trn.npz is a scipy sparse matrix [texts, labels]. trn_X_Y.txt has a header with the numbers of texts and labels, then a
    line of `label:value` words for each text. Files of texts may lie in raw/ or raw_data/. A label is named by its column;
    line n of Y.txt or lbl_X.txt is the text of label n. All labels and all test texts are kept.

    Args:
        augment: add each label's text as a training row with that label.
        with_filter: read filter_labels_test.txt or tst_filter_labels.txt.
    """
    folders = [folder / name for name in _FOLDERS]
    folders = [each for each in folders[1:] if os.path.isdir(each)] + folders[:1]
    remedy = "set `folder`, or add the file"
    labels = {split: find_file(folders, names, _LAYOUT, remedy) for split, names in LABEL_FILES.items()}
    texts = {split: find_file(folders, names, _LAYOUT, remedy) for split, names in _TEXT_FILES.items()}
    found = (each / name for each in folders for name in _LABEL_TEXTS if os.path.isfile(each / name))
    table = next(found, None)
    if augment and table is None:
        raise UserError(
            f"{folder}: has no label texts, which `augment_label_data`=true needs; add Y.txt, or set `augment_label_data`=false"
        )
    filters = find_file(folders, _FILTERS, _LAYOUT, "or set `use_filter_eval`=false") if with_filter else None
    files = [*labels.values(), *texts.values(), *(each for each in (table, filters) if each)]

    def read() -> Contents:
        notes: dict[str, str] = {}
        matrices = {split: _matrix(path) for split, path in labels.items()}
        (train, columns), (test, test_columns) = matrices["train"], matrices["test"]
        if columns != test_columns:
            raise UserError(
                f"{labels['test']}: has {test_columns} labels, {labels['train']} has {columns}; give both the same columns"
            )
        for split, (rows, _) in matrices.items():
            check_lines(texts[split], labels[split], len(rows.offsets) - 1)
        names = [line.strip() for _, line in read_lines(table)] if table else [""] * columns
        if len(names) != columns:
            raise UserError(f"{table}: has {len(names)} lines, but there are {columns} labels; write one line for each")
        if table:
            notes["label texts"] = f"{table.name}: {sum(map(bool, names))} of {columns} labels have a text"

        def train_rows() -> Iterator[Row]:
            rows = count_empty(lines_with_labels(texts["train"], train), "training", notes)
            yield from count_unlabelled(rows, notes)
            if augment:
                yield from (Row(text, [label]) for label, text in enumerate(names) if text)

        return Contents(
            labels=[(str(number), text or str(number)) for number, text in enumerate(names)],
            train=train_rows,
            test=lambda: count_empty(lines_with_labels(texts["test"], test), "test", notes),
            filter_pairs=filter_pairs_of(filters, len(test.offsets) - 1, columns) if filters else None,
            augmented=sum(map(bool, names)) if augment else 0,
            notes=notes,
        )

    return Source(str(folder), files, "sparse", json.dumps([augment, with_filter]), read)


def _matrix(path: Path) -> tuple[Ragged, int]:
    """Return the labels of each row, ascending and distinct, and the number of labels."""
    return _from_npz(path) if path.suffix == ".npz" else _from_text(path)


def _from_npz(path: Path) -> tuple[Ragged, int]:
    from scipy.sparse import csr_matrix, load_npz  # slow, and most runs do not come here

    try:
        loaded = load_npz(path)
        loaded.data = loaded.data != 0  # the sum of values that repeat could be 0
        matrix = csr_matrix(loaded)
        matrix.check_format(full_check=True)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not a sparse matrix of scipy ({reason(error)}); write it with save_npz") from None
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return Ragged(matrix.indices.astype(np.int32), matrix.indptr.astype(np.int64)), matrix.shape[1]


class _Found(NamedTuple):
    ids: np.ndarray  # int32
    counts: np.ndarray  # int32, per line
    largest: int
    where: int  # line of the largest label


def _from_text(path: Path) -> tuple[Ragged, int]:
    header = next((line.split() for _, line in read_lines(path)), [])
    if len(header) != 2 or not all(word.isdecimal() and len(word) < 11 and int(word) < _MOST for word in header):
        raise UserError(
            f"{path}, line 1: must be the numbers of texts and of labels, not {shown(repr(' '.join(header)))}; add that line"
        )
    rows, columns = map(int, header)
    found = [part for part, _ in spread(_labels_in, ((part, None) for part in cut(path)))]
    largest, where = max(((part.largest, part.where) for part in found), default=(-1, 0))
    if largest >= columns:
        raise UserError(
            f"{path}, line {where}: label {largest} is out of range: line 1 says {columns} labels, numbered from 0; correct "
            "one of them"
        )
    counts = np.concatenate([part.counts for part in found])
    if len(counts) != rows:
        raise UserError(f"{path}: line 1 says {rows} texts, but {len(counts)} lines follow; copy the file again")
    return Ragged(np.concatenate([part.ids for part in found]), np.r_[0, np.cumsum(counts, dtype=np.int64)]), columns


def _labels_in(part: Lines) -> _Found:
    ids, counts = array("i"), array("i")
    largest, where = -1, 0
    header = part.first == 1
    for number, line in enumerate(texts_of(part)[header:], part.first + header):
        pairs = (word.partition(":") for word in line.split())
        try:
            row = sorted({int(label) for label, _, value in pairs if float(value)})
        except ValueError:
            raise UserError(f"{part.path}, line {number}: must hold label:value words, such as 12:1.0") from None
        if row and not 0 <= row[0] <= row[-1] < _MOST:
            raise UserError(
                f"{part.path}, line {number}: label {shown(row[0] if row[0] < 0 else row[-1])} is out of range; correct it"
            )
        ids.extend(row)
        counts.append(len(row))
        if row and row[-1] > largest:
            largest, where = row[-1], number
    return _Found(np.array(ids, np.int32), np.array(counts, np.int32), largest, where)
