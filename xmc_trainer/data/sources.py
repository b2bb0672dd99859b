"""Read texts and labels from the two layouts of the Extreme Classification Repository.

A source streams rows; it never holds a whole corpus. Every defect of a file raises a UserError that names the file, the
line and the remedy. Rows with an empty text are kept. `hugging_face` reads Hugging Face data sets.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xmc_trainer.data.texts import check_unicode, decoded_lines, json_object, without_marks
from xmc_trainer.errors import UserError, shown

# If more than this share of the labels looks comma-separated, warn.
_COMMA_SHARE = 0.01
_MAX_DIGITS = 40  # of a row or label number; int() raises for thousands of digits


class Row(NamedTuple):
    """One instance."""

    text: str
    labels: list[int]  # ascending, distinct


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: `ids` int32 [nnz] and `offsets` int64 [rows + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def rows(self, indices: np.ndarray) -> Ragged:
        """Select rows by number, int [n], in the given order."""
        counts = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], counts)
        return Ragged(self.ids[positions], offsets)


@dataclass(frozen=True)
class Contents:
    """The content of a source. Each call of `train` or `test` starts a new pass."""

    labels: list[tuple[str, str]]  # (id, text) in label order
    train: Callable[[], Iterator[Row]]
    test: Callable[[], Iterator[Row]]
    filter_pairs: Ragged | None = None  # labels to exclude from the ranking of each test row
    augmented: int = 0  # training rows made from label texts; they come last
    # Warnings for the user: subject -> one line. Complete after a pass over train and test. They name files without
    # their folders, because the cache may later serve the same content for another folder.
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A data set whose files were found but not read."""

    files: list[Path]  # their content and `identity` together identify the data set
    identity: str  # the options for reading them
    read: Callable[[], Contents]  # raises UserError; so does a pass over train or test


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a UTF-8 file with `decoded_lines`. A name that ends in .gz means gzip."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, text in decoded_lines(file, str(path)):
                yield number, text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}, after line {number}: damaged or truncated gzip file ({error}); copy it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, line n", object) for each line."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        yield where, json_object(line, where)


def _find_file(folders: list[Path], names: list[str], layout: str, remedy: str) -> Path:
    """Return the first existing file, trying all `names` in one folder after the other. UserError if there is none."""
    # Path's methods raise for a name that is too long for the file system; os.path returns False.
    if not os.path.isdir(folders[-1]):
        raise UserError(f"{folders[-1]}: no such folder; set `folder`")
    for folder in folders:
        for name in names:
            if os.path.isfile(folder / name):
                return folder / name
    looked = " and in ".join(str(folder) for folder in folders)
    raise UserError(f"{' or '.join(names)} is missing, looked for in {looked}; {layout}; {remedy}")


class Vocabulary:
    """A list of label names; a label's number is its position."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._number = {name: number for number, name in enumerate(names)}

    @classmethod
    def of(cls, names: set[str]) -> Vocabulary:
        """Sort the names: by value if all are whole numbers, else alphabetically."""
        numeric = all(name.isascii() and name.isdigit() for name in names)
        return cls(sorted(names, key=_numerical if numeric else None))

    def known(self, names: Iterable[str]) -> list[int]:
        """Return the numbers of the known names, ascending and distinct. Unknown names are ignored."""
        return sorted({self._number[name] for name in names if name in self._number})

    def train_rows(self, rows: Iterable[NamedRow], notes: dict[str, str]) -> Iterator[Row]:
        """Yield all rows with label numbers. Adds notes about empty texts and texts without labels."""
        return count_unlabelled(
            (Row(text, self.known(names)) for text, names in count_empty(rows, "training", notes)), notes
        )

    def test_rows(self, rows: Iterable[NamedRow], notes: dict[str, str]) -> Iterator[Row]:
        """Yield rows without the labels that training does not have, and without texts left with no label."""
        unseen = dropped = 0
        for text, names in count_empty(rows, "test", notes):
            labels = self.known(names)
            unseen += len(set(names)) - len(labels)
            if labels:
                yield Row(text, labels)
            else:
                dropped += 1
        if unseen or dropped:
            notes["test labels"] = (
                f"test set: dropped {unseen} labels never seen in training and {dropped} texts without one"
            )


def _numerical(name: str) -> tuple[int, str, str]:
    """Sort key: the value of a whole number of any length. int() raises for thousands of digits."""
    digits = name.lstrip("0")
    return len(digits), digits, name


# ("file, line n", text, labels). Labels are names, or numbers in the label-feature layout.
NamedRow = tuple[str, str, list[Any]]


def count_empty(rows: Iterable[NamedRow], split: str, notes: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (text, labels) of each row. Adds a note about empty texts."""
    empty, first = 0, ""
    for where, text, labels in rows:
        if not without_marks(text).strip():
            empty, first = empty + 1, first or os.path.basename(where)
        yield text, labels
    if empty:
        notes[f"{split} texts"] = f"{split} set: {empty} texts are empty, the first at {first!r}; they are kept"


