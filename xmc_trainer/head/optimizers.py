"""The head's optimizers: update rules that the head step applies tile by tile, to whole rows of weights.

torch.optim needs a gradient of the whole weight, which never exists here. SGD and AdamW compute the same as torch.optim's (tests
compare them), including weight decay: added to the gradient for SGD, decoupled for AdamW.

A rule computes in float32. Its states have the dtype of the weights unless it sets `state_dtype`. Those in `per_label_states` are
one float32 per label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """SGD, with a momentum buffer if `momentum` > 0."""

    momentum: float = 0.0
    per_label_states: ClassVar[tuple[str, ...]] = ()
    state_dtype: ClassVar[torch.dtype | None] = None

    @property
    def name(self) -> str:
        return "momentum" if self.momentum else "sgd"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the new (weight, state). All tensors are float32 of one shape; `step` is 1 for the first update."""
        if weight_decay:
            grad = grad + weight_decay * weight
        if not self.momentum:
            return weight - lr * grad, []
        buffer = self.momentum * state[0] + grad
        return weight - lr * buffer, [buffer]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    Attributes:
        eight_bits: store the states of weights in one byte each; see `xmc_trainer.kernels.eight_bits`. Those of biases
            stay float32.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eight_bits: bool = False
    name = "adamw"
    per_label_states: ClassVar[tuple[str, ...]] = ()

    @property
    def state_dtype(self) -> torch.dtype | None:
        return torch.uint8 if self.eight_bits else None

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the new (weight, state). All tensors are float32 of one shape; `step` is 1 for the first update."""
        average = self.beta1 * state[0] + (1 - self.beta1) * grad
        square = self.beta2 * state[1] + (1 - self.beta2) * grad * grad
        deviation = (square / (1 - self.beta2**step)).sqrt() + self.eps
        weight = weight * (1 - lr * weight_decay) - lr / (1 - self.beta1**step) * average / deviation
        return weight, [average, square]


@dataclass(frozen=True)
class RowwiseRMSprop:
    """AdamW without the first moment and with one second moment per label, the mean square of its weights' gradients.

    A rare label's few gradients keep their direction, that of its texts' features. AdamW would make steps of equal size along
    all features. The state is one float per label. (FBGEMM's "partial rowwise Adam" does so for embedding tables; Adam-mini,
    Zhang et al., ICLR 2025, for blocks of other weights.)
    """

    beta2: float = 0.999
    eps: float = 1e-8
    name = "rowwise_rmsprop"
    state_names: ClassVar[tuple[str, ...]] = ("mean_square",)
    per_label_states: ClassVar[tuple[str, ...]] = ("mean_square",)
    state_dtype: ClassVar[torch.dtype | None] = None

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the new (weight, state) of float32 weights [T, F] with a state [T, 1], or of biases [T] with a state [T]."""
        square = grad.square()
        if square.dim() > 1:
            square = square.mean(1, keepdim=True)
        square = self.beta2 * state[0] + (1 - self.beta2) * square
        deviation = (square / (1 - self.beta2**step)).sqrt() + self.eps
        return weight * (1 - lr * weight_decay) - lr * grad / deviation, [square]


Optimizer = SGD | AdamW | RowwiseRMSprop


def optimizer_named(name: str, momentum: float = 0.0) -> Optimizer:
    """Return the optimizer that the setting `xmc_optimizer` calls `name`. `momentum` applies to "sgd" only."""
    by_name: dict[str, Optimizer] = {
        "sgd": SGD(momentum),
        "adamw": AdamW(),
        "adamw_8bit": AdamW(eight_bits=True),
        "rowwise_rmsprop": RowwiseRMSprop(),
    }
    return by_name[name]
