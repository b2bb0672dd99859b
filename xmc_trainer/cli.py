"""The command `xmc-trainer`, or `python -m xmc_trainer`, and what it shares with the scripts of launchers/."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from xmc_trainer.errors import NothingToDo, UserError

USAGE = """\
settings are key=value words: dataset=NAME (a shipped data set or a .yaml file), dataset_path=FOLDER, log_fname=NAME,
and dotted fields such as model.ffi.fan_in=64; --print-config of train.py shows the whole resolved tree"""

# command -> the module with its `main`, and what it does. Modules are imported when they are called.
COMMANDS = {
    "settings": ("xmc_trainer.config", "list every setting, its default and its meaning"),
    "clusters": ("xmc_trainer.clusters", "compute label clusters, for the meta branch and semantic groups"),
    "sweep": ("xmc_trainer.sweep", "many trainings with several seeds, and their table"),
    "adjust": ("xmc_trainer.adjust", "rank a saved model's rare labels higher: what it would be worth, and do it"),
    "report": ("xmc_trainer.report", "runs side by side: a table and pictures"),
    "wordnet": ("xmc_trainer.data.wordnet", "write the quick start's data set"),
    "bench head": ("xmc_trainer.bench.head", "time and memory of the head's step on this machine"),
    "bench ranks": ("xmc_trainer.bench.ranks", "what several ranks send each other; start it by torchrun"),
    "bench train": ("xmc_trainer.bench.train", "whole training steps: texts a second, and where the time goes"),
}


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2, NothingToDo a line and 0, Ctrl-C status 130; no traceback."""
    try:
        main()
    except NothingToDo as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, flush=True)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        said = "what was written so far stays; the same command goes on from there, a training with training.resume=true from its last checkpoint"
        print(f"interrupted: {said}", file=sys.stderr, flush=True)
        sys.exit(130)


def _call(name: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not name.startswith("bench"):
        raise UserError(f"xmc-trainer {name}: works in one process, {processes} were started; start it without a launcher")
    importlib.import_module(COMMANDS[name][0]).main()


def main() -> None:
    """Call the command that the first words name; it reads the others."""
    words = sys.argv[1:]
    for length in (1, 2):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            # What argparse shows as the program's name.
            sys.argv = [f"xmc-trainer {name}", *words[length:]]
            run(lambda: _call(name))
            return
    lines = [f"  {name:14s}{text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(
        ["usage: xmc-trainer COMMAND ... (--help after a command shows its arguments)", "", *lines, "",
         "training, evaluation and prediction are scripts: launchers/train.py, evaluate.py, predict.py"]
    )  # fmt: skip
    if words in (["-h"], ["--help"]):
        print(usage)
        return
    print(f"error: no command {' '.join(words[:2])!r}" if words else "error: which command?", usage, sep="\n", file=sys.stderr)
    sys.exit(2)
