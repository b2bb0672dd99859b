"""Look for what is odd in a data set, and describe it on a page."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from xmc_trainer.data.sources import Contents, Row
from xmc_trainer.errors import shown

_AT_ONCE = 1 << 20  # labels counted at once
_WIDTH = 40  # characters of the longest bar


class _Part(NamedTuple):
    texts: np.ndarray  # uint64 [texts], hash of each text
    rows: np.ndarray  # uint64 [texts], hash of each text and its labels
    counts: np.ndarray  # int64 [L], texts of each label
    unseen: np.ndarray  # int64, the same of labels that training lacks, which have the numbers from L on
    unlabelled: int


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def _survey(rows: Iterable[Row], num_labels: int) -> _Part:
    texts, with_labels, ids = array("Q"), array("Q"), array("i")
    counts, unlabelled = np.zeros(num_labels, np.int64), 0

    def count(ids: array, counts: np.ndarray) -> np.ndarray:
        found = np.bincount(np.array(ids, np.int32), minlength=len(counts))
        found[: len(counts)] += counts
        return found

    for text, labels in rows:
        texts.append(_hash(text))
        with_labels.append(xxhash.xxh3_64_intdigest(array("i", labels).tobytes(), seed=texts[-1]))
        unlabelled += not labels
        ids.extend(labels)
        if len(ids) >= _AT_ONCE:
            counts, ids = count(ids, counts), array("i")
    counts = count(ids, counts)
    hashes = np.array(texts, np.uint64), np.array(with_labels, np.uint64)
    return _Part(*hashes, counts[:num_labels], counts[num_labels:], unlabelled)


def page(contents: Contents, lengths: dict[str, np.ndarray], max_len: int) -> str:
    """Describe duplicates, labels with few or no texts, similar names, and lengths. It makes one pass over the rows.

    Memory is 16 bytes for a text, and the labels' names.

    Args:
        contents: of a source without rows made from label texts.
        lengths: "train" and "test" -> tokens of each text, at most `max_len`.
    """
    names = [name for name, _ in contents.labels]
    train = _survey(contents.train(), len(names))
    test = _survey(contents.test(), len(names))
    lines = [
        f"{len(train.texts):,} training texts, {len(test.texts):,} test texts, {len(names):,} labels; "
        f"{train.counts.sum() / max(len(train.texts), 1):.2f} labels for a training text, "
        f"{train.counts.sum() / max(len(names), 1):.1f} training texts for a label",
        "",
        *_repetitions(contents, train, test),
        *_labels(names, train, test),
        *_dropped(contents),
        "",
        "Texts by length in tokens (training)",
        *_histogram(lengths["train"], last=max_len),
        "",
        "Labels by number of training texts",
        *_histogram(train.counts),
    ]
    return "\n".join(lines)


def _repetitions(contents: Contents, train: _Part, test: _Part) -> Iterator[str]:
    for called, part in (("training", train), ("test", test)):
        distinct = len(np.unique(part.texts))
        contradicting = len(np.unique(part.rows)) - distinct
        yield f"{len(part.texts) - distinct:>10,} {called} texts repeat an earlier one; {contradicting:,} of them have other labels"
    shared = np.isin(test.texts, train.texts)
    example = ""
    if shared.any():
        first = int(test.texts[shared.argmax()])
        text = next(row.text for row in contents.test() if _hash(row.text) == first)
        example = f", such as {shown(repr(text))}; remove them from one of the two, or the metrics come out too high"
    yield f"{shared.sum():>10,} test texts are training texts, too{example}"
    yield f"{train.unlabelled:>10,} training texts and {test.unlabelled:,} test texts have no label"


def _dropped(contents: Contents) -> Iterator[str]:
    """Test texts without labels are left out before they are counted here."""
    if note := contents.notes.get("unlabelled test texts"):
        yield f"{'':>10} {note}"


def _labels(names: list[str], train: _Part, test: _Part) -> Iterator[str]:
    yield f"{(train.counts == 1).sum():>10,} labels have a single training text, {(train.counts == 0).sum():,} have none"
    unseen = np.concatenate([test.counts[train.counts == 0], test.unseen])
    yield f"{(unseen > 0).sum():>10,} labels occur in the test set alone, {unseen.sum():,} times; they cannot be predicted"
    # Hashes take a fraction of the memory of a dict of names.
    folded = np.fromiter((_hash(" ".join(name.casefold().split())) for name in names), np.uint64, len(names))
    order = np.argsort(folded, kind="stable")
    same = np.flatnonzero(folded[order][1:] == folded[order][:-1])
    example = ""
    if len(same):
        one, other = sorted(order[same[0] : same[0] + 2])
        example = f", such as {shown(repr(names[one]))} and {shown(repr(names[other]))}; give them one spelling"
    yield f"{len(same):>10,} label names differ from another only in case or spaces{example}"


def _histogram(values: np.ndarray, last: int | None = None) -> Iterator[str]:
    """Count values by powers of two; those of `last` or more apart."""
    bounds = [0, 1, 2]
    while bounds[-1] <= values.max(initial=0):
        bounds.append(2 * bounds[-1])
    if last is not None:
        bounds = [bound for bound in bounds if bound < last] + [last, last + 1]
    counts = np.histogram(values, bounds)[0]
    filled = np.flatnonzero(counts)
    for bucket in range(filled[0], filled[-1] + 1):
        low, high, count = bounds[bucket], bounds[bucket + 1], counts[bucket]
        called = f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        cut = " (the most that is read: some may be cut)" if low == last else ""
        bar = "#" * round(_WIDTH * count / counts.max())
        yield f"{called:>18} {count:>12,} {count / len(values):6.1%} {bar}{cut}"
