"""Run launchers/train.py several times in the processes of one launch, because starting takes most of a short training's time.

Each argument is a JSON file with an object:
    settings: key=value words.
    deepspeed_config: JSON file for the deepspeed launcher.
    cut: abandon the training before this step, as if the processes had been killed.
    fails: ["raise" or "kill", step]: end the last rank, and so the launch, before this step.
    signal: [number, "launcher" or "group", step]: send this signal during the step.
    refused: expected part of the error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

from accelerate.state import AcceleratorState

from xmc_trainer import signals
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.commands.cli import run
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.hooks import Hook
from xmc_trainer.trainer import Trainer


class Cut(Exception):
    pass


class CutBefore(Hook):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            raise Cut


class Fail(Hook):
    """End the last rank. It creates the file `fails` in the run's folder first."""

    def __init__(self, how: str, step: int | None) -> None:
        self.how, self.step = how, step

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step and trainer.ranks.rank == trainer.ranks.size - 1:
            (trainer.run_folder / "fails").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank's own error")


class Signal(Hook):
    """Send the signal in the middle of a step: from rank 0 to the launcher, or from every rank to its own process group."""

    def __init__(self, number: int, to: str, step: int | None) -> None:
        self.number, self.to, self.step = number, to, step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step != self.step:
            return
        if self.to == "group":
            os.killpg(0, self.number)
        elif trainer.ranks.rank == 0:
            os.kill(int(os.environ["LAUNCHER"]), self.number)
            while not signals.pending():  # forwarded, or noticed
                time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--local_rank")  # of the deepspeed launcher
    environment = dict(os.environ)
    for file in parser.parse_intermixed_args().files:
        training = json.loads(file.read_text())
        refused = training.get("refused")
        try:
            trainer = build_trainer(
                load_config(training["settings"]),
                deepspeed_config=training.get("deepspeed_config"),
                hooks=[
                    CutBefore(training.get("cut")),
                    Fail(*training.get("fails", ("", None))),
                    Signal(*training.get("signal", (0, "", None))),
                ],
            )
            trainer.train()
            assert refused is None, f"not refused: {refused}"
        except Cut:
            pass
        except UserError as error:
            if refused is None or refused not in str(error):
                raise
        # Keep only the process group for the next training.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)
    trainer.close()


if __name__ == "__main__":
    run(main)
