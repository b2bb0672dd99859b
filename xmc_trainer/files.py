"""Files that last: each appears whole or not at all, and is on the disk before anything relies on it.

A write that fails because of the disk is a `CannotWrite`. Power may go at any moment: what was not synced is then lost, a file's
content and the names in a folder each on its own. So contents are synced first, then their names, and only then does
what they replace go.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from xmc_trainer.errors import UserError, reason

PARTIAL, OLD, REMOVED = ".partial", ".old", ".removed"  # endings of what is being written, replaced and removed
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.ENOTDIR: "remove the file that stands where a folder must be",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ELOOP: "correct the links, which lead in a circle",
    errno.EROFS: "make that file system writable",
    errno.EACCES: "make it writable for you",
}
# The libraries in Rust tell the number in the text alone.
_NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)


class CannotWrite(UserError):
    """The disk did not take a file: it is full, read-only, or broken."""


@contextmanager
def writing(path: Path, elsewhere: str = "choose another folder") -> Iterator[None]:
    """Errors of the operating system in the block, by whatever library, become a CannotWrite that names `path`.

    Args: elsewhere: what the user can do to write to another place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = _NUMBER.search(str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number is None and not isinstance(error, OSError):
            raise
        said = os.strerror(number) if number else reason(error)
        remedy = _REMEDIES.get(number, "check that disk")
        raise CannotWrite(f"{path}: cannot be written ({said}); {remedy}, or {elsewhere}") from None


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` every file and folder in it, and the folder itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


@contextmanager
def replacing(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file that takes the place of `path`, on the disk, when the block ends without an error.

    What is no plain file (a device, a pipe) is written to as it is, and so is a file that is open already, such as
    /dev/stdout: what it holds stays before the text.
    """
    if (path.exists() and not path.is_file()) or _is_open_file(path):
        with writing(path), open(path, "a", encoding="utf-8", newline=newline) as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # where a link points
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        try:
            with open(partial, "w", encoding="utf-8", newline=newline) as file:
                if path.exists():
                    shutil.copymode(path, partial)  # who may not read the old file may not read the new one
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _is_open_file(path: Path) -> bool:
    """Whether links lead from `path` to an open file's descriptor, as those of /dev/stdout and /dev/fd/3 do."""
    for _ in range(40):  # the system follows no more links either
        if not path.is_symlink():
            break
        if os.path.realpath(path.parent).startswith("/proc/"):
            return True
        path = path.parent / path.readlink()
    return False


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a folder, all of which is synced, to `folder`, whose predecessor goes when the new one is there to stay.

    In between the predecessor may stand aside, see `settle`.
    """
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        if old.exists():
            remove([old])
        os.rename(folder, old)
    os.rename(partial, folder)
    sync(folder.parent)
    if old.exists():
        remove([old])


def remove(folders: list[Path]) -> None:
    """Remove folders, one after another. Each is there whole, or under another name, at every moment."""
    for folder in folders:
        removed = folder.with_name(folder.name + REMOVED)
        if os.path.lexists(removed):
            _delete(removed)
        os.rename(folder, removed)
        sync(folder.parent)  # or the folder might come back without some of its files
        _delete(removed)


def _delete(folder: Path) -> None:
    """Of a link that somebody put in a folder's place, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def settle(folder: Path, names: re.Pattern[str]) -> None:
    """Clear up what writing, replacing and removing the folders `names` in `folder` have left where they were cut off."""
    for path in sorted(folder.iterdir()):
        whole, ending = path.with_name(path.stem), path.suffix
        if not path.is_dir() or ending not in (PARTIAL, OLD, REMOVED) or not names.fullmatch(whole.name):
            continue
        if ending == OLD and not whole.exists():
            os.rename(path, whole)
            sync(folder)
        else:
            _delete(path)
