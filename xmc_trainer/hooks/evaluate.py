"""Evaluation at the end of epochs, early stopping, and the best model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from xmc_trainer.hooks.base import Hook

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


class EvaluateHook(Hook):
    """Evaluates at the end of every n-th epoch and of the last one.

    Args:
        test_every: n for the test set.
        train_every: n for the training set; None for no evaluation there.
    """

    def __init__(self, test_every: int, train_every: int | None) -> None:
        self.test_every, self.train_every = test_every, train_every

    def on_epoch_end(self, trainer: Trainer) -> None:
        done, last = trainer.state.epoch + 1, trainer.state.finished
        splits = ["test"] if last or done % self.test_every == 0 else []
        if self.train_every is not None and (last or done % self.train_every == 0):
            splits.append("train")
        # A signal may end an evaluation, and a resumed training repeats all of them. So hooks get results only when all are done.
        found = {split: trainer.evaluate(split) for split in splits}
        for split, metrics in found.items():
            trainer.dispatch("on_evaluate", split, metrics)


class EarlyStopHook(Hook):
    """Ends the training after `patience` test evaluations without a better `metric`.

    Evaluations in the first `dense_epochs` epochs do not count: a dense head scores higher than the sparse head made from it.

    Args:
        delta: a value is better if it exceeds the best one by more than this.
    """

    def __init__(self, metric: str, patience: int, delta: float, dense_epochs: int) -> None:
        self.metric, self.patience, self.delta, self.dense_epochs = metric, patience, delta, dense_epochs
        self._best, self._waited = -math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split != "test" or trainer.state.epoch < self.dense_epochs:
            return
        value = metrics[self.metric]
        if value > self._best + self.delta:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience and not trainer.state.finished:
            trainer.state.stopped = True
            if trainer.accelerator.is_main_process:
                print(
                    f"stopped early: {self.metric} has not risen above {100 * self._best:.2f} for "
                    f"{self._waited} evaluations",
                    flush=True,
                )


class BestModelHook(Hook):
    """Saves the model with the best test P@1 so far, after the first `dense_epochs` epochs.

    Args:
        folder_name: in the run's folder.
        best_p1: a model is saved only if its P@1 is higher.
    """

    def __init__(self, folder_name: str, best_p1: float, dense_epochs: int) -> None:
        self.folder_name, self.best_p1, self.dense_epochs = folder_name, best_p1, dense_epochs

    def state_dict(self) -> dict[str, Any]:
        return {"best_p1": self.best_p1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_p1 = max(self.best_p1, state["best_p1"])

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split == "test" and trainer.state.epoch >= self.dense_epochs and metrics["P@1"] > self.best_p1:
            self.best_p1 = metrics["P@1"]
            trainer.save(trainer.run_folder / self.folder_name)
