"""The version of this code."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Return the git commit of this code, followed by + if files were edited, or "none" outside a repository."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        inside = subprocess.run([*words[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() if inside.returncode == done.returncode == 0 else "none"
