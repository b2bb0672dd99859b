"""A simulated disk that loses unsynced changes in a power failure, in any combination, not only the latest ones.

After a failure, a file has the content of its last sync, or none. Each name that was created, removed or renamed since its
folder was synced may or may not have changed; a rename is atomic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest


class Node:
    """A file or folder, independent of its name."""

    def __init__(self, is_folder: bool) -> None:
        self.now: dict[str, Node] | None = {} if is_folder else None
        self.on_disk: dict[str, Node] | bytes = {} if is_folder else b""


class Change:
    """Names that change atomically, and the folders that have not been synced since."""

    def __init__(self, *names: tuple[Node, str, Node | None]) -> None:
        self.names, self.unsynced = names, {folder for folder, _, _ in names}

    def apply(self, entries: dict[Node, dict[str, Node]]) -> None:
        for folder, name, node in self.names:
            entries.setdefault(folder, dict(folder.on_disk)).pop(name, None)
            if node is not None:
                entries[folder][name] = node


class CrashDisk:
    """Records this process's file operations below `root`.

    Args: before_operation: called before each file operation; it may simulate the crash.
    """

    def __init__(self, root: Path, before_operation: Callable[[CrashDisk], None]) -> None:
        self.root, self._before_operation = root.resolve(), before_operation
        self.operations, self._pending, self._busy = 0, [], False
        self._node = Node(is_folder=True)
        self._scan(self._node, self.root)
        self._sync_all()

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("unlink", "rmdir", "mkdir", "rename", "replace", "fsync"):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable) -> Callable:
        def watched(path, *more, **options):
            if self._busy or not (inside := self._inside(path, options.get("dir_fd"))):
                return call(path, *more, **options)
            self._busy = True
            try:
                self._scan(self._node, self.root)
                self.operations += 1
                self._before_operation(self)
                if name == "fsync":
                    return self._sync(inside)
                result = call(path, *more, **options)
                if name in ("rename", "replace"):
                    self._rename(inside, Path(more[0]).resolve())
                self._scan(self._node, self.root)
                return result
            finally:
                self._busy = False

        return watched

    def _inside(self, path: object, folder: int | None) -> Path | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            path = Path(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = Path(os.path.abspath(path))
        return path if path == self.root or self.root in path.parents else None

    def _find(self, path: Path) -> Node:
        node = self._node
        for name in path.relative_to(self.root).parts:
            node = node.now[name]
        return node

    def _scan(self, node: Node, path: Path) -> None:
        """Record names that appeared or disappeared."""
        there = {entry.name: entry for entry in os.scandir(path)}
        for name in node.now.keys() - there.keys():
            del node.now[name]
            self._pending.append(Change((node, name, None)))
        for name, entry in there.items():
            if name not in node.now:
                node.now[name] = Node(entry.is_dir())
                self._pending.append(Change((node, name, node.now[name])))
            if entry.is_dir():
                self._scan(node.now[name], path / name)

    def _rename(self, source: Path, target: Path) -> None:
        before, after = self._find(source.parent), self._find(target.parent)
        node = before.now.pop(source.name)
        after.now[target.name] = node
        self._pending.append(Change((before, source.name, None), (after, target.name, node)))

    def _sync(self, path: Path) -> None:
        node = self._find(path)
        if node.now is None:
            node.on_disk = path.read_bytes()
            return
        for change in self._pending:
            change.unsynced.discard(node)
        entries: dict[Node, dict[str, Node]] = {}
        for change in [change for change in self._pending if not change.unsynced]:
            change.apply(entries)
            self._pending.remove(change)
        for folder, names in entries.items():
            folder.on_disk = names

    def _sync_all(self) -> None:
        for path in (self.root, *self.root.rglob("*")):
            self._sync(path)

    def crash(self, target: Path, random: Random | None) -> None:
        """Write to `target` what the disk may hold after a power failure now, or without `random` after the process is killed."""
        entries: dict[Node, dict[str, Node]] = {}
        changes = list(self._pending)
        if random and changes:
            one = random.randrange(len(changes))
            some = [change for change in changes if random.random() < 0.5]
            changes = random.choice(
                [[], changes, changes[:one], changes[one:], changes[:one] + changes[one + 1 :], some]
            )
        for change in changes:
            change.apply(entries)
        paths: dict[Node, Path] = {}

        def locate(node: Node, path: Path) -> None:
            paths[node] = path
            for name, child in (node.now or {}).items():
                locate(child, path / name)

        def write(node: Node, path: Path) -> None:
            if node.now is not None:
                path.mkdir()
                for name, child in entries.get(node, node.on_disk).items():
                    write(child, path / name)
            elif node in paths and (random is None or random.random() < 0.3):
                path.write_bytes(paths[node].read_bytes())
            else:
                path.write_bytes(node.on_disk)

        locate(self._node, self.root)
        write(self._node, target)
