"""Where texts and labels come from: two layouts of the Extreme Classification Repository, and Hugging Face datasets.

A source streams rows and never holds a corpus. Whatever is wrong with a file becomes a UserError that names file, line
and remedy.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_trainer.errors import UserError, reason

logger = logging.getLogger(__name__)

_ROWS_A_READ = 2000


class Row(NamedTuple):
    """One instance."""

    text: str
    labels: list[int]  # ascending, without repeats


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: `ids` int32 [nnz], `offsets` int64 [rows + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def rows(self, indices: np.ndarray) -> Ragged:
        """The rows of these numbers, in this order."""
        counts = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        place = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], counts)
        return Ragged(self.ids[place], offsets)


class Contents(NamedTuple):
    """What a source holds. `train` and `test` start a new pass each time they are called."""

    labels: list[tuple[str, str]]  # (id, text) in label order
    train: Callable[[], Iterator[Row]]
    test: Callable[[], Iterator[Row]]
    filter_pairs: Ragged | None = None  # labels to leave out of the ranking of each test row
    augmented: int = 0  # training rows made from label texts; they come last


@dataclass(frozen=True)
class Source:
    """A data set before tokenising: found, but not read yet."""

    files: list[Path]  # their content identifies the data set, together with `identity`
    identity: str  # the choices of how to read them
    read: Callable[[], Contents]  # raises UserError; so does a pass over train or test


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of a UTF-8 file, plain or gzip (name ends in .gz).

    Only a newline ends a line: texts may hold other characters that str.splitlines would split at.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                # Some editors put a byte order mark in front of the first line.
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}, after line {number}: damaged or truncated gzip file ({error}); copy it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _find(folders: list[Path], names: list[str], layout: str, remedy: str) -> Path:
    """The first of `names` in the first of `folders` that has one."""
    if not folders[-1].is_dir():
        raise UserError(f"{folders[-1]}: no such folder; set dataset_path or data.folder")
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    looked = " and in ".join(str(folder) for folder in folders)
    raise UserError(f"{' or '.join(names)} is missing, looked for in {looked}; {layout}; {remedy}")


def _checked_text(text: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: the text is empty; remove the instance, here and in its label file")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character; correct the text") from None
    return text


class _Vocabulary:
    """Label names and their numbers."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._number = {name: number for number, name in enumerate(names)}

    @classmethod
    def of(cls, names: set[str]) -> _Vocabulary:
        """In numerical order if all names are whole numbers, else in alphabetical order."""
        numeric = all(name.isascii() and name.isdigit() for name in names)
        return cls(sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names))

    def known(self, names: Iterable[str]) -> list[int]:
        """Numbers of the known names, ascending, without repeats."""
        return sorted({self._number[name] for name in names if name in self._number})

    def test_rows(self, rows: Iterator[tuple[str, list[str]]]) -> Iterator[Row]:
        """Labels never seen in training cannot be predicted: they go, and so do texts left with none."""
        unseen = dropped = 0
        for text, names in rows:
            labels = self.known(names)
            unseen += len(set(names)) - len(labels)
            if labels:
                yield Row(text, labels)
            else:
                dropped += 1
        if unseen or dropped:
            logger.warning(
                "test set: dropped %d labels never seen in training and %d texts without one", unseen, dropped
            )


def _counted(rows: Iterator[Row]) -> Iterator[Row]:
    """Training rows, with a word about those that have no label: each is a negative for every label."""
    empty = 0
    for row in rows:
        empty += not row.labels
        yield row
    if empty:
        logger.warning("training set: %d texts have no label", empty)


# Raw text -------------------------------------------------------------------------------------------------------------

_RAW_LAYOUT = "raw layout: {train,test}_raw_texts.txt or {train,test}_texts.txt, and {train,test}_labels.txt"
_WRONG_FOLDER = "set dataset_path, data.folder or data.is_lf_data"


