"""Where texts and labels come from: two file layouts of the Extreme Classification Repository, and Hugging Face datasets.

A source streams rows and never holds a corpus. Whatever is wrong with a file becomes a UserError that names file, line
and remedy.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from xmc_trainer.errors import UserError

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One instance."""

    text: str
    labels: list[int]  # ascending, without repeats


@dataclass(frozen=True)
class Source:
    """A data set before tokenising. `train` and `test` start a new pass each time they are called."""

    labels: list[tuple[str, str]]  # (id, text) in label order
    train: Callable[[], Iterator[Row]]
    test: Callable[[], Iterator[Row]]
    files: list[Path]  # what the rows are read from: their content identifies the data set
    identity: str = ""  # what identifies it beside the files
    filter_pairs: list[tuple[int, int]] | None = field(default=None)  # (test row, label) to leave out of evaluation


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of a UTF-8 file, plain or gzip (name ends in .gz).

    Only a newline ends a line: texts may hold other characters that str.splitlines would split at.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}, after line {number}: damaged or truncated gzip file ({error}); copy it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _find(folder: Path, *names: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set dataset_path or data.folder")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has no {' or '.join(names)}; set dataset_path, data.folder or data.is_lf_data")


def _checked_text(text: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: the text is empty; remove the instance, here and in its label file")
    return text


class _Vocabulary:
    """Label names in order: numerically if all of them are numbers, else alphabetically."""

    def __init__(self, names: set[str]) -> None:
        numeric = all(name.isascii() and name.isdigit() for name in names)
        self.names = sorted(names, key=lambda name: (int(name), name) if numeric else name)
        self._number = {name: number for number, name in enumerate(self.names)}

    def known(self, names: Iterable[str]) -> list[int]:
        """Numbers of the known names, ascending, without repeats."""
        return sorted({self._number[name] for name in names if name in self._number})


def _test_rows(rows: Iterator[tuple[str, list[str]]], vocabulary: _Vocabulary) -> Iterator[Row]:
    """Labels never seen in training cannot be predicted: they go, and so do texts left with none."""
    unseen = dropped = 0
    for text, names in rows:
        labels = vocabulary.known(names)
        unseen += len(set(names)) - len(labels)
        if labels:
            yield Row(text, labels)
        else:
            dropped += 1
    if unseen or dropped:
        logger.warning(
            "test set: dropped %d labels never seen in training and %d texts left without one", unseen, dropped
        )


def raw_source(folder: Path, label_text_file: str | None = None) -> Source:
    """`train_raw_texts.txt` (or `train_texts.txt`) beside `train_labels.txt`, and the same for test.

    A line is a text; the same line of the label file holds its label names, separated by blanks. The labels are those
    seen in training. `label_text_file` holds lines of name, tab, text; a label without one goes by its name.
    """
    texts = {split: _find(folder, f"{split}_raw_texts.txt", f"{split}_texts.txt") for split in ("train", "test")}
    labels = {split: _find(folder, f"{split}_labels.txt") for split in ("train", "test")}
    for split in ("train", "test"):
        counts = [sum(1 for _ in read_lines(path)) for path in (texts[split], labels[split])]
        if counts[0] != counts[1]:
            raise UserError(
                f"{texts[split]} has {counts[0]} lines, {labels[split]} has {counts[1]}; each text needs one line of labels"
            )
    names = {name for _, line in read_lines(labels["train"]) for name in line.split()}
    if not names:
        raise UserError(f"{labels['train']}: holds no labels; is it the right file?")
    vocabulary = _Vocabulary(names)
    table, files = {}, [*texts.values(), *labels.values()]
    if label_text_file is not None:
        files.append(_find(folder, label_text_file))
        for number, line in read_lines(files[-1]):
            name, tab, text = line.partition("\t")
            if not tab:
                raise UserError(f"{files[-1]}, line {number}: write the label's name, a tab, and its text")
            table[name] = text

    def rows(split: str) -> Iterator[tuple[str, list[str]]]:
        for (number, text), (_, line) in zip(read_lines(texts[split]), read_lines(labels[split])):
            yield _checked_text(text, f"{texts[split]}, line {number}"), line.split()

    return Source(
        labels=[(name, table.get(name) or name) for name in vocabulary.names],
        train=lambda: (Row(text, vocabulary.known(line)) for text, line in rows("train")),
        test=lambda: _test_rows(rows("test"), vocabulary),
        files=files,
    )


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}); write one object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: write one JSON object a line")
        yield number, record


def _title_and_content(record: dict[str, Any], where: str) -> str:
    parts = [record.get(name) or "" for name in ("title", "content")]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{where}: title and content must be strings")
    return " ".join(part.strip() for part in parts if part.strip())


