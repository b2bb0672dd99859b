"""Folders of files made once and read many times: sealed with hashes, verified at every opening, made by one process.

A cache folder holds, for each entry,

<name>/             the entry, whole; its manifest.json lists every file with size and hash
<name>.<x>.partial/ one that is being made, or that its dead maker left behind
<name>.lock         held by the maker
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_BLOCK = 1 << 22


class Damaged(Exception):
    """An entry that is not there, or not as it was made: the message says what is wrong."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of an entry: its files as they are now, and `facts` about them, which JSON can hold."""
    files = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(folder.iterdir())}
    body = json.dumps({"files": files, "facts": facts}).encode()
    (folder / _MANIFEST).write_bytes(body + b"\n" + _digest_of(body))


def unseal(folder: Path) -> dict[str, Any]:
    """The facts about an entry whose every file is as it was sealed. Raises Damaged.

    Reads all files, at about the speed of memory: only then may they be memory-mapped. A flipped bit in an Arrow file gives
    other data, or a crash of the process.
    """
    try:
        body, _, digest = (folder / _MANIFEST).read_bytes().partition(b"\n")
        if digest != _digest_of(body):
            raise Damaged(f"{folder / _MANIFEST} is damaged")
        manifest = json.loads(body)
        for name, (size, wanted) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size:
                raise Damaged(f"{path} has {path.stat().st_size} bytes instead of {size}")
            if _digest(path) != wanted:
                raise Damaged(f"{path} is damaged")
    except OSError as error:
        raise Damaged(f"{error.filename}: {error.strerror}") from None
    return manifest["facts"]


def _digest_of(content: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(content).encode()


def _digest(path: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Waits while another process makes the entry `target`; what dead makers left behind is gone then.

    The lock ends with the process that took it, and its children do not have it (`lockf`, not `flock`).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_file(target)
    lock = _take(path, wait=True)
    try:
        for owner in {
            entry.name.split(".")[0] for entry in target.parent.iterdir() if entry.suffix in (".partial", ".lock")
        }:
            _remove_leftovers(target.with_name(owner), own=owner == target.name)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _lock_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _take(path: Path, wait: bool) -> int | None:
    """The descriptor of a lock file, held; None if another process holds it and `wait` is false."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                os.fchmod(lock, path.parent.stat().st_mode & 0o666)  # for whoever else may write there
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EAGAIN, errno.EACCES)  # else this file system has no locks
            if not wait:
                os.close(lock)
                return None
            if not held:
                return lock
            logger.warning("%s: another process makes this; waiting for it", path.with_suffix(""))
            fcntl.lockf(lock, fcntl.LOCK_EX)
        # Whoever held it removed it in the end: a file without a name locks nothing.
        try:
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _remove_leftovers(target: Path, own: bool) -> None:
    """Partial folders of an entry, if its maker is dead. `own`: this process holds the entry's lock."""
    with suppress(OSError):
        lock = None if own else _take(_lock_file(target), wait=False)
        if not own and lock is None:
            return
        for partial in target.parent.glob(f"{target.name}.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        if not own:
            _lock_file(target).unlink()
            os.close(lock)


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """An empty folder to make the entry `target` in, which takes the place of what is there when the block ends well."""
    made = [_beside(target)]
    try:
        made[0].chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp's is for one user only
        yield made[0]
        if os.path.lexists(target):
            # Aside first: a folder cannot be replaced. Those who have its files mapped keep them.
            made.append(_beside(target))
            os.replace(target, made[1] / "old")
        os.replace(made[0], target)
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
