"""Removes each barrier, wait, arrival and fence of the CUDA sources in turn. The emulator must fail the launch, or the results differ."""

from __future__ import annotations

import functools
import os
import re
import shutil

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter, which builds the bitmaps, is off on a GPU"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the CUDA source needs a C++ compiler to run on a CPU"),
]

pytest.importorskip("triton", reason="the Triton backend needs triton")
from tests.kernels.cuda_helpers import Change, batch, error, library_for_cpu, make_head, use  # noqa: E402
from xmc_trainer.kernels.cuda import densify, group, source  # noqa: E402

SYNCHRONISES = re.compile(
    r"(?<![\w.>])(?:[\w.]+\.)?(?:__syncthreads|__syncwarp|meet|await|await_full|await_free|arrive|arrive_expecting|await_copies"
    r"|await_products|end_products|commit_products|begin_products|publish_shared|publish_barriers)(?:<[^<>;]*>)?\((?:[^();{}]|\([^()]*\))*\)(?=[;,])"
)
# The heads that launch each source: (features, fan_in, group_size, labels, weight_dtype, texts).
HEADS = {
    "logits.cu": [(704, 24, 1, 1100, torch.bfloat16, 128)],  # a part of X in shared memory
    "feature_gradient.cu": [(192, 24, 1, 1100, torch.bfloat16, 128)],
    "weight_gradient.cu": [(192, 24, 1, 700, torch.bfloat16, 300)],  # several tiles of texts
    # Slopes in registers, and in shared memory.
    "group.cu": [(200, 64, 64, 700, torch.bfloat16, 256), (200, 128, 128, 700, torch.bfloat16, 256)],
}  # fmt: skip
OF_HEADERS = {"densify.cuh": "logits.cu"}


def mutants():
    for file in (*HEADS, *OF_HEADERS):
        text = (source.FOLDER / file).read_text()
        for found in SYNCHRONISES.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            if "for convergence alone" not in text.splitlines()[line - 1]:
                yield pytest.param(file, found.span(), id=f"{file}:{line} {found.group()}")


def word_of(mutant) -> str:
    return re.match(r"(?:[\w.]+\.)?(\w+)", str(mutant.id).split(" ", 1)[1]).group(1)


def chosen():
    """The last mutant of each kind; with XMC_ALL_MUTANTS=1 every one, which takes minutes: after a change of a kernel."""
    everyone = list(mutants())
    return (
        everyone
        if os.environ.get("XMC_ALL_MUTANTS") == "1"
        else list({word_of(each): each for each in everyone}.values())
    )


def outcome(file: str, number: int, change: Change | None, monkeypatch):
    """Run a step. Return [loss, feature gradient, change of the weights]."""
    features, fan_in, group_size, labels, weight_dtype, texts = HEADS[file][number]
    launched = use("cpu", densify if group_size == 1 else group, "run", monkeypatch)

    def compiled(name, defines, layout):
        return library_for_cpu(name, defines, layout, change if name == file else None)

    monkeypatch.setattr(source, "compiled", compiled)
    head = make_head("cpu", features, fan_in, group_size, labels=labels, weight_dtype=weight_dtype, lr=1.0)
    before = head.weight.float().clone()
    feat, ids, counts = batch("cpu", features, texts, labels=labels)
    feat.requires_grad_()
    loss = head(feat, ids, counts)
    loss.backward()
    assert launched
    return [loss.detach(), feat.grad, head.weight.float() - before]


@functools.cache
def expected(file: str, number: int):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return outcome(file, number, None, monkeypatch)


def noticed(file: str, number: int, change: Change, monkeypatch) -> bool:
    right = expected(file, number)
    try:
        found = outcome(file, number, change, monkeypatch)
    except RuntimeError as failed:
        assert "CUDA error 719" in str(failed)
        return True
    return not all(error(got, exact.double()) < 1e-3 for got, exact in zip(found, right))


@pytest.mark.parametrize("file, span", chosen())
def test_a_kernel_without_one_synchronisation_fails_or_differs(file, span, monkeypatch):
    kernel = OF_HEADERS.get(file, file)
    assert any(noticed(kernel, number, Change(file, *span), monkeypatch) for number in range(len(HEADS[kernel])))


def test_there_are_mutants_of_every_kind():
    words = {word_of(mutant) for mutant in mutants()}
    assert len(list(mutants())) >= 45 and {
        "__syncthreads", "__syncwarp", "meet", "await_full", "await_free", "arrive", "arrive_expecting", "publish_shared", "await_products", "await_copies", "begin_products",
        "commit_products", "end_products", "publish_barriers",
    } <= words  # fmt: skip
