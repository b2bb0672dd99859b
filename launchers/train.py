"""Train, evaluate and save a model: `xmc-trainer train` as a file, for launchers.

accelerate launch --config_file launchers/accelerate_zero2.yaml launchers/train.py dataset=wordnet dataset_path=./data
deepspeed launchers/train.py --deepspeed_config ds_configs/zero2.json dataset=wordnet dataset_path=./data
"""

from xmc_trainer.commands.cli import NOT_STARTED, run
from xmc_trainer.commands.train import main

if __name__ == "__main__":
    run(main, interrupted=NOT_STARTED)
