"""The choice of a backend: a module with `head_step` and `head_topk`, the same signatures in each."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

from xmc_trainer.kernels import reference

BACKENDS = ("auto", "triton", "reference")


@functools.cache
def select_backend(name: str, device: torch.device) -> ModuleType:
    """The kernels for `model.ffi.backend` on a device: "auto" is triton on a GPU where it is installed, else reference.

    Raises ValueError for "triton" where it cannot run. Under TRITON_INTERPRET=1 it runs on a CPU, for tests.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.ffi.backend={name!r}: choose {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("triton") is not None
    if name == "reference" or (name == "auto" and not (installed and device.type == "cuda")):
        return reference
    if not installed:
        raise ValueError("model.ffi.backend='triton': triton is not installed; pip install triton, or choose reference")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"model.ffi.backend='triton': needs a CUDA device, this is {device}; choose auto or reference")
    from xmc_trainer.kernels import triton_head  # imports triton

    return triton_head
