"""Train, evaluate and save a model.

xmc-trainer train data.source=tickets.csv                        # a table with the columns text and labels
xmc-trainer train dataset=wordnet dataset_path=./data --gpus 2   # two processes under DeepSpeed ZeRO 2
accelerate launch --config_file launchers/accelerate_zero2.yaml launchers/train.py dataset=wordnet dataset_path=./data
deepspeed launchers/train.py --deepspeed_config ds_configs/zero2.json dataset=wordnet dataset_path=./data

SIGINT (Ctrl-C), SIGTERM, SIGHUP or SIGUSR1, sent to any rank or launcher, ends the training after the current step
with a checkpoint (continue with training.resume=true) and exit status 128 + signal. A second signal ends it at once.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from importlib import resources

from xmc_trainer.commands.cli import NOT_STARTED, USAGE, run
from xmc_trainer.errors import UserError

_ZERO = 2  # default stage of --gpus


def main() -> None:
    # Import only here, where `run` handles signals and errors, and slow modules only after the arguments are checked.
    from xmc_trainer.config import load_config, to_yaml

    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="start N processes with the deepspeed launcher, one for each GPU"
    )
    parser.add_argument(
        "--zero",
        type=int,
        choices=range(4),
        help=f"ZeRO stage of --gpus, default {_ZERO}; 3 shards the weights as well",
    )
    parser.add_argument(
        "--deepspeed_config", metavar="JSON", help="DeepSpeed configuration of --gpus or the deepspeed launcher"
    )
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    # Launchers and shells mix flags and settings in any order.
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.settings)
    if arguments.print_config:
        from xmc_trainer.builders.recipe import configured

        config, choices = configured(arguments.settings)
        print(to_yaml(config), end="")
        _say(choices)
        return
    on_cpu = config.environment.device == "cpu"
    launcher = _launcher(arguments, on_cpu) if arguments.gpus is not None or arguments.zero is not None else None
    # These take a second; importing torch and the engine takes many.
    from xmc_trainer.builders.inputs import require_clusters, require_data, require_encoder
    from xmc_trainer.run_folder import require_free

    if "RANK" not in os.environ:  # several ranks decide together, or those that go on would wait for the others
        require_free(config)
    require_data(config)
    require_clusters(config)
    require_encoder(config)
    if launcher is not None:
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for a GPU, and warns that there is none
        os.execv(sys.executable, launcher)  # replaces this process

    from xmc_trainer import signals
    from xmc_trainer.builders.recipe import configured
    from xmc_trainer.builders.training import build_trainer
    from xmc_trainer.library_log import libraries_log_to
    from xmc_trainer.plan import explained
    from xmc_trainer.run_folder import LIBRARY_LOG

    config, choices = configured(arguments.settings)
    if os.environ.get("RANK", "0") == "0":
        _say(choices)
    log = config.run_folder / LIBRARY_LOG if os.environ.get("RANK", "0") == "0" else None
    with libraries_log_to(log), explained(config):
        trainer = build_trainer(config, deepspeed_config=arguments.deepspeed_config)
        with signals.deferred():
            trainer.train()
            trainer.close()


def _say(choices: list[str]) -> None:
    for line in choices:
        print(f"recipe: {line}", file=sys.stderr, flush=True)


def _launcher(arguments: argparse.Namespace, on_cpu: bool) -> list[str]:
    """Return the command of the deepspeed launcher, which runs this module once for each GPU. Raises UserError."""
    if "RANK" in os.environ:
        raise UserError("--gpus, --zero: a launcher has started this process already; remove them")
    if arguments.gpus is not None and arguments.gpus < 1:
        raise UserError(f"--gpus={arguments.gpus}: must be at least 1")
    if arguments.zero is not None and arguments.deepspeed_config:
        raise UserError("--zero: --deepspeed_config names the ZeRO stage; give only one of the two")
    stage = _ZERO if arguments.zero is None else arguments.zero
    shipped = resources.files("xmc_trainer") / "ds_configs" / f"zero{stage}.json"
    processes, visible = arguments.gpus or 1, os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or on_cpu:
        where = ["--num_gpus", str(processes)]
    else:  # with --num_gpus the launcher ignores the variable
        numbers = [number.strip() for number in visible.split(",") if number.strip()]
        if not all(number.isdigit() for number in numbers):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible}: --gpus needs the GPUs' numbers; give them, or unset the variable"
            )
        if len(numbers) < processes:
            raise UserError(
                f"--gpus={processes}: CUDA_VISIBLE_DEVICES={visible} names {len(numbers)} GPUs; lower it, or unset the variable"
            )
        where = ["--include", f"localhost:{','.join(numbers[:processes])}"]
    with socket.create_server(("", 0)) as server:  # a free port, so that two trainings fit on a machine
        where += ["--master_port", str(server.getsockname()[1])]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *where, "--module"]
    command += ["xmc_trainer.commands.train", "--deepspeed_config", arguments.deepspeed_config or str(shipped)]
    return [*command, *arguments.settings]


if __name__ == "__main__":
    run(main, interrupted=NOT_STARTED)
