"""The head's optimizers: element-wise rules that the head step applies tile by tile.

torch.optim cannot be used here: it wants a gradient for the whole weight, and the step never has one. The rules follow
torch.optim.SGD and torch.optim.AdamW to the letter (tests compare them), weight decay included: added to the gradient
for SGD, decoupled for AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """SGD, with a momentum buffer if `momentum` > 0."""

    momentum: float = 0.0

    @property
    def name(self) -> str:
        return "momentum" if self.momentum else "sgd"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """New (weight, state) from float32 tensors of one shape; `step` is 1 for the first update."""
        if weight_decay:
            grad = grad + weight_decay * weight
        if not self.momentum:
            return weight - lr * grad, []
        buffer = self.momentum * state[0] + grad
        return weight - lr * buffer, [buffer]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    name = "adamw"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor], lr: float, weight_decay: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """New (weight, state) from float32 tensors of one shape; `step` is 1 for the first update."""
        average = self.beta1 * state[0] + (1 - self.beta1) * grad
        square = self.beta2 * state[1] + (1 - self.beta2) * grad * grad
        deviation = (square / (1 - self.beta2**step)).sqrt() + self.eps
        weight = weight * (1 - lr * weight_decay) - lr / (1 - self.beta1**step) * average / deviation
        return weight, [average, square]
