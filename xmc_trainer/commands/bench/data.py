"""Generate a data set of any shape in the raw layout, and time it: a stand-in for a data set that you do not have.

xmc-trainer bench data data/Amazon-3M --like amazon3m               # then: train.py dataset=amazon3m dataset_path=data
xmc-trainer bench data data/small --like amazon3m --scale 0.01      # 1 % of its texts and labels
xmc-trainer bench data data/mine --texts 100000 --test-texts 10000 --labels 50000 --labels-a-text 5 --words-a-text 60

--like takes the published numbers of texts, labels, labels per text and words per text; other options override them. Words
depend on labels, so a model can learn. The files depend on shape, seed and vocabulary, not on --workers. Memory grows with the
number of workers, not with the data. `xmc_trainer.data.generated` describes the model and its sources.

Most tokenizers split a made-up word into several tokens. --vocabulary reads words from a file, one per line. With the vocab.txt of
a BERT every word is one token for that BERT.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import multiprocessing
import os
import platform
import resource
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from xmc_trainer.data.generated import PUBLISHED, Shape, block, made_up_words
from xmc_trainer.data.sources import Ragged
from xmc_trainer.errors import UserError
from xmc_trainer.files import replacing, require_writable, writing

_FILES = tuple(f"{split}_{kind}.txt" for split in ("train", "test") for kind in ("raw_texts", "labels"))
# Option -> field of Shape.
_NUMBERS = {
    "texts": "train_texts", "test_texts": "test_texts", "labels": "labels", "labels_a_text": "labels_a_text",
    "words_a_text": "words_a_text", "skew": "skew",
}  # fmt: skip
_DOMAINS = {
    "texts": (1, 2**31 - 1), "test_texts": (1, 2**31 - 1), "labels": (1, 2**31 - 1), "labels_a_text": (0.1, 10_000),
    "words_a_text": (1, 100_000), "skew": (0, 0.95), "scale": (1e-9, 1000), "seed": (0, 2**32 - 1), "workers": (1, 1024),
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to; must not hold a data set")
    parser.add_argument("--like", choices=sorted(PUBLISHED), help="shape of a published data set")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor for the numbers of texts and labels (default: 1)"
    )
    parser.add_argument("--texts", type=int, help="training texts")
    parser.add_argument("--test-texts", type=int)
    parser.add_argument("--labels", type=int)
    parser.add_argument("--labels-a-text", type=float, help="mean labels per text")
    parser.add_argument("--words-a-text", type=float, help="mean words per text")
    parser.add_argument("--skew", type=float, help="label frequency falls as rank^-skew (default: 0.75)")
    parser.add_argument("--vocabulary", type=Path, help="file of words, one per line (default: 29,995 made-up words)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)"
    )
    parser.add_argument("--csv", type=Path, help="file to append a row with time and memory to")
    return parser.parse_args()


def shape_of(options: argparse.Namespace, vocabulary: int) -> Shape:
    """Build the shape that the options describe. Raises UserError for a missing option or one outside its domain."""
    for name, (low, high) in _DOMAINS.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be between {low} and {high}")
    told = {field: getattr(options, name) for name, field in _NUMBERS.items() if getattr(options, name) is not None}
    if options.like is None:
        needed = [name for name, field in _NUMBERS.items() if name != "skew" and field not in told]
        if needed:
            raise UserError(
                f"--{needed[0].replace('_', '-')}: is missing; give it, or --like with the name of a data set"
            )
        shape = Shape(**told)
    else:
        shape = dataclasses.replace(PUBLISHED[options.like], **told)
    return dataclasses.replace(shape.scaled(options.scale), vocabulary=vocabulary)


def words_of(path: Path | None) -> list[str]:
    """Read words from a file, ignoring lines that are not three or more ASCII letters. For None make up words."""
    if path is None:
        return made_up_words(Shape.vocabulary)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--vocabulary={path}: cannot be read ({error}); name a UTF-8 file of words") from None
    words = [line for line in lines if line.isascii() and line.isalpha() and len(line) > 2]
    if not words:
        raise UserError(f"--vocabulary={path}: has no word of three or more ASCII letters; name another file")
    return words


# In a worker process: the arguments of _begin.
_own: tuple[Shape, int, np.ndarray]


def _begin(shape: Shape, seed: int, words: list[str]) -> None:
    global _own
    _own = shape, seed, np.array(words, dtype=object)


def _lines(split: str, number: int) -> tuple[str, str]:
    """Make the lines of a block: (texts, labels)."""
    shape, seed, words = _own
    made = block(shape, split, number, seed)
    spelled = words[made.words.ids].tolist()
    return _joined(spelled, made.words), _joined(list(map(str, made.labels.ids.tolist())), made.labels)


def _joined(items: list[str], rows: Ragged) -> str:
    offsets = rows.offsets.tolist()
    return "".join(" ".join(items[start:stop]) + "\n" for start, stop in zip(offsets, offsets[1:]))


def _blocks(shape: Shape, split: str, pool: ProcessPoolExecutor, ahead: int) -> Iterator[tuple[str, str]]:
    """Yield the lines of all blocks in order. At most `ahead` blocks are in memory."""
    waiting: deque[Future[tuple[str, str]]] = deque()
    for number in range(shape.blocks(split)):
        waiting.append(pool.submit(_lines, split, number))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write(folder: Path, shape: Shape, words: list[str], seed: int, workers: int) -> None:
    """Write the data set's four files. Raises UserError if the folder holds one of them, CannotWrite if writing fails."""
    for name in _FILES:
        if (folder / name).exists():
            raise UserError(f"{folder / name}: exists; name another folder, or remove it")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _begin, (shape, seed, words)) as pool, ExitStack() as stack:
        files = {name: stack.enter_context(replacing(folder / name)) for name in _FILES}
        for split in ("train", "test"):
            for texts, labels in _blocks(shape, split, pool, 2 * workers):
                files[f"{split}_raw_texts.txt"].write(texts)
                files[f"{split}_labels.txt"].write(labels)


