"""Rows to tokens, a batch at a time, in several processes where there are many."""

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
from xmc_trainer.data.texts import encode_texts, readable
from xmc_trainer.errors import UserError

ROWS_A_BATCH = 2000
_CHARACTERS_A_BATCH = 1 << 20
_MOST_PROCESSES = 16

Labels = list[list[int]]


def tokenised(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int) -> Iterator[tuple[Ragged, Labels]]:
    """(tokens of `encode_texts`, labels) of consecutive rows, at most 2,000 at a time.

    Memory is bounded whatever the length of texts: a batch has some 1,048,576 characters, and each process has three at most.
    """
    batches = _batches(rows, tokenizer)
    first = list(islice(batches, 2))
    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
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
        texts.append(readable(tokenizer, row.text))
        labels.append(row.labels)
        characters += len(texts[-1])
        if len(texts) == ROWS_A_BATCH or characters >= _CHARACTERS_A_BATCH:
            yield texts, labels
            texts, labels, characters = [], [], 0
    if texts:
        yield texts, labels


def _encoded(tokenizer: PreTrainedTokenizerBase, max_len: int, texts: list[str]) -> Ragged:
    ids = encode_texts(tokenizer, texts, max_len)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Ragged(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)


# In a worker: what it was started with.
_own: tuple[PreTrainedTokenizerBase, int]


def _encoded_by_worker(texts: list[str]) -> Ragged:
    return _encoded(*_own, texts)


def _begin_worker(tokenizer: PreTrainedTokenizerBase, max_len: int, parent: int) -> None:
    global _own
    _own = tokenizer, max_len
    # Ctrl-C reaches the parent, too, which ends its workers; what it does at other signals is not theirs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent tells nobody: its workers would wait for more texts for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _workers(processes: int, tokenizer: PreTrainedTokenizerBase, max_len: int) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("fork"),  # so a tokenizer need not be one that can be pickled
        _begin_worker,
        (tokenizer, max_len, os.getpid()),
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process was killed, most likely because memory ran out; give the job more memory, or fewer cores "
            f"(each of {processes} has a process)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