def raw_source(folder: Path, label_text_file: str | None = None, augment: bool = False, test_split: str = "test") -> Source:
    """`train_raw_texts.txt` (or `train_texts.txt`) beside `train_labels.txt`, and the same for `test_split`.

    A line is a text, which may be empty; the same line of the label file holds its label names, separated by blanks.
    The labels are those seen in training. `label_text_file` holds lines of name, tab, text; a label without one goes by
    its name. With `augment` each label's text of that file is also a training row with that one label.
    """
    texts, labels = {}, {}
    for split in ("train", test_split):
        remedy = _WRONG_FOLDER if split in ("train", "test") else f"the split is data.test_split={split}"
        texts[split] = _find([folder], [f"{split}_raw_texts.txt", f"{split}_texts.txt"], _RAW_LAYOUT, remedy)
        labels[split] = _find([folder], [f"{split}_labels.txt"], _RAW_LAYOUT, remedy)
    files, table_file = [*texts.values(), *labels.values()], None
    if label_text_file is not None:
        table_file = _find(
            [folder], [label_text_file], "label<TAB>text a line", "correct or remove data.label_text_file"
        )
        files.append(table_file)

    def rows(split: str) -> Iterator[tuple[str, list[str]]]:
        empty = first = 0
        for (number, text), (_, line) in zip(read_lines(texts[split]), read_lines(labels[split])):
            if not text.strip():  # readers of the published files expect them: LightXML puts filler words there
                empty, first = empty + 1, first or number
            yield text, line.split()
        if empty:
            said = "%s: %d texts are empty, the first in line %d; they stay, as texts without words"
            logger.warning(said, texts[split], empty, first)

    def read() -> Contents:
        names: dict[str, set[str]] = {}
        for split in ("train", test_split):
            names[split] = _names_and_line_count(texts[split], labels[split])
        vocabulary = _Vocabulary.of(names["train"])
        table = _label_texts(table_file) if table_file else {}
        own = [(number, table[name]) for number, name in enumerate(vocabulary.names) if table.get(name)] if augment else []

        def train() -> Iterator[Row]:
            yield from _counted(Row(text, vocabulary.known(line)) for text, line in rows("train"))
            yield from (Row(text, [number]) for number, text in own)

        return Contents(
            labels=[(name, table.get(name) or name) for name in vocabulary.names],
            train=train,
            test=lambda: vocabulary.test_rows(rows(test_split)),
            augmented=len(own),
        )

    return Source(files, json.dumps([augment, test_split]), read)


def _names_and_line_count(texts: Path, labels: Path) -> set[str]:
    """The names in a label file, which must have a line for each text."""
    names: set[str] = set()
    label_lines = 0
    for _, line in read_lines(labels):
        names.update(line.split())
        label_lines += 1
    text_lines = sum(1 for _ in read_lines(texts))
    if text_lines != label_lines:
        raise UserError(
            f"{texts} has {text_lines} lines, {labels} has {label_lines}; write one line of labels for each text"
        )
    if not names:
        raise UserError(f"{labels}: a label file with no labels; write each text's label names on its line")
    return names


def _label_texts(path: Path) -> dict[str, str]:
    table = {}
    for number, line in read_lines(path):
        name, tab, text = line.partition("\t")
        if not tab:
            raise UserError(f"{path}, line {number}: no tab; write the label's name, a tab, and its text")
        table[name] = text.strip()
    return table


# Label features -------------------------------------------------------------------------------------------------------

_LF_LAYOUT = "label-feature layout: trn.json, tst.json, lbl.json, plain or .gz, in raw_text/ or the folder itself"


def lf_source(folder: Path, augment: bool = False, with_filter: bool = False) -> Source:
    """Label features: `trn.json`, `tst.json`, `lbl.json` in `raw_text/`, plain or .gz; lines of JSON objects.

    An instance has `title`, `content` and `target_ind`, line numbers (from 0) of lbl.json. Every label of lbl.json
    counts, and every test row stays: `filter_labels_test.txt` counts them. With `augment` each label's text is also a
    training instance of that label.
    """
    folders = [folder / "raw_text", folder]
    paths = {
        name: _find(folders, [f"{name}.json", f"{name}.json.gz"], _LF_LAYOUT, _WRONG_FOLDER)
        for name in ("trn", "tst", "lbl")
    }
    files, filter_file = list(paths.values()), None
    if with_filter:
        filter_file = _find(
            folders, ["filter_labels_test.txt"], "row and label a line", "or set data.use_filter_eval=false"
        )
        files.append(filter_file)

    def read() -> Contents:
        labels = list(_lf_labels(paths["lbl"]))
        if not labels:
            raise UserError(f"{paths['lbl']}: a label file with no labels; write one JSON object a label")

        def train() -> Iterator[Row]:
            yield from _counted(_lf_rows(paths["trn"], paths["lbl"], len(labels)))
            if augment:
                yield from (Row(text, [label]) for label, (_, text) in enumerate(labels) if text)

        return Contents(
            labels=[(name, text or name) for name, text in labels],
            train=train,
            test=lambda: _lf_rows(paths["tst"], paths["lbl"], len(labels)),
            filter_pairs=_filter_pairs(filter_file, paths["tst"], len(labels)) if filter_file else None,
            augmented=sum(bool(text) for _, text in labels) if augment else 0,
        )

    return Source(files, json.dumps([augment, with_filter]), read)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of every line."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            raise UserError(f"{where}: not valid JSON ({why}); write one JSON object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object; write one JSON object a line")
        yield where, record


