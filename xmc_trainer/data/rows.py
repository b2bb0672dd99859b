"""Read rows with a text column and a label column: a file, a folder of files, a folder of `save_to_disk`, or a hub id.

Only these two columns are read. No code of a data set is run: the datasets library has no loading scripts since version
4, and this module reads only CSV, JSON, Parquet and Arrow.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from xmc_trainer.data import tables
from xmc_trainer.data.sources import (
    Contents,
    NamedRow,
    Ragged,
    Row,
    Source,
    Vocabulary,
    count_empty,
    count_unlabelled,
    json_lines,
    labelled,
)
from xmc_trainer.data.split import DEV, TEST, TRAIN, Split, divided
from xmc_trainer.data.texts import check_unicode
from xmc_trainer.errors import UserError, reason, shown

SEPARATOR = ";"  # default of `label_separator`
_ROWS_PER_READ = 2000
_EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", *tables.EXTENSIONS)
_CONVERT = f"convert it to one of {', '.join(_EXTENSIONS)}"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DIVISION = 2  # increase when `split.divided` divides the same texts in another way
_DEPTH = 3  # levels of folders searched, including the named one
_TEST_SHARE = 0.1  # of a single file's texts
# If more than this share of the rows that are strings has a comma, warn.
_COMMA_SHARE = 0.2

# pyarrow's exceptions for damaged files. ValueError and OverflowError: a value that no Python object can hold.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)

Record = dict[str, Any]


class _Split(NamedTuple):
    """One split of a source."""

    files: list[Path]
    records: Callable[[Sequence[str]], Iterator[tuple[str, Record]]]  # column names -> ("file, row n", their values)
    class_names: list[str] | None = None  # of the label column, if it holds class labels


def rows_source(
    name: str,
    train_split: str = "train",
    test_split: str = "test",
    text_column: str = "text",
    label_column: str = "labels",
    label_separator: str = SEPARATOR,
    *,
    test_share: float | None = None,
    dev_share: float | None = None,
    group_column: str | None = None,
    stratify: bool = False,
    split_file: Path | None = None,
) -> Source:
    """Open a file or a data set of rows.

    The label set is that of the training part. For class labels and multi-hot columns it is all classes.

    Args:
        name: a file, a folder with the files of `_find_files`, a folder of `save_to_disk`, or a hub id.
        test_split: the split to evaluate on; with `dev_share`, "dev" is the part held out.
        label_column: see `_LabelColumn` for the accepted values.
        label_separator: between the labels in a cell of a CSV or TSV file.
        test_share, dev_share: hold out these shares of the training split's texts, see `split.divided`. A `test_share` of
            None means 0.1 if `name` has only one split; otherwise `test_split` is read.
        group_column: rows with an equal value in it stay together; None: rows with an equal text.
        split_file: divide the training split as this file of `Split.save` does, instead of by shares.
    """
    if len({text_column, label_column, group_column}) < 3:
        one = "`label_column`" if text_column == label_column else "`group_column`"
        raise UserError(f"{one}: is also the name of another column; name the right one")
    columns = _Columns(text_column, label_column, label_separator, group_column)
    one_split = _is_one_split(name)
    if one_split and train_split != "train":
        raise UserError(f"`train_split`={train_split}: {name} is all in one split; remove it")
    whole = _open_split(name, "train_split", train_split, columns)
    if test_share is None and one_split:
        test_share = _TEST_SHARE
    evaluated = {"dev": DEV if dev_share else None, "test": TEST if test_share else None}.get(test_split)
    if evaluated is None and test_share is not None:
        raise UserError(f"`test_split`={test_split}: no texts are held out for it; set `dev_share`, or choose test")
    apart = None if evaluated is not None else _open_split(name, "test_split", test_split, columns)
    holds_out = test_share is not None or dev_share is not None
    if not holds_out and (group_column is not None or stratify):
        option = "group_column" if group_column is not None else "stratify"
        raise UserError(f"`{option}`: no texts are held out; set `test_share` or `dev_share`, or remove it")

    def read() -> Contents:
        notes: dict[str, str] = {}
        column = _LabelColumn(label_column, whole.class_names)
        seen = column.scan(whole)
        if not column.rows:
            remedy = "" if one_split else ", or set `train_split`"
            raise UserError(f"`source`={name}: {train_split} has no rows; write it again{remedy}")
        if apart and apart.class_names != whole.class_names:
            raise UserError(
                f"`source`={name}: the class labels of {label_column!r} in {test_split} differ from those in "
                f"{train_split}; give both splits the same"
            )
        if apart:
            train_rows = column.rows
            column.scan(apart)
            if column.rows == train_rows:
                raise UserError(f"`source`={name}: {test_split} has no rows; write it again, or set `test_split`")
        column.decide(f"`source`={name}", notes)
        split = None
        if holds_out:
            given = None if split_file is None else Split.load(split_file)
            split, seen = _hold_out(name, whole, test_share or 0.0, dev_share or 0.0, columns, column, stratify, given)
            notes["held out"] = _held_out_note(split, columns, stratify)
        vocabulary = Vocabulary.of(seen) if column.classes is None else Vocabulary(column.classes)
        if not vocabulary.names:
            raise UserError(f"`source`={name}: {train_split} has no labels in {label_column!r}; set `label_column`")

        def rows(of: _Split, part: int | None) -> Iterator[NamedRow]:
            records = of.records([text_column, label_column])
            if split is not None and part is not None:
                records = itertools.compress(records, split.parts == part)
            for where, record in records:
                yield where, _text(record, columns, where), column.names(record[label_column], where)

        def train() -> Iterator[Row]:
            found = rows(whole, TRAIN if split is not None else None)
            return count_unlabelled(count_empty(vocabulary.numbered(found), "training", notes), notes)

        return Contents(
            labels=[(label, label) for label in vocabulary.names],
            train=train,
            test=lambda: labelled(vocabulary.numbered(rows(apart or whole, evaluated)), len(vocabulary.names), notes),
            split=split,
            notes=notes,
        )

    # Without files, the name identifies the data set. Class names may be stored outside the files with the rows.
    files = [*whole.files, *(apart.files if apart else [])]
    is_table = any(map(tables.is_table, files))
    if label_separator != SEPARATOR and not is_table:
        raise UserError(
            f"`label_separator`={label_separator}: applies to .csv and .tsv files only; set it to {SEPARATOR}"
        )
    has_files = whole.files and (apart is None or apart.files)
    identity: list[Any] = [
        None if has_files else name,
        train_split,
        test_split,
        text_column,
        label_column,
        whole.class_names,
    ]
    # Appended only where they matter, so that caches and checkpoints of earlier versions are found.
    identity += [label_separator] * is_table + [test_share] * (test_share is not None)
    more = {"dev_share": dev_share, "group_column": group_column, "stratify": stratify or None}
    identity += [more] * any(value is not None for value in more.values())
    identity += [_DIVISION] * holds_out
    if (
        apart
        and len(files) > 2
        and [train_split in path.name for path in files] != [path in whole.files for path in files]
    ):
        identity.append(len(whole.files))  # the names of the files do not say which split they belong to
    if split_file is not None:
        files.append(split_file)
    return Source(name, files, "hf", json.dumps(identity), read)


def _hold_out(
    name: str,
    whole: _Split,
    test_share: float,
    dev_share: float,
    columns: _Columns,
    column: _LabelColumn,
    stratify: bool,
    given: Split | None,
) -> tuple[Split, set[str]]:
    """Divide a split. Returns the parts of its rows, and the label names of the training part.

    Args:
        given: repeat this division, unless it is of other texts.
    """
    keys, ids, counts, numbers = array("Q"), array("i"), array("i"), dict[str, int]()
    for where, record in whole.records(columns.read):
        value = _text(record, columns, where) if columns.group is None else _group(record, columns.group, where)
        keys.append(xxhash.xxh3_64_intdigest(value.encode(errors="surrogatepass")))
        row = {numbers.setdefault(label, len(numbers)) for label in column.names(record[columns.labels], where)}
        ids.extend(row)
        counts.append(len(row))
    names = sorted(numbers)  # by name, so that the order of the rows does not matter
    place = np.argsort([numbers[label] for label in names]).astype(np.int32)
    labels = Ragged(place[np.array(ids, np.int32)], np.r_[0, np.cumsum(np.array(counts, np.int64))])
    hashes = np.array(keys, np.uint64)
    if given is not None and np.isin(hashes, given.keys).any():
        split = given.repeated(hashes)
    else:
        split = divided(hashes, labels, len(numbers), test_share, dev_share, stratify)
    for part, share, called in ((TEST, test_share, "test"), (DEV, dev_share, "dev"), (TRAIN, 1.0, "training")):
        if share and not (split.parts == part).any():
            if part == TRAIN:
                raise UserError(
                    f"`source`={name}: no text is left to train on; add texts, or lower the shares held out"
                )
            raise UserError(
                f"`source`={name}: no text can be held out as {called} set, because each is needed for training; add texts, or "
                f"write a folder with a train and a {called} file"
            )
    trained = np.unique(labels.ids[np.repeat(split.parts == TRAIN, np.diff(labels.offsets))])
    return split, {names[label] for label in trained}


def _held_out_note(split: Split, columns: _Columns, stratify: bool) -> str:
    sizes = np.bincount(split.parts, minlength=3)
    held = [f"{sizes[part]:,} texts as {called} set" for part, called in ((TEST, "test"), (DEV, "dev")) if sizes[part]]
    how = f", whole groups of {columns.group!r}" if columns.group is not None else ""
    how += ", by iterative stratification" if stratify else ""
    return (
        f"held out of {len(split.parts):,} texts{how}: {' and '.join(held)}; to choose them yourself, write a folder with a file for "
        "each split"
    )


def _text(record: Record, columns: _Columns, where: str) -> str:
    text = record[columns.text]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: column {columns.text!r} must hold strings; set `text_column`")
    check_unicode(text or "", f"{where}: column {columns.text!r}")
    return text or ""


def _group(record: Record, column: str, where: str) -> str:
    group = record[column]
    if not isinstance(group, str | int) or group == "":
        found = "nothing" if group in (None, "") else type(group).__name__
        raise UserError(
            f"{where}: column {column!r} must hold a name or a whole number, not {found}; set `group_column`"
        )
    return str(group)


class _Columns(NamedTuple):
    text: str
    labels: str
    separator: str = SEPARATOR  # of labels in a cell of a table
    group: str | None = None

    @property
    def read(self) -> list[str]:
        return [name for name in (self.text, self.labels, self.group) if name is not None]

    def check(self, found: Iterable[str], where: str) -> None:
        """Raise UserError unless all columns are in `found`."""
        named = {"text_column": self.text, "label_column": self.labels, "group_column": self.group}
        if missing := {parameter: name for parameter, name in named.items() if name is not None and name not in found}:
            raise UserError(
                f"{where}: has no column {' and no column '.join(map(repr, missing.values()))}, only "
                f"{', '.join(found) or 'none'}; set {' and '.join(f'`{parameter}`' for parameter in missing)}"
            )


class _LabelColumn:
    """The format of a label column. `scan` collects facts over all rows, then `decide` picks one format for them all.

    A row holds a label, a list of labels, or null for no label. A label is a name (a string, or a whole number used as
    a name) or a class label. Lists of one length n that hold only 0 and 1 are multi-hot: the labels are the n classes,
    named by the class labels or 0 to n - 1. A list of labels never repeats a label, so n >= 3 is unambiguous. With n =
    1 a list holds the label 0 or 1. Two cases are ambiguous and refused: n = 2 if every list is [0, 1] or [1, 0], and
    lists of different lengths if one repeats a number.
    """

    def __init__(self, name: str, class_names: list[str] | None) -> None:
        self.name = name
        self.classes = class_names  # all labels, if the column itself defines them
        self._class_names = class_names
        self._multi_hot: list[str] | None = None  # the classes, if the column is multi-hot
        self._only_bits, self._repeats, self._lengths = True, False, set[int]()
        self.rows, self._strings, self._commas, self._example = 0, 0, 0, ""

    def scan(self, split: _Split) -> set[str]:
        """Read all rows of a split. Returns the label names, which are valid unless the column is multi-hot."""
        seen: set[str] = set()
        is_table = bool(split.files) and tables.is_table(split.files[0])
        for where, record in split.records([self.name]):
            value = record[self.name]
            entries = self._entries(value, where)
            self.rows += 1
            single = entries[0] if is_table and len(entries) == 1 else value
            if isinstance(single, str):
                self._strings += 1
                if any(mark in single for mark in ",;|"):
                    self._commas, self._example = self._commas + 1, self._example or single
            if value is not None and self._only_bits:
                self._only_bits = isinstance(value, list) and all(
                    type(entry) is int and 0 <= entry <= 1 for entry in entries
                )
                self._lengths.add(len(entries))
                self._repeats |= len(set(entries)) < len(entries)
            if self._class_names is None:
                seen.update(map(str, entries))
        return seen

    def decide(self, where: str, notes: dict[str, str]) -> None:
        """Choose the column's format, after all scans. Adds a note about commas. UserError if it is ambiguous."""
        column = f"column {self.name!r}"
        where = f"{where}: {column}"
        if self._only_bits and max(self._lengths, default=0) > 1:
            classes = None if self._class_names is None else len(self._class_names)
            if len(self._lengths) > 1:
                if self._repeats:
                    raise UserError(
                        f"{where} holds lists of 0 and 1 with different lengths; write one number per class in every "
                        "row (multi-hot), or lists of distinct labels"
                    )
            else:
                (length,) = self._lengths
                if self._repeats and classes in (None, length):
                    self._multi_hot = self.classes = self._class_names or [str(number) for number in range(length)]
                elif self._repeats:
                    raise UserError(
                        f"{where} holds lists of {length} numbers 0 or 1, but there are {classes} class labels; write "
                        "one number per class (multi-hot), or lists of distinct class labels"
                    )
                elif length == 2 and classes in (None, 2):
                    raise UserError(
                        f"{where} holds [0, 1] or [1, 0] in every row, which may be two labels or multi-hot; write "
                        "label names instead"
                    )
        if self._commas > _COMMA_SHARE * self._strings:
            notes["label commas"] = (
                f"{column}: {self._commas} of {self._strings} rows are one string with a comma, semicolon or bar, like "
                f"{shown(self._example)!r}; each is read as one label; write several labels as a list of strings, or set "
                "label_separator for a table"
            )

    def names(self, value: Any, where: str) -> list[str]:
        """Return the label names of a row."""
        entries = self._entries(value, where)
        if self._multi_hot is not None:
            return [name for name, bit in zip(self._multi_hot, entries) if bit]
        if self._class_names is None:
            return [str(entry) for entry in entries]
        return [self._class_names[entry] for entry in entries]

    def _entries(self, value: Any, where: str) -> list[Any]:
        """Return a row as a list of names or numbers. UserError for other values."""
        where = f"{where}: column {self.name!r}"
        entries = value if isinstance(value, list) else [] if value is None else [value]
        allowed = (int,) if self._class_names is not None else (int, str)
        for entry in entries:
            if type(entry) not in allowed:
                found = "null" if entry is None else type(entry).__name__
                remedy = "; for multi-hot, write the whole numbers 0 and 1" if found in ("bool", "float") else ""
                raise UserError(
                    f"{where} must hold a name, a whole number or a list of them, not {found}"
                    f"{' in a list' * (entries is value)}{remedy}; correct it, or set `label_column`"
                )
            if type(entry) is str:
                check_unicode(entry, where)
                if not entry.strip():
                    raise UserError(f"{where} holds an empty label name; remove it; for no label, write null or []")
            elif self._class_names is not None and not 0 <= entry < len(self._class_names):
                raise UserError(
                    f"{where}: label {shown(entry)} is out of range: there are {len(self._class_names)} class labels; "
                    "correct it"
                )
        return entries


