"""Passes as CUDA graphs: the same numbers as without, for every recorded shape and between others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xmc_trainer.encoder.captured import CannotCapture, EagerPass, Recorder
from xmc_trainer.encoder.compiling import compile_encoder, warm_up
from xmc_trainer.encoder.flat import FlatEncoder
from xmc_trainer.encoder.loading import load_backbone
from xmc_trainer.encoder.text_encoder import TextEncoder

RATES = (0.01, 0.03, 0.1)  # encoder, penultimate layer, weight decay


def inputs(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 90, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, width // 2 :] = 0
    return ids.cuda(), mask.cuda()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """The first compilation of a process chooses the folder for compiled code for the whole process."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)


def flat_encoder(folder: object, cache: Path) -> FlatEncoder:
    torch.manual_seed(0)
    encoder = TextEncoder(load_backbone(str(folder)), embed_dropout=0.3, pool_mode="last_nhidden_conlast").cuda()
    flat = FlatEncoder(encoder, encoder.parameter_groups(*RATES)).cuda()
    flat.attach()
    # transformers looks at the mask's values, which a recording may not; not where a compiler looks on.
    compile_encoder(encoder, cache)
    warm_up(encoder, encoder, 6, 16, torch.device("cuda"))
    return flat.train()


def test_an_eager_pass_gives_flat_gradients_where_it_is_told():
    layer = nn.Linear(3, 2)
    members = [[layer.weight], [layer.bias, nn.Parameter(torch.ones(2))]]  # the last one is not read
    x = torch.randn(4, 3)
    places = [torch.empty(6), torch.empty(4)]
    given = EagerPass(layer, members, (x,)).gradients(torch.ones(4, 2), into=places)
    again = EagerPass(layer, members, (x,)).gradients(torch.ones(4, 2))
    for place, one, other in zip(places, given, again):
        assert place.data_ptr() == one.data_ptr() != other.data_ptr() and torch.equal(one, other)
    torch.testing.assert_close(given[0].view(2, 3), x.sum(0).expand(2, 3))
    assert given[1].tolist() == [4.0, 4.0, 0.0, 0.0]


def test_layers_left_out_at_random_are_not_recorded():
    encoder = SimpleNamespace(backbone=SimpleNamespace(config=SimpleNamespace(encoder_layerdrop=0.1)))
    with pytest.raises(CannotCapture, match="skips layers at random"):
        Recorder(encoder, [])


@pytest.mark.gpu
def test_graphs_train_as_without_them(tiny_encoder, tmp_path):
    """Dropout draws the same; shapes alternate; a shape that was not recorded and a second pass before a backward pass."""
    trained = []
    for captured in (False, True):
        flat = flat_encoder(tiny_encoder, tmp_path)
        if captured:
            flat.capture([inputs(6, 16), inputs(6, 8)])
            assert flat.captured_bytes > 0
        optimizer = torch.optim.SGD(flat.groups, momentum=0.9)
        losses = []
        for step, width in enumerate((16, 8, 24, 8, 16, 16)):
            torch.manual_seed(step)
            features = flat(*inputs(6, width, step))
            other = flat(*inputs(6, width, step + 100)) if step == 4 else features
            kept = features.detach().clone()
            loss = features.square().sum() + (other * features).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            flat.run(inputs(6, 16, step + 50))  # its backward pass never comes
            assert torch.equal(features, kept)
            losses.append(float(loss.detach()))
        trained.append((losses, flat.state_dict()))
    assert trained[1][0] == pytest.approx(trained[0][0], rel=1e-4)
    for name, value in trained[0][1].items():
        torch.testing.assert_close(trained[1][1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", ["asks the host", "fails", "asks the host later"])
def test_passes_run_without_graphs_after_a_failed_recording(tiny_encoder, tmp_path, wrong):
    """Draws, too. "fails" raises in the recording itself, which CUDA takes to be complete."""

    def answer(mask):
        if wrong == "fails" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("no")
        return float(mask.sum().item() > 0) if wrong != "asks the host later" or len(mask) == 3 else 1.0

    flat = flat_encoder(tiny_encoder, tmp_path)
    pool = flat.encoder.pool
    flat.encoder.pool = lambda *batch: pool(*batch) * answer(batch[1])
    with pytest.raises(CannotCapture, match="no" if wrong == "fails" else "captur"):
        flat.capture([inputs(6, 16), inputs(3, 16)])
    features = flat(*inputs(6, 16))
    features.sum().backward()
    assert 0 < (features == 0).float().mean() < 1  # dropout drew
    assert features.isfinite().all() and all(p.grad.isfinite().all() for p in flat.parameters())
