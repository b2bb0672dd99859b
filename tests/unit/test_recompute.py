"""A backward pass that computes layers again gives the gradient of the forward pass: with its dropout, not another."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.encoders import save_encoder
from xmc_trainer.builders.encoder import encoder_of
from xmc_trainer.config import load_config
from xmc_trainer.encoder import compiling
from xmc_trainer.encoder.compiling import compile_encoder
from xmc_trainer.encoder.loading import load_backbone
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        heads = x[:, None]
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)[:, 0]
        return x + self.dropout(nn.functional.gelu(self.linear(mixed)))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch.compile needs g++ on a CPU"
)
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_compiled_code_that_recomputes_does_not_draw_again(recompute, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = Layers().double().to(device)
    compile_encoder(SimpleNamespace(backbone=layers), tmp_path, recompute=recompute)
    x, weight = torch.randn(2, 20, 3, 8, dtype=torch.float64, device=device)
    trained = layers.layers[0].linear.weight
    at, direction = trained.detach().clone(), torch.randn_like(trained)

    def value(step):
        trained.data = at + step * direction
        torch.manual_seed(1)
        return (layers(x.clone().requires_grad_()) * weight).sum()

    kept = torch._functorch.config.activation_memory_budget if recompute else compiling._KEPT  # as on a GPU
    with torch._functorch.config.patch(activation_memory_budget=kept):
        (gradient,) = torch.autograd.grad(value(0.0), trained)
        slope = (value(1e-5) - value(-1e-5)).item() / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "t5 encoder", "roberta"])
def test_layers_that_are_computed_again_give_the_same_gradients(name, tmp_path):
    more = {"dropout_rate": 0.3} if name == "t5 encoder" else {"hidden_dropout_prob": 0.3}
    encoder = TextEncoder(load_backbone(str(save_encoder(name, tmp_path, **more)))).train()
    ids = torch.randint(4, 60, (5, 9))
    calls, found = [], []
    layer = compiling.layer_lists(encoder.backbone)[0][1][1]
    part = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    part.register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True, False):
        encoder.recompute_layers(on)
        torch.manual_seed(3)
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        found.append(
            torch.autograd.grad(encoder(ids, torch.ones_like(ids)).square().sum(), parameters, allow_unused=True)
        )
        encoder.zero_grad()
    assert len(calls) == 1 + 2 + 1
    for plain, again in zip(found[0], found[1]):
        assert (plain is None and again is None) or torch.equal(plain, again)


def test_an_encoder_that_cannot_is_refused(tmp_path):
    backbone = load_backbone(str(save_encoder("xlnet", tmp_path)))
    config = load_config(
        [
            "dataset=wordnet",
            "model.encoder.gradient_checkpointing=true",
            "model.encoder.encoder_model=x",
            "model.encoder.encoder_ftr_dim=null",
        ]
    )
    with pytest.raises(
        UserError,
        match="model.encoder.gradient_checkpointing=true: XLNetModel of model.encoder.encoder_model=x cannot .*; set it to false",
    ):
        encoder_of(config, backbone)