# Finding and opening ------------------------------------------------------------------------------------------------


def _open_split(name: str, parameter: str, split: str, columns: _Columns) -> _Split:
    """Open a split. `parameter`: the parameter of `load_corpus` that names the split, for messages."""
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:  # ~ names an unknown user
        raise UserError(f"`source`={name}: {error}; name a folder or hub id") from None
    # Path's methods raise for names that are too long; os.path returns False.
    if os.path.isfile(folder):
        if not folder.name.endswith(_EXTENSIONS):
            raise UserError(f"`source`={name}: cannot be read; {_CONVERT}")
        return _open_files([folder], columns)
    if os.path.isfile(folder / "state.json"):
        return _open_saved(folder, split, columns)
    if not os.path.isdir(folder):
        if folder.name.endswith(_EXTENSIONS):
            raise UserError(f"`source`={name}: no such file; name an existing file or folder, or a hub id")
        if folder.is_absolute() or not _HUB_ID.fullmatch(name):
            raise UserError(f"`source`={name}: no such folder; name the folder of the data, or a hub id")
        return _open_dataset(
            lambda: _datasets().load_dataset(name, split=split),
            f"`source`={name}",
            split,
            columns,
            "name an existing folder or a hub id in `source`, correct the split names, or check the connection",
        )
    saved = folder / split
    try:
        is_saved = (saved / "state.json").is_file() and not any(map(os.path.exists, _unsplit_files(folder, split)))
        files = [] if is_saved else _find_files(folder, split)
    except OSError as error:
        raise UserError(
            f"`source`={name}: {error.filename}: {error.strerror}; check the split names and permissions"
        ) from None
    if is_saved:
        return _open_saved(saved, split, columns)
    if not files:
        raise UserError(f"`source`={name}: has no split {split!r}: {_why_missing(folder, parameter, split)}")
    return _open_files(files, columns)


