"""The corpus: a source, tokenised once, as memory-mapped Arrow files that are found again by content.

A folder of the cache, named by the fingerprint, holds train.arrow, test.arrow, labels.arrow, filter_ids.npy and
filter_offsets.npy (if there are pairs to leave out), and manifest.json with their hashes.
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
from xmc_trainer.data.hugging_face import hf_source as open_hf
from xmc_trainer.data.sources import Contents, Ragged, Row, Source, lf_source, raw_source
from xmc_trainer.data.tokenise import ROWS_A_BATCH, tokenised
from xmc_trainer.errors import UserError, reason

logger = logging.getLogger(__name__)

# Changes whenever the files of the cache change their meaning.
_CACHE_FORMAT = 4
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
_LABEL_FEATURES = Features({"id": Value("string"), "text": Value("string")})


@dataclass(frozen=True)
class Corpus:
    """A tokenised data set.

    Attributes:
        train, test: columns input_ids (int32, special tokens included, cut to max_len, unpadded), labels (int32,
            ascending; see `places`) and length (tokens).
        labels: columns id and text, one row a label, in the order in which the head holds them.
        filter_pairs: labels to leave out of the ranking of each test row; None: nothing to leave out.
        fingerprint: hash of the source files' content, how they are read, and the tokenizer.
    """

    train: Dataset
    test: Dataset
    labels: Dataset
    filter_pairs: Ragged | None
    fingerprint: str
    texts: int  # real training texts: rows made from label texts come after them
    places: np.ndarray | None = (
        None  # int32 [L]: where each label number of train and test stands in `labels`; None: there
    )

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def label_order(self) -> str:
        """Hash of the labels' ids, in the order in which the head holds them."""
        digest = hashlib.sha256()
        for label in self.labels["id"]:
            digest.update(f"{label}\n".encode())
        return digest.hexdigest()

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of every text of "train" or "test", int32."""
        return getattr(self, split).data.column("length").to_numpy()

    def label_counts(self) -> np.ndarray:
        """Real training texts of every label, int64 [num_labels]."""
        counts = np.zeros(self.num_labels, dtype=np.int64)
        for chunk in self.train.data.column("labels").slice(0, self.texts).chunks:
            np.add.at(counts, chunk.flatten().to_numpy().astype(np.int64), 1)
        if self.places is None:
            return counts
        placed = np.empty_like(counts)
        placed[self.places] = counts
        return placed

    def log_frequency(self) -> np.ndarray:
        """log of how many more training texts a label has than the average one, float32 [num_labels]; without any it counts half."""
        counts = self.label_counts()
        return np.log(np.maximum(counts, 0.5) / counts.mean()).astype(np.float32)

    def train_labels(self) -> Ragged:
        """The labels of every training row."""
        return self._placed(flatten_lists(self.train.data.column("labels")))

    def test_labels(self) -> Ragged:
        """The labels of every test text."""
        return self._placed(flatten_lists(self.test.data.column("labels")))

    def _placed(self, labels: Ragged) -> Ragged:
        return labels if self.places is None else Ragged(self.places[labels.ids], labels.offsets)

    def reordered(self, order: np.ndarray) -> Corpus:
        """The same data with the labels in another order: `order` [L] gives for each new place the present one."""
        moved = np.empty(len(order), dtype=np.int32)
        moved[order] = np.arange(len(order), dtype=np.int32)
        pairs = self.filter_pairs
        return dataclasses.replace(
            self,
            labels=self.labels.select(order),
            filter_pairs=None if pairs is None else Ragged(moved[pairs.ids], pairs.offsets),
            places=moved if self.places is None else moved[self.places],
        )


def flatten_lists(column: pa.ChunkedArray) -> Ragged:
    """An Arrow list column as numpy arrays, without Python lists in between."""
    counts = [chunk.value_lengths().to_numpy() for chunk in column.chunks]
    ids = [chunk.flatten().to_numpy() for chunk in column.chunks]
    offsets = np.zeros(len(column) + 1, dtype=np.int64)
    if counts:
        np.cumsum(np.concatenate(counts), out=offsets[1:])
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
    test_split: str = "test",
    augment_label_data: bool = False,
    use_filter_eval: bool = False,
    num_labels: int | None = None,
    progress: bool = True,
) -> Corpus:
    """The tokenised data set, from the cache if the same content was tokenised the same way before.

    What is in the cache is verified, and made again if it is damaged.

    Args:
        folder: of layout "raw" or "lf"; "hf" reads `hf_source` instead (see `xmc_trainer.data.sources`).
        label_text_file, test_split: layout "raw" only.
        augment_label_data: layout "lf", or "raw" with a label_text_file.
        use_filter_eval: layout "lf" only.
        max_len: tokens a text is cut to.
        num_labels: what the data must say; None: anything.
        progress: show progress bars, and say what the source noticed: empty texts, unused label texts and the like.
    Raises UserError for whatever is wrong with the files; the cache then stays as it was.
    """
    folder = Path(folder)
    if layout == "raw":
        source = raw_source(folder, label_text_file, augment_label_data, test_split)
    elif layout == "lf":
        source = lf_source(folder, augment_label_data, use_filter_eval)
    elif layout == "hf" and hf_source:
        source = open_hf(hf_source, hf_train_split, hf_test_split, text_column, label_column)
    else:
        raise ValueError(f"layout={layout!r}, hf_source={hf_source!r}: choose raw, lf, or hf with hf_source")
    fingerprint = _fingerprint(source, layout, tokenizer, max_len)

    def make(part: Path) -> None:
        contents = source.read()
        _check_num_labels(num_labels, len(contents.labels))
        _build(part, contents, folder if layout != "hf" else hf_source, tokenizer, max_len, progress)

    corpus, notes = _open_or_make(_cache_folder(cache_dir) / fingerprint, make)
    _check_num_labels(num_labels, corpus.num_labels)
    if progress:
        for note in notes:
            logger.warning("%s", note)
    return corpus


def _cache_folder(name: str | Path) -> Path:
    try:
        folder = Path(name).expanduser()
        os.path.realpath(folder)
    except (RuntimeError, ValueError) as error:  # ~ of a user that there is not; a zero byte, half a surrogate pair
        raise UserError(f"data.cache_dir={name}: no name of a folder ({error}); name another") from None
    return folder


def _open_or_make(target: Path, make: Callable[[Path], None]) -> tuple[Corpus, list[str]]:
    """The corpus in the cache folder `target`, and what its source had to say. `make` fills an empty folder with it."""
    with suppress(Damaged):
        return _open(target)
    try:
        with locked(target):
            try:
                return _open(target)  # another process made it meanwhile
            except Damaged as error:
                if os.path.lexists(target):
                    logger.warning("%s; the texts are tokenised again", error)
            with making(target) as part:
                make(part)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={target.parent}: cannot be written ({error.strerror or reason(error)}); name a folder that "
            "can be written and has room"
        ) from None
    try:
        return _open(target)
    except Damaged as error:
        raise UserError(
            f"data.cache_dir={target.parent}: {error}, just after it was written; name a folder on another disk"
        ) from None


def _open(folder: Path) -> tuple[Corpus, list[str]]:
    """What `_build` wrote. Raises Damaged if it is not all there as it was written."""
    facts = unseal(folder)
    train, test, labels = (Dataset.from_file(str(folder / f"{name}.arrow")) for name in ("train", "test", "labels"))
    filter_pairs = None
    if (folder / "filter_ids.npy").is_file():
        filter_pairs = Ragged(np.load(folder / "filter_ids.npy"), np.load(folder / "filter_offsets.npy"))
    return Corpus(train, test, labels, filter_pairs, fingerprint=folder.name, texts=facts["texts"]), facts["notes"]


def _check_num_labels(wanted: int | None, found: int) -> None:
    if wanted not in (None, found):
        raise UserError(f"data.num_labels={wanted}: the data have {found} labels; correct it, or set it to null")


def _fingerprint(source: Source, layout: str, tokenizer: PreTrainedTokenizerBase, max_len: int) -> str:
    digest = xxhash.xxh3_128()  # at the speed of memory: every start reads all files
    digest.update(
        json.dumps([_CACHE_FORMAT, layout, source.identity, max_len, _tokenizer_identity(tokenizer)]).encode()
    )
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
    """A tokenizer is what it does: the name of its folder or hub id says nothing about its content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [tokenizer.get_vocab(), {name: str(value) for name, value in tokenizer.init_kwargs.items()}]
    else:
        # Truncation and padding are what it was last called with.
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    return [type(tokenizer).__name__, tokenizer.truncation_side, content]