def _peak_mib() -> tuple[int, int]:
    """Return the peak memory of this process and of its largest worker, in MiB."""
    own, worker = (resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own, worker


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its finished workers."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    options = parse()
    if options.csv is not None:
        require_writable(options.csv, "--csv")
    words = words_of(options.vocabulary)
    shape = shape_of(options, len(words))
    begin, cpu = time.perf_counter(), _cpu_seconds()
    write(options.folder, shape, words, options.seed, options.workers)
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    size = sum((options.folder / name).stat().st_size for name in _FILES)
    texts, (own, worker) = shape.train_texts + shape.test_texts, _peak_mib()
    print(
        f"{options.folder}: {shape.train_texts:,} training and {shape.test_texts:,} test texts, {shape.labels:,} labels, "
        f"{size / 2**20:,.0f} MiB in {seconds:.1f} s; {texts / seconds:,.0f} texts/s with {options.workers} workers; "
        f"peak memory {own} MiB, and {worker} MiB per worker",
        flush=True,
    )
    cores = len(os.sched_getaffinity(0))
    row = {
        "device": f"{platform.machine()}, {cores} cores", "cores": cores, "numpy": np.__version__,
        "like": options.like or "", "scale": options.scale, "train_texts": shape.train_texts, "test_texts": shape.test_texts,
        "labels": shape.labels, "workers": options.workers, "mib": round(size / 2**20, 1), "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2), "texts_s": round(texts / seconds), "peak_mib": own, "worker_peak_mib": worker,
    }  # fmt: skip
    if options.csv is not None:
        add_row(options.csv, row)


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file; create the file if it does not exist."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    rows.append(row)
    with replacing(path, newline="") as lines:
        writer = csv.DictWriter(lines, dict.fromkeys(name for each in rows for name in each))
        writer.writeheader()
        writer.writerows(rows)
    print(f"added to {path}", flush=True)
