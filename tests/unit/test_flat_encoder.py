"""A flat encoder trains and saves like the encoder itself, with only a few parameters for the engine."""

from __future__ import annotations

import copy

import pytest
import torch

from xmc_trainer.encoder.flat import FlatEncoder, named_parts
from xmc_trainer.encoder.loading import load_backbone
from xmc_trainer.encoder.text_encoder import TextEncoder

RATES = (0.01, 0.03, 0.1)  # encoder, penultimate layer, weight decay


@pytest.fixture
def encoder(tiny_encoder):
    torch.manual_seed(0)
    return TextEncoder(load_backbone(str(tiny_encoder)), penultimate_size=24, penultimate_activation="tanh")


@pytest.fixture
def batch():
    ids = torch.randint(4, 90, (5, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_like_the_encoder(encoder, batch, accumulate):
    plain, before = copy.deepcopy(encoder), encoder(*batch).detach()
    flat = FlatEncoder(encoder, encoder.parameter_groups(*RATES))
    assert len(list(flat.parameters())) == 4 and all(p.ndim == 1 for p in flat.parameters())
    for module, groups in ((plain, plain.parameter_groups(*RATES)), (flat, flat.groups)):
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        for _ in range(3):
            for _ in range(accumulate):
                module(*batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (plain(*batch) - before).abs().max() > 0.1
    torch.testing.assert_close(flat(*batch), plain(*batch), rtol=1e-4, atol=1e-5)
    state = flat.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    # File formats refuse tensors that share memory.
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)


def test_the_encoders_views_follow_the_engines_tensors(encoder, batch):
    flat = FlatEncoder(encoder, encoder.parameter_groups(*RATES))
    flat.to(torch.bfloat16)
    flat.attach()
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}  # including the pooler, which is not trained
    flat.eval()
    assert not encoder.training
    with torch.no_grad():
        flat.flat[0].zero_()
        assert not encoder.backbone.embeddings.word_embeddings.weight.any()
        assert flat(*batch).dtype == torch.bfloat16


def test_every_part_keeps_the_encoders_name_and_shape(encoder):
    expected = {name: p.shape for name, p in encoder.named_parameters() if p.requires_grad}
    assert dict(part for _, parts in named_parts(encoder) for part in parts) == expected
    flat = FlatEncoder(encoder, encoder.parameter_groups(*RATES))
    found = list(named_parts(flat))
    assert dict(part for _, parts in found for part in parts) == expected
    assert all(whole.numel() == sum(shape.numel() for _, shape in parts) for whole, parts in found)
