"""The command `xmc-trainer` (`python -m xmc_trainer`), and the error handling that the launchers share."""

from __future__ import annotations

import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from xmc_trainer import __version__, signals
from xmc_trainer.errors import NothingToDo, UserError, reason
from xmc_trainer.launch import launched_processes

USAGE = """\
settings are key=value words: dataset=NAME (a shipped data set or a .yaml file), dataset_path=FOLDER, log_fname=NAME,
and dotted names such as model.ffi.fan_in=64; `train --print-config` prints the resolved configuration"""
NOT_STARTED = "before the first step; the run's folder is unchanged"  # how a training ends that is interrupted early
# Commands for several processes, which a launcher starts.
_LAUNCHED = ("train", "evaluate", "predict", "bench head", "bench ranks", "bench train")

# command -> (module with its `main`, description). The module is imported only when its command runs.
COMMANDS = {
    "train": ("xmc_trainer.commands.train", "train, evaluate and save a model"),
    "evaluate": ("xmc_trainer.commands.evaluate", "measure a saved model on a test set"),
    "predict": ("xmc_trainer.commands.predict", "predict the labels of texts with a saved model"),
    "export": (
        "xmc_trainer.commands.export",
        "write a saved model for sentence-transformers, scipy, torch or ONNX",
    ),
    "extend": ("xmc_trainer.commands.extend", "add labels to a saved model from texts, without training it again"),
    "settings": ("xmc_trainer.commands.settings", "list every setting with its default and meaning"),
    "clusters": ("xmc_trainer.commands.clusters", "compute label clusters for the meta branch and semantic groups"),
    "sweep": ("xmc_trainer.commands.sweep", "train a table of configurations with several seeds"),
    "adjust": (
        "xmc_trainer.commands.adjust",
        "rank rare labels of a saved model higher: evaluate strengths, or write one",
    ),
    "calibrate": (
        "xmc_trainer.commands.calibrate",
        "fit probabilities and thresholds of a saved model on held-out texts, and store them",
    ),
    "report": ("xmc_trainer.commands.report", "compare runs: a table, and a page with charts"),
    "doctor": (
        "xmc_trainer.commands.doctor",
        "show versions, GPUs, compilers and the kernels that will run, for a bug report",
    ),
    "completion": ("xmc_trainer.commands.completion", "print a script with which bash and zsh complete commands"),
    "wordnet": ("xmc_trainer.commands.wordnet", "write the quick start's data set"),
    "prepare": ("xmc_trainer.commands.prepare", "read and tokenise a data set into the cache"),
    "plan": ("xmc_trainer.commands.plan", "estimate memory, disk and time of a training before it starts"),
    "bench data": ("xmc_trainer.commands.bench.data", "write a generated data set of any shape"),
    "bench head": ("xmc_trainer.commands.bench.head", "measure time and memory of the head's step on this machine"),
    "bench ranks": ("xmc_trainer.commands.bench.ranks", "measure communication between ranks; start it with torchrun"),
    "bench train": (
        "xmc_trainer.commands.bench.train",
        "measure whole training steps: texts per second, and time per part",
    ),
}

# System errors that the user can fix: errno -> remedy.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "change its permissions, or choose another file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
}


def run(main: Callable[[], None], interrupted: str = "before it finished") -> None:
    """Call a script's `main` and exit with a status:

    0: done, or `NothingToDo`. 2: a UserError, a system error that the user can fix, or lost ranks; prints one line on
    stderr. 128 + signal: ended by SIGINT, SIGTERM, SIGHUP or SIGUSR1; rank 0 prints "ended" and the message of
    `Interrupted`, or else `interrupted`. 128 + SIGPIPE: the reader of stdout is gone, as with `| head`; prints nothing.
    Any other exception is a bug and keeps its traceback.
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
            end.with_traceback(None)  # releases the data loader, so that its processes end now
            if rank == "0":
                _print_error(f"{signal.Signals(end.number).name}: ended {end.said or interrupted}")
            sys.exit(128 + end.number)
        except BrokenPipeError:
            if not _stdout_reader_is_gone():
                raise
            # Discard buffered output, or Python reports the broken pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            message = _remedy(error)
            if "torch" in sys.modules:  # otherwise there is no process group
                from xmc_trainer import parallel

                if message is None and parallel.lost_ranks(error):
                    message = f"lost the other ranks ({reason(error)}); see the error of the rank that failed first"
                parallel.announce_failure()
            if message is None:
                raise
            _print_error(f"error{'' if rank == '0' else f' (rank {rank})'}: {message}")
            sys.exit(2)


def _print_error(line: str) -> None:
    """Print a line on stderr, below any progress bars."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr, flush=True)


def _remedy(error: Exception) -> str | None:
    """Return a one-line message for an error that the user can fix, else None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{error.filename or 'a file'}: {error.strerror}; {_REMEDIES[error.errno]}"
    return None


def _stdout_reader_is_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, AttributeError):  # not a file, or closed
        return False


def _run_command(name: str) -> None:
    processes = launched_processes() if "WORLD_SIZE" in os.environ else 1
    if processes > 1 and name not in _LAUNCHED:
        raise UserError(
            f"xmc-trainer {name}: runs in one process, but {processes} were started; start it without a launcher"
        )
    importlib.import_module(COMMANDS[name][0]).main()


def _usage(group: str = "") -> str:
    """Return how to call the commands whose names begin with `group`."""
    lines = [f"  {name:14s}{text}" for name, (_, text) in COMMANDS.items() if name.startswith(group)]
    return "\n".join([f"usage: xmc-trainer {group}COMMAND ... (COMMAND --help shows its arguments)", "", *lines])


def main() -> None:
    """Run the command named by the first one or two words; it parses the rest."""
    words = sys.argv[1:]
    for length in (1, 2):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            # argparse prints it as the program name.
            sys.argv = [f"xmc-trainer {name}", *words[length:]]
            run(partial(_run_command, name), **({"interrupted": NOT_STARTED} if name == "train" else {}))
            return
    group = "bench " if words[:1] == ["bench"] else ""
    rest = words[1:] if group else words
    if rest in (["-h"], ["--help"]):
        print(_usage(group))
        return
    if words == ["--version"]:
        print(f"xmc-trainer {__version__}")
        return
    name = group + "".join(rest[:1])
    similar = get_close_matches(name, COMMANDS, n=1)
    hint = f"; write {similar[0]}" if rest and similar else ""
    print(
        f"error: no such command {name!r}{hint}" if rest else f"error: name a command{' of bench' if group else ''}",
        _usage(group),
        sep="\n",
        file=sys.stderr,
    )
    sys.exit(2)
