"""Helpers for tests of the CUDA kernels: compilation for a GPU or the CPU emulator, heads and batches."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from tests.head_helpers import ragged_batch
from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RowwiseRMSprop
from xmc_trainer.kernels import eight_bits
from xmc_trainer.kernels.cuda import source as cuda_source

HERE = Path(__file__).parent
OPTIMIZERS = {
    "sgd": SGD(), "momentum": SGD(momentum=0.9), "adamw": AdamW(eps=1e-4), "rowwise": RowwiseRMSprop(eps=1e-4),
    "adamw_8bit": AdamW(eps=1e-4, eight_bits=True),
}  # fmt: skip
LABELS = 203
COMPILED = HERE.parents[1] / ".pytest_cache" / "cuda_on_cpu"
_memory = tempfile.TemporaryDirectory(prefix="cuda_on_cpu.")


class Change(NamedTuple):
    """Replaces the text from start to stop of a source by a statement that does nothing."""

    file: str
    start: int
    stop: int


@functools.cache
def library_for_cpu(source, defines, layout, change=None):
    """Stands in for `cuda_source.compiled`: rewrites what only nvcc understands and compiles with g++."""
    folder = Path(tempfile.mkdtemp(dir=_memory.name))
    replaced = 0
    for name in (source, *cuda_source.HEADERS):
        text = (cuda_source.FOLDER / name).read_text()
        if change and change.file == name:
            text = text[: change.start] + "void()" + text[change.stop :]
        text, shared = re.subn(
            r"extern __shared__ (.*)uint8_t memory\[\];", "uint8_t* memory = cpu::shared_memory();", text
        )
        text, launches = re.subn(
            r"step_kernel<<<(.*?), (.*?), (.*?), .*?>>>\((.*?)\);",
            r"failed = !cpu::run(\1, \2, \3, [&] { step_kernel(\4); });",
            text,
        )
        (folder / name.replace(".cu", ".cpp") if name == source else folder / name).write_text(text)
        replaced += shared + launches
    assert replaced == 2
    (folder / "arguments.cuh").write_text(layout.header)
    for file in (HERE / "cuda_on_cpu").iterdir():
        shutil.copy(file, folder)
    words = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-I."]
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    # The kernel's memory accesses call __tsan_* functions, which cpu.cpp defines in place of the sanitizer's.
    emulator = _built([*words, "-c", "cpu.cpp"], folder, ["cpu.cpp", "cpu.h"], version)
    words += [f"-D{define}" for define in defines]
    kernel = [*words, "-fsanitize=thread", "-c", source.replace(".cu", ".cpp")]
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    kernel_object = _built(kernel, folder, files, version)
    library = _built(["g++", "-shared", "-Wl,--no-undefined", str(kernel_object), str(emulator)], folder, [], version)
    return cuda_source.checked_layout(ctypes.CDLL(str(library)), source, layout)


def _built(command: list[str], folder: Path, files: list[str], version: str) -> Path:
    """Run g++ unless an earlier run with the same command and contents of the files has left its output. Return the output."""
    content = [(name, (folder / name).read_text()) for name in files]
    output = COMPILED / f"{hashlib.sha256(repr([command, version, content]).encode()).hexdigest()}.o"
    if not output.exists():
        COMPILED.mkdir(parents=True, exist_ok=True)
        partial = COMPILED / f"{os.getpid()}.partial"  # other test processes write here, too
        subprocess.run([*command, "-o", str(partial)], check=True, cwd=folder)
        partial.replace(output)
    return output


DEVICES = [
    pytest.param("cpu", marks=[
        pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter, which builds the bitmaps, is off on a GPU"),
        pytest.mark.skipif(shutil.which("g++") is None, reason="the CUDA source needs a C++ compiler to run on a CPU"),
    ]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]  # fmt: skip


def use(device, module, name, monkeypatch):
    """Compile for `device`. Return a list that gets an entry for each call of `module.name`."""
    if device == "cpu":
        monkeypatch.setattr(cuda_source, "can_compile", lambda device: True)
        monkeypatch.setattr(cuda_source, "compiled", library_for_cpu)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    elif not cuda_source.can_compile(torch.device("cuda")):
        pytest.skip("the CUDA kernels need nvcc, ninja and a GPU of capability 9.0")
    launched, launch = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: launched.append(1) or launch(*a, **k))
    return launched


def make_head(device, features, fan_in, group_size, optimizer="sgd", labels=LABELS, **options):
    options = {
        "lr": 0.03,
        "weight_decay": 0.02,
        "seed": 5,
        "backend": "triton",
        "product_dtype": torch.bfloat16,
    } | options
    return FixedFanInHead(
        features,
        labels,
        fan_in=fan_in,
        group_size=group_size,
        optimizer=OPTIMIZERS[optimizer],
        device=device,
        **options,
    )


def batch(device, features, texts, seed=0, labels=LABELS):
    generator = torch.Generator().manual_seed(seed)
    feat = torch.randn(texts, features, generator=generator).bfloat16().float()
    ids, counts = ragged_batch(texts, labels, generator)
    return feat.to(device), ids.to(device), counts.to(device)


def dense_of(head):
    """Return the weights as float64 [L, d] and a bool mask of the connected ones, on the head's device.

    `head_helpers.dense_of` goes label by label and is slow on a GPU.
    """
    if head.index is None:
        return head.weight.double(), torch.ones_like(head.weight, dtype=torch.bool)
    row = torch.arange(head.weight.shape[0], device=head.weight.device) // head.group_size
    index = head.index.long()[row]
    dense = torch.zeros(head.weight.shape[0], head.in_features, dtype=torch.float64, device=head.weight.device)
    return dense.scatter(1, index, head.weight.double()), torch.zeros_like(dense, dtype=torch.bool).scatter(
        1, index, True
    )


def floats_of(head):
    """Return float32 copies of a head's weights, biases and states, by name."""
    bytes_of = {"weight_exp_avg": 1, "weight_exp_avg_sq": 2}  # the number of an 8-bit state
    return {
        name: eight_bits.decoded(tensor, bytes_of[name]) if tensor.dtype == torch.uint8 else tensor.float().clone()
        for name, tensor in head.named_buffers()
        if name not in ("index", "skipped")
    }


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()
