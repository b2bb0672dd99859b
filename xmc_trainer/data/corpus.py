"""The corpus: a source tokenised once into memory-mapped Arrow files, which are cached by content.

A cache folder is named by the corpus's fingerprint. It holds train.arrow, test.arrow, labels.arrow, manifest.json with
their hashes; filter_ids.npy and filter_offsets.npy if the source has filter pairs; and split.npz if it holds texts out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, List, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from xmc_trainer.data.cache import Damaged, locked, making, seal, unseal
from xmc_trainer.data.sources import Contents, Ragged, Row, Source, check_num_labels, no_texts
from xmc_trainer.data.texts import instruction_of
from xmc_trainer.data.tokenise import ROWS_PER_BATCH, tokenised
from xmc_trainer.errors import UserError, reason

logger = logging.getLogger(__name__)

# Increase when the meaning of the cached files changes.
_CACHE_FORMAT = 4
_AT_ONCE = 1 << 24  # labels that are counted at once
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
_LABEL_FEATURES = Features({"id": Value("string"), "text": Value("string")})


@dataclass(frozen=True)
class Corpus:
    """A tokenised data set.

    Attributes:
        train, test: columns input_ids (int32, with special tokens, truncated to max_len, unpadded), labels (int32,
            ascending; see `places`) and length (int32, tokens). In `test`, labels that training lacks have the numbers
            from `num_labels` on.
        labels: columns id and text, one row per label, in the head's label order.
        filter_pairs: labels to exclude from the ranking of each test row, or None.
        fingerprint: hash of the source files' content, the reading options and the tokenizer.
        unseen_labels: labels of `test` that training lacks.
        texts: training texts. The rows of `train` after them are made from label texts.
        split_file: which rows of the source are in which part, as `data.split.Split.save` writes it; None if its files say that.
        former_fingerprint: computes the fingerprint that checkpoints until November 2026 have, by a slower hash.
        places: int32 [L + unseen_labels], label number in `train` and `test` -> row of `labels`, or the same number from L
            on. None: they are equal.
    """

    train: Dataset
    test: Dataset
    labels: Dataset
    filter_pairs: Ragged | None
    fingerprint: str
    texts: int
    unseen_labels: int = 0
    places: np.ndarray | None = None
    split_file: Path | None = None
    former_fingerprint: Callable[[], str] | None = None

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def label_ids(self) -> list[str]:
        """Return the id of each label. Reading `labels["id"]` takes many times as long."""
        return self.labels.with_format("arrow")[:].column("id").to_pylist()

    @functools.cached_property
    def label_order(self) -> str:
        """Hash of the label ids in the head's label order."""
        return hashlib.sha256("".join(f"{label}\n" for label in self.label_ids()).encode()).hexdigest()

    def lengths(self, split: str) -> np.ndarray:
        """Return the number of tokens of each text, int32 [texts]. `split` is "train" or "test"."""
        return getattr(self, split).data.column("length").to_numpy()

    def label_counts(self) -> np.ndarray:
        """Count the training texts of each label, int64 [L], without rows made from label texts."""
        counts = np.zeros(self.num_labels, dtype=np.int64)
        labels = flatten_lists(self.train.data.column("labels").slice(0, self.texts)).ids
        for first in range(0, len(labels), _AT_ONCE):
            counts += np.bincount(labels[first : first + _AT_ONCE], minlength=self.num_labels)
        if self.places is None:
            return counts
        placed = np.empty_like(counts)
        placed[self.places[: self.num_labels]] = counts
        return placed

    def log_frequency(self) -> np.ndarray:
        """Return log(training texts / mean over labels) of each label, float32 [L]. 0 texts count as 0.5."""
        counts = self.label_counts()
        return np.log(np.maximum(counts, 0.5) / counts.mean()).astype(np.float32)

    def train_labels(self) -> Ragged:
        """Return the labels of each training row, as rows of `labels`."""
        return self._placed(flatten_lists(self.train.data.column("labels")))

    def test_labels(self, unseen: bool = False) -> Ragged:
        """Return the labels of each test row, as rows of `labels`. Args: unseen: with the numbers of labels that training lacks."""
        labels = self._placed(flatten_lists(self.test.data.column("labels")))
        return labels if unseen else labels.below(self.num_labels)

    def test_rows(self, unseen: bool = False) -> np.ndarray:
        """Return the rows of `test` to evaluate, int64. Without `unseen`, rows that have only labels that training lacks are left out."""
        every = np.diff(self.test_labels(unseen=True).offsets)
        return np.flatnonzero(unseen | (every == 0) | (np.diff(self.test_labels().offsets) > 0))

    def _placed(self, labels: Ragged) -> Ragged:
        return labels if self.places is None else Ragged(self.places[labels.ids], labels.offsets)

    def reordered(self, order: np.ndarray) -> Corpus:
        """Return the same data with the labels reordered: new label i is the old label order[i]. `order`: int [L]."""
        new_place = np.arange(len(order) + self.unseen_labels, dtype=np.int32)
        new_place[order] = np.arange(len(order), dtype=np.int32)
        pairs = self.filter_pairs
        return dataclasses.replace(
            self,
            labels=self.labels.select(order),
            filter_pairs=None if pairs is None else Ragged(new_place[pairs.ids], pairs.offsets),
            places=new_place if self.places is None else new_place[self.places],
        )