def _is_one_split(name: str) -> bool:
    """Return whether a file, or a folder of `Dataset.save_to_disk`, is all of the data."""
    path = Path(name).expanduser()
    return os.path.isfile(path) or os.path.isfile(path / "state.json")


def _datasets() -> Any:
    import datasets  # takes a second, which mistakes in files need not wait for

    return datasets


def _open_saved(folder: Path, split: str, columns: _Columns) -> _Split:
    return _open_dataset(
        lambda: _datasets().load_from_disk(str(folder)),
        str(folder),
        split,
        columns,
        "save it again, with at least one row",
    )


def _open_files(files: list[Path], columns: _Columns) -> _Split:
    if files[0].suffix == ".parquet":
        return _open_parquet(files, columns)
    next(_rows_of_files(files, columns), None)  # refuses wrong columns now
    return _Split(files, lambda _: _rows_of_files(files, columns))


def _why_missing(folder: Path, parameter: str, split: str) -> str:
    """Say what a folder holds in place of a split, and what to do about it."""
    files = [path for depth in range(_DEPTH) for path in sorted(folder.glob("*/" * depth + "*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files]
    readable = [name for name in names if name.endswith((*_EXTENSIONS, ".arrow"))]
    if not names:
        return f"the folder has no files; write {split}.jsonl there, or name another folder"
    if readable:
        held_out = ", or set `test_share` to hold texts out" if parameter == "test_split" else ""
        return (
            f"the folder has no {split}.parquet, no {split}.jsonl, no folder {split} and no parts such as "
            f"{split}-00000-of-00002.parquet, only {', '.join(readable[:8])}{' ...' * (len(readable) > 8)}; set "
            f"`{parameter}`, rename the files, or name their folder{held_out}"
        )
    for path in files:
        if path.name.removesuffix(".gz") in ("train_labels.txt", "trn.json", "trn_X_Y.txt", "Y.trn.npz"):
            return f"the data are in {path.parent}; name that folder"
    return f"the folder has only files such as {names[0]}; {_CONVERT}"


def _unsplit_files(folder: Path, split: str) -> list[Path]:
    return [folder / f"{split}{extension}" for extension in _EXTENSIONS]


def _find_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split in row order, or [].

    First choice: a file such as <split>.parquet in the folder. Otherwise parts such as <split>-00000-of-00005.parquet, or
    files in a folder named <split> or <split>.parquet, on the first level of folders that has any. UserError if a level
    has several such sets, or if parts are missing.
    """
    name = re.escape(split)
    part = re.compile(rf"{name}[-_.](\d+)(?:-of-(\d+))?(?:-[0-9A-Za-z]+)?(\.parquet|\.jsonl|\.jsonl\.gz)")
    if whole := [path for path in _unsplit_files(folder, split) if path.is_file()]:
        others = [*whole[1:], *(path for path in sorted(folder.iterdir()) if part.fullmatch(path.name))]
        if others:
            raise _ambiguous(folder, split, [str(whole[0]), str(others[0])])
        return whole
    sets: dict[tuple[Path, str], list[tuple[int, str, Path, int | None]]] = {}
    level = [folder]
    for _ in range(_DEPTH):
        for parent in level:
            for path in sorted(parent.iterdir()):
                extension = next((extension for extension in _EXTENSIONS if path.name.endswith(extension)), None)
                if extension is None or path.name.startswith(".") or not path.is_file():
                    continue
                if found := part.fullmatch(path.name):
                    number, count = int(found[1]), int(found[2]) if found[2] else None
                elif path.name == f"{split}{extension}" or parent.name in (split, f"{split}{extension}"):
                    number, count = 0, None
                else:
                    continue
                sets.setdefault((parent, extension), []).append((number, path.name, path, count))
        if sets:
            break
        level = [
            path
            for parent in level
            for path in sorted(parent.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        ]
    if len(sets) > 1:
        raise _ambiguous(folder, split, [f"{parent}/*{extension}" for parent, extension in sorted(sets)])
    parts = sorted(next(iter(sets.values()), []), key=lambda part: part[:2])
    counts = {count for *_, count in parts}
    known = [count for count in counts if count is not None]
    if known and (len(counts) > 1 or [number for number, *_ in parts] != list(range(known[0]))):
        present = ", ".join(name for _, name, *_ in parts[:8])
        raise UserError(
            f"`source`={folder}: {split} is incomplete, it has {present}; fetch the missing parts, or remove "
            "those of another set"
        )
    return [path for _, _, path, _ in parts]


def _ambiguous(folder: Path, split: str, candidates: list[str]) -> UserError:
    return UserError(
        f"`source`={folder}: {split} may be {' or '.join(candidates)}; name the folder of one, or move the others away"
    )


def _rows_of_files(paths: list[Path], columns: _Columns) -> Iterator[tuple[str, Record]]:
    for path in paths:
        is_table = tables.is_table(path)
        rows = tables.table_records(path, columns.labels, columns.separator) if is_table else json_lines(path)
        for where, record in rows:
            columns.check(record, where)
            yield where, record


def _open_parquet(paths: list[Path], columns: _Columns) -> _Split:
    def records(wanted: Sequence[str]) -> Iterator[tuple[str, Record]]:
        for path in paths:
            number = 0
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for batch in file.iter_batches(_ROWS_PER_READ, columns=list(wanted)):
                        batch.validate(full=True)
                        for record in batch.to_pylist():
                            number += 1
                            yield f"{path}, row {number}", record
            except _UNREADABLE as error:
                raise UserError(
                    f"{path}, after row {number}: cannot be read ({reason(error)}); write it again"
                ) from None

    class_names = []
    for path in paths:
        try:
            schema = pq.read_schema(path)
            names = schema.names
        except _UNREADABLE as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}); write it again") from None
        columns.check(names, str(path))
        if repeated := [name for name in columns.read if names.count(name) > 1]:
            raise UserError(f"{path}: two columns are named {repeated[0]!r}; rename one")
        # Only for the label column: the datasets library may not know the types of other columns.
        class_names.append(_class_names_in(schema, columns.labels))
        if class_names[0] != class_names[-1]:
            raise UserError(
                f"{path}: the class labels of {columns.labels!r} differ from those in {paths[0].name}; write the same in "
                "all files"
            )
    return _Split(paths, records, class_names[0])


def _class_names_in(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the class names that the datasets library stored in a file's schema for a column, else None."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except Exception:  # absent, or written by an incompatible version: use the column's Arrow type
        return None


def _open_dataset(load: Callable[[], Any], where: str, split: str, columns: _Columns, remedy: str) -> _Split:
    """Open a split with the `datasets` library, from the hub or from disk. `remedy`: ends the message if that fails."""
    try:
        dataset = load()
        columns.check(dataset.column_names, f"{where}, split {split}")
        dataset = dataset.with_format(None).select_columns(columns.read)
        dataset.data.table.validate(full=True)  # a damaged memory-mapped file could crash the process
    except UserError:
        raise
    except Exception as error:  # the hub client, its transport and the file formats have no common base exception
        raise UserError(
            f"{where}: the datasets library cannot load split {split!r} ({reason(error)}); {remedy}"
        ) from error

    def records(wanted: Sequence[str]) -> Iterator[tuple[str, Record]]:
        number = 0
        try:
            for number, record in enumerate(dataset.select_columns(list(wanted)), start=1):
                yield f"{where}, split {split}, row {number}", record
        except _UNREADABLE as error:
            raise UserError(
                f"{where}, split {split}, after row {number}: cannot be read ({reason(error)}); write it again"
            ) from None

    files = sorted(Path(file["filename"]) for file in dataset.cache_files)
    feature = dataset.features[columns.labels]
    feature = getattr(feature, "feature", feature)  # of a list
    class_names = feature.names if isinstance(feature, _datasets().ClassLabel) else None
    return _Split(files, records, class_names)
