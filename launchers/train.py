"""Train, evaluate and save a model. Start it with one of:

python launchers/train.py dataset=wordnet dataset_path=./data
accelerate launch --config_file launchers/accelerate_zero2.yaml launchers/train.py dataset=wordnet dataset_path=./data
deepspeed launchers/train.py --deepspeed_config ds_configs/zero2.json dataset=wordnet dataset_path=./data

SIGINT (Ctrl-C), SIGTERM, SIGHUP or SIGUSR1, sent to any rank or launcher, ends the training after the current step
with a checkpoint (continue with training.resume=true) and exit status 128 + signal. A second signal ends it at once.
"""

from __future__ import annotations

import argparse

from xmc_trainer.commands.cli import USAGE, run


def main() -> None:
    # Import only here, where `run` handles signals and errors, and slow modules only after the arguments are checked.
    from xmc_trainer.config import load_config, to_yaml

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="DeepSpeed configuration for the deepspeed launcher, for example from ds_configs/",
    )
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    # Launchers and shells mix flags and settings in any order.
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.settings)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return

    from xmc_trainer import signals
    from xmc_trainer.builders.training import build_trainer
    from xmc_trainer.plan import explained

    with explained(config):
        trainer = build_trainer(config, deepspeed_config=arguments.deepspeed_config)
        with signals.deferred():
            trainer.train()
            trainer.close()


if __name__ == "__main__":
    run(main, interrupted="before the first step; the run's folder is unchanged")
