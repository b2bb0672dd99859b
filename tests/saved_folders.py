"""Forge saved folders with valid digests, and simulate a full disk."""

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
    """Update the manifest's checksums, change it in place, and renew its digest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256", None)
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(manifest)
    path.write_text(json.dumps(manifest | {"manifest_sha256": _digest(manifest)}))


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Limit the size of files, which fails like a full disk for every library, and for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