def lf_source(folder: Path, augment: bool = False, with_filter: bool = False) -> Source:
    """Label features: `trn.json`, `tst.json`, `lbl.json` in `raw_text/`, plain or .gz; lines of JSON objects.

    An instance has `title`, `content` and `target_ind`, line numbers (from 0) of lbl.json. Every label of lbl.json
    counts, and every test row stays: `filter_labels_test.txt` counts them. With `augment` each label's text is also a
    training instance of that label.
    """
    base = folder / "raw_text" if (folder / "raw_text").is_dir() else folder
    paths = {name: _find(base, f"{name}.json", f"{name}.json.gz") for name in ("trn", "tst", "lbl")}
    labels = []
    for number, record in _json_lines(paths["lbl"]):
        name = str(record.get("uid", number - 1))
        labels.append((name, _title_and_content(record, f"{paths['lbl']}, line {number}") or name))
    if not labels:
        raise UserError(f"{paths['lbl']}: holds no labels; is it the right file?")

    def rows(path: Path) -> Iterator[Row]:
        for number, record in _json_lines(path):
            where = f"{path}, line {number}"
            target = record.get("target_ind")
            if not isinstance(target, list) or not all(type(label) is int for label in target):
                raise UserError(f"{where}: target_ind must be a list of integers")
            for label in target:
                if not 0 <= label < len(labels):
                    raise UserError(f"{where}: label {label} is out of range, {paths['lbl']} has {len(labels)} labels")
            yield Row(_checked_text(_title_and_content(record, where), where), sorted(set(target)))

    def train() -> Iterator[Row]:
        labelled = False
        for row in rows(paths["trn"]):
            labelled = labelled or bool(row.labels)
            yield row
        if not labelled:
            raise UserError(f"{paths['trn']}: no instance has a label; is target_ind filled?")
        if augment:
            yield from (Row(text, [label]) for label, (_, text) in enumerate(labels))

    pairs, files = None, list(paths.values())
    if with_filter:
        files.append(_find(base, "filter_labels_test.txt"))
        pairs = _filter_pairs(files[-1], sum(1 for _ in read_lines(paths["tst"])), len(labels))
    return Source(labels=labels, train=train, test=lambda: rows(paths["tst"]), files=files, filter_pairs=pairs)


def _filter_pairs(path: Path, rows: int, labels: int) -> list[tuple[int, int]]:
    pairs = []
    for number, line in read_lines(path):
        words = line.split()
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise UserError(f"{path}, line {number}: write a test row and a label, two numbers")
        row, label = map(int, words)
        if row >= rows or label >= labels:
            raise UserError(
                f"{path}, line {number}: {line!r} is out of range, there are {rows} test rows, {labels} labels"
            )
        pairs.append((row, label))
    return sorted(set(pairs))


def hf_source(name: str, train_split: str, test_split: str, text_column: str, label_column: str) -> Source:
    """A Hugging Face datasets source.

    Args:
        name: a folder of `Dataset.save_to_disk`; a folder with <split>.parquet or <split>.jsonl; or a hub id.
        label_column: lists of label names (strings, or numbers used as names), or of class labels.
    """
    splits, files = {}, []
    for split in (train_split, test_split):
        splits[split], used = _load_split(name, split)
        files += used
        for column in (text_column, label_column):
            if column not in splits[split].column_names:
                raise UserError(
                    f"data.hf_source={name}, split {split}: has no column {column!r} but "
                    f"{', '.join(splits[split].column_names)}; set data.text_column and data.label_column"
                )
    feature = getattr(splits[train_split].features[label_column], "feature", None)
    if feature is None:
        raise UserError(f"data.label_column={label_column}: must hold a list of labels in every row")
    to_name = feature.int2str if isinstance(feature, datasets.ClassLabel) else str

    def rows(split: str) -> Iterator[tuple[str, list[str]]]:
        columns = splits[split].select_columns([text_column, label_column])
        for number, record in enumerate(columns):
            where = f"data.hf_source={name}, split {split}, row {number}"
            text = record[text_column]
            if not isinstance(text, str):
                raise UserError(f"{where}: column {text_column!r} must hold strings")
            yield _checked_text(text, where), [to_name(label) for label in record[label_column] or []]

    names = {label for _, line in rows(train_split) for label in line}
    if not names:
        raise UserError(f"data.hf_source={name}, split {train_split}: column {label_column!r} holds no labels")
    vocabulary = _Vocabulary(names)
    return Source(
        labels=[(name, name) for name in vocabulary.names],
        train=lambda: (Row(text, vocabulary.known(line)) for text, line in rows(train_split)),
        test=lambda: _test_rows(rows(test_split), vocabulary),
        files=files,
        identity=json.dumps([train_split, test_split, text_column, label_column])
        + ("" if files else "".join(split._fingerprint for split in splits.values())),
    )


def _load_split(name: str, split: str) -> tuple[datasets.Dataset, list[Path]]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        for suffix, kind in ((".parquet", "parquet"), (".jsonl", "json")):
            file = folder / f"{split}{suffix}"
            if file.is_file():
                try:
                    return datasets.load_dataset(kind, data_files=str(file), split="train"), [file]
                except datasets.exceptions.DatasetGenerationError as error:
                    raise UserError(f"{file}: cannot be read ({error.__cause__ or error})") from None
        saved = folder / split
        if (saved / "state.json").is_file():
            return datasets.load_from_disk(str(saved)), sorted(path for path in saved.iterdir() if path.is_file())
        raise UserError(
            f"data.hf_source={name}: the folder has no {split}.parquet, {split}.jsonl or saved data set {split}/; "
            "set data.hf_train_split and data.hf_test_split"
        )
    try:
        return datasets.load_dataset(name, split=split), []
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.hf_source={name}: neither a folder nor a reachable hub data set ({reason})") from None


def group_pairs(pairs: list[tuple[int, int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (row, label) pairs -> label ids int32 [P] and offsets int64 [rows + 1]."""
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    counts = np.bincount(array[:, 0], minlength=rows)
    return array[:, 1].astype(np.int32), np.concatenate([[0], np.cumsum(counts)])
