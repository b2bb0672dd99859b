"""The interface of hooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmc_trainer.head import RewireReport

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class Hook:
    """Base class. Every method is called on every rank with the trainer; `trainer.state` holds its progress."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first step after the checkpoint that the training resumes from."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the micro-batches of an optimizer step."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After an optimizer step that changed the weights of encoder and head, so not after one that fp16 skipped."""

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """About once per second, with a record of each step since the last call: "step", "epoch", "loss", "lr", "encoder_lr", ...

        The last record also has the speed of these steps: "texts_per_s", "encoder_ms" (forward, backward and update) and
        "head_ms" per step, "waiting" (share of the time spent waiting for data) and, on a GPU, "gib" (peak memory allocated).
        """

    def on_rewire(self, trainer: Trainer, report: RewireReport, amount: float) -> None:
        """After a rewiring with the threshold or fraction `amount`. The report covers this rank's labels."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After the last step of an epoch, and before the state counts it."""

    def on_evaluation_batch(self, trainer: Trainer) -> None:
        """Before each batch of an evaluation, and after the last one."""

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        """After an evaluation on "test" or "train". All evaluations of an epoch are done before the first call."""

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """After the model has been written to `folder`."""

    def on_timed(self, trainer: Trainer, what: str, facts: dict[str, Any]) -> None:
        """After work between steps, with seconds and sizes: "checkpoint" and "evaluation"."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, when the model has been written."""

    def on_interrupt(self, trainer: Trainer) -> None:
        """Instead of `on_train_end`: a signal ends the training, and another process may resume it."""

    def state_dict(self) -> dict[str, Any]:
        """Return this hook's state as a JSON object. Checkpoints store that of rank 0."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the output of `state_dict()`, on every rank, before `on_train_start`."""
