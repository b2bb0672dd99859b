"""Compiles, loads and launches the CUDA sources.

torch's extension loader compiles a source on first use, for one configuration of a head, and the library is kept on disk. That needs
nvcc (torch looks at CUDA_HOME, then at PATH), ninja and a GPU of compute capability 9.0; `can_compile` checks for them. If
compilation fails all the same (nvcc may not support the C++ compiler), it raises `CompilationFailed`, and the caller calls `give_up`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.kernels.arguments import Layout
from xmc_trainer.kernels.cuda import wgmma
from xmc_trainer.kernels.interface import HeadTensors

FOLDER = Path(__file__).parent
HEADERS = ("ptx.cuh", "operands.cuh", "losses.cuh", "densify.cuh", "launch.cuh")
HOPPER = (9, 0)  # the compute capability with warpgroup matrix instructions (wgmma)
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int16: "int16_t", torch.int32: "int32_t"}


class CompilationFailed(RuntimeError):
    """A CUDA source does not compile. The message is the compiler's."""


_gave_up = False


def give_up(error: CompilationFailed) -> None:
    """Warn, and make `can_compile` false from now on."""
    global _gave_up
    _gave_up = True
    warnings.warn(
        f"the head's CUDA kernels do not compile; the slower Triton kernels run instead: {error}",
        stacklevel=2,
    )


def can_compile(device: torch.device) -> bool:
    """Return whether the sources can be compiled for a device."""
    return not _gave_up and _finds_compiler(device)


@functools.cache
def _finds_compiler(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER or shutil.which("ninja") is None:
        return False
    from torch.utils.cpp_extension import CUDA_HOME  # takes a while to import

    return CUDA_HOME is not None


def cache_folder() -> Path:
    """Return the folder of compiled kernels: xmc_trainer/kernels in XDG_CACHE_HOME (default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmc_trainer" / "kernels"


def generated(layout: Layout) -> dict[str, str]:
    """Return the text of each generated header, by name."""
    return {"arguments.cuh": layout.header, "wgmma.cuh": wgmma.header()}


@functools.cache
def compiled(source: str, defines: tuple[str, ...], layout: Layout) -> ctypes.CDLL:
    """Compile a source, or take it from disk, and load it. Raises CompilationFailed.

    Ranks that start together each compile it; the last one's library is kept.
    """
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in (source, *HEADERS)]
    content = (texts, generated(layout), defines, torch.__version__)
    name = f"{Path(source).stem}_{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}"
    kept = cache_folder() / f"{name}.so"
    if not kept.exists():
        from torch.utils import cpp_extension

        kept.parent.mkdir(parents=True, exist_ok=True)
        target = (
            "-gencode=arch=compute_90a,code=sm_90a"  # torch's default is sm_90, which lacks the warpgroup instructions
        )
        # A temporary folder, because the lock file of a killed process would block every later one.
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            for header, text in generated(layout).items():
                (Path(folder) / header).write_text(text, encoding="utf-8")
            try:
                cpp_extension.load(
                    name, [str(FOLDER / source)], build_directory=folder, is_python_module=False, extra_include_paths=[folder],
                    extra_cuda_cflags=["-O3", target, *(f"-D{define}" for define in defines)],
                )  # fmt: skip
            except (RuntimeError, OSError) as error:
                raise CompilationFailed(str(error)) from error
            os.replace(Path(folder) / f"{name}.so", kept)
    return checked_layout(ctypes.CDLL(str(kept)), source, layout)


def checked_layout(library: ctypes.CDLL, source: str, layout: Layout) -> ctypes.CDLL:
    if library.arguments_size() != ctypes.sizeof(layout.structure):
        raise RuntimeError(f"{source} was compiled with another Arguments struct than that of kernels/arguments.py")
    return library


class Kernel:
    """A source compiled for a head. `blocks`: how many thread blocks the device runs at once."""

    def __init__(
        self, source: str, layout: Layout, head: HeadTensors, device: torch.device, **defines: int | str
    ) -> None:
        assert head.index_RF is not None  # dispatch sends no dense head here
        types = {"WEIGHT": TYPES[head.weight_LF.dtype], "INDEX": TYPES[head.index_RF.dtype]}
        self._library = compiled(source, tuple(f"{name}={value}" for name, value in (types | defines).items()), layout)
        self._layout, self._device = layout, device
        self.blocks = _checked(self._library.launch_blocks())

    def __call__(self, blocks: int, arguments: dict[str, Any]) -> None:
        """Launch `blocks` thread blocks on the current stream. Tensors are passed by address, None as null."""
        plain = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        _checked(-self._library.launch(ctypes.byref(self._layout.structure(**plain)), blocks, stream))


def _checked(result: int) -> int:
    """Return the result of a source's function. A negative one is a CUDA error number and raises RuntimeError."""
    if result < 0:
        raise RuntimeError(f"CUDA error {-result}")
    return result
