"""The protocol of hooks: what happens around a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xmc_trainer.head import RewireReport

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class Hook:
    """The protocol. Every method is called on every rank, with the trainer, whose `state` says where training is."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first after the checkpoint that the training goes on from."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the micro-batches of an optimizer step."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After a real optimizer step: encoder and head hold new weights. Not after one that fp16 skipped."""

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Every second or so: the steps since the last call, as {"step", "epoch", "loss", "lr", "encoder_lr", ...}.

        The last one also has the speed of them all: "texts_per_s", the milliseconds of a step "encoder_ms" (forward, backward and
        update) and "head_ms", the share of the time "waiting" for data, and on a GPU "gib", the memory allocated at most.
        """

    def on_rewire(self, trainer: Trainer, report: RewireReport, amount: float) -> None:
        """After a rewiring with the scheduled threshold or fraction `amount`; the report covers this rank's labels."""

    def on_epoch_end(self, trainer: Trainer) -> None: ...

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None: ...

    def on_save(self, trainer: Trainer, folder: Any) -> None: ...

    def on_train_end(self, trainer: Trainer) -> None: ...

    def on_interrupt(self, trainer: Trainer) -> None:
        """Instead of `on_train_end`: a signal ends the training, which may go on in another process."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this hook, of rank 0's; JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it over, on every rank, before `on_train_start`."""
