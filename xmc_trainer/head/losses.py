"""The losses: element-wise over (text, label), summed over labels by the head step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bce(logit: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy with logits: log(1 + e^z) - y z, and its derivative sigmoid(z) - y.

    Args: logit float32, positive bool, of one shape. Returns: (loss, dloss/dlogit), float32.
    """
    y = positive.to(logit.dtype)
    return functional.softplus(logit) - y * logit, torch.sigmoid(logit) - y


def squared_hinge(logit: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """max(0, 1 - s z)^2 with s = 1 for positives, -1 for the rest, and its derivative -2 s max(0, 1 - s z)."""
    sign = torch.where(positive, 1.0, -1.0)
    margin = (1 - sign * logit).clamp_min(0)
    return margin.square(), -2 * sign * margin


LOSSES = {"bce": bce, "squared_hinge": squared_hinge}


def best_constant(loss: str, positive_share: Tensor) -> Tensor:
    """The logit that minimises a label's mean loss if all its logits are one constant, for shares of positives in (0, 1).

    A bias that starts there lets the first gradients speak of the positives. From a bias of zero they are the sum of
    L negatives' pushes through random weights, and Adam, blind to scale, wrecks a pretrained encoder with them.
    """
    if loss == "bce":
        return torch.logit(positive_share)
    return 2 * positive_share - 1


def starting_bias(loss: str, init: str, counts: Tensor, texts: int) -> Tensor:
    """Where the biases of a head begin.

    Args:
        init: "prior": the best constant for the mean share of positives, the same for all; "frequency": of each output's own
            share; "zero".
        counts: int [L], texts of which each output is a positive.
        texts: how many there are.
    Returns: float32 [L], finite whatever the counts: every share is shrunk away from 0 and 1, where the best constant of
        the binary cross-entropy is infinite.
    """
    if init == "zero":
        return torch.zeros(len(counts))
    counts = counts.double()
    # One more pair of a text and an output, half of a positive one.
    mean = (counts.sum() + 0.5) / (texts * len(counts) + 1)
    # One more text, with an average set of positives.
    share = (counts + mean) / (texts + 1) if init == "frequency" else mean.expand(len(counts))
    return best_constant(loss, share).float()
