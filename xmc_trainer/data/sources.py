"""Read texts and labels from the two layouts of the Extreme Classification Repository.

A source streams rows; it never holds a whole corpus. Every defect of a file raises a UserError that names the file, the
line and the remedy. Rows with an empty text are kept. `hugging_face` reads Hugging Face data sets.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xmc_trainer.data.processes import spread
from xmc_trainer.data.texts import check_unicode, decoded_lines, json_object, without_marks
from xmc_trainer.errors import UserError, shown

if TYPE_CHECKING:
    from xmc_trainer.data.split import Split

# If more than this share of the labels looks comma-separated, warn.
_COMMA_SHARE = 0.01
_PART = 1 << 22  # bytes of a label file that a process reads at once
_ROWS = 1 << 12  # rows whose labels are sorted at once
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

    def below(self, limit: int) -> Ragged:
        """Keep the ids below `limit`."""
        kept = self.ids < limit
        return Ragged(self.ids[kept], np.concatenate([[0], np.cumsum(kept)])[self.offsets])


@dataclass(frozen=True)
class Contents:
    """The content of a source. Each call of `train` or `test` starts a new pass."""

    labels: list[tuple[str, str]]  # (id, text) in label order
    train: Callable[[], Iterator[Row]]
    test: Callable[[], Iterator[Row]]  # labels that `labels` lacks, because training has none, have numbers after it
    filter_pairs: Ragged | None = None  # labels to exclude from the ranking of each test row
    split: Split | None = None  # where the source holds texts out
    augmented: int = 0  # training rows made from label texts; they come last
    # Warnings for the user: subject -> one line. Complete after a pass over train and test. They name files without
    # their folders, because the cache may later serve the same content for another folder.
    notes: dict[str, str] = field(default_factory=dict)


def check_num_labels(expected: int | None, found: int) -> None:
    """Raise UserError if another number of labels was expected."""
    if expected not in (None, found):
        raise UserError(f"`num_labels`={expected}: the data have {found} labels; correct it, or set it to null")


def no_texts(source: Source, split: str) -> UserError:
    return UserError(f"{source.name}: the {split} set has no texts with labels; check its files")


@dataclass(frozen=True)
class Source:
    """A data set whose files were found but not read."""

    name: str  # for messages
    files: list[Path]  # their content and `identity` together identify the data set
    layout: str  # "raw", "lf", "sparse" or "hf" (rows with columns)
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
        raise _cannot_read(path, error) from None


def _cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, line n", object) for each line."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        yield where, json_object(line, where)


def find_file(folders: list[Path], names: list[str], layout: str, remedy: str) -> Path:
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
        self.numbers = {name: number for number, name in enumerate(names)}

    @classmethod
    def of(cls, names: Iterable[str]) -> Vocabulary:
        """Sort the names: by value if all are whole numbers, else alphabetically."""
        names = list(names)
        numeric = all(name.isascii() and name.isdigit() for name in names)
        ordered = sorted(names)
        if numeric:  # by value: by length without leading zeros, then by digits. int() raises for thousands of digits
            ordered.sort(key=lambda name: name.lstrip("0"))
            ordered.sort(key=lambda name: len(name.lstrip("0")))
        return cls(ordered)

    def numbered(self, rows: Iterable[NamedRow]) -> Iterator[NumberedRow]:
        """Replace label names by numbers, ascending and distinct. Unknown names get numbers after all labels."""
        unknown: dict[str, int] = {}
        for where, text, names in rows:
            numbers = {
                self.numbers[name] if name in self.numbers else len(self.names) + unknown.setdefault(name, len(unknown))
                for name in names
            }
            yield where, text, sorted(numbers)


Where = tuple[Path, int] | str  # file and line, or both in words
NamedRow = tuple[Where, str, list[str]]  # (where, text, label names)
NumberedRow = tuple[Where, str, list[int]]  # (where, text, label numbers, ascending)


def count_empty(rows: Iterable[NumberedRow], split: str, notes: dict[str, str]) -> Iterator[Row]:
    """Yield all rows. Adds a note about empty texts."""
    empty, first = 0, ""
    for where, text, labels in rows:
        # The first character tells of nearly every text that it is not empty, in a tenth of the time.
        if (text[:1].isspace() or text[:1] in ("", "\ufeff")) and not without_marks(text).strip():
            said = where if isinstance(where, str) else f"{where[0]}, line {where[1]}"
            empty, first = empty + 1, first or os.path.basename(said)
        yield Row(text, labels)
    if empty:
        notes[f"{split} texts"] = f"{split} set: {empty} texts are empty, the first at {first!r}; they are kept"


def labelled(rows: Iterable[NumberedRow], labels: int, notes: dict[str, str]) -> Iterator[Row]:
    """Yield the test rows that have labels. Adds a note about those without, and about label numbers from `labels` on."""
    unseen = only_unseen = dropped = 0
    for row in count_empty(rows, "test", notes):
        known = bisect_left(row.labels, labels)
        unseen += len(row.labels) - known
        only_unseen += known == 0 < len(row.labels)
        if row.labels:
            yield row
        else:
            dropped += 1
    if unseen:
        notes["test labels"] = (
            f"test set: {unseen} labels are never seen in training, and {only_unseen} texts have no other; only "
            "`xmc-trainer evaluate` counts them"
        )
    if dropped:
        notes["unlabelled test texts"] = f"test set: dropped {dropped} texts without labels"


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
        texts[split] = find_file([folder], [f"{split}_raw_texts.txt", f"{split}_texts.txt"], _RAW_LAYOUT, remedy)
        labels[split] = find_file([folder], [f"{split}_labels.txt"], _RAW_LAYOUT, remedy)
    files, table_file = [*texts.values(), *labels.values()], None
    if label_text_file is not None:
        table_file = find_file(
            [folder], [label_text_file], "one label<TAB>text per line", "correct or remove `label_text_file`"
        )
        files.append(table_file)

    def read() -> Contents:
        notes: dict[str, str] = {}
        seen: dict[str, int] = {}  # name -> number, in the order of their first lines
        found = {"train": _read_labels(texts["train"], labels["train"], seen, notes)}
        vocabulary = Vocabulary.of(seen)
        names, place = vocabulary.names, np.fromiter(map(vocabulary.numbers.__getitem__, seen), np.int32, len(seen))
        del vocabulary  # the data set may have millions of labels
        found[test_split] = _read_labels(texts[test_split], labels[test_split], seen, notes)
        # Names that only the test set has get numbers after all labels.
        place = np.concatenate([place, np.arange(len(place), len(seen), dtype=np.int32)])
        for numbers in found.values():
            _renumber(numbers, place)
        table = _label_texts(table_file, names, labels["train"], notes) if table_file else {}
        label_rows = [(number, table[name]) for number, name in enumerate(names) if table.get(name)] if augment else []

        def rows(split: str) -> Iterator[NumberedRow]:
            return lines_with_labels(texts[split], found[split])

        def train() -> Iterator[Row]:
            yield from count_unlabelled(count_empty(rows("train"), "training", notes), notes)
            yield from (Row(text, [number]) for number, text in label_rows)

        return Contents(
            labels=[(name, table.get(name) or name) for name in names],
            train=train,
            test=lambda: labelled(rows(test_split), len(names), notes),
            augmented=len(label_rows),
            notes=notes,
        )

    return Source(str(folder), files, "raw", json.dumps([augment, test_split]), read)


class Lines(NamedTuple):
    """A part of a file, cut at the ends of lines."""

    path: Path
    start: int  # byte
    stop: int
    first: int  # number of its first line, from 1
    lines: int


def lines_with_labels(path: Path, labels: Ragged) -> Iterator[NumberedRow]:
    """Yield each line of a text file with its labels."""
    for part in cut(path):
        bounds = labels.offsets[part.first - 1 : part.first + part.lines]
        numbers, starts = labels.ids[bounds[0] : bounds[-1]].tolist(), (bounds - bounds[0]).tolist()
        for line, (text, start, stop) in enumerate(zip(texts_of(part), starts, starts[1:]), part.first):
            yield (path, line), text, numbers[start:stop]


def check_lines(texts: Path, labels: Path, rows: int) -> None:
    """Raise UserError unless a text file has one line for each of the `rows` rows of a label file."""
    lines = sum(len(texts_of(part)) for part in cut(texts))
    if lines != rows:
        raise UserError(f"{texts} has {lines} lines, {labels} has {rows}; write one line of labels for each text")


def cut(path: Path) -> Iterator[Lines]:
    """Cut a file into parts of about 4 MiB. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            start, first = 0, 1
            while block := file.read(_PART):
                block += file.readline()
                # As `decoded_lines` counts: a byte order mark without text is no line.
                lines = 0 if first == 1 and block == codecs.BOM_UTF8 else block.count(b"\n") + (block[-1:] != b"\n")
                yield Lines(path, start, start + len(block), first, lines)
                start, first = start + len(block), first + lines
    except OSError as error:
        raise _cannot_read(path, error) from None


