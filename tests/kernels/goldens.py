"""Digests of a head after five steps, for each shipped shape, optimizer and loss. Run this file to print a new goldens.json."""

from __future__ import annotations

import json

import torch

from tests.head_helpers import ragged_batch
from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RowwiseRMSprop

LABELS, STEPS = 331, 5
# name: (features, fan_in, group_size, optimizer, loss, weight_dtype, texts)
CASES = {
    "amazon3m": (768, 128, 1, AdamW(), "squared_hinge", torch.float32, 256),
    "lfamazontitles131k": (768, 128, 1, SGD(momentum=0.9), "bce", torch.float32, 130),
    "lfpaper2keywords": (768, 128, 1, SGD(momentum=0.9), "bce", torch.bfloat16, 130),
    "eurlex4k": (4096, 64, 1, AdamW(), "squared_hinge", torch.float32, 32),
    "wordnet": (384, 64, 1, RowwiseRMSprop(), "bce", torch.float32, 128),
    "groups": (768, 128, 64, AdamW(eight_bits=True), "bce", torch.bfloat16, 128),
}


def digest(name: str, device: str, **options: object) -> dict[str, float]:
    """Return the last loss and, for each tensor, two sums: of its elements times 1, 2, ..., 7, 1, ..., and of their absolute values."""
    features, fan_in, group_size, optimizer, loss, weight_dtype, texts = CASES[name]
    head = FixedFanInHead(
        features, LABELS, fan_in=fan_in, group_size=group_size, optimizer=optimizer, loss=loss, weight_dtype=weight_dtype, lr=1e-3,
        text_reduction="mean", seed=11, product_dtype=torch.bfloat16, device=device, **options,
    )  # fmt: skip
    generator, found = torch.Generator().manual_seed(3), {}
    for _ in range(STEPS):
        feat = torch.randn(texts, features, generator=generator)
        found["loss"] = head(feat.to(device), *(x.to(device) for x in ragged_batch(texts, LABELS, generator))).item()
    for tensor_name, tensor in head.named_buffers():
        flat = tensor.double().flatten().cpu()
        found[tensor_name] = (flat * (torch.arange(flat.numel()) % 7 + 1)).sum().item()
        found[f"|{tensor_name}|"] = flat.abs().sum().item()
    return found


if __name__ == "__main__":
    print(json.dumps({name: digest(name, "cpu", backend="reference") for name in CASES}, indent=1))
