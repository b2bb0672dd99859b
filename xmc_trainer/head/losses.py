"""Loss functions, element-wise over (text, label). The head step sums over labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bce(logit: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy with logits: log(1 + e^z) - y z, and its derivative sigmoid(z) - y.

    `logit` is float32 and `positive` bool, of one shape. Returns (loss, dloss/dlogit), float32.
    """
    y = positive.to(logit.dtype)
    return functional.softplus(logit) - y * logit, torch.sigmoid(logit) - y


def squared_hinge(logit: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """max(0, 1 - s z)^2 with s = 1 for positives, -1 for the rest, and its derivative -2 s max(0, 1 - s z)."""
    sign = torch.where(positive, 1.0, -1.0)
    margin = (1 - sign * logit).clamp_min(0)
    return margin.square(), -2 * sign * margin


LOSSES = {"bce": bce, "squared_hinge": squared_hinge}
# The constant logit with the smallest mean loss, as a function of the share of positives.
_BEST_CONSTANTS = {"bce": torch.logit, "squared_hinge": lambda share: 2 * share - 1}


def best_constant(loss: str, positive_share: Tensor) -> Tensor:
    """Return the constant logit with the smallest mean loss of a label, for shares of positives in (0, 1).

    With this initial bias the first gradients come from the positives. With a bias of zero they come from L negatives through
    random weights, and Adam, which ignores their scale, damages a pretrained encoder with them.
    """
    return _BEST_CONSTANTS[loss](positive_share)


def starting_bias(loss: str, init: str, count_L: Tensor, texts: int) -> Tensor:
    """Return the initial biases of a head, float32 [L].

    They are finite for any counts: shares are shrunk away from 0 and 1, where binary cross-entropy's best constant is infinite.

    Args:
        init: "prior": the best constant for the mean share of positives, the same for all outputs. "frequency": the best
            constant for each output's own share. "zero".
        count_L: int, number of texts with each output as a positive.
        texts: number of texts.
    """
    if init == "zero":
        return torch.zeros(len(count_L))
    count_L = count_L.double()
    # Add one (text, output) pair that is half positive.
    mean = (count_L.sum() + 0.5) / (texts * len(count_L) + 1)
    # Add one text with an average set of positives.
    share = (count_L + mean) / (texts + 1) if init == "frequency" else mean.expand(len(count_L))
    return best_constant(loss, share).float()