def flatten_lists(column: pa.ChunkedArray) -> Ragged:
    """Convert an Arrow list column to numpy arrays without Python lists."""
    counts = [chunk.value_lengths().to_numpy() for chunk in column.chunks]
    ids = [chunk.flatten().to_numpy() for chunk in column.chunks]
    offsets = np.zeros(len(column) + 1, dtype=np.int64)
    if counts:
        np.cumsum(np.concatenate(counts), out=offsets[1:])
    return Ragged(np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32), offsets)


def load_corpus(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    cache_dir: str | Path,
    num_labels: int | None = None,
    progress: bool = True,
) -> Corpus:
    """Tokenise a data set, or open it from the cache if the same content was tokenised the same way before.

    A cache entry is verified, and written again if it is damaged.

    Args:
        source: as `xmc_trainer.data.open_source` returns it.
        max_len: maximal number of tokens per text.
        num_labels: the expected number of labels; None accepts any.
        progress: show progress bars, and log the source's warnings: empty texts, unused label texts and so on.
    Raises UserError for defects of the files and leaves the cache unchanged.
    """
    fingerprint_by = functools.partial(_fingerprint, source, [max_len, _tokenizer_identity(tokenizer)])
    fingerprint = fingerprint_by(xxhash.xxh3_128)  # at the speed of memory, because every start reads all files

    def make(part: Path) -> None:
        contents = source.read()
        check_num_labels(num_labels, len(contents.labels))
        if contents.split is not None:
            contents.split._replace(made_for=fingerprint_of(source)).save(part / "split.npz")
        _build(part, source, contents, tokenizer, max_len, progress)

    corpus, notes = _open_or_make(_cache_folder(cache_dir) / fingerprint, make)
    check_num_labels(num_labels, corpus.num_labels)
    if progress:
        for note in notes:
            logger.warning("%s", note)
    former = functools.partial(fingerprint_by, functools.partial(hashlib.blake2b, digest_size=16))
    return dataclasses.replace(corpus, former_fingerprint=former)


def _cache_folder(name: str | Path) -> Path:
    try:
        folder = Path(name).expanduser()
        os.path.realpath(folder)
    except (RuntimeError, ValueError) as error:  # ~ names an unknown user; a zero byte or a lone surrogate
        raise UserError(f"`cache_dir`={name}: is not a valid folder name ({error}); name another") from None
    return folder


def _open_or_make(target: Path, make: Callable[[Path], None]) -> tuple[Corpus, list[str]]:
    """Open the cache entry `target`, after writing it if needed. Returns the corpus and its source's notes.

    Args:
        make: writes the entry into an empty folder.
    """
    with suppress(Damaged):
        return _open(target)
    try:
        with locked(target):
            try:
                return _open(target)  # another process may have written it meanwhile
            except Damaged as error:
                if os.path.lexists(target):
                    logger.warning("%s; the texts are tokenised again", error)
            with making(target) as part:
                make(part)
    except OSError as error:
        raise UserError(
            f"`cache_dir`={target.parent}: cannot be written ({error.strerror or reason(error)}); name a writable "
            "folder with enough space"
        ) from None
    try:
        return _open(target)
    except Damaged as error:
        raise UserError(
            f"`cache_dir`={target.parent}: {error} just after it was written; name a folder on another disk"
        ) from None


def _open(folder: Path) -> tuple[Corpus, list[str]]:
    """Open an entry that `_build` wrote. Raises Damaged if it is missing or differs from what was written."""
    facts = unseal(folder)
    if "unseen_labels" not in facts:
        raise Damaged(f"{folder} was written by an earlier version")
    train, test, labels = (Dataset.from_file(str(folder / f"{name}.arrow")) for name in ("train", "test", "labels"))
    filter_pairs = None
    if (folder / "filter_ids.npy").is_file():
        filter_pairs = Ragged(np.load(folder / "filter_ids.npy"), np.load(folder / "filter_offsets.npy"))
    split_file = folder / "split.npz" if (folder / "split.npz").is_file() else None
    corpus = Corpus(
        train,
        test,
        labels,
        filter_pairs,
        fingerprint=folder.name,
        texts=facts["texts"],
        unseen_labels=facts["unseen_labels"],
        split_file=split_file,
    )
    return corpus, facts["notes"]