def _text_field(record: dict[str, Any], name: str, where: str) -> str:
    """A field stripped; "" if it is missing or null."""
    text = record.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no text file can hold
        raise UserError(
            f"{where}: {name} is not valid Unicode (half a surrogate pair); correct its \\u escapes"
        ) from None
    return text.strip()


def _lf_labels(path: Path) -> Iterator[tuple[str, str]]:
    """(uid, text) of every label; the text may be empty."""
    for number, (where, record) in enumerate(_json_lines(path)):
        name = str(record.get("uid", number))
        yield name, _text_field(record, "title", where) or _text_field(record, "content", where)


def _lf_rows(path: Path, label_file: Path, num_labels: int) -> Iterator[Row]:
    for where, record in _json_lines(path):
        target = record.get("target_ind")
        if not isinstance(target, list) or not all(type(label) is int for label in target):
            raise UserError(f"{where}: target_ind must be a list of whole numbers; write [] for none")
        for label in target:
            if not 0 <= label < num_labels:
                raise UserError(
                    f"{where}: label {label} is out of range: {label_file} has {num_labels} labels; correct "
                    "target_ind, which counts its lines from 0"
                )
        parts = _text_field(record, "title", where), _text_field(record, "content", where)
        text = " ".join(part for part in parts if part)
        if not text:
            raise UserError(f"{where}: title and content are empty; give the instance a text or remove it")
        yield Row(text, sorted(set(target)))


def _filter_pairs(path: Path, test_file: Path, num_labels: int) -> Ragged:
    """The labels to leave out for every row of the test file, ascending."""
    num_rows = sum(1 for _ in read_lines(test_file))
    flat = array("q")
    for number, line in read_lines(path):
        words = line.split()
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise UserError(f"{path}, line {number}: write a test row and a label, two whole numbers")
        for what, word, size, counted in zip(("row", "label"), words, (num_rows, num_labels), ("test rows", "labels")):
            if int(word) >= size:
                raise UserError(
                    f"{path}, line {number}: {what} {word} is out of range, there are {size} {counted}; "
                    "correct the line, both count from 0"
                )
        flat.extend(map(int, words))
    pairs = (
        np.unique(np.frombuffer(flat, dtype=np.int64).reshape(-1, 2), axis=0) if flat else np.zeros((0, 2), np.int64)
    )
    counts = np.bincount(pairs[:, 0], minlength=num_rows)
    return Ragged(pairs[:, 1].astype(np.int32), np.concatenate([[0], np.cumsum(counts)]))


# Hugging Face datasets ------------------------------------------------------------------------------------------------


class _Split(NamedTuple):
    """One split of a Hugging Face source."""

    files: list[Path]
    records: Callable[[], Iterator[tuple[str, dict[str, Any]]]]  # ("where", {text column, label column})
    class_names: list[str] | None = None  # of a column of class labels


