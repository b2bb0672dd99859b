"""The corpus: a source, tokenised once, as memory-mapped Arrow files that are found again by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from xmc_trainer.data.sources import Row, Source, group_pairs, lf_source, raw_source
from xmc_trainer.data.sources import hf_source as open_hf
from xmc_trainer.errors import UserError

logger = logging.getLogger(__name__)

# Changes whenever the files of the cache change their meaning.
_CACHE_FORMAT = 1
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
_ROWS_A_BATCH = 2000
_MOST_PROCESSES = 16


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: `ids` int32 [nnz], `offsets` int64 [rows + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def rows(self, rows: np.ndarray) -> Ragged:
        """The rows of these numbers, in this order."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        place = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], counts)
        return Ragged(self.ids[place], offsets)


@dataclass(frozen=True)
class Corpus:
    """A tokenised data set.

    Attributes:
        train, test: columns input_ids (int32, special tokens included, cut to max_len, unpadded), labels (int32,
            ascending) and length (tokens).
        labels: columns id and text, one row a label.
        filter_pairs: labels to leave out of the ranking of each test row; None: nothing to leave out.
    """

    train: Dataset
    test: Dataset
    labels: Dataset
    filter_pairs: Ragged | None

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of every text of "train" or "test", int32."""
        return getattr(self, split).data.column("length").to_numpy()

    def label_counts(self) -> np.ndarray:
        """Training texts of every label, int64 [num_labels]."""
        counts = np.zeros(self.num_labels, dtype=np.int64)
        for chunk in self.train.data.column("labels").chunks:
            counts += np.bincount(chunk.flatten().to_numpy(), minlength=self.num_labels)
        return counts

    def test_labels(self) -> Ragged:
        """The labels of every test text."""
        return flatten_lists(self.test.data.column("labels"))


def flatten_lists(column: pa.ChunkedArray) -> Ragged:
    """An Arrow list column as numpy arrays, without Python lists in between."""
    counts = column.combine_chunks().value_lengths().to_numpy() if len(column) else np.zeros(0, dtype=np.int64)
    ids = [chunk.flatten().to_numpy() for chunk in column.chunks]
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Ragged(np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32), offsets)


def load_corpus(
    *,
    folder: Path,
    layout: str,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    cache_dir: str | Path,
    hf_source: str | None = None,
    hf_train_split: str = "train",
    hf_test_split: str = "test",
    text_column: str = "text",
    label_column: str = "labels",
    label_text_file: str | None = None,
    augment_label_data: bool = False,
    use_filter_eval: bool = False,
    num_labels: int | None = None,
    progress: bool = True,
) -> Corpus:
    """The tokenised data set, from the cache if the same content was tokenised the same way before.

    Args:
        folder: of layout "raw" or "lf"; "hf" reads `hf_source` instead (see `xmc_trainer.data.sources`).
        max_len: tokens a text is cut to.
        num_labels: what the data must say; None: anything.
        progress: show progress bars.
    Raises UserError for whatever is wrong with the files; the cache then stays as it was.
    """
    if layout == "raw":
        source = raw_source(folder, label_text_file)
    elif layout == "lf":
        source = lf_source(folder, augment_label_data, use_filter_eval)
    else:
        source = open_hf(hf_source, hf_train_split, hf_test_split, text_column, label_column)
    if num_labels not in (None, len(source.labels)):
        raise UserError(
            f"data.num_labels={num_labels}: the data have {len(source.labels)} labels; correct it or remove it"
        )
    options = [_CACHE_FORMAT, layout, augment_label_data, use_filter_eval, label_text_file, max_len, source.identity]
    target = Path(cache_dir).expanduser() / _fingerprint(source.files, options, tokenizer)
    if not target.is_dir():
        _build(target, source, tokenizer, max_len, progress)
    filter_pairs = None
    if source.filter_pairs is not None:
        with np.load(target / "filter_pairs.npz") as arrays:
            filter_pairs = Ragged(arrays["ids"], arrays["offsets"])
    train, test, labels = (datasets.load_from_disk(str(target / name)) for name in ("train", "test", "labels"))
    return Corpus(train=train, test=test, labels=labels, filter_pairs=filter_pairs)


def _fingerprint(files: list[Path], options: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.blake2b(json.dumps(options).encode(), digest_size=16)
    for path in files:
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    # A tokenizer is what it does: the name of its folder or hub id says nothing about its content.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(f"\0{type(tokenizer).__name__}\0{identity}".encode())
    return digest.hexdigest()


def _build(target: Path, source: Source, tokenizer: PreTrainedTokenizerBase, max_len: int, progress: bool) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={target.parent}: {error.strerror}") from None
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    try:
        sizes = {}
        for split, rows in (("train", source.train()), ("test", source.test())):
            sizes[split] = _tokenise(partial, split, rows, tokenizer, max_len)
        if not sizes["train"] or not sizes["test"]:
            empty = "training" if not sizes["train"] else "test"
            raise UserError(
                f"{source.files[0].parent if source.files else 'data.hf_source'}: the {empty} set has no texts"
            )
        table = {"id": [name for name, _ in source.labels], "text": [text for _, text in source.labels]}
        Dataset.from_dict(table).save_to_disk(str(partial / "labels"))
        if source.filter_pairs is not None:
            ids, offsets = group_pairs(source.filter_pairs, sizes["test"])
            np.savez(partial / "filter_pairs.npz", ids=ids, offsets=offsets)
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # else another process was faster with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenise(folder: Path, split: str, rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int) -> int:
    """Stream rows to disk, tokenise them in parallel from there; returns their number."""
    raw = folder / f"{split}.arrow"
    schema = pa.schema([("text", pa.string()), ("labels", pa.list_(pa.int32()))])
    with pa.OSFile(str(raw), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batched(rows):
            columns = [
                pa.array([row.text for row in batch]),
                pa.array([row.labels for row in batch], schema.field(1).type),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    stream = Dataset.from_file(str(raw))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            batch["text"], truncation=True, max_length=max_len, return_attention_mask=False, return_token_type_ids=False
        )
        ids = encoded["input_ids"]
        return {"input_ids": ids, "labels": batch["labels"], "length": [len(row) for row in ids]}

    processes = min(_MOST_PROCESSES, os.cpu_count() or 1, len(stream) // _ROWS_A_BATCH)
    tokenised = stream.map(
        encode,
        batched=True,
        batch_size=_ROWS_A_BATCH,
        writer_batch_size=_ROWS_A_BATCH,
        remove_columns=["text", "labels"],
        features=_FEATURES,
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(folder / f"{split}_tokens.arrow"),
        desc=f"tokenise {split}",
    )
    tokenised.save_to_disk(str(folder / split))
    size = len(tokenised)
    del stream, tokenised
    for file in folder.glob(f"{split}*.arrow"):
        file.unlink()
    return size


def _batched(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_A_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
