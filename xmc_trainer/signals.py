"""Signals that end a run.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal has closed) and SIGUSR1 (Slurm's notice before the time limit) end a
script with exit status 128 + signal. The first signal raises `Interrupted` in the main thread. Inside `deferred()` it
is only recorded for `pending()`, so that all ranks of a training stop together between two steps, with a checkpoint. A
second signal ends the process at once.

A process that a launcher started treats the launcher's death as a SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, cast

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Ctrl-C reaches a rank from the terminal and again from its launcher. Within this time they count as one signal.
_DUPLICATE_SECONDS = 1.0
# `Interrupted` is raised when Python regains control. A process that hangs in a library is ended after this time.
_GRACE_SECONDS = 10.0
_STOP_WATCHING = 0  # no signal has this number
# Set by torchrun, by the deepspeed launcher, and by accelerate launch for a single process.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "ACCELERATE_MIXED_PRECISION")

_pending = 0
_deferrals = 0
_deferred_until = 0.0  # when the last block of `deferred` ended
_wakeup = -1  # descriptor to which Python writes the number of each signal, or -1


class Interrupted(BaseException):
    """A signal ends this process. `said` tells the user what happened to its work."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(number, said)
        self.number, self.said = number, said


def pending() -> int:
    """Return the number of the signal that asks this process to end, or 0."""
    return _pending


@contextmanager
def deferred() -> Iterator[None]:
    """Do not raise `Interrupted` in the block. The block must check `pending()` where it can stop."""
    global _deferrals, _deferred_until
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        _deferred_until = time.monotonic()


@contextmanager
def listening() -> Iterator[None]:
    """Handle signals in the block, which must be the whole script, in its main thread.

    After the block, a signal ends the process by the system's default, without a traceback. If a signal has already
    ended the block, further ones are ignored, so that the exit status is that of the first.
    """
    global _wakeup, _pending
    _pending = 0
    reader, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    for number in SIGNALS:
        # Respect nohup. Shells ignore SIGINT in background jobs, and SIGUSR1 may be ignored for the launcher: handle
        # these.
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
        if not _pending:  # otherwise keep the thread: it ends a process that hangs on exit
            os.write(_wakeup, bytes([_STOP_WATCHING]))
        os.close(_wakeup)
        _wakeup = -1


def ignore_in_worker(_: int = 0) -> None:
    """Ignore signals in a data loader worker: its parent needs it to finish the step, and ends it."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _before_fork() -> None:
    # Block signals, or the handlers could run in the child before `_in_child` resets them.
    if _wakeup >= 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _in_parent() -> None:
    if _wakeup >= 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child() -> None:
    if _wakeup < 0:
        return
    # The wake-up pipe belongs to the parent. Process pools end their workers by SIGTERM.
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


def _on_signal(number: int, _: object) -> None:
    global _pending
    if _pending:
        return  # _watch decides whether it is a second signal
    _pending = number
    if not _deferrals:
        raise Interrupted(number)


def _watch(wakeups: int, launchers: list[int]) -> None:
    """Watch signals from a thread: Python's handlers do not run while the main thread is in a collective."""
    first = 0.0  # time of the first signal
    while True:
        ready, _, _ = select.select([wakeups], [], [], 1.0)
        now = time.monotonic()
        for number in os.read(wakeups, 64) if ready else b"":
            if number == _STOP_WATCHING:
                os.close(wakeups)
                return
            if number not in SIGNALS:
                continue  # SIGCHLD and others arrive here too
            if first and now - first > _DUPLICATE_SECONDS:
                _end_at_once(number, "again: ended at once")
            if not first and not _pending:
                # The system may have delivered it to another thread; wake the main thread.
                signal.pthread_kill(cast(int, threading.main_thread().ident), number)
            first = first or now
        if first and not _deferrals and now - max(first, _deferred_until) > _GRACE_SECONDS:
            _end_at_once(
                _pending or signal.SIGTERM, f"did not end the process within {_GRACE_SECONDS:.0f} s: ended at once"
            )
        if not first and launchers and _launchers() != launchers:
            launchers = []
            os.kill(os.getpid(), signal.SIGTERM)


def _end_at_once(number: int, message: str) -> NoReturn:
    # Start a new line, because a progress bar may be on the current one.
    os.write(2, f"\n{signal.Signals(number).name} {message}\n".encode())
    os._exit(128 + number)


def _launchers() -> list[int]:
    """Return the launcher processes: the parent and, under deepspeed, the grandparent, which the parent may outlive."""
    parent = os.getppid()
    return [parent, _parent_of(parent)] if "CROSS_RANK" in os.environ else [parent]


def _parent_of(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])  # a program's name may contain spaces and brackets
    except OSError:
        return 0  # no such process, or no /proc