def fingerprint_of(source: Source) -> str:
    """Return a hash of the source's files and reading options. It reads all files."""
    return _fingerprint(source, [], xxhash.xxh3_128)


def _fingerprint(source: Source, use: list[Any], new_digest: Callable[[], Any]) -> str:
    digest = new_digest()
    digest.update(json.dumps([_CACHE_FORMAT, source.layout, source.identity, *use]).encode())
    for path in source.files:
        try:
            with open(path, "rb") as file:
                digest.update(b"\0%b\0%d\0" % (os.fsencode(path.name), os.fstat(file.fileno()).st_size))
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return digest.hexdigest()


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return the tokenizer's content. Its folder or hub id would not do: the files behind a name can change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [tokenizer.get_vocab(), {name: str(value) for name, value in tokenizer.init_kwargs.items()}]
    else:
        # Truncation and padding are left over from the last call.
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    instruction = instruction_of(tokenizer)
    return [type(tokenizer).__name__, tokenizer.truncation_side, content, *([instruction] if instruction else [])]


def _build(
    folder: Path,
    source: Source,
    contents: Contents,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    progress: bool,
) -> None:
    """Write a data set's cache entry into an empty folder."""
    sizes = {}
    for split, rows in (("train", contents.train()), ("test", contents.test())):
        with tqdm(desc=f"tokenise {split}", unit="text", disable=not progress) as bar:
            sizes[split] = _write_tokens(folder / f"{split}.arrow", rows, tokenizer, max_len, bar)
        labels = flatten_lists(Dataset.from_file(str(folder / f"{split}.arrow")).data.column("labels"))
        if not sizes[split] or not len(labels.below(len(contents.labels)).ids):
            raise no_texts(source, split)
    unseen = int(labels.ids.max(initial=0)) + 1 - len(contents.labels)  # of the test set
    with _arrow_writer(folder / "labels.arrow", _LABEL_FEATURES.arrow_schema) as writer:
        for start in range(0, len(contents.labels), ROWS_PER_BATCH):
            columns = [pa.array(column) for column in zip(*contents.labels[start : start + ROWS_PER_BATCH])]
            writer.write_batch(pa.record_batch(columns, schema=_LABEL_FEATURES.arrow_schema))
    if contents.filter_pairs is not None:
        np.save(folder / "filter_ids.npy", contents.filter_pairs.ids)
        np.save(folder / "filter_offsets.npy", contents.filter_pairs.offsets)
    facts = {"texts": sizes["train"] - contents.augmented, "unseen_labels": max(unseen, 0)}
    seal(folder, facts | {"notes": list(contents.notes.values())})


@contextmanager
def _arrow_writer(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        yield writer


def _write_tokens(path: Path, rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int, bar: tqdm) -> int:
    """Tokenise a stream of rows into an Arrow file. Returns the number of rows."""
    written = 0
    waiting: list[tuple[Ragged, list[list[int]]]] = []
    with _arrow_writer(path, _FEATURES.arrow_schema) as writer:
        for tokens, labels in tokenised(rows, tokenizer, max_len):
            waiting.append((tokens, labels))
            written += len(labels)
            bar.update(len(labels))
            # Batches of long texts have few rows; combine them, because many small record batches are slow to read.
            if sum(len(labels) for _, labels in waiting) >= ROWS_PER_BATCH:
                writer.write_batch(_record_batch(waiting))
                waiting = []
        if waiting:
            writer.write_batch(_record_batch(waiting))
    return written


def _record_batch(parts: list[tuple[Ragged, list[list[int]]]]) -> pa.RecordBatch:
    lengths = np.concatenate([np.diff(tokens.offsets) for tokens, _ in parts])
    columns = [
        _list_array(np.concatenate([tokens.ids for tokens, _ in parts]), lengths),
        _list_array(
            np.fromiter(chain.from_iterable(chain.from_iterable(labels for _, labels in parts)), np.int32),
            np.fromiter((len(row) for _, labels in parts for row in labels), np.int64),
        ),
        pa.array(lengths.astype(np.int32)),
    ]
    return pa.record_batch(columns, schema=_FEATURES.arrow_schema)


def _list_array(ids: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Cut `ids`, int32, into lists of the given lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
