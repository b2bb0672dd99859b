"""A saved folder: files of any kind, and manifest.json with their checksums.

The folder appears complete or not at all. The manifest lists every file with its checksum, describes their content, and
has a digest of its own entries. Readers verify every file and every value of the manifest before they use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from xmc_trainer.errors import UserError
from xmc_trainer.files import OLD, PARTIAL, put_in_place, sync_tree, writing

if TYPE_CHECKING:
    from xmc_trainer.parallel import Ranks

MANIFEST = "manifest.json"
CARD = "README.md"  # for people, who edit it: it has no checksum
_DIGEST = "manifest_sha256"
_REMEDY = "copy or save the whole folder again"
# Relative paths without . and .. parts: they cannot leave the folder.
_NAME = re.compile(r"(?!\.\.?(/|$))[^/\\\x00-\x1f]+(/(?!\.\.?(/|$))[^/\\\x00-\x1f]+)*")


# The shape of a manifest.


class Entry(NamedTuple):
    """The requirement on one JSON value, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*values: Any) -> Entry:
    # Compare types too, because 1 == True.
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
    """An object with arbitrary names."""

    name: Entry
    value: Any


class ListOf(NamedTuple):
    """A list of any length."""

    value: Any


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """Describe the first mismatch between a JSON value and a shape. Returns None if the value fits.

    Args:
        shape: an Entry, MapOf or ListOf; {name: shape} for an object with exactly these names; (shape, ...) for a list
            of exactly this length.
        where: the path of the value, for the description.
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
        children = [(f"{where}[{n}]", child, inner) for n, (child, inner) in enumerate(zip(value, shapes))]
    return next((found for name, child, inner in children if (found := misfit(child, inner, name))), None)


def _inside(where: str, name: str) -> str:
    return f"{where}{where and '.'}{name if name.isidentifier() else json.dumps(name)[:40]}"


@dataclass(frozen=True)
class Kind:
    """A kind of saved folder.

    Args:
        name: with its article, such as "a saved model".
        formats: the formats that this version reads, oldest first. The last one is written.
        signed: the first format whose manifest has a digest.
        shape: the shape of the manifest (see `misfit`), without format, checksums and digest.
        files: manifest -> names of the files that it requires.
    """

    name: str
    formats: tuple[int, ...]
    signed: int
    shape: dict[str, Any]
    files: Callable[[dict[str, Any]], list[str]]


# Writing.


def save_folder(folder: Path, ranks: Ranks, kind: Kind, write: Callable[[Path], dict[str, Any] | None]) -> None:
    """Write `folder` atomically and sync it to disk. Collective; all ranks must share the file system.

    Args:
        write: writes this rank's files into the folder that it is given, without collectives, and returns the manifest
            on rank 0. Other ranks, which may be on other machines, must sync their files; rank 0's are synced here.
    Raises CannotWrite on all ranks if a write of any rank fails; `folder` is then unchanged.
    """
    folder = Path(os.path.realpath(folder))  # follow links; "." has no name
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
                assert manifest is not None
                _seal(partial, kind, manifest)
                put_in_place(partial, folder)
    except UserError:
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise


def _seal(partial: Path, kind: Kind, manifest: dict[str, Any]) -> None:
    """Write the manifest, and sync everything."""
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor() as pool:
        sums = {path: pool.submit(_sha256, path) for path in files}
        sync_tree(partial)  # the disk writes while files are hashed
    checksums = {path.relative_to(partial).as_posix(): found.result() for path, found in sums.items()}
    checksums.pop(CARD, None)
    # The digest must match what a reader sees: JSON turns tuples into lists and keys into strings.
    manifest = json.loads(json.dumps({"format": kind.formats[-1]} | manifest | {"sha256": checksums}))
    text = json.dumps(manifest | {_DIGEST: _digest(manifest)}, indent=1)
    (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    for path in files:
        path.chmod(0o666 & ~mask)  # safetensors makes its files private to the user
    sync_tree(partial)


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the entries, independent of the file's formatting."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading.


def read_manifest(folder: Path, kind: Kind, remedy: str = _REMEDY) -> dict[str, Any]:
    """Return a folder's manifest, after a check of its content, and that the files it lists exist. Raises UserError.

    Manifests of formats before `kind.signed` have no digest; only their shape is checked.
    """
    manifest = _manifest(folder, remedy)
    path, found = folder / MANIFEST, manifest.get("format")
    if found not in kind.formats or type(found) is not int:
        known = " and ".join(map(str, kind.formats))
        raise UserError(
            f"{path}: has format {json.dumps(found)[:40]}, but this version reads {known} of {kind.name}; use the "
            "version that wrote it"
        )
    if found >= kind.signed and _DIGEST not in manifest:
        raise UserError(f"{path}: is damaged, its digest is missing; {remedy}")
    shape = (
        kind.shape | {"format": ANY, "sha256": MapOf(NAME, SHA256)} | ({_DIGEST: ANY} if _DIGEST in manifest else {})
    )
    if wrong := misfit(manifest, shape):
        raise UserError(f"{path}: does not describe {kind.name}: {wrong}; {remedy}")
    if missing := [name for name in kind.files(manifest) if name not in manifest["sha256"]]:
        raise UserError(f"{path}: has no checksum for {missing[0]}; {remedy}")
    for name in manifest["sha256"]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; {remedy}")
    return manifest


def read_folder(folder: Path, kind: Kind, remedy: str = _REMEDY) -> dict[str, Any]:
    """Verify a folder and return its manifest. UserError names the file that is missing, damaged or not listed."""
    manifest = read_manifest(folder, kind, remedy)
    for name in manifest["sha256"]:
        verify_file(folder, name, manifest, remedy)
    # transformers reads an inner folder as a whole and would also read files that are not listed.
    for inner in {Path(name).parent for name in manifest["sha256"]} - {Path()}:
        for each in sorted((folder / inner).iterdir()):
            name = each.relative_to(folder).as_posix()
            if not each.name.startswith(".") and not each.is_dir() and name not in manifest["sha256"]:
                raise UserError(f"{each}: is not part of what was saved; remove it")
    return manifest


def _manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """Read the manifest and verify its digest, if it has one."""
    path = folder / MANIFEST
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: is not a regular file; {remedy}")  # reading a pipe or a device may never end
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        others = (folder / "model", Path(f"{folder}{OLD}"))
        # Path's methods raise for names that are too long; os.path returns False.
        found = next((f", such as {other}" for other in others if os.path.isfile(other / MANIFEST)), "")
        raise UserError(f"{path}: {error.strerror}; name the folder of a saved model or checkpoint{found}") from None
    except (ValueError, RecursionError) as error:
        cause = getattr(error, "msg", None) or "its numbers, text or nesting"
        raise UserError(f"{path}: not valid JSON ({cause}); {remedy}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    if _DIGEST in manifest and manifest[_DIGEST] != _digest({k: v for k, v in manifest.items() if k != _DIGEST}):
        raise UserError(f"{path}: is damaged, its digest differs; {remedy}")
    return manifest


def verify_file(folder: Path, name: str, manifest: dict[str, Any] | None = None, remedy: str = _REMEDY) -> Path:
    """Verify one file of a saved folder and return its path. UserError if it is missing or damaged.

    Args:
        manifest: the result of `read_folder`; None reads it here.
    """
    path = folder / name
    checksums = (_manifest(folder, remedy) if manifest is None else manifest).get("sha256")
    if not isinstance(checksums, dict) or name not in checksums:
        raise UserError(f"{folder / MANIFEST}: has no checksum for {name}; {remedy}")
    if not path.is_file():
        raise UserError(f"{path}: is missing; {remedy}")
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]  # in the cache of the Hugging Face hub, a snapshot is links to ../../blobs
    if not path.resolve().is_relative_to(root):
        raise UserError(f"{path}: is a link out of the folder; replace it by the file itself")
    try:
        found = _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if found != checksums[name]:
        raise UserError(f"{path}: is damaged, its checksum differs from {MANIFEST}; {remedy}")
    return path


def tensor_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Read name -> (safetensors' dtype name, shape) of all tensors, without their data. UserError for other files."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is not a safetensors file ({error}); save it again") from None
