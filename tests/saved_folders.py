"""Saved folders as somebody else makes them, signed and never saved by this program; and a disk that takes no more."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmc_trainer.checkpoint.folder import _digest


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Change the manifest in place, after its checksums were brought up to date; then sign it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256", None)
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(manifest)
    path.write_text(json.dumps(manifest | {"manifest_sha256": _digest(manifest)}))


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a full disk does, to every library alike, and to whom is root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
