"""Spread work on the parts of a data set over processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from xmc_trainer.errors import UserError

_MAX_PROCESSES = 16

Part = TypeVar("Part")
Kept = TypeVar("Kept")
Result = TypeVar("Result")


def spread(work: Callable[[Part], Result], parts: Iterable[tuple[Part, Kept]]) -> Iterator[tuple[Result, Kept]]:
    """Yield (work(part), kept) of each (part, kept), in order. Two or more parts are spread over processes, one per core.

    Memory does not grow with the number of parts: each process has at most three at a time. `part` and the result are pickled;
    `work` and `kept` are not. Raises UserError if a process is killed.
    """
    waiting = iter(parts)
    first = list(islice(waiting, 2))
    processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
    if len(first) < 2 or processes == 1:
        yield from ((work(part), kept) for part, kept in chain(first, waiting))
        return
    pending: deque[tuple[Future[Result], Kept]] = deque()
    # fork: some tokenizers cannot be pickled
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker, (work, os.getpid()))
    try:
        for part, kept in chain(first, waiting):
            pending.append((pool.submit(_work_on, part), kept))
            if len(pending) > 2 * processes:
                result, done = pending.popleft()
                yield result.result(), done
        while pending:
            result, done = pending.popleft()
            yield result.result(), done
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process was killed, most likely because memory ran out; give the job more memory or fewer "
            f"cores (it used {processes} processes, one per core)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# Set in each worker.
_work: Callable[[Any], Any]


def _work_on(part: Any) -> Any:
    return _work(part)


def _start_worker(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    gc.freeze()  # a collection would write to the parent's objects, and so copy their memory
    # Ctrl-C also reaches the parent, which ends its workers. The parent's SIGTERM handler must not run here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Exit when the parent has died. Without this, workers of a killed parent would wait for parts for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
