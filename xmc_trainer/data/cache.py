"""A cache of folders, each written once by one process, hashed, and verified whenever it is opened.

For each entry, the cache folder holds

<name>/             the complete entry; its manifest.json lists every file with size and hash
<name>.<x>.partial/ an entry that is being written, or left behind by a process that died
<name>.lock         the lock of the process that writes the entry
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
from typing import Any, Literal, overload

import xxhash

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_BLOCK = 1 << 22


class Damaged(Exception):
    """An entry is missing or differs from what was written. The message says what is wrong."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of an entry: size and hash of its files, and `facts`, which must be valid JSON values."""
    files = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(folder.iterdir())}
    body = json.dumps({"files": files, "facts": facts}).encode()
    (folder / _MANIFEST).write_bytes(body + b"\n" + _digest_of(body))


def unseal(folder: Path) -> dict[str, Any]:
    """Verify all files of an entry and return its facts. Raises Damaged.

    This reads every file, at about memory speed. Verify before memory-mapping: a flipped bit in an Arrow file changes
    the data or crashes the process.
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
    """Hold the lock of the entry `target`, waiting for another holder. Removes what dead processes left in the cache.

    The lock ends with this process. Forked children do not hold it, because it is a `lockf` lock, not a `flock` lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_file(target)
    lock = _acquire(path, wait=True)
    try:
        for name in {
            entry.name.split(".")[0] for entry in target.parent.iterdir() if entry.suffix in (".partial", ".lock")
        }:
            _remove_leftovers(target.with_name(name), locked_here=name == target.name)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _lock_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


@overload
def _acquire(path: Path, wait: Literal[True]) -> int: ...
@overload
def _acquire(path: Path, wait: bool) -> int | None: ...
def _acquire(path: Path, wait: bool) -> int | None:
    """Lock a lock file and return its descriptor. Returns None if another process holds it and `wait` is false."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                os.fchmod(lock, path.parent.stat().st_mode & 0o666)  # so that all users of the cache can lock it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EAGAIN, errno.EACCES)  # otherwise the file system has no locks
            if not wait:
                os.close(lock)
                return None
            if not held:
                return lock
            logger.warning("%s: another process is writing this; waiting for it", path.with_suffix(""))
            fcntl.lockf(lock, fcntl.LOCK_EX)
        # The previous holder has deleted the file. A lock on a deleted file excludes nobody, so try again.
        try:
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _remove_leftovers(target: Path, locked_here: bool) -> None:
    """Remove an entry's partial folders unless another process is writing it.

    Args:
        locked_here: this process holds the entry's lock.
    """
    with suppress(OSError):
        lock = None if locked_here else _acquire(_lock_file(target), wait=False)
        if not locked_here and lock is None:
            return
        for partial in target.parent.glob(f"{target.name}.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            _lock_file(target).unlink()
            os.close(lock)


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """Give an empty folder, which becomes the entry `target` when the block ends without an error."""
    made = [_make_partial(target)]
    try:
        made[0].chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp's folders are private to the user
        yield made[0]
        if os.path.lexists(target):
            # os.replace cannot replace a folder that has files, so move it away. Existing memory maps stay valid.
            made.append(_make_partial(target))
            os.replace(target, made[1] / "old")
        os.replace(made[0], target)
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def _make_partial(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
