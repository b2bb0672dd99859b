"""The choice of a backend: one module with `head_step` and `head_topk` of one signature each."""

from __future__ import annotations

from types import ModuleType

from xmc_trainer.kernels import reference


def select_backend(name: str) -> ModuleType:
    """The kernels module for `model.ffi.backend`: "reference", or "auto", the fastest that there is."""
    if name in ("auto", "reference"):
        return reference
    raise ValueError(f"model.ffi.backend={name!r}: choose auto or reference")
