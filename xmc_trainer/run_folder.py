"""A run's folder: whose it is, what lies in it, and what a training that is to begin there may do.

config.yaml       the run's configuration
log.jsonl         what happened, a JSON object a line
checkpoint-1000/  where the training was after that step, until it is finished; see `resume`
model/            what it came to; see `checkpoint`
best/             training.checkpoint_file: the best model so far
replaced/         the earlier run that this one replaces, until this one is finished
.lock             held by the training that is at work
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from xmc_trainer.checkpoint.folder import MANIFEST, verify_file
from xmc_trainer.config import Config, flatten, saved_settings, to_yaml
from xmc_trainer.errors import NothingToDo, UserError
from xmc_trainer.files import CannotWrite, remove, settle, sync, write_text, writing

if TYPE_CHECKING:
    from xmc_trainer.parallel import Ranks

MODEL, LOG = "model", "log.jsonl"
ELSEWHERE = "set output_dir to another folder"  # of `files.writing`
_CHECKPOINT = re.compile(r"checkpoint(?:-(\d+))?")  # without a number: of an earlier version
# What a training may go on with otherwise than it began: places, and what does not change what is learned.
_FREE = (
    "dataset", "dataset_path", "log_fname", "output_dir", "environment", "data.folder", "data.num_workers", "data.cache_dir",
    "data.test_batch_size", "data.micro_batches", "model.encoder.encoder_model", "model.encoder.encoder_tokenizer", "model.encoder.ngame_checkpoint",
    "model.encoder.use_torch_compile", "model.ffi.backend", "model.ffi.tile_labels", "training.verbose", "training.resume",
    "training.overwrite", "training.checkpoint_interval", "training.checkpoint_minutes", "training.checkpoints_kept", "training.use_checkpoint", "training.checkpoint_file", "training.best_p1",
)  # fmt: skip


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"checkpoint-{step}"


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's whole checkpoints, the earliest first."""
    found = (path.parent for path in run_folder.glob(f"checkpoint*/{MANIFEST}"))
    numbers = {path: int(match[1] or 0) for path in found if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted(numbers, key=numbers.__getitem__)


def find_checkpoint(run_folder: Path) -> Path | None:
    """The run's last whole checkpoint."""
    return next(reversed(checkpoints(run_folder)), None)


def remove_checkpoints(run_folder: Path, kept: int) -> None:
    """All but the last `kept`, the earliest first."""
    found = checkpoints(run_folder)
    remove(found[: max(len(found) - kept, 0)])


def differences(config: Config, file: Path) -> list[str]:
    """In which settings that matter to what is learned a run's config.yaml differs from `config`: "name=there, not here"."""
    there, here = flatten(saved_settings(file)), flatten(asdict(config))
    names = [name for name in here | there if not any(f"{name}.".startswith(f"{free}.") for free in _FREE)]
    # A setting that one version does not know is at its default there.
    return [
        f"{name}={there[name]}, not {here[name]}"
        for name in names
        if name in here and name in there and here[name] != there[name]
    ]


class RunFolder:
    """The folder of a training, which holds it from the first look into it to its end; every rank must call.

    Attributes:
        config: as the run remembers it.
        checkpoint: what the training goes on from. None: it begins.

    Raises UserError, on all ranks, where another training is at work in it, where the folder cannot be written, or rather than
    undo what another run has done; NothingToDo where the run is finished and `training.resume` asks for no more.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.path, self.checkpoint = config.run_folder, None
        # Leave to replace a run is for this start alone: whoever starts from the run's own settings has none.
        self.config = replace(config, training=replace(config.training, overwrite=False))
        self._overwrite, self._ranks = config.training.overwrite, ranks
        self._lock: TextIO | None = None
        self._do(self._look)
        self.checkpoint = ranks.broadcast(self.checkpoint)

    def _do(self, work: Callable[[], None]) -> None:
        with self._ranks.together():
            if self._ranks.rank == 0:
                with writing(self.path, ELSEWHERE):
                    work()

    def _look(self) -> None:
        if not self.path.exists():
            _try_to_make(self.path)  # that it is there is for a training to say that was not refused
            return
        self._take()
        self.checkpoint = self._to_go_on_from()

    def _take(self) -> None:
        # A folder from elsewhere may hold links, which lead to files that are none of its business, or pipes.
        for name in (".lock", LOG, "config.yaml"):
            if (file := self.path / name).is_symlink() or (file.exists() and not file.is_file()):
                raise UserError(f"{file}: is no plain file, and a run writes one there; move it elsewhere")
        for name in (MODEL, self.config.training.checkpoint_file):
            if (folder := self.path / name).exists() and not folder.is_dir():
                raise UserError(f"{folder}: is no folder, and a run makes one there; move it elsewhere")
        self._lock = _locked(self.path)
        best = re.escape(self.config.training.checkpoint_file)
        settle(self.path, re.compile(rf"model|(checkpoint|replaced)(-\d+)?|{best}"))

    def _results(self) -> list[Path]:
        """Saved models."""
        found = sorted(path.parent for path in self.path.glob(f"*/{MANIFEST}"))
        return [path for path in found if not _CHECKPOINT.fullmatch(path.name)]

    def _to_go_on_from(self) -> Path | None:
        training, found, results = self.config.training, find_checkpoint(self.path), self._results()
        held = found or next((path for path in results if path.name == MODEL), None) or next(iter(results), None)
        if held is None:
            return None
        what = "a finished run" if held.name == MODEL else "the best model of a run that was interrupted"
        remedies = []
        if found is not None:
            what, remedies = f"a run that was interrupted ({found.name})", ["go on with training.resume=true"]
        if training.resume:
            file = self.path / "config.yaml"
            if found is not None:
                file = verify_file(found, "config.yaml", remedy=f"put it back, or remove {found} to go on without it")
            differ = differences(self.config, file)
            logged = saved_settings(file).get("training.verbose.logging", True)
            if held.name == MODEL and not differ and (not logged or _ended(self.path / LOG)):
                raise NothingToDo(
                    f"{self.path}: this run is finished; training.overwrite=true without training.resume trains it anew"
                )
            if not differ:
                return found  # None: it was cut off at its very end, or had no checkpoints
            what, remedies = f"{what} with {'; '.join(differ)}", ["set that again"]
        if self._overwrite:
            return None
        remedies.append(f"name this one otherwise (log_fname={_free(self.path).name})")
        raise UserError(
            f"{self.path}: holds {what}; {', '.join(remedies)}, or give that one up by training.overwrite=true"
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The training. What it leaves behind is either finished, or can be gone on from."""
        try:
            self._do(self._begin)
            yield
            self._do(self._finish)
        except CannotWrite as error:
            last = find_checkpoint(self.path)
            go_on = (
                f"training.resume=true then goes on from {last.name}, which is whole" if last else "start again then"
            )
            raise UserError(f"{error}; {go_on}") from None
        finally:
            if self._lock is not None:
                self._lock.close()

    def _begin(self) -> None:
        if self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._to_go_on_from() is not None:
                raise UserError(f"{self.path}: another training was at work in it meanwhile; start again")
        if self.checkpoint is None:
            if self.config.training.resume:
                print(f"{self.path}: no checkpoint to go on from; the training begins", flush=True)
            if held := [*checkpoints(self.path), *self._results()]:
                self._set_aside(held)
        write_text(self.path / "config.yaml", to_yaml(self.config))

    def _set_aside(self, held: list[Path]) -> None:
        aside = _free(self.path / "replaced")
        aside.mkdir()
        sync(self.path)
        for each in (*held, self.path / "config.yaml", self.path / LOG):
            if each.exists():
                os.rename(each, aside / each.name)
        sync(aside)
        sync(self.path)
        print(f"{self.path}: replaces an earlier run, which stays in {aside} until this one is finished", flush=True)

    def _finish(self) -> None:
        # Cut off in between, the training goes on from its last checkpoint and finishes again.
        remove([path for path in sorted(self.path.iterdir()) if re.fullmatch(r"replaced(-\d+)?", path.name)])
        remove_checkpoints(self.path, kept=0)


def _try_to_make(folder: Path) -> None:
    """Raises what making it will raise, and leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        try:
            path.rmdir()
        except OSError:
            return  # somebody else uses it


def _locked(folder: Path) -> TextIO:
    """The lock, taken. It goes with this process, however that ends, and with no other: forked loaders do not have it."""
    lock = open(folder / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        with lock:
            raise UserError(
                f"{folder}: another training is at work in it ({lock.read().strip()}); end it first, or name this "
                "run otherwise by log_fname"
            ) from None
    except OSError:
        pass  # a file system without locks
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _free(path: Path) -> Path:
    """The path, or its name with the first number from 2 on that is not taken."""
    stem, number = re.fullmatch(r"(?s)(.*?)(?:-(\d{1,9}))?", path.name).groups()
    others = (path.with_name(f"{stem}-{n}") for n in count(int(number or 1) + 1))
    return next(each for each in chain([path], others) if not each.exists())


def _ended(log: Path) -> bool:
    """Whether a run's log ends as that of a finished training; so does none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            return b'"event": "end"' in file.read().rpartition(b"\n{")[2]
    except FileNotFoundError:
        return True
