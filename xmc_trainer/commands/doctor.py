"""Report this machine's versions, GPUs and compilers and the kernels that will run, for a bug report.

xmc-trainer doctor
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata

from xmc_trainer import __version__
from xmc_trainer.errors import reason

_LIBRARIES = (
    "torch", "triton", "deepspeed", "accelerate", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "scipy",
    "safetensors", "pyyaml", "torch_sparse",
)  # fmt: skip
_MODULES = {"pyyaml": "yaml"}  # libraries whose module has another name
_OPTIONAL = ("triton", "torch_sparse")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM", "TRITON_INTERPRET", "XDG_CACHE_HOME", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
# compiler -> marker of the line of `--version` that contains the version
_COMPILERS = {"nvcc": "release", "g++": "", "ninja": ""}


def library_version(name: str) -> str:
    """Return the version of an installed library, or say that it is missing or cannot be imported."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed" + (" (optional)" if name in _OPTIONAL else ": pip install --editable .")
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # a broken installation can raise any exception
        return f"{version}, cannot be imported: {reason(error)}"
    return version


def compiler_version(name: str, marker: str) -> str:
    """Return the first line of `NAME --version` that contains `marker`, and the compiler's path."""
    path = shutil.which(name)
    if path is None:
        return "not found on PATH"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {reason(error)} ({path})"
    line = next((line for line in done.stdout.splitlines() if marker in line), "no version printed")
    return f"{line} ({path})"


def _backends() -> Iterator[tuple[str, str]]:
    """Yield (name, what runs and why) for each `model.ffi.backend`."""
    import torch

    from xmc_trainer.kernels.dispatch import BACKENDS, GPU, select_backend

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    for name in BACKENDS:
        try:
            backend = select_backend(name, device)
        except ValueError as error:
            yield f"backend {name}", f"cannot run: {error}"
            continue
        on_gpu = isinstance(backend, GPU)
        chosen = "the GPU kernels" if isinstance(backend, GPU) else backend.__name__.rpartition(".")[2]
        because = ""
        if name == "auto":
            because = "a GPU and triton" if on_gpu else "no triton" if gpu else "no usable GPU"
        yield f"backend {name}", f"runs {chosen}" + (f" (there is {because})" if because else "")
    if gpu:
        from xmc_trainer.kernels.cuda.source import can_compile

        yield (
            "CUDA kernels",
            "compiled on first use"
            if can_compile(device)
            else ("not used, Triton's run instead: they need a GPU of capability 9.0, nvcc and ninja"),
        )


def _gpus() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        yield (
            "GPU",
            f"none usable (torch is built {'for CUDA ' + torch.version.cuda if torch.version.cuda else 'without CUDA'})",
        )
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield (
            f"GPU {number}",
            f"{properties.name}, capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB",
        )
    yield "CUDA of torch", str(torch.version.cuda)


def _commit() -> str:
    from xmc_trainer.version import commit

    return commit()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def report() -> Iterator[tuple[str, str]]:
    """Yield (item, state) for each line of the report. An item that fails yields its error, and the rest follow."""
    yield "xmc_trainer", __version__
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "cores, memory", f"{len(os.sched_getaffinity(0))}, {_memory()}"
    yield from ((name, library_version(name)) for name in _LIBRARIES)
    yield from ((name, compiler_version(name, marker)) for name, marker in _COMPILERS.items())
    for section in (_gpus, _backends, lambda: [("commit", _commit())]):
        try:
            yield from section()
        except Exception as error:  # for example torch cannot be imported, which a line above reports
            yield "error", f"{type(error).__name__}: {reason(error)}"
    yield from ((name, os.environ[name]) for name in _VARIABLES if name in os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for name, value in report():
        print(f"{name:24s}{value}", flush=True)
