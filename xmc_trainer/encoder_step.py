"""The encoder's part of a training step: backward pass and update, repeated if the gradient overflows float16."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xmc_trainer.engine.accelerator import step_was_applied
from xmc_trainer.errors import UserError
from xmc_trainer.head import feature_gradient
from xmc_trainer.parallel import Ranks

# Halved so many times, any loss scale of float16 is zero.
_MOST_REPEATS = 50


class EncoderStep:
    """Runs the backward passes of a step and the update of the encoder under the engine.

    When the gradient overflows float16, the head has made its update already. So the encoder's part is repeated with the
    loss scale that the engine has lowered, with the same dropout and the kept gradient of the features. If a feature was
    not finite, neither head nor encoder makes the step.

    Args:
        encoder, optimizer: as the engine runs them.
        seed: of the dropout.
        max_grad_norm: norm to clip the gradient to; 0 for no clipping.
        fp16: whether the engine scales the loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: nn.Module,
        optimizer: Any,
        ranks: Ranks,
        *,
        seed: int,
        max_grad_norm: float,
        fp16: bool,
    ) -> None:
        self._accelerator, self._encoder, self._optimizer, self._ranks = accelerator, encoder, optimizer, ranks
        self._seed, self._max_grad_norm, self._fp16 = seed, max_grad_norm, fp16
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # micro-batches, and gradients of their features

    @property
    def captured_bytes(self) -> int:
        """GPU memory of the encoder's CUDA graphs, which the allocator does not count as in use."""
        return getattr(self._accelerator.unwrap_model(self._encoder), "captured_bytes", 0)

    def begin(self, step: int) -> None:
        """Start a step. `step`: steps made before it."""
        self._step, self._kept = step, []
        self._seed_draws()

    def _seed_draws(self) -> None:
        """Seed dropout by rank and step: ranks drop different features, and a resumed training draws the same numbers."""
        key = f"{self._seed} {self._step} {self._ranks.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))

    def keep(self, input_ids: Tensor, attention_mask: Tensor, loss: Tensor) -> None:
        """Keep what a repetition needs of a micro-batch. `loss` is the head's, before its backward pass."""
        if self._fp16:
            self._kept.append((input_ids, attention_mask, feature_gradient(loss)))

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch; at the end of the step also the update. Call it in `accelerator.accumulate`."""
        self._accelerator.backward(loss)
        if self._max_grad_norm and self._accelerator.sync_gradients:
            self._accelerator.clip_grad_norm_(self._encoder.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self) -> bool:
        """Repeat the step if it overflowed. Returns whether the encoder has new weights.

        Raises UserError if the gradient overflows float16 at every loss scale.
        """
        if self._applied():
            return True
        if not self._kept:
            return False
        for _ in range(_MOST_REPEATS):
            if self._ranks.largest(lambda: [int(not all(grad.isfinite().all() for *_, grad in self._kept))])()[0]:
                return False
            self._seed_draws()
            for input_ids, attention_mask, grad in self._kept:
                with self._accelerator.accumulate(self._encoder):
                    features = self._encoder(input_ids, attention_mask)[: grad.shape[0]]
                    self.backward((features.float() * grad).sum())
            if self._applied():
                return True
        raise UserError(
            f"the encoder's gradient overflows float16 at step {self._step + 1}, whatever the loss scale: set training.amp.dtype=bfloat16, or "
            "fp16.loss_scale=0 in the DeepSpeed JSON"
        )

    def _applied(self) -> bool:
        return step_was_applied(self._accelerator, self._encoder, self._optimizer)
