"""Durable files and folders: each appears complete or not at all, and is synced before anything relies on it.

A write that the disk refuses raises `CannotWrite`. A power failure may lose whatever was not synced, and a file's
content independently of its name in the folder. So the content is synced first, then the name, and only then is the
predecessor removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from xmc_trainer.errors import UserError, reason

PARTIAL, OLD, REMOVED = ".partial", ".old", ".removed"  # suffixes while writing, replacing and removing
_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.ENOTDIR: "remove the file that is in place of a folder",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ELOOP: "correct the circular links",
    errno.EROFS: "make that file system writable",
    errno.EACCES: "make it writable for you",
}
# Libraries written in Rust give the error number only in the message.
_ERROR_NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)


class CannotWrite(UserError):
    """The disk refused a write: it is full, read-only or broken."""


@contextmanager
def writing(path: Path, elsewhere: str = "choose another folder") -> Iterator[None]:
    """Turn operating system errors in the block, from any library, into a CannotWrite that names `path`.

    Args:
        elsewhere: how the user can choose another place, as a remedy in the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = _ERROR_NUMBER.search(str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number is None and not isinstance(error, OSError):
            raise
        cause = os.strerror(number) if number else reason(error)
        remedy = _REMEDIES.get(number, "check that disk")
        raise CannotWrite(f"{path}: cannot be written ({cause}); {remedy}, or {elsewhere}") from None


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and all files and folders in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


@contextmanager
def replacing(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Give a text file that atomically replaces `path`, synced, when the block ends without an error.

    Devices, pipes and files that are already open, such as /dev/stdout, are not replaced: the text is appended to them.
    """
    if (path.exists() and not path.is_file()) or _is_open_file(path):
        with writing(path), open(path, "a", encoding="utf-8", newline=newline) as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # follow links
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        try:
            with open(partial, "w", encoding="utf-8", newline=newline) as file:
                if path.exists():
                    shutil.copymode(path, partial)  # keep the old file's permissions
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _is_open_file(path: Path) -> bool:
    """Whether `path` links to a file descriptor, as /dev/stdout and /dev/fd/3 do."""
    for _ in range(40):  # the kernel's limit
        if not path.is_symlink():
            break
        if os.path.realpath(path.parent).startswith("/proc/"):
            return True
        path = path.parent / path.readlink()
    return False


def check_can_create(folder: Path) -> None:
    """Create a folder and remove it again. Raises the error that creating it raises."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        try:
            path.rmdir()
        except OSError:
            return  # another process uses it already


def require_writable(path: Path, option: str, endings: Collection[str] = ()) -> None:
    """Raise UserError if a command cannot write a file, as far as this is seen before its work.

    Args:
        option: the command's option that names the file, for messages, such as --output.
        endings: that the file's name may have, besides none; empty for any. Devices and pipes have none.
    """
    where = f"{option}={path}"
    try:
        if path.is_dir():
            raise UserError(f"{where}: is a folder; name a file in it")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{where}: its folder does not exist; create it")
        if (not path.exists() or path.is_file()) and not _is_open_file(path):
            if endings and path.suffix and path.suffix not in endings:
                raise UserError(f"{where}: unknown ending {path.suffix}; use {', '.join(endings)}")
            with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
                pass
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); name another file") from None


def require_new_folder(path: Path) -> None:
    """Raise UserError if a command cannot make a folder, as far as this is seen before its work."""
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; name a new folder")
    with writing(path):
        check_can_create(path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def put_copy(source: Path, target: Path) -> None:
    """Copy a file, so that `target` appears complete or not at all, and synced."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.copyfile(source, partial)
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a synced folder to `folder`, sync the new name, and then remove the predecessor.

    If this is interrupted, the predecessor may be left under another name; see `settle`.
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
    """Remove folders, one after another. At every moment a folder is complete under its name, or absent."""
    for folder in folders:
        removed = folder.with_name(folder.name + REMOVED)
        if os.path.lexists(removed):
            _delete(removed)
        os.rename(folder, removed)
        sync(folder.parent)  # otherwise a power failure may bring the folder back without some of its files
        _delete(removed)


def _delete(folder: Path) -> None:
    """Delete a folder. For a link to a folder, delete only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def settle(folder: Path, names: re.Pattern[str]) -> None:
    """Clean up after interrupted writes, replacements and removals of the subfolders whose names match `names`."""
    for path in sorted(folder.iterdir()):
        final, suffix = path.with_name(path.stem), path.suffix
        if not path.is_dir() or suffix not in (PARTIAL, OLD, REMOVED) or not names.fullmatch(final.name):
            continue
        if suffix == OLD and not final.exists():
            os.rename(path, final)
            sync(folder)
        else:
            _delete(path)
