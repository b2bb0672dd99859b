"""A saved folder: files of any kind and manifest.json, which vouches for them and for itself.

The folder appears whole or not at all. Its manifest names every file with its checksum, says what they hold, and carries
a digest of its own entries. Who reads a folder believes no file, and no number in the manifest, before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from xmc_trainer.errors import UserError
from xmc_trainer.files import OLD, PARTIAL, put_in_place, sync_tree, writing

if TYPE_CHECKING:
    from xmc_trainer.parallel import Ranks

MANIFEST = "manifest.json"
_DIGEST = "manifest_sha256"
# Plain names with / between them: nothing that leaves the folder.
_NAME = re.compile(r"(?!\.\.?(/|$))[^/\\\x00-\x1f]+(/(?!\.\.?(/|$))[^/\\\x00-\x1f]+)*")


# What the manifest's entries must be.


class Entry(NamedTuple):
    """One value: what it must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*values: Any) -> Entry:
    # 1 == True, but not here.
    return Entry(
        " or ".join(map(json.dumps, values)), lambda value: any(value == v and type(value) is type(v) for v in values)
    )


def or_null(entry: Entry) -> Entry:
    return Entry(f"{entry.words}, or null", lambda value: value is None or entry.holds(value))


def whole(lowest: int, highest: int = (1 << 53) - 1) -> Entry:
    words = f"a whole number from {lowest} to {highest}"
    return Entry(words, lambda value: type(value) is int and lowest <= value <= highest)


TEXT = Entry("text", lambda value: isinstance(value, str))
NUMBER = Entry("a number", lambda value: type(value) in (int, float))
ANY = Entry("anything", lambda value: True)
NAME = Entry("the name of a file in this folder", lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value)))
SHA256 = Entry("a SHA-256", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)))


class MapOf(NamedTuple):
    """An object with any names."""

    name: Entry
    value: Any


class ListOf(NamedTuple):
    """A list of any length."""

    value: Any


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """What is wrong with a value out of JSON, in words; None if nothing is.

    Args: shape: an Entry, a MapOf or a ListOf; {name: shape} of an object with just these names; (shape, shape) of a list with
        as many.
    """
    children: list[tuple[str, Any, Any]] = []
    if isinstance(shape, Entry):
        if not shape.holds(value):
            return f"{where} must be {shape.words}, not {json.dumps(value)[:40]}"
    elif isinstance(shape, (dict, MapOf)):
        if not isinstance(value, dict):
            return f"{where} must be an object"
        if isinstance(shape, MapOf):
            if wrong := next((name for name in value if not shape.name.holds(name)), None):
                return f"{where}: {wrong!r} must be {shape.name.words}"
            shape = dict.fromkeys(value, shape.value)
        if differ := sorted(shape.keys() ^ value.keys()):
            return f"{_inside(where, differ[0])} is {'missing' if differ[0] in shape else 'unknown'}"
        children = [(_inside(where, name), value[name], shape[name]) for name in shape]
    else:
        shapes = [shape.value] * len(value) if isinstance(shape, ListOf) and isinstance(value, list) else shape
        if not isinstance(value, list) or len(value) != len(shapes):
            return f"{where} must be a list{'' if isinstance(shape, ListOf) else f' of {len(shape)}'}"
        children = [(f"{where}[{n}]", child, own) for n, (child, own) in enumerate(zip(value, shapes))]
    return next((found for name, child, own in children if (found := misfit(child, own, name))), None)


def _inside(where: str, name: str) -> str:
    return f"{where}{where and '.'}{name if name.isidentifier() else json.dumps(name)[:40]}"


@dataclass(frozen=True)
class Kind:
    """What is saved as a folder.

    Args:
        name: with its article.
        formats: that this version reads, the oldest first. The last is written, and from `signed` on the manifest has a digest.
        shape: of the manifest, see `misfit`; beside format and checksums.
        files: the manifest -> names of the files that it speaks of, all of which must be there.
    """

    name: str
    formats: tuple[int, ...]
    signed: int
    shape: dict[str, Any]
    files: Callable[[dict[str, Any]], list[str]]


# Writing.


def save_folder(folder: Path, ranks: Ranks, kind: Kind, write: Callable[[Path], dict[str, Any] | None]) -> None:
    """Write `folder`, on one file system, and put it in its place, whole and on the disk; every rank must call.

    Args: write: writes this rank's files to the folder that it is given, without a word to the other ranks. Rank 0's gives
        the manifest. The files of other ranks, which may be on other machines, must be synced.
    Raises CannotWrite on all ranks where the disk fails one of them; `folder` is then as it was.
    """
    folder = Path(os.path.realpath(folder))  # where a link points; and "." has no name
    partial, main = folder.with_name(folder.name + PARTIAL), ranks.rank == 0
    try:
        with ranks.together(), writing(partial):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with ranks.together(), writing(partial):
            manifest = write(partial)
        with ranks.together(), writing(folder):
            if main:
                _seal(partial, kind, manifest)
                sync_tree(partial)
                put_in_place(partial, folder)
    except UserError:
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # its room may be what lacks
        raise


