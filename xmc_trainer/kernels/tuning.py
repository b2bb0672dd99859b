"""Which of several ways through the same work is the fastest on this device: measured once, remembered on disk."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_ROUNDS = 5


def cache_folder() -> Path:
    """Where compiled kernels and choices are kept: XDG_CACHE_HOME (default ~/.cache)/xmc_trainer/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmc_trainer" / "kernels"


def _remembered(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_known: dict[str, str] = {}  # this process's answers


def fastest(question: str, names: Sequence[str], trial: Callable[[str], Callable[[], object]], device: torch.device) -> str:
    """The name of the fastest of several ways.

    Args:
        question: says all that the answer may depend on besides the device's name and torch's version.
        trial: from a name what to time; it is called some times on the device's current stream. Asked for only where the
            answer is not known yet.
    The answers are kept in `choices.json` in `cache_folder`. Ranks that ask together each measure; the last answer is kept.
    """
    key = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: {question}: {' | '.join(names)}"
    if key not in _known:
        file = cache_folder() / "choices.json"
        chosen = _remembered(file).get(key)
        if chosen not in names:
            times = {name: _milliseconds(trial(name), device) for name in names}
            chosen = min(times, key=times.get)
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8", delete=False) as part:
                json.dump(_remembered(file) | {key: chosen}, part, indent=1, sort_keys=True)
            os.replace(part.name, file)
        _known[key] = chosen
    return _known[key]


def keep_busy(device: torch.device, milliseconds: float = 8) -> None:
    """So long at least, for a GPU. As in training the host is ahead: what follows does not wait for its own launches.

    It does nothing: products instead would heat the GPU, whose clock falls then (an H100's steps took a fifth longer).
    """
    with torch.cuda.device(device):
        torch.cuda._sleep(round(2e6 * milliseconds))  # cycles


def _milliseconds(way: Callable[[], object], device: torch.device) -> float:
    """The device's time for the shortest of some rounds, after one that warms up."""
    way()
    keep_busy(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
    events[0].record()
    for event in events[1:]:
        way()
        event.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(stop) for start, stop in zip(events, events[1:]))
