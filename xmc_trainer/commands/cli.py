"""The command `xmc-trainer`, or `python -m xmc_trainer`, and what it shares with the scripts of launchers/."""

from __future__ import annotations

import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable
from functools import partial

from xmc_trainer import __version__, signals
from xmc_trainer.errors import NothingToDo, UserError, reason
from xmc_trainer.launch import launched_processes

USAGE = """\
settings are key=value words: dataset=NAME (a shipped data set or a .yaml file), dataset_path=FOLDER, log_fname=NAME,
and dotted fields such as model.ffi.fan_in=64; --print-config of train.py shows the whole resolved tree"""

# command -> the module with its `main`, and what it does. Modules are imported when they are called.
COMMANDS = {
    "settings": ("xmc_trainer.commands.settings", "list every setting, its default and its meaning"),
    "clusters": ("xmc_trainer.commands.clusters", "compute label clusters, for the meta branch and semantic groups"),
    "sweep": ("xmc_trainer.commands.sweep", "many trainings with several seeds, and their table"),
    "adjust": (
        "xmc_trainer.commands.adjust",
        "rank a saved model's rare labels higher: what it would be worth, and do it",
    ),
    "report": ("xmc_trainer.commands.report", "runs side by side: a table and pictures"),
    "doctor": (
        "xmc_trainer.commands.doctor",
        "versions, GPUs, compilers, and which kernels will run: paste it into a bug report",
    ),
    "wordnet": ("xmc_trainer.commands.wordnet", "write the quick start's data set"),
    "plan": ("xmc_trainer.commands.plan", "memory, disk and time of a training, before anything is loaded"),
    "bench data": ("xmc_trainer.commands.bench.data", "write a generated data set of any shape"),
    "bench head": ("xmc_trainer.commands.bench.head", "time and memory of the head's step on this machine"),
    "bench ranks": ("xmc_trainer.commands.bench.ranks", "what several ranks send each other; start it by torchrun"),
    "bench train": (
        "xmc_trainer.commands.bench.train",
        "whole training steps: texts a second, and where the time goes",
    ),
}

# Errors of the system that are nobody's bug.
_MENDABLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions, or choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
}


def run(main: Callable[[], None], interrupted: str = "before its work was done") -> None:
    """Call a script's `main`, then end the process with the exit status that fits.

    0: done, or `NothingToDo`. 2: a UserError, an error of the system that the user can mend, or ranks out of reach; one line
    on stderr. 128 + signal: SIGINT, SIGTERM, SIGHUP or SIGUSR1 ended it, and rank 0 says "ended" and `interrupted`, or what
    a training has to say; also SIGPIPE, without a word: the reader of the output is gone, as after `| head`. Any other
    exception is our fault and keeps its traceback.
    """
    rank = os.environ.get("RANK", "0")
    with signals.listening():
        try:
            main()
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()
        except NothingToDo as error:
            if rank == "0":
                print(error, flush=True)
        except signals.Interrupted as end:
            end.with_traceback(
                None
            )  # lets go of the data loader, whose processes end now and not at the end of this one
            if rank == "0":
                _say(f"{signal.Signals(end.number).name}: ended {end.said or interrupted}")
            sys.exit(128 + end.number)
        except BrokenPipeError:
            if not _nobody_reads_stdout():
                raise
            # What is still to be written has nowhere to go, and Python would say so at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            said = _remedy(error)
            if "torch" in sys.modules:  # else there is no process group
                from xmc_trainer import parallel

                if said is None and parallel.lost_ranks(error):
                    said = f"lost the other ranks ({reason(error)}); see the error of the one that failed first"
                parallel.announce_failure()
            if said is None:
                raise
            _say(f"error{'' if rank == '0' else f' (rank {rank})'}: {said}")
            sys.exit(2)


def _say(line: str) -> None:
    """On stderr, on a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr, flush=True)


def _remedy(error: Exception) -> str | None:
    """One line for an error that the user can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        return f"{error.filename or 'a file'}: {error.strerror}; {_MENDABLE[error.errno]}"
    return None


def _nobody_reads_stdout() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, AttributeError):  # no file, or closed
        return False


def _call(name: str) -> None:
    processes = launched_processes() if "WORLD_SIZE" in os.environ else 1
    if processes > 1 and (not name.startswith("bench") or name == "bench data"):
        raise UserError(
            f"xmc-trainer {name}: works in one process, {processes} were started; start it without a launcher"
        )
    importlib.import_module(COMMANDS[name][0]).main()


def main() -> None:
    """Call the command that the first words name; it reads the others."""
    words = sys.argv[1:]
    for length in (1, 2):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            # What argparse shows as the program's name.
            sys.argv = [f"xmc-trainer {name}", *words[length:]]
            run(partial(_call, name))
            return
    lines = [f"  {name:14s}{text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(
        ["usage: xmc-trainer COMMAND ... (--help after a command shows its arguments)", "", *lines, "",
         "training, evaluation and prediction are scripts: launchers/train.py, evaluate.py, predict.py"]
    )  # fmt: skip
    if words in (["-h"], ["--help"]):
        print(usage)
        return
    if words == ["--version"]:
        print(f"xmc-trainer {__version__}")
        return
    print(
        f"error: no command {' '.join(words[:2])!r}" if words else "error: which command?",
        usage,
        sep="\n",
        file=sys.stderr,
    )
    sys.exit(2)