def _seal(partial: Path, kind: Kind, manifest: dict[str, Any]) -> None:
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(partial).as_posix(): _sha256(path) for path in files}
    # As it will be read: JSON knows no tuples, and no names but texts.
    manifest = json.loads(json.dumps({"format": kind.formats[-1]} | manifest | {"sha256": checksums}))
    text = json.dumps(manifest | {_DIGEST: _digest(manifest)}, indent=1)
    (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    for path in files:
        path.chmod(0o666 & ~mask)  # safetensors' files would be for their writer alone


def _digest(manifest: dict[str, Any]) -> str:
    """Of the entries, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading.


def read_folder(folder: Path, kind: Kind, remedy: str = "copy or save the whole folder again") -> dict[str, Any]:
    """The manifest of a folder that is just what was saved. UserError names the file that is missing, damaged or not listed.

    Of a format before `kind.signed` the manifest's own entries are taken at their word, as far as they can be true.
    """
    manifest = _manifest(folder, remedy)
    path, found = folder / MANIFEST, manifest.get("format")
    if found not in kind.formats or type(found) is not int:
        known = " and ".join(map(str, kind.formats))
        raise UserError(
            f"{path}: format {json.dumps(found)[:40]}, this version reads {known} of {kind.name}; use the version that wrote it"
        )
    if found >= kind.signed and _DIGEST not in manifest:
        raise UserError(f"{path}: damaged, its digest is missing; {remedy}")
    shape = (
        kind.shape | {"format": ANY, "sha256": MapOf(NAME, SHA256)} | ({_DIGEST: ANY} if _DIGEST in manifest else {})
    )
    if wrong := misfit(manifest, shape):
        raise UserError(f"{path}: is not that of {kind.name}: {wrong}; {remedy}")
    if missing := [name for name in kind.files(manifest) if name not in manifest["sha256"]]:
        raise UserError(f"{path}: has no checksum of {missing[0]}; {remedy}")
    for name in manifest["sha256"]:
        verify_file(folder, name, manifest, remedy)
    # Who reads an inner folder as a whole, as transformers does, would read these too.
    for inner in {Path(name).parent for name in manifest["sha256"]} - {Path()}:
        for each in sorted((folder / inner).iterdir()):
            name = each.relative_to(folder).as_posix()
            if not each.name.startswith(".") and not each.is_dir() and name not in manifest["sha256"]:
                raise UserError(f"{each}: does not belong to what was saved; remove it")
    return manifest


def _manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """The manifest, whose digest, if it has one, is right."""
    path = folder / MANIFEST
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: is no plain file; {remedy}")  # a pipe or a device could be read without end
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        others = (folder / "model", Path(f"{folder}{OLD}"))
        # os.path's takes any name, however long.
        found = next((f", such as {other}" for other in others if os.path.isfile(other / MANIFEST)), "")
        raise UserError(f"{path}: {error.strerror}; name the folder of a saved model or checkpoint{found}") from None
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", None) or "its numbers, text or nesting"
        raise UserError(f"{path}: not valid JSON ({said}); {remedy}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    if _DIGEST in manifest and manifest[_DIGEST] != _digest({k: v for k, v in manifest.items() if k != _DIGEST}):
        raise UserError(f"{path}: damaged, it differs from its digest; {remedy}")
    return manifest


def verify_file(
    folder: Path, name: str, manifest: dict[str, Any] | None = None, remedy: str = "copy or save the whole folder again"
) -> Path:
    """The path of one file of a saved folder, after a look at its checksum. UserError if it is missing or damaged.

    Args: manifest: of `read_folder`, if it was read.
    """
    path = folder / name
    checksums = (_manifest(folder, remedy) if manifest is None else manifest).get("sha256")
    if not isinstance(checksums, dict) or name not in checksums:
        raise UserError(f"{folder / MANIFEST}: has no checksum of {name}; {remedy}")
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: a link that leaves the folder; put the file itself there")
    try:
        found = _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if found != checksums[name]:
        raise UserError(f"{path}: damaged, its checksum differs from {MANIFEST}; {remedy}")
    return path


def tensor_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """name -> (dtype as safetensors calls it, shape) of every tensor, without reading one. UserError if it is another file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a file of tensors ({error}); save it again") from None
