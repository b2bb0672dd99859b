"""Signals that end a run.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (Slurm's notice before the time limit) end a script
with exit status 128 + signal. The first one raises `Interrupted` in the main thread. Inside `deferred()` it is only noted,
for `pending()`: a training ends between two steps, on all ranks together, with a checkpoint. A second signal ends the
process at once.

A process that a launcher started treats the launcher's death as a SIGTERM: nobody else would tell it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Ctrl-C reaches a rank from the terminal and again from its launcher: within this time they are one signal.
_SAME_SECONDS = 1.0
# `Interrupted` waits until Python gets control back; a process that hangs in a library is ended after this time.
_GRACE_SECONDS = 10.0
_END = 0  # no signal's number: tells the thread to end
# Set by torchrun, by the deepspeed launcher, and by accelerate launch for a single process.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "ACCELERATE_MIXED_PRECISION")

_pending = 0
_deferrals = 0
_deferred_until = 0.0  # when the last block of `deferred` ended
_wakeup = -1  # where Python writes the number of every signal, or -1


class Interrupted(BaseException):
    """A signal ends this process. `said`: what became of its work."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(number, said)
        self.number, self.said = number, said


def pending() -> int:
    """The signal that asks for the end, or 0."""
    return _pending


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal does not raise: the block asks `pending()` where it can stop."""
    global _deferrals, _deferred_until
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        _deferred_until = time.monotonic()


@contextmanager
def listening() -> Iterator[None]:
    """Around all of a script, in its main thread.

    Afterwards the process is about to end: a signal ends it in the system's way, without a traceback, and once one has
    ended the script others are ignored, so that the exit status is the first one's.
    """
    global _wakeup, _pending
    _pending = 0
    reader, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    for number in SIGNALS:
        # nohup means it; an ignored SIGINT or SIGUSR1 is a shell's habit for background jobs, or meant for the launcher.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    launchers = _launchers() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else []
    threading.Thread(target=_watch, args=(reader, launchers), name="signals", daemon=True).start()
    try:
        yield
    finally:
        for number in SIGNALS:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_IGN if _pending else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if not _pending:  # else the thread goes on, and ends a process that hangs at its end
            os.write(_wakeup, bytes([_END]))
        os.close(_wakeup)
        _wakeup = -1


def ignore_in_worker(_: int = 0) -> None:
    """For the processes of a data loader: their parent ends them, and still needs them if it is to finish its step."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _before_fork() -> None:
    # Handlers would run in the child before `_in_child` has changed them.
    if _wakeup >= 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _in_parent() -> None:
    if _wakeup >= 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child() -> None:
    if _wakeup < 0:
        return
    # The wake-up pipe is the parent's. SIGTERM is how process pools end their workers.
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


def _on_signal(number: int, _: object) -> None:
    global _pending
    if _pending:
        return  # _watch decides whether this is a second signal
    _pending = number
    if not _deferrals:
        raise Interrupted(number)


def _watch(wakeups: int, launchers: list[int]) -> None:
    """A thread, because the main one may be inside a collective, where no Python handler runs."""
    first = 0.0  # when the first signal came
    while True:
        ready, _, _ = select.select([wakeups], [], [], 1.0)
        now = time.monotonic()
        for number in os.read(wakeups, 64) if ready else b"":
            if number == _END:
                os.close(wakeups)
                return
            if number not in SIGNALS:
                continue  # SIGCHLD and others arrive here as well
            if first and now - first > _SAME_SECONDS:
                _end_at_once(number, "again: ended at once")
            if not first and not _pending:
                # The system may have given it to another thread: the main one would sleep on.
                signal.pthread_kill(threading.main_thread().ident, number)
            first = first or now
        if first and not _deferrals and now - max(first, _deferred_until) > _GRACE_SECONDS:
            _end_at_once(_pending or signal.SIGTERM, f"had not ended it after {_GRACE_SECONDS:.0f} s: ended at once")
        if not first and launchers and _launchers() != launchers:
            launchers = []
            os.kill(os.getpid(), signal.SIGTERM)


def _end_at_once(number: int, said: str) -> NoReturn:
    # On a line of its own: a progress bar may stand there.
    os.write(2, f"\n{signal.Signals(number).name} {said}\n".encode())
    os._exit(128 + number)


def _launchers() -> list[int]:
    """The parent; and its parent under deepspeed, whose command runs a second launcher that outlives it."""
    parent = os.getppid()
    return [parent, _parent_of(parent)] if "CROSS_RANK" in os.environ else [parent]


def _parent_of(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])  # a program's name may hold blanks and brackets
    except OSError:
        return 0  # no such process, or no such file system