def _build(
    folder: Path,
    contents: Contents,
    origin: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    progress: bool,
) -> None:
    """Write everything that the cache keeps of a data set into an empty folder."""
    sizes = {}
    for split, rows in (("train", contents.train()), ("test", contents.test())):
        with tqdm(desc=f"tokenise {split}", unit="text", disable=not progress) as bar:
            sizes[split] = _write_tokens(folder / f"{split}.arrow", rows, tokenizer, max_len, bar)
        if not sizes[split]:
            raise UserError(f"{origin}: the {split} set has no texts with labels; check its files")
    with _arrow_writer(folder / "labels.arrow", _LABEL_FEATURES.arrow_schema) as writer:
        for start in range(0, len(contents.labels), ROWS_A_BATCH):
            columns = [pa.array(column) for column in zip(*contents.labels[start : start + ROWS_A_BATCH])]
            writer.write_batch(pa.record_batch(columns, schema=_LABEL_FEATURES.arrow_schema))
    if contents.filter_pairs is not None:
        np.save(folder / "filter_ids.npy", contents.filter_pairs.ids)
        np.save(folder / "filter_offsets.npy", contents.filter_pairs.offsets)
    seal(folder, {"texts": sizes["train"] - contents.augmented, "notes": list(contents.notes.values())})


@contextmanager
def _arrow_writer(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        yield writer


def _write_tokens(path: Path, rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int, bar: tqdm) -> int:
    """Tokenise rows as they come into an Arrow file; returns their number."""
    written = 0
    waiting: list[tuple[Ragged, list[list[int]]]] = []
    with _arrow_writer(path, _FEATURES.arrow_schema) as writer:
        for tokens, labels in tokenised(rows, tokenizer, max_len):
            waiting.append((tokens, labels))
            written += len(labels)
            bar.update(len(labels))
            # Batches of long texts have few rows, and a file of many small record batches is slow to read.
            if sum(len(labels) for _, labels in waiting) >= ROWS_A_BATCH:
                writer.write_batch(_record_batch(waiting))
                waiting = []
        if waiting:
            writer.write_batch(_record_batch(waiting))
    return written


def _record_batch(parts: list[tuple[Ragged, list[list[int]]]]) -> pa.RecordBatch:
    lengths = np.concatenate([np.diff(tokens.offsets) for tokens, _ in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = [
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([tokens.ids for tokens, _ in parts]))),
        pa.array(list(chain.from_iterable(labels for _, labels in parts)), pa.list_(pa.int32())),
        pa.array(lengths.astype(np.int32)),
    ]
    return pa.record_batch(columns, schema=_FEATURES.arrow_schema)