def count_unlabelled(rows: Iterable[Row], notes: dict[str, str]) -> Iterator[Row]:
    """Yield the training rows. Adds a note about rows without labels: each is a negative example for every label."""
    empty = 0
    for row in rows:
        empty += not row.labels
        yield row
    if empty:
        notes["training labels"] = f"training set: {empty} texts have no label"


# Raw text -------------------------------------------------------------------------------------------------------------

_RAW_LAYOUT = "raw layout: {train,test}_raw_texts.txt or {train,test}_texts.txt, and {train,test}_labels.txt"
_WRONG_FOLDER = "set `folder` or `layout`"


def raw_source(
    folder: Path, label_text_file: str | None = None, augment: bool = False, test_split: str = "test"
) -> Source:
    """Find the raw layout: `train_raw_texts.txt` (or `train_texts.txt`), `train_labels.txt`, and those of `test_split`.

    Each line of a text file is a text and may be empty. The same line of the label file holds its label names,
    separated by spaces or tabs; any other character is part of a name. The label set is that of the training set.

    Args:
        label_text_file: lines of name, tab, text. A label without a text gets its name as text.
        augment: add each label's text as a training row with that label.
    """
    texts, labels = {}, {}
    for split in ("train", test_split):
        remedy = _WRONG_FOLDER if split in ("train", "test") else f"the split is `test_split`={split}"
        texts[split] = _find_file([folder], [f"{split}_raw_texts.txt", f"{split}_texts.txt"], _RAW_LAYOUT, remedy)
        labels[split] = _find_file([folder], [f"{split}_labels.txt"], _RAW_LAYOUT, remedy)
    files, table_file = [*texts.values(), *labels.values()], None
    if label_text_file is not None:
        table_file = _find_file(
            [folder], [label_text_file], "one label<TAB>text per line", "correct or remove `label_text_file`"
        )
        files.append(table_file)

    def rows(split: str) -> Iterator[NamedRow]:
        for (number, text), (_, line) in zip(read_lines(texts[split]), read_lines(labels[split])):
            yield f"{texts[split]}, line {number}", text, _label_names(line)

    def read() -> Contents:
        notes: dict[str, str] = {}
        names = {split: _names_and_line_count(texts[split], labels[split], notes) for split in ("train", test_split)}
        vocabulary = Vocabulary.of(names["train"])
        table = _label_texts(table_file, vocabulary.names, labels["train"], notes) if table_file else {}
        label_rows = (
            [(number, table[name]) for number, name in enumerate(vocabulary.names) if table.get(name)]
            if augment
            else []
        )

        def train() -> Iterator[Row]:
            yield from vocabulary.train_rows(rows("train"), notes)
            yield from (Row(text, [number]) for number, text in label_rows)

        return Contents(
            labels=[(name, table.get(name) or name) for name in vocabulary.names],
            train=train,
            test=lambda: vocabulary.test_rows(rows(test_split), notes),
            augmented=len(label_rows),
            notes=notes,
        )

    return Source(files, json.dumps([augment, test_split]), read)


def _label_names(line: str) -> list[str]:
    # Without an argument, str.split would also split names at no-break and ideographic spaces.
    return [name for name in line.replace("\t", " ").split(" ") if name]


