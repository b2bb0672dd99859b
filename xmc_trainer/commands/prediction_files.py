"""Files of texts that `xmc-trainer predict` reads, and files of predictions that it writes, both as streams."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from xmc_trainer.errors import UserError, reason

if TYPE_CHECKING:
    from xmc_trainer.checkpoint.model_manifest import ModelFacts
    from xmc_trainer.model import XMCModel

_ROWS_PER_READ = 2000
# Extension -> format of the output.
EXTENSIONS = {".jsonl": "jsonl", ".json": "jsonl", ".tsv": "tsv", ".csv": "csv", ".npz": "npz", ".parquet": "parquet"}


# Reading ---------------------------------------------------------------------------------------------------------------


def has_columns(path: str) -> bool:
    """Tell files with a column or field of texts from those with one text per line, by their name."""
    from xmc_trainer.data.tables import is_table

    return is_table(Path(path)) or path.endswith((".jsonl", ".json", ".parquet"))


def read_texts(path: str, text_column: str = "text") -> Iterator[str]:
    """Yield the texts of the input, decoded like training files. Raises UserError that names a faulty line.

    A file whose name ends in .csv, .tsv (both also with .gz), .jsonl, .json or .parquet has a column or field `text_column`; any
    other file, and "-" for standard input, has one text per line.
    """
    from xmc_trainer.data import tables
    from xmc_trainer.data.texts import check_unicode

    if tables.is_table(Path(path)):
        rows: Iterator[tuple[str, dict[str, Any]]] = tables.table_records(Path(path), "", "")
    elif path.endswith(".parquet"):
        rows = _parquet_rows(path, text_column)
    else:
        yield from _lines(path, text_column)
        return
    for where, record in rows:
        if text_column not in record:
            found = ", ".join(record)
            raise UserError(f"{where}: has no column {text_column!r}, only {found}; name one with --text-column")
        text = record[text_column]
        if not isinstance(text, str):
            raise UserError(f"{where}: column {text_column!r} must hold strings; correct it, or set --text-column")
        check_unicode(text, where)
        yield text


def _lines(path: str, text_column: str) -> Iterator[str]:
    from xmc_trainer.data.texts import check_unicode, decoded_lines, json_object

    name = "standard input" if path == "-" else path
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            for number, line in decoded_lines(file, name):
                text: Any = line
                where = f"{name}, line {number}"
                if path.endswith((".jsonl", ".json")):
                    text = json_object(line, where).get(text_column)
                    if not isinstance(text, str):
                        raise UserError(
                            f"{where}: write an object with a string field {json.dumps(text_column)}, or set --text-column"
                        )
                    check_unicode(text, where)
                yield text
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); name another file") from None


def _parquet_rows(path: str, text_column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if text_column not in file.schema_arrow.names:
                yield path, dict.fromkeys(file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_PER_READ, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {text_column: text}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({reason(error)}); name another file") from None


def threshold(word: str) -> float | str:
    """Parse the argument --threshold: a number, or "fitted"."""
    try:
        if word == "fitted" or math.isfinite(float(word)):
            return word if word == "fitted" else float(word)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{word!r} must be a number or fitted")


def require_thresholds(folder: Path, facts: ModelFacts, limit: float | str | None) -> None:
    """Raise UserError if a model lacks the thresholds that --threshold asks for."""
    if limit == "fitted" and not facts.is_calibrated:
        raise UserError(f"{folder}: has no fitted thresholds; run xmc-trainer calibrate on it")


# Writing ---------------------------------------------------------------------------------------------------------------

# Write a chunk: texts, and for each text scores float32 [n, k], label numbers int64 [n, k], and which to write, bool [n, k].
Write = Callable[[list[str], np.ndarray, np.ndarray, np.ndarray], None]


class Writer(AbstractContextManager):
    """Writes predictions to a binary stream; `write` adds a chunk, and leaving the block ends the file.

    jsonl: {"text": ..., "labels": [{"id", "text", "score"}, ...]} on each line. parquet: the same columns.
    tsv, csv: one row for each predicted label, with a header: row (number of the text, from 1), rank, label, label_text, score, text.
    npz: scores as scipy.sparse.save_npz stores a CSR matrix: float32 [texts, labels], labels in the model's order.
    """

    def __init__(self, out: IO[bytes], form: str, model: XMCModel) -> None:
        self.model, self._stack = model, ExitStack()
        made = {
            "jsonl": self._jsonl,
            "tsv": self._table,
            "csv": self._table,
            "npz": self._npz,
            "parquet": self._parquet,
        }
        self.write: Write = made[form](out, form)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)

    def _jsonl(self, out: IO[bytes], form: str) -> Write:
        def write(texts: list[str], scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> None:
            for text, found in zip(texts, self.model.predictions(scores, labels, kept)):
                record = {"text": text, "labels": [label._asdict() for label in found]}
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            out.flush()

        return write

    def _table(self, out: IO[bytes], form: str) -> Write:
        lines = io.TextIOWrapper(out, "utf-8", newline="", write_through=True)
        self._stack.callback(lines.detach)
        table = csv.writer(lines, "excel-tab" if form == "tsv" else "excel", lineterminator="\n")
        table.writerow(["row", "rank", "label", "label_text", "score", "text"])
        rows = itertools.count(1)

        def write(texts: list[str], scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> None:
            for text, found, row in zip(texts, self.model.predictions(scores, labels, kept), rows):
                for rank, label in enumerate(found, 1):
                    table.writerow([row, rank, label.id, label.text, label.score, text])
            lines.flush()

        return write

    def _npz(self, out: IO[bytes], form: str) -> Write:
        # The header of an array holds its length, so the values wait on disk until the end.
        parts = {name: self._stack.enter_context(tempfile.TemporaryFile()) for name in ("indptr", "indices", "data")}
        rows = pairs = 0
        parts["indptr"].write(np.zeros(1, np.int64).tobytes())

        def write(texts: list[str], scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> None:
            nonlocal rows, pairs
            order = np.argsort(labels, axis=1)
            scores, labels, kept = (np.take_along_axis(x, order, 1) for x in (scores, labels, kept))
            parts["indptr"].write((pairs + np.cumsum(kept.sum(1, dtype=np.int64))).tobytes())
            parts["indices"].write(labels[kept].astype(np.int32).tobytes())
            parts["data"].write(scores[kept].astype(np.float32).tobytes())
            rows, pairs = rows + len(texts), pairs + int(kept.sum())

        def end(kind: Any, error: Any, trace: Any) -> None:
            if kind is not None:
                return
            form = {"indptr": ("<i8", rows + 1), "indices": ("<i4", pairs), "data": ("<f4", pairs)}
            small = {"format": np.array(b"csr"), "shape": np.array([rows, len(self.model.saved.label_ids)])}
            with zipfile.ZipFile(out, "w") as file:
                for name, value in small.items():
                    with file.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, value)
                for name, (dtype, length) in form.items():
                    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                        header = {"descr": dtype, "fortran_order": False, "shape": (length,)}
                        np.lib.format.write_array_header_1_0(member, header)
                        parts[name].seek(0)
                        shutil.copyfileobj(parts[name], member, 1 << 20)

        self._stack.push(end)
        return write

    def _parquet(self, out: IO[bytes], form: str) -> Write:
        import pyarrow as pa
        import pyarrow.parquet as pq

        label = pa.struct([("id", pa.string()), ("text", pa.string()), ("score", pa.float32())])
        schema = pa.schema([("text", pa.string()), ("labels", pa.list_(label))])
        file = pq.ParquetWriter(pa.PythonFile(out, "w"), schema)
        self._stack.callback(file.close)

        def write(texts: list[str], scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> None:
            found = [[each._asdict() for each in row] for row in self.model.predictions(scores, labels, kept)]
            file.write_table(pa.table([texts, found], schema=schema))

        return write
