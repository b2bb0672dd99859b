"""Evaluate a saved model: `xmc-trainer evaluate` as a file, for launchers.

torchrun --nproc_per_node 2 launchers/evaluate.py outputs/wordnet/model
"""

from xmc_trainer.commands.cli import run
from xmc_trainer.commands.evaluate import main

if __name__ == "__main__":
    run(main)
