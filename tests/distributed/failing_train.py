"""launchers/train.py with a hook that fails on the last rank after some steps: `how` is raise or kill.

Just before, it makes the file `fails` in the run's folder.
"""

from __future__ import annotations

import argparse
import os
import signal

from xmc_trainer.config import load_config
from xmc_trainer.hooks import Hook
from xmc_trainer.trainer import Trainer


class Fail(Hook):
    def __init__(self, how: str, step: int | None) -> None:
        self.how, self.step = how, step

    def on_step_begin(self, trainer) -> None:
        if trainer.state.step == self.step and trainer.ranks.rank == trainer.ranks.size - 1:
            (trainer.run_folder / "fails").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank's own error")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    parser.add_argument("--after", type=int, default=5)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--deepspeed_config")
    parser.add_argument("--local_rank")
    arguments = parser.parse_intermixed_args()
    Trainer(
        load_config(arguments.settings), deepspeed_config=arguments.deepspeed_config, hooks=[Fail(arguments.how, arguments.after)]
    ).train()
