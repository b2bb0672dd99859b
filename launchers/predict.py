"""Predict the labels of texts: `xmc-trainer predict` as a file, for launchers.

torchrun --nproc_per_node 2 launchers/predict.py outputs/wordnet/model texts.txt
"""

from xmc_trainer.commands.cli import run
from xmc_trainer.commands.predict import main

if __name__ == "__main__":
    run(main)
