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

# After this many halvings any loss scale is zero in float16.
_MOST_REPEATS = 50


class EncoderStep:
    """Runs the backward passes of a step and the update of the encoder under the engine.

    When the gradient overflows float16, the head has already made its update. So the encoder's part is repeated with the
    lowered loss scale, the same dropout and the kept feature gradient. If a feature is not finite, head and encoder both
    skip the step.

    Args:
        encoder, optimizer: as the engine returned them.
        seed: seed of dropout.
        max_grad_norm: maximal norm of the gradient; 0 for no clipping.
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
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # micro-batches with their feature gradients

    @property
    def captured_bytes(self) -> int:
        """GPU memory of the encoder's CUDA graphs, in bytes; the allocator does not count it as in use."""
        return getattr(self._accelerator.unwrap_model(self._encoder), "captured_bytes", 0)

    def begin(self, step: int) -> None:
        """Start a step. `step`: number of steps before it."""
        self._step, self._kept = step, []
        self._seed_draws()

    def _seed_draws(self) -> None:
        """Seed dropout by rank and step: ranks drop different features, and a resumed training draws the same numbers."""
        key = f"{self._seed} {self._step} {self._ranks.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))

    def keep(self, input_ids: Tensor, attention_mask: Tensor, loss: Tensor) -> None:
        """Keep a micro-batch for a repetition. `loss`: the head's loss, before its backward pass."""
        if self._fp16:
            self._kept.append((input_ids, attention_mask, feature_gradient(loss)))

    def backward(self, loss: Tensor) -> None:
        """Run a micro-batch's backward pass and, at the end of the step, the update. Call it in `accelerator.accumulate`."""
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
            f"the encoder's gradient overflows float16 at step {self._step + 1} at every loss scale; set `dtype`=bfloat16, or "
            "fp16.loss_scale=0 in the DeepSpeed JSON"
        )

    def _applied(self) -> bool:
        return step_was_applied(self._accelerator, self._encoder, self._optimizer)