def hf_source(name: str, train_split: str, test_split: str, text_column: str, label_column: str) -> Source:
    """A Hugging Face datasets source.

    The labels are those seen in training, unless the column is of class labels: then all of their names.

    Args:
        name: a folder of `save_to_disk`; a folder with <split>.parquet or <split>.jsonl; or a hub id.
        label_column: lists of label names (strings, or whole numbers used as names), or of class labels.
    """
    columns = (text_column, label_column)
    train, test = (_open_split(name, split, columns) for split in (train_split, test_split))

    def rows(split: _Split) -> Iterator[tuple[str, list[str]]]:
        for where, record in split.records():
            text, labels = record[text_column], record[label_column]
            if not isinstance(text, str):
                raise UserError(f"{where}: column {text_column!r} must hold strings; set data.text_column")
            yield _checked_text(text, where), _names(labels, split.class_names, f"{where}: column {label_column!r}")

    def read() -> Contents:
        if train.class_names is not None:
            vocabulary = _Vocabulary(train.class_names)
        else:
            vocabulary = _Vocabulary.of({label for _, names in rows(train) for label in names})
        if not vocabulary.names:
            raise UserError(
                f"data.hf_source={name}: {train_split} has no labels in {label_column!r}; set data.label_column"
            )
        return Contents(
            labels=[(label, label) for label in vocabulary.names],
            train=lambda: _counted(Row(text, vocabulary.known(names)) for text, names in rows(train)),
            test=lambda: vocabulary.test_rows(rows(test)),
        )

    # The name identifies what has no files of its own.
    identity = json.dumps([None if train.files and test.files else name, train_split, test_split, *columns])
    return Source([*train.files, *test.files], identity, read)


def _names(labels: Any, class_names: list[str] | None, where: str) -> list[str]:
    """A row's label names."""
    if labels is None:
        return []
    kinds = (int,) if class_names is not None else (int, str)
    if not isinstance(labels, list) or not all(type(label) in kinds for label in labels):
        raise UserError(f"{where} must hold a list of names or whole numbers; set data.label_column")
    if class_names is None:
        return [str(label) for label in labels]
    for label in labels:
        if not 0 <= label < len(class_names):
            raise UserError(
                f"{where}: label {label} is out of range: there are {len(class_names)} class labels; correct it"
            )
    return [class_names[label] for label in labels]


def _open_split(name: str, split: str, columns: tuple[str, str]) -> _Split:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(f"data.hf_source={name}: a file; name its folder, with {split}.parquet or {split}.jsonl in it")
    if not folder.is_dir():
        return _open_dataset(lambda: datasets.load_dataset(name, split=split), f"data.hf_source={name}", split, columns)
    if (file := folder / f"{split}.parquet").is_file():
        return _open_parquet(file, columns)
    if (file := folder / f"{split}.jsonl").is_file():
        return _Split([file], lambda: _json_records(file, columns))
    if (saved := folder / split).is_dir():
        return _open_dataset(lambda: datasets.load_from_disk(str(saved)), str(saved), split, columns)
    raise UserError(
        f"data.hf_source={name}: the folder has no {split}.parquet, {split}.jsonl or folder {split} of save_to_disk; "
        "set data.hf_train_split and data.hf_test_split"
    )


def _check_columns(found: Iterable[str], columns: tuple[str, str], where: str) -> None:
    for column in columns:
        if column not in found:
            raise UserError(
                f"{where}: has no column {column!r}, only {', '.join(found)}; set data.text_column and "
                "data.label_column"
            )


def _class_names(features: datasets.Features, label_column: str) -> list[str] | None:
    feature = getattr(features[label_column], "feature", None)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _json_records(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in _json_lines(path):
        _check_columns(record, columns, where)
        _text_field(record, columns[0], where)
        yield where, record


def _open_parquet(path: Path, columns: tuple[str, str]) -> _Split:
    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS_A_READ, columns=list(columns)):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", record
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}, after row {number}: cannot be read ({reason(error)}); write it again"
            ) from None

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); write it again") from None
    _check_columns(schema.names, columns, str(path))
    return _Split([path], records, _class_names(datasets.Features.from_arrow_schema(schema), columns[1]))


def _open_dataset(load: Callable[[], Any], where: str, split: str, columns: tuple[str, str]) -> _Split:
    """A split that the `datasets` library opens: from the hub, or saved to disk."""
    try:
        dataset = load()
    except Exception as error:  # the hub's client, its transport and the file formats each raise errors of their own
        raise UserError(
            f"{where}: tried as a folder, and split {split!r} with the datasets library: {reason(error)}; correct "
            "data.hf_source and the split names, or see to the connection"
        ) from error
    _check_columns(dataset.column_names, columns, f"{where}, split {split}")
    dataset = dataset.with_format(None).select_columns(list(columns))

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        return ((f"{where}, split {split}, row {number}", record) for number, record in enumerate(dataset, start=1))

    files = sorted(Path(file["filename"]) for file in dataset.cache_files)
    return _Split(files, records, _class_names(dataset.features, columns[1]))
