"""The encoder's optimizer groups, whole and as ZeRO-3 leaves them."""

from __future__ import annotations

from pathlib import Path

import torch

from xmc_trainer.encoder import TextEncoder, load_backbone


def test_matrices_decay_and_vectors_do_not_at_every_stage(tiny_encoder: Path):
    encoder = TextEncoder(load_backbone(str(tiny_encoder)), penultimate_size=8, penultimate_activation="relu")
    groups = encoder.parameter_groups(1e-4, 1e-2, 0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-4, 0.01), (1e-4, 0.0), (1e-2, 0.01), (1e-2, 0.0)]
    assert all(p.ndim > 1 for group in groups[::2] for p in group["params"])
    assert all(p.ndim == 1 for group in groups[1::2] for p in group["params"])
    members = [[id(p) for p in group["params"]] for group in groups]
    for parameter in encoder.parameters():  # what DeepSpeed does to them
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert [[id(p) for p in group["params"]] for group in encoder.parameter_groups(1e-4, 1e-2, 0.01)] == members
