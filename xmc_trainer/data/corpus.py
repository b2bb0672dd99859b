"""The corpus: a source, tokenised once, as memory-mapped Arrow files that are found again by content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from xmc_trainer.data.sources import Contents, Ragged, Row, Source, lf_source, raw_source
from xmc_trainer.data.sources import hf_source as open_hf
from xmc_trainer.data.texts import encode_texts
from xmc_trainer.errors import UserError

logger = logging.getLogger(__name__)

# Changes whenever the files of the cache change their meaning.
_CACHE_FORMAT = 3
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
_ROWS_A_BATCH = 2000
_MOST_PROCESSES = 16


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
    places: np.ndarray | None = None  # int32 [L]: where each label number of train and test stands in `labels`; None: there

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

    Args:
        folder: of layout "raw" or "lf"; "hf" reads `hf_source` instead (see `xmc_trainer.data.sources`).
        label_text_file, test_split: layout "raw" only.
        augment_label_data: layout "lf", or "raw" with a label_text_file.
        use_filter_eval: layout "lf" only.
        max_len: tokens a text is cut to.
        num_labels: what the data must say; None: anything.
        progress: show progress bars.
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
    target = Path(cache_dir).expanduser() / fingerprint
    if not target.is_dir():
        contents = source.read()
        _check_num_labels(num_labels, len(contents.labels))
        with _progress_bars(progress):
            _build(target, contents, folder if layout != "hf" else hf_source, tokenizer, max_len)
    train, test, labels = (datasets.load_from_disk(str(target / name)) for name in ("train", "test", "labels"))
    _check_num_labels(num_labels, len(labels))
    filter_pairs = None
    if (target / "filter_ids.npy").is_file():
        filter_pairs = Ragged(np.load(target / "filter_ids.npy"), np.load(target / "filter_offsets.npy"))
    return Corpus(
        train=train,
        test=test,
        labels=labels,
        filter_pairs=filter_pairs,
        fingerprint=fingerprint,
        texts=int((target / "texts").read_text()),
    )


def _check_num_labels(wanted: int | None, found: int) -> None:
    if wanted not in (None, found):
        raise UserError(f"data.num_labels={wanted}: the data have {found} labels; correct it, or set it to null")


def _fingerprint(source: Source, layout: str, tokenizer: PreTrainedTokenizerBase, max_len: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(
        json.dumps([_CACHE_FORMAT, layout, source.identity, max_len, _tokenizer_identity(tokenizer)]).encode()
    )
    for path in source.files:
        try:
            with open(path, "rb") as file:
                digest.update(f"\0{path.name}\0{os.fstat(file.fileno()).st_size}\0".encode())
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


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hides the bars of the datasets library, which has one switch for all of a process."""
    hide = not shown and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _build(
    target: Path, contents: Contents, origin: Path | str, tokenizer: PreTrainedTokenizerBase, max_len: int
) -> None:
    """Write the cache folder `target`, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Its name is unique, so processes that build the same corpus at once do not meet before the end.
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"data.cache_dir={target.parent}: {error.strerror}; name a folder that can be written"
        ) from None
    try:
        partial.chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp's is for one user only
        sizes = {}
        for split, rows in (("train", contents.train()), ("test", contents.test())):
            sizes[split] = _tokenise(partial, split, rows, tokenizer, max_len)
            if not sizes[split]:
                raise UserError(f"{origin}: the {split} set has no texts with labels; check its files")
        (partial / "texts").write_text(str(sizes["train"] - contents.augmented))
        table = {"id": [name for name, _ in contents.labels], "text": [text for _, text in contents.labels]}
        Dataset.from_dict(table).save_to_disk(str(partial / "labels"))
        if contents.filter_pairs is not None:
            np.save(partial / "filter_ids.npy", contents.filter_pairs.ids)
            np.save(partial / "filter_offsets.npy", contents.filter_pairs.offsets)
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # else another process was faster with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenise(folder: Path, split: str, rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int) -> int:
    """Stream rows to disk and tokenise them in parallel from there into `folder / split`; returns their number."""
    raw = folder / f"{split}.arrow"
    schema = pa.schema([("text", pa.large_string()), ("labels", pa.list_(pa.int32()))])
    with pa.OSFile(str(raw), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, _ROWS_A_BATCH)):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*batch), schema)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    stream = Dataset.from_file(str(raw))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = encode_texts(tokenizer, batch["text"], max_len)
        return {"input_ids": ids, "labels": batch["labels"], "length": [len(row) for row in ids]}

    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)), len(stream) // _ROWS_A_BATCH)
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
