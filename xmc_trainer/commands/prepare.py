"""Read and tokenise a data set into the cache, so that a training on GPUs starts at once.

xmc-trainer prepare dataset=amazon3m dataset_path=data
xmc-trainer prepare data.source=tickets.csv --check       # and say what is odd in the data

It takes the settings of a training and needs no GPU. It prints time and peak memory. --csv appends them to a file, from which
`xmc-trainer plan --rates` takes the rate.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from xmc_trainer.builders.inputs import names_in, require_data, require_tokenizer, source_of
from xmc_trainer.commands.bench.data import add_row
from xmc_trainer.commands.cli import USAGE
from xmc_trainer.config import load_config
from xmc_trainer.data.check import page
from xmc_trainer.files import require_writable

_SECONDS = 0.5  # between two looks at the memory


class PeakMemory:
    """Samples the memory of this process and its children while the block runs, on Linux.

    Attributes:
        bytes: the largest sum of their proportional set sizes: a page that n processes share counts 1/n in each.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, sum(map(_memory_of, [os.getpid(), *_children()])))
            if self._done.wait(_SECONDS):
                return


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended
            found += map(int, (task / "children").read_text().split())
    return found


def _memory_of(process: int) -> int:
    with suppress(OSError):  # it has ended
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        return 1024 * int(re.findall(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)[0])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+", metavar="key=value", help="settings of the training")
    parser.add_argument("--csv", type=Path, help="file to append a row with time and memory to")
    parser.add_argument(
        "--check",
        action="store_true",
        help="print duplicates, labels with few texts, similar label names and histograms of lengths and labels",
    )
    options = parser.parse_intermixed_args()
    config = load_config(options.settings)
    if options.csv is not None:
        require_writable(options.csv, "--csv")
    # Mistakes are found before torch is imported, which takes seconds.
    require_data(config)
    require_tokenizer(config)
    from xmc_trainer.builders.data import corpus_of
    from xmc_trainer.builders.encoder import tokenizer_of
    from xmc_trainer.builders.recipe import configured

    config, _ = configured(options.settings)
    tokenizer = tokenizer_of(config)
    begin = time.perf_counter()
    with PeakMemory() as peak:
        corpus = corpus_of(config, tokenizer)
    seconds, cores = time.perf_counter() - begin, len(os.sched_getaffinity(0))
    texts = len(corpus.train) + len(corpus.test)
    print(
        f"{len(corpus.train):,} training and {len(corpus.test):,} test texts, {corpus.num_labels:,} labels in {seconds:.1f} s on "
        f"{cores} cores; peak memory of all processes {peak.bytes / 2**30:.2f} GiB"
    )
    if options.csv is not None:
        row = {
            "device": f"{platform.machine()}, {cores} cores", "cores": cores, "dataset": config.data.dataset,
            "texts": texts, "labels": corpus.num_labels, "seconds": round(seconds, 2),
            "tokenised_texts_s": round(texts / seconds), "all_peak_mib": peak.bytes >> 20,
        }  # fmt: skip
        add_row(options.csv, row)
    if options.check:
        lengths = {"train": corpus.lengths("train")[: corpus.texts], "test": corpus.lengths("test")}
        plain = replace(config, data=replace(config.data, augment_label_data=False))
        with names_in(plain):
            print(page(source_of(plain).read(), lengths, config.data.max_len))
