"""The loader of the CUDA sources: if compilation fails, it warns and Triton's kernels run instead."""

from __future__ import annotations

import pytest
import torch
from torch.utils import cpp_extension

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the Triton backend needs triton")
from tests.kernels.cuda_helpers import batch, dense_of, error, make_head  # noqa: E402
from xmc_trainer.kernels.cuda import source as cuda_source  # noqa: E402


def test_without_a_compiler_that_works_triton_takes_over(monkeypatch, tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tried = []

    def load(*arguments, **options):
        tried.append(arguments[0])
        raise RuntimeError("Error building extension: unsupported GNU version")

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cuda_source, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cuda_source, "_finds_compiler", lambda device: True)
    monkeypatch.setattr(cuda_source, "_gave_up", False)
    heads = [make_head(device, 48, 16, group_size=1, backend=backend) for backend in ("triton", "reference")]
    start = heads[0].weight.clone()
    with pytest.warns(UserWarning, match="unsupported GNU version"):
        losses = [head(*batch(device, 48, 37)).item() for head in heads]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert error(heads[0].weight - start, (heads[1].weight - start).double()) < 2e-2
    heads[0](*batch(device, 48, 37, seed=1))
    assert len(tried) == 1
    monkeypatch.setattr(cuda_source, "_gave_up", False)
    feat = batch(device, 48, 37, seed=2)[0]
    with pytest.warns(UserWarning, match="unsupported GNU version"):
        score, label = heads[0].topk(feat, 5)
    assert len(tried) == 2
    z = feat.double() @ dense_of(heads[0])[0].bfloat16().double().T + heads[0].bias.double()
    torch.testing.assert_close(score.double(), z.topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.gather(1, label), score.double(), rtol=1e-5, atol=1e-5)