def _names_and_line_count(texts: Path, labels: Path, notes: dict[str, str]) -> set[str]:
    """Return the names in a label file. UserError if it does not have one line for each text, or has no name."""
    names: set[str] = set()
    label_lines = total = with_comma = 0
    example = ""
    for _, line in read_lines(labels):
        found = _label_names(line)
        names.update(found)
        label_lines, total = label_lines + 1, total + len(found)
        for name in found:
            # A comma inside a name is normal, but a line with a single name may be a comma-separated list.
            if name[-1] in ",;" or (len(found) == 1 and ("," in name or ";" in name)):
                with_comma, example = with_comma + 1, example or name
    text_lines = sum(1 for _ in read_lines(texts))
    if text_lines != label_lines:
        raise UserError(
            f"{texts} has {text_lines} lines, {labels} has {label_lines}; write one line of labels for each text"
        )
    if not names:
        raise UserError(f"{labels}: has no labels; write each text's label names on its line")
    if with_comma > _COMMA_SHARE * total:
        notes[f"{labels.name} commas"] = (
            f"{labels.name}: {with_comma} of {total} labels end in a comma or semicolon, or contain one and are alone "
            f"on their line, like {shown(example)!r}; it is read as part of the name; separate labels by spaces only"
        )
    return names


def _label_texts(path: Path, labels: list[str], label_file: Path, notes: dict[str, str]) -> dict[str, str]:
    """Return label name -> text of a file. Adds a note. UserError if it has the text of no label."""
    table: dict[str, str] = {}
    repeated: list[str] = []
    for number, line in read_lines(path):
        name, tab, text = line.partition("\t")
        if not tab:
            raise UserError(f"{path}, line {number}: has no tab; write the label's name, a tab, and its text")
        if name in table:
            repeated.append(name)
        table[name] = text.strip()
    known = set(labels)
    unknown = [name for name in table if name not in known]
    without_text = [name for name in labels if not table.get(name)]
    if unknown:
        # Names usually differ in case or in spaces at the end: show such a pair first.
        similar = {_case_folded(name): name for name in without_text}
        unknown.sort(key=lambda name: _case_folded(name) not in similar)
        example, expected = unknown[0], similar.get(_case_folded(unknown[0]), labels[0])
    if len(unknown) == len(table):
        found = f"it has {shown(example)!r}, {label_file} has {shown(expected)!r}" if unknown else "it is empty"
        raise UserError(
            f"{path}: none of its {len(table)} names is a label of the training set: {found}; names must match "
            "exactly, including spaces and case; correct the file, or remove `label_text_file`"
        )
    parts = [f"{path.name}: {len(labels) - len(without_text)} of {len(labels)} labels have a text"]
    if without_text:
        parts.append(f"{len(without_text)} have none, like {shown(without_text[0])!r}")
    if unknown:
        parts.append(f"{len(unknown)} names are not labels of the training set, like {shown(example)!r}")
    if repeated:
        parts.append(f"{len(repeated)} lines repeat a name, like {shown(repeated[0])!r}: the last text is used")
    notes["label texts"] = "; ".join(parts)
    return table


def _case_folded(name: str) -> str:
    return " ".join(name.split()).casefold()


# Label features -------------------------------------------------------------------------------------------------------

_LF_LAYOUT = "label-feature layout: trn.json, tst.json and lbl.json, plain or .gz, in raw_text/ or in the folder itself"


