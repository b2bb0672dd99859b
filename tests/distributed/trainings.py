"""launchers/train.py for several trainings, one after another in the processes of one launch: most of a short one is its start.

Its arguments are JSON files, each an object: `settings`; `deepspeed_config`, the file for the deepspeed launcher; `cut`, the
step before which the training is given up, as if its processes had been killed; `fails`, how the last of them really ends, and
the launch with it: raise or kill, and before which step; `signal`, [its number, launcher or group, the step in which it comes];
and `refused`, what the error says that the training is refused with.
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
    """On the last rank, which makes the file `fails` in the run's folder just before."""

    def __init__(self, how: str, step: int | None) -> None:
        self.how, self.step = how, step

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step and trainer.ranks.rank == trainer.ranks.size - 1:
            (trainer.run_folder / "fails").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank's own error")


class Signal(Hook):
    """Comes in the middle of a step: from rank 0 to the launcher that the test started, or from every rank to its own process group."""

    def __init__(self, number: int, to: str, step: int | None) -> None:
        self.number, self.to, self.step = number, to, step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step != self.step:
            return
        if self.to == "group":
            os.killpg(0, self.number)
        elif trainer.ranks.rank == 0:
            os.kill(int(os.environ["LAUNCHER"]), self.number)
            while not signals.pending():  # passed on, or noticed
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
        # The next finds the process group, and nothing else.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)
    trainer.close()


if __name__ == "__main__":
    run(main)
