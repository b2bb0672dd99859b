"""Saved folders as somebody else makes them: what is said in them is true to itself, and was never saved by this program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xmc_trainer.saved_folder import _digest


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Change the manifest in place, after its checksums were brought up to date; then sign it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256", None)
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(manifest)
    path.write_text(json.dumps(manifest | {"manifest_sha256": _digest(manifest)}))