def lf_source(folder: Path, augment: bool = False, with_filter: bool = False) -> Source:
    """Find the label-feature layout: JSON lines in `trn.json`, `tst.json` and `lbl.json`, plain or .gz, in `raw_text/`.

    An instance has `title`, `content` and `target_ind` (line numbers in lbl.json, from 0). A missing text is empty. All
    labels of lbl.json and all test rows are kept, because `filter_labels_test.txt` refers to them by number.

    Args:
        augment: add each label's text as a training row with that label.
        with_filter: read `filter_labels_test.txt`.
    """
    folders = [folder / "raw_text", folder]
    paths = {
        name: _find_file(folders, [f"{name}.json", f"{name}.json.gz"], _LF_LAYOUT, _WRONG_FOLDER)
        for name in ("trn", "tst", "lbl")
    }
    files, filter_file = list(paths.values()), None
    if with_filter:
        filter_file = _find_file(
            folders, ["filter_labels_test.txt"], "one row and label per line", "or set `use_filter_eval`=false"
        )
        files.append(filter_file)

    def read() -> Contents:
        notes: dict[str, str] = {}
        labels = list(_lf_labels(paths["lbl"]))
        if not labels:
            raise UserError(f"{paths['lbl']}: has no labels; write one JSON object per label")
        texts = sum(bool(text) for _, text in labels)
        if augment and not texts:
            raise UserError(
                f"{paths['lbl']}: no label has a title or content, which `augment_label_data`=true needs; add them, "
                "or set `augment_label_data`=false"
            )
        repeated = len(labels) - len({name for name, _ in labels})
        notes["label texts"] = f"{paths['lbl'].name}: {texts} of {len(labels)} labels have a text" + (
            f"; {repeated} lines repeat a uid" if repeated else ""
        )

        def rows(name: str, split: str) -> Iterator[Row]:
            found = _lf_rows(paths[name], paths["lbl"], len(labels))
            return (Row(text, numbers) for text, numbers in count_empty(found, split, notes))

        def train() -> Iterator[Row]:
            yield from count_unlabelled(rows("trn", "training"), notes)
            if augment:
                yield from (Row(text, [label]) for label, (_, text) in enumerate(labels) if text)

        return Contents(
            labels=[(name, text or name) for name, text in labels],
            train=train,
            test=lambda: rows("tst", "test"),
            filter_pairs=_filter_pairs(filter_file, paths["tst"], len(labels)) if filter_file else None,
            augmented=texts if augment else 0,
            notes=notes,
        )

    return Source(files, json.dumps([augment, with_filter]), read)


def _text_field(record: dict[str, Any], name: str, where: str) -> str:
    """Return a field without surrounding whitespace, or "" if it is missing or null."""
    text = record.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} must be a string, not {type(text).__name__}")
    check_unicode(text, f"{where}: {name}")
    return text.strip()


def _lf_labels(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (uid, text) of each label. The text may be empty."""
    for number, (where, record) in enumerate(json_lines(path)):
        uid = record.get("uid")
        if type(uid) not in (str, int, type(None)):
            raise UserError(f"{where}: uid must be a string or a whole number, not {type(uid).__name__}")
        name = str(number if uid is None else uid)
        check_unicode(name, f"{where}: uid")
        yield name, _text_field(record, "title", where) or _text_field(record, "content", where)


def _lf_rows(path: Path, label_file: Path, num_labels: int) -> Iterator[NamedRow]:
    for where, record in json_lines(path):
        target = record.get("target_ind")
        if not isinstance(target, list) or not all(type(label) is int for label in target):
            raise UserError(f"{where}: target_ind must be a list of whole numbers; write [] for none")
        for label in target:
            if not 0 <= label < num_labels:
                raise UserError(
                    f"{where}: label {shown(label)} is out of range: {label_file} has {num_labels} labels; correct "
                    "target_ind, which counts the lines of that file from 0"
                )
        parts = _text_field(record, "title", where), _text_field(record, "content", where)
        yield where, " ".join(part for part in parts if part), sorted(set(target))


def _filter_pairs(path: Path, test_file: Path, num_labels: int) -> Ragged:
    """Read the labels to exclude for each row of the test file, ascending."""
    num_rows = sum(1 for _ in read_lines(test_file))
    flat = array("q")
    for number, line in read_lines(path):
        words = line.split()
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise UserError(f"{path}, line {number}: is not two whole numbers; write a test row and a label")
        for what, word, size, counted in zip(("row", "label"), words, (num_rows, num_labels), ("test rows", "labels")):
            if len(word) > _MAX_DIGITS or int(word) >= size:
                raise UserError(
                    f"{path}, line {number}: {what} {shown(word)} is out of range, there are {size} {counted}; "
                    "correct the line; both numbers count from 0"
                )
        flat.extend(map(int, words))
    pairs = (
        np.unique(np.frombuffer(flat, dtype=np.int64).reshape(-1, 2), axis=0) if flat else np.zeros((0, 2), np.int64)
    )
    counts = np.bincount(pairs[:, 0], minlength=num_rows)
    return Ragged(pairs[:, 1].astype(np.int32), np.concatenate([[0], np.cumsum(counts)]))