def _bytes_of(part: Lines) -> bytes:
    try:
        with open(part.path, "rb") as file:
            file.seek(part.start)
            return file.read(part.stop - part.start)
    except OSError as error:
        raise _cannot_read(part.path, error) from None


def texts_of(part: Lines) -> list[str]:
    """Return what `decoded_lines` yields, in a tenth of the time."""
    content = _bytes_of(part)
    try:
        text = content.decode("utf-8-sig" if part.first == 1 else "utf-8")
    except UnicodeDecodeError:
        # This raises UserError with the number of the line.
        return [line for _, line in decoded_lines(io.BytesIO(content), str(part.path), part.first)]
    lines = text.split("\n")[: part.lines]
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


class _Found(NamedTuple):
    """The labels of the lines of a part. Its names are numbered from 0 in the order in which they first occur."""

    names: str  # separated by spaces
    ids: np.ndarray  # int32, distinct names of each line
    counts: np.ndarray  # int32, per line
    total: int  # names, with repetitions
    with_comma: int
    example: str  # a name with a comma


def _names_in(part: Lines) -> _Found:
    numbers: dict[str, int] = {}
    ids, counts = array("i"), array("i")
    total = with_comma = 0
    example = ""
    for line in texts_of(part):
        # Without an argument, str.split would also split names at no-break and ideographic spaces.
        names = [name for name in line.replace("\t", " ").split(" ") if name]
        row = {numbers.setdefault(name, len(numbers)) for name in names}
        ids.extend(row)
        counts.append(len(row))
        total += len(names)
        if "," in line or ";" in line:
            for name in names:
                # A comma inside a name is normal, but a line with a single name may be a comma-separated list.
                if name[-1] in ",;" or (len(names) == 1 and ("," in name or ";" in name)):
                    with_comma, example = with_comma + 1, example or name
    return _Found(" ".join(numbers), np.array(ids, np.int32), np.array(counts, np.int32), total, with_comma, example)


