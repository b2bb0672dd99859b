"""Tokenise rows in batches. Two or more batches are spread over processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from xmc_trainer.data.sources import Ragged, Row
from xmc_trainer.data.texts import cut_text, encode_texts
from xmc_trainer.errors import UserError

ROWS_PER_BATCH = 2000
_CHARACTERS_PER_BATCH = 1 << 20
_MAX_PROCESSES = 16

Labels = list[list[int]]


def tokenised(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int) -> Iterator[tuple[Ragged, Labels]]:
    """Yield (token ids of `encode_texts`, labels) of consecutive rows, at most 2,000 at a time.

    Memory does not grow with the length of texts: a batch has about 1,048,576 characters, and each process at most
    three batches.
    """
    batches = _batches(rows, tokenizer)
    first = list(islice(batches, 2))
    processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
    if len(first) < 2 or processes == 1:
        yield from ((_encoded(tokenizer, max_len, texts), labels) for texts, labels in chain(first, batches))
        return
    pending: deque[tuple[Future[Ragged], Labels]] = deque()
    with _workers(processes, tokenizer, max_len) as pool:
        for texts, labels in chain(first, batches):
            pending.append((pool.submit(_encoded_by_worker, texts), labels))
            if len(pending) > 2 * processes:
                tokens, done = pending.popleft()
                yield tokens.result(), done
        for tokens, done in pending:
            yield tokens.result(), done


def _batches(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[str], Labels]]:
    texts: list[str] = []
    labels: Labels = []
    characters = 0
    for row in rows:
        texts.append(cut_text(tokenizer, row.text))
        labels.append(row.labels)
        characters += len(texts[-1])
        if len(texts) == ROWS_PER_BATCH or characters >= _CHARACTERS_PER_BATCH:
            yield texts, labels
            texts, labels, characters = [], [], 0
    if texts:
        yield texts, labels


def _encoded(tokenizer: PreTrainedTokenizerBase, max_len: int, texts: list[str]) -> Ragged:
    ids = encode_texts(tokenizer, texts, max_len)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Ragged(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)


# Set in each worker: its tokenizer and max_len.
_worker_options: tuple[PreTrainedTokenizerBase, int]


def _encoded_by_worker(texts: list[str]) -> Ragged:
    return _encoded(*_worker_options, texts)


def _start_worker(tokenizer: PreTrainedTokenizerBase, max_len: int, parent: int) -> None:
    global _worker_options
    _worker_options = tokenizer, max_len
    # Ctrl-C also reaches the parent, which ends its workers. The parent's SIGTERM handler must not run here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Exit when the parent has died. Without this, workers of a killed parent would wait for texts for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _workers(processes: int, tokenizer: PreTrainedTokenizerBase, max_len: int) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("fork"),  # some tokenizers cannot be pickled
        _start_worker,
        (tokenizer, max_len, os.getpid()),
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process was killed, most likely because memory ran out; give the job more memory or fewer "
            f"cores (it used {processes} processes, one per core)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
