"""Hugging Face datasets as a source: files as the hub stores them, data sets of `save_to_disk`, or hub ids.

Only the two columns of texts and labels are read. Nothing that comes with a data set is run: the datasets library has no
loading scripts since version 4, and what is read here is JSON, Parquet and Arrow.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_trainer.data.sources import Contents, NamedRow, Source, Vocabulary, json_lines
from xmc_trainer.data.texts import check_unicode
from xmc_trainer.errors import UserError, reason, shown

_ROWS_A_READ = 2000
_KINDS = (".parquet", ".jsonl", ".jsonl.gz")
_DEPTH = 3  # folders that files may lie below the one that is named
# With a comma in more than this share of the rows that are strings, they seem to be lists.
_ODD_SHARE = 0.2

# What pyarrow raises for damaged files; ValueError and OverflowError: for a value that Python has no object for.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)

Record = dict[str, Any]


class _Split(NamedTuple):
    """One split of a source."""

    files: list[Path]
    records: Callable[[list[str]], Iterator[tuple[str, Record]]]  # columns -> ("file, row n", those columns' values)
    class_names: list[str] | None = None  # of a column of class labels


def hf_source(name: str, train_split: str, test_split: str, text_column: str, label_column: str) -> Source:
    """A Hugging Face datasets source.

    The labels are those seen in training, unless the column is of class labels, or multi-hot: then all classes.

    Args:
        name: a folder with files of `_find_files`; a folder of `save_to_disk`; or a hub id.
        label_column: what `_Column` understands.
    """
    if text_column == label_column:
        raise UserError(f"data.label_column={label_column}: is data.text_column, too; name the column of the labels")
    columns = [text_column, label_column]
    train, test = (_open_split(name, split, columns) for split in (train_split, test_split))

    def read() -> Contents:
        notes: dict[str, str] = {}
        column = _Column(label_column, train.class_names)
        seen = column.scan(train)
        if test.class_names != train.class_names:
            raise UserError(
                f"data.hf_source={name}: the class labels of {label_column!r} in {test_split} are not those in "
                f"{train_split}; give both splits the same"
            )
        column.scan(test)
        column.settle(f"data.hf_source={name}", notes)
        vocabulary = Vocabulary.of(seen) if column.classes is None else Vocabulary(column.classes)
        if not vocabulary.names:
            raise UserError(
                f"data.hf_source={name}: {train_split} has no labels in {label_column!r}; set data.label_column"
            )

        def rows(split: _Split) -> Iterator[NamedRow]:
            for where, record in split.records(columns):
                text = record[text_column]
                if not isinstance(text, str | None):
                    raise UserError(f"{where}: column {text_column!r} must hold strings; set data.text_column")
                check_unicode(text or "", f"{where}: column {text_column!r}")
                yield where, text or "", column.names(record[label_column], where)

        return Contents(
            labels=[(label, label) for label in vocabulary.names],
            train=lambda: vocabulary.train_rows(rows(train), notes),
            test=lambda: vocabulary.test_rows(rows(test), notes),
            notes=notes,
        )

    # The name identifies what has no files of its own; names of classes may stand in other files than the rows.
    own_files = train.files and test.files
    identity = json.dumps([None if own_files else name, train_split, test_split, *columns, train.class_names])
    return Source([*train.files, *test.files], identity, read)


class _Column:
    """How a column holds labels: one rule for all rows, found by a pass over them.

    A row holds a label or a list of labels; null is no label. A label is a name (a string; a whole number used as a name)
    or a class label. Lists of equal length n with only the whole numbers 0 and 1 in them are multi-hot: labels are the n
    classes, by the names of the class labels, or 0 to n - 1. Lists of labels do not repeat a label, so n >= 3 leaves no
    doubt. With n = 1 a list holds the label 0 or 1. With n = 2 there is doubt if every list is [0, 1] or [1, 0], and lists
    of different lengths are in doubt if one repeats a number: both are refused.
    """

    def __init__(self, name: str, class_names: list[str] | None) -> None:
        self.name = name
        self.classes = class_names  # all labels, where the column itself says what there is
        self._class_names = class_names
        self._multi_hot = False
        self._only_bits, self._repeats, self._lengths = True, False, set[int]()
        self._strings, self._commas, self._example = 0, 0, ""

    def scan(self, split: _Split) -> set[str]:
        """Look at all rows of a split. Returns the names in it, if it is not multi-hot."""
        seen: set[str] = set()
        for where, record in split.records([self.name]):
            value = record[self.name]
            entries = self._entries(value, where)
            if isinstance(value, str):
                self._strings += 1
                if "," in value or ";" in value:
                    self._commas, self._example = self._commas + 1, self._example or value
            if value is not None and self._only_bits:
                self._only_bits = isinstance(value, list) and all(
                    type(entry) is int and 0 <= entry <= 1 for entry in entries
                )
                self._lengths.add(len(entries))
                self._repeats |= len(set(entries)) < len(entries)
            if self._class_names is None:
                seen.update(map(str, entries))
        return seen

    def settle(self, where: str, notes: dict[str, str]) -> None:
        """Decide what the column is, after all scans."""
        column = f"column {self.name!r}"
        where = f"{where}: {column}"
        if self._only_bits and max(self._lengths, default=0) > 1:
            classes = None if self._class_names is None else len(self._class_names)
            if len(self._lengths) > 1:
                if self._repeats:
                    raise UserError(
                        f"{where} holds lists of 0 and 1 of different lengths; write one number for each class in every row "
                        "(multi-hot), or lists of labels without repeats"
                    )
            else:
                (length,) = self._lengths
                if self._repeats and classes in (None, length):
                    self._multi_hot = True
                    self.classes = self._class_names or [str(number) for number in range(length)]
                elif self._repeats:
                    raise UserError(
                        f"{where} holds lists of {length} times 0 or 1, and there are {classes} class labels; write one "
                        "number for each class (multi-hot), or lists of class labels without repeats"
                    )
                elif length == 2 and classes in (None, 2):
                    raise UserError(
                        f"{where} holds [0, 1] or [1, 0] in every row, which may be a list of two labels or multi-hot; "
                        "write the labels' names"
                    )
        if self._commas > _ODD_SHARE * self._strings:
            notes["label commas"] = (
                f"{column}: {self._commas} of {self._strings} rows are one string with a comma or semicolon, like "
                f"{shown(self._example)!r}, which is read as one label; if it is several, write a list of strings"
            )

    def names(self, value: Any, where: str) -> list[str]:
        """The label names of a row."""
        entries = self._entries(value, where)
        if self._multi_hot:
            return [name for name, bit in zip(self.classes, entries) if bit]
        if self._class_names is None:
            return [str(entry) for entry in entries]
        return [self._class_names[entry] for entry in entries]

    def _entries(self, value: Any, where: str) -> list[Any]:
        """A row as a list of names or numbers. UserError for anything else."""
        where = f"{where}: column {self.name!r}"
        entries = value if isinstance(value, list) else [] if value is None else [value]
        kinds = (int,) if self._class_names is not None else (int, str)
        for entry in entries:
            if type(entry) not in kinds:
                kind = "null" if entry is None else type(entry).__name__
                remedy = "; write the whole numbers 0 and 1 for multi-hot" if kind in ("bool", "float") else ""
                raise UserError(
                    f"{where} must hold names or whole numbers, one or a list of them, not {kind}{' in a list' * (entries is value)}"
                    f"{remedy}; correct it, or set data.label_column"
                )
            if type(entry) is str:
                check_unicode(entry, where)
                if not entry.strip():
                    raise UserError(f"{where} holds an empty label name; remove it, or write null or [] for no label")
            elif self._class_names is not None and not 0 <= entry < len(self._class_names):
                raise UserError(
                    f"{where}: label {shown(entry)} is out of range: there are {len(self._class_names)} class labels; correct it"
                )
        return entries


# Finding and opening ------------------------------------------------------------------------------------------------


def _open_split(name: str, split: str, columns: list[str]) -> _Split:
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:  # ~ of a user that there is not
        raise UserError(f"data.hf_source={name}: {error}; name a folder or hub id") from None
    # os.path: Path's methods raise for names that are too long.
    if os.path.isfile(folder):
        raise UserError(f"data.hf_source={name}: a file; name its folder, with {split}.parquet or {split}.jsonl in it")
    if not os.path.isdir(folder):
        return _open_dataset(lambda: datasets.load_dataset(name, split=split), f"data.hf_source={name}", split, columns)
    saved = folder / split
    try:
        is_saved = (saved / "state.json").is_file() and not any(map(os.path.exists, _exact(folder, split)))
        files = [] if is_saved else _find_files(folder, split)
    except OSError as error:
        raise UserError(
            f"data.hf_source={name}: {error.filename}: {error.strerror}; check the split names and permissions"
        ) from None
    if is_saved:
        return _open_dataset(lambda: datasets.load_from_disk(str(saved)), str(saved), split, columns)
    if not files:
        raise UserError(
            f"data.hf_source={name}: the folder has no {split}.parquet, {split}.jsonl or folder {split} of save_to_disk, nor "
            f"parts of them such as {split}-00000-of-00002.parquet; set data.hf_train_split and data.hf_test_split"
        )
    if files[0].suffix == ".parquet":
        return _open_parquet(files, columns)
    return _Split(files, lambda wanted: _json_records(files, wanted))


def _exact(folder: Path, split: str) -> list[Path]:
    return [folder / f"{split}{kind}" for kind in _KINDS]


def _find_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the order of their rows; none if there are none.

    <split>.parquet, <split>.jsonl or <split>.jsonl.gz in the folder; else the one set of parts, <split>-00000-of-00005.parquet
    or similar, or files in a folder named <split> (or <split>.parquet), in the folder or the nearest below it.
    """
    for path in _exact(folder, split):
        if path.is_file():
            return [path]
    name = re.escape(split)
    part = re.compile(rf"{name}[-_.](\d+)(?:-of-(\d+))?(?:-[0-9A-Za-z]+)?(\.parquet|\.jsonl|\.jsonl\.gz)")
    sets: dict[tuple[Path, str], list[tuple[int, str, Path, int | None]]] = {}
    level = [folder]
    for _ in range(_DEPTH):
        for parent in level:
            for path in sorted(parent.iterdir()):
                kind = next((kind for kind in _KINDS if path.name.endswith(kind)), None)
                if kind is None or path.name.startswith(".") or not path.is_file():
                    continue
                if found := part.fullmatch(path.name):
                    number, of = int(found[1]), found[2] and int(found[2])
                elif path.name == f"{split}{kind}" or parent.name in (split, f"{split}{kind}"):
                    number, of = 0, None
                else:
                    continue
                sets.setdefault((parent, kind), []).append((number, path.name, path, of))
        if sets:
            break
        level = [
            path
            for parent in level
            for path in sorted(parent.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        ]
    if len(sets) > 1:
        found_in = " and ".join(f"{parent}/*{kind}" for parent, kind in sorted(sets))
        raise UserError(
            f"data.hf_source={folder}: {split} may be {found_in}; name the folder of one, or move the others away"
        )
    parts = sorted(next(iter(sets.values()), []), key=lambda part: part[:2])
    wholes = {of for *_, of in parts}
    if wholes - {None} and (len(wholes) > 1 or [number for number, *_ in parts] != list(range(max(wholes)))):
        have = ", ".join(name for _, name, *_ in parts[:8])
        raise UserError(
            f"data.hf_source={folder}: {split} is not whole, it has {have}; fetch the missing parts, or remove those of another set"
        )
    return [path for _, _, path, _ in parts]


def _check_columns(found: Iterable[str], columns: list[str], where: str) -> None:
    for column in columns:
        if column not in found:
            names = ", ".join(found)
            raise UserError(
                f"{where}: has no column {column!r}, only {names}; set data.text_column and data.label_column"
            )


def _class_names(feature: Any) -> list[str] | None:
    """The names of a column of class labels, or of lists of them."""
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _json_records(paths: list[Path], columns: list[str]) -> Iterator[tuple[str, Record]]:
    for path in paths:
        for where, record in json_lines(path):
            _check_columns(record, columns, where)
            yield where, record


def _open_parquet(paths: list[Path], columns: list[str]) -> _Split:
    def records(wanted: list[str]) -> Iterator[tuple[str, Record]]:
        for path in paths:
            number = 0
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for batch in file.iter_batches(_ROWS_A_READ, columns=wanted):
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
        _check_columns(names, columns, str(path))
        # Of the label column alone: other columns may be of types that the datasets library does not know.
        class_names.append(_class_names_in(schema, columns[1]))
        if class_names[0] != class_names[-1]:
            raise UserError(
                f"{path}: its class labels of {columns[1]!r} are not those of {paths[0].name}; write them all alike"
            )
    return _Split(paths, records, class_names[0])


def _class_names_in(schema: pa.Schema, column: str) -> list[str] | None:
    """What the datasets library wrote about a column into a file's schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return _class_names(datasets.Features.from_dict({column: features[column]})[column])
    except Exception:  # there is nothing of the kind, or it is of another version: then the column is what Arrow says
        return None


def _open_dataset(load: Callable[[], Any], where: str, split: str, columns: list[str]) -> _Split:
    """A split that the `datasets` library opens: from the hub, or saved to disk."""
    try:
        dataset = load()
        _check_columns(dataset.column_names, columns, f"{where}, split {split}")
        dataset = dataset.with_format(None).select_columns(columns)
        dataset.data.table.validate(full=True)  # a damaged file that is memory-mapped could crash the process
    except UserError:
        raise
    except Exception as error:  # the hub's client, its transport and the file formats each raise errors of their own
        raise UserError(
            f"{where}: tried as a folder, and split {split!r} with the datasets library: {reason(error)}; correct "
            "data.hf_source and the split names, or see to the connection"
        ) from error

    def records(wanted: list[str]) -> Iterator[tuple[str, Record]]:
        number = 0
        try:
            for number, record in enumerate(dataset.select_columns(wanted), start=1):
                yield f"{where}, split {split}, row {number}", record
        except _UNREADABLE as error:
            raise UserError(
                f"{where}, split {split}, after row {number}: cannot be read ({reason(error)}); write it again"
            ) from None

    files = sorted(Path(file["filename"]) for file in dataset.cache_files)
    return _Split(files, records, _class_names(dataset.features[columns[1]]))