def _read_labels(texts: Path, labels: Path, seen: dict[str, int], notes: dict[str, str]) -> Ragged:
    """Return the distinct labels of each line of a label file, as numbers in `seen`, to which new names are added.

    UserError if the file does not have one line for each text.
    """
    ids, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    total = with_comma = 0
    example = ""
    for found, _ in spread(_names_in, ((part, None) for part in cut(labels))):
        names = found.names.split(" ") if found.names else []
        number = np.fromiter(map(seen.get, names, repeat(-1)), np.int32, len(names))
        for at in np.flatnonzero(number < 0).tolist():
            number[at] = seen.setdefault(names[at], len(seen))
        ids.append(number[found.ids])
        counts.append(found.counts)
        total, with_comma = total + found.total, with_comma + found.with_comma
        example = example or found.example
    check_lines(texts, labels, sum(map(len, counts)))
    if not total:
        raise UserError(f"{labels}: has no labels; write each text's label names on its line")
    if with_comma > _COMMA_SHARE * total:
        notes[f"{labels.name} commas"] = (
            f"{labels.name}: {with_comma} of {total} labels end in a comma or semicolon, or contain one and are alone "
            f"on their line, like {shown(example)!r}; it is read as part of the name; separate labels by spaces only"
        )
    return Ragged(np.concatenate(ids), np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)]))


def _renumber(rows: Ragged, place: np.ndarray) -> None:
    """Replace each number by its place, in place, and sort the numbers of each row."""
    for first in range(0, len(rows.offsets) - 1, _ROWS):
        offsets = rows.offsets[first : first + _ROWS + 1]
        part = rows.ids[offsets[0] : offsets[-1]]
        row_start = np.repeat(np.arange(len(offsets) - 1) * len(place), np.diff(offsets))
        part[:] = np.sort(row_start + place[part]) - row_start


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
        name: find_file(folders, [f"{name}.json", f"{name}.json.gz"], _LF_LAYOUT, _WRONG_FOLDER)
        for name in ("trn", "tst", "lbl")
    }
    files, filter_file = list(paths.values()), None
    if with_filter:
        filter_file = find_file(
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
            return count_empty(found, split, notes)

        def train() -> Iterator[Row]:
            yield from count_unlabelled(rows("trn", "training"), notes)
            if augment:
                yield from (Row(text, [label]) for label, (_, text) in enumerate(labels) if text)

        return Contents(
            labels=[(name, text or name) for name, text in labels],
            train=train,
            test=lambda: rows("tst", "test"),
            filter_pairs=filter_pairs_of(filter_file, count_lines(paths["tst"]), len(labels)) if filter_file else None,
            augmented=texts if augment else 0,
            notes=notes,
        )

    return Source(str(folder), files, "lf", json.dumps([augment, with_filter]), read)


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


def _lf_rows(path: Path, label_file: Path, num_labels: int) -> Iterator[NumberedRow]:
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


def count_lines(path: Path) -> int:
    return sum(1 for _ in read_lines(path))


def filter_pairs_of(path: Path, num_rows: int, num_labels: int) -> Ragged:
    """Read the labels to exclude for each of the `num_rows` test rows, ascending."""
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
