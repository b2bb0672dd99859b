"""The choice of a backend: a module with `head_step` and `head_topk`, the same signatures in each."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from xmc_trainer.kernels import reference

BACKENDS = ("auto", "triton", "reference", "torch_sparse")


@functools.cache
def select_backend(name: str, device: torch.device) -> ModuleType:
    """The kernels for `model.ffi.backend` on a device: "auto" is triton on a GPU where it is installed, else reference.

    Raises ValueError for "triton" and "torch_sparse" where they cannot run. Under TRITON_INTERPRET=1 it runs on a CPU, for tests.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.ffi.backend={name!r}: choose {', '.join(BACKENDS)}")
    if name == "torch_sparse":
        return _torch_sparse()
    installed = importlib.util.find_spec("triton") is not None
    if name == "reference" or (name == "auto" and not (installed and device.type == "cuda")):
        return reference
    if not installed:
        raise ValueError("model.ffi.backend='triton': triton is not installed; pip install triton, or choose reference")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"model.ffi.backend='triton': needs a CUDA device, this is {device}; choose auto or reference")
    from xmc_trainer.kernels import triton_head  # imports triton

    return triton_head


def _torch_sparse() -> ModuleType:
    field = "model.ffi.backend='torch_sparse'"
    spec = importlib.util.find_spec("torch_sparse")
    if spec is None:
        raise ValueError(
            f"{field}: PyG's torch_sparse is not installed; pip install --no-build-isolation torch_scatter torch_sparse "
            "(they are compiled, which takes a while), or choose auto"
        )
    # PyG's has this module. Spartex's kernels are a wheel of the same name; importing it would be of no use.
    if not any((Path(folder) / "tensor.py").is_file() for folder in spec.submodule_search_locations or ()):
        raise ValueError(
            f"{field}: the installed torch_sparse is not PyG's but another package of that name, such as Spartex's kernels, "
            "which this backend does not use; pip uninstall torch_sparse and install PyG's, or choose auto"
        )
    try:
        from xmc_trainer.kernels import torch_sparse_head
    except (OSError, ImportError) as error:
        raise ValueError(
            f"{field}: torch_sparse does not fit this torch ({str(error).splitlines()[0]}); build it and torch_scatter anew: "
            "pip install --no-build-isolation --force-reinstall --no-deps torch_scatter torch_sparse"
        ) from None
    return torch_sparse_head
