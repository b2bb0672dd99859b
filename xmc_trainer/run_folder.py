"""A run's folder: its lock, its content, and whether a training may start or resume in it.

config.yaml       the run's configuration
split.npz         which texts were held out, if the run did so; see `data.split`
log.jsonl         the log, one JSON object per line
run.log           what libraries logged and warned, if anything
checkpoint-1000/  the training state after step 1000, removed when the run finishes; see `checkpoint.resume`
model/            the final model; see `checkpoint.saved_model`
best/             training.checkpoint_file: the best model so far
replaced/         an earlier run that this one replaces, removed when this run finishes
.lock             held by the training that uses the folder
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
from xmc_trainer.files import (
    OLD,
    PARTIAL,
    REMOVED,
    CannotWrite,
    check_can_create,
    put_copy,
    remove,
    settle,
    sync,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from xmc_trainer.parallel import Ranks

MODEL, LOG, LIBRARY_LOG, SPLIT = "model", "log.jsonl", "run.log", "split.npz"
ELSEWHERE = "set output_dir to another folder"  # remedy for `files.writing`
_CHECKPOINT = re.compile(r"checkpoint(?:-(\d+))?")  # an earlier version wrote no number
# Settings that may change on resume: paths, and settings that do not affect the result.
_MAY_CHANGE = (
    "dataset", "dataset_path", "log_fname", "output_dir", "environment", "data.folder", "data.source", "data.num_workers", "data.cache_dir",
    "data.test_batch_size", "data.micro_batches", "model.encoder.encoder_model", "model.encoder.encoder_tokenizer",
    "model.encoder.ngame_checkpoint", "model.encoder.use_torch_compile", "model.encoder.gradient_checkpointing",
    "model.encoder.attn_implementation",
    "model.ffi.backend", "model.ffi.tile_labels",
    "training.verbose", "training.resume", "training.overwrite", "training.checkpoint_interval",
    "training.checkpoint_minutes", "training.checkpoints_kept", "training.use_checkpoint", "training.checkpoint_file",
    "training.best_p1",
)  # fmt: skip


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"checkpoint-{step}"


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the run's complete checkpoints, earliest first."""
    found = (path.parent for path in run_folder.glob(f"checkpoint*/{MANIFEST}"))
    numbers = {path: int(match[1] or 0) for path in found if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted(numbers, key=numbers.__getitem__)


def find_checkpoint(run_folder: Path) -> Path | None:
    """Return the run's last complete checkpoint, or None."""
    return next(reversed(checkpoints(run_folder)), None)


def remove_checkpoints(run_folder: Path, kept: int) -> None:
    """Remove all but the last `kept` checkpoints, earliest first."""
    found = checkpoints(run_folder)
    remove(found[: max(len(found) - kept, 0)])


def differences(config: Config, file: Path) -> list[str]:
    """Return "name=saved, not new" for each setting that affects the result and differs from a run's config.yaml."""
    saved, new = flatten(saved_settings(file)), flatten(asdict(config))
    names = [name for name in new | saved if not any(f"{name}.".startswith(f"{free}.") for free in _MAY_CHANGE)]
    # Ignore settings that only one version knows: the other version behaves as with their defaults.
    return [
        f"{name}={saved[name]}, not {new[name]}"
        for name in names
        if name in new and name in saved and new[name] != saved[name]
    ]


def _results(run_folder: Path) -> list[Path]:
    """Return the folders of saved models."""
    found = sorted(path.parent for path in run_folder.glob(f"*/{MANIFEST}"))
    unfinished = (PARTIAL, OLD, REMOVED)
    return [path for path in found if not _CHECKPOINT.fullmatch(path.name) and path.suffix not in unfinished]


def _checkpoint_to_resume(config: Config) -> Path | None:
    """Return the checkpoint from which a training resumes; None to start from the beginning.

    Raises UserError if another run's results would be lost; NothingToDo if the run is finished and shall be resumed.
    """
    path = config.run_folder
    training, found, results = config.training, find_checkpoint(path), _results(path)
    existing = found or next((each for each in results if each.name == MODEL), None) or next(iter(results), None)
    if existing is None:
        return None
    what = "a finished run" if existing.name == MODEL else "the best model of an interrupted run"
    remedies = []
    if found is not None:
        what, remedies = f"an interrupted run ({found.name})", ["continue it with training.resume=true"]
    if training.resume:
        file = path / "config.yaml"
        if found is not None:
            file = verify_file(found, "config.yaml", remedy=f"restore it, or remove {found} to resume without it")
        differ = differences(config, file)
        logged = saved_settings(file).get("training.verbose.logging", True)
        if existing.name == MODEL and not differ and (not logged or _log_has_ended(path / LOG)):
            raise NothingToDo(
                f"{path}: this run is finished; to train it again, set training.overwrite=true and leave out "
                "training.resume"
            )
        if not differ:
            return found  # None: the run was interrupted while finishing, or had no checkpoints
        what, remedies = f"{what} with {'; '.join(differ)}", ["restore these settings"]
    if training.overwrite:
        return None
    remedies.append(f"choose another name (log_fname={_free_name(path).name})")
    raise UserError(f"{path}: holds {what}; {', '.join(remedies)}, or replace it with training.overwrite=true")


def require_free(config: Config) -> None:
    """Refuse a start that `RunFolder` would refuse, as far as that is seen without the folder's lock. Raises as it does."""
    with writing(config.run_folder, ELSEWHERE):
        if config.run_folder.exists():
            _checkpoint_to_resume(config)
        else:
            check_can_create(config.run_folder)


class RunFolder:
    """The folder of a training, locked from construction (if it exists) to the end of training. Collective.

    Attributes:
        config: the configuration that is stored in the folder.
        checkpoint: the checkpoint to resume from, or None to start from the beginning.
        split_file: the file that becomes split.npz when the training begins; None for none. Set by the builder.

    Raises, on all ranks: UserError if another training uses the folder, if it cannot be written, or if another run's
    results would be lost; NothingToDo if the run is finished and `training.resume` is set.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.path, self.checkpoint = config.run_folder, None
        self.split_file: Path | None = None
        # training.overwrite holds for this start only: a later start from the stored settings must not overwrite.
        self.config = replace(config, training=replace(config.training, overwrite=False))
        self._requested, self._ranks = config, ranks
        self._lock: TextIO | None = None
        self._on_main_rank(self._inspect)
        self.checkpoint = ranks.broadcast(self.checkpoint)

    def _on_main_rank(self, work: Callable[[], None]) -> None:
        with self._ranks.together():
            if self._ranks.rank == 0:
                with writing(self.path, ELSEWHERE):
                    work()

    def _inspect(self) -> None:
        if not self.path.exists():
            check_can_create(self.path)  # only a training that was not refused creates the folder
            return
        self._acquire()
        self.checkpoint = _checkpoint_to_resume(self._requested)

    def _acquire(self) -> None:
        # A folder from elsewhere may hold pipes, or links to files outside the run.
        for name in (".lock", LOG, LIBRARY_LOG, SPLIT, "config.yaml"):
            if (file := self.path / name).is_symlink() or (file.exists() and not file.is_file()):
                raise UserError(f"{file}: is not a regular file, but a run writes one there; move it elsewhere")
        for name in (MODEL, self.config.training.checkpoint_file):
            if (folder := self.path / name).exists() and not folder.is_dir():
                raise UserError(f"{folder}: is not a folder, but a run creates one there; move it elsewhere")
        self._lock = _locked(self.path)
        best = re.escape(self.config.training.checkpoint_file)
        settle(self.path, re.compile(rf"model|(checkpoint|replaced)(-\d+)?|{best}"))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Surround the training. Afterwards the run is finished, or can be resumed from its last checkpoint."""
        try:
            self._on_main_rank(self._begin)
            yield
            self._on_main_rank(self._finish)
        except CannotWrite as error:
            last = find_checkpoint(self.path)
            next_step = f"then resume from {last.name} with training.resume=true" if last else "then start again"
            raise UserError(f"{error}; {next_step}") from None
        finally:
            if self._lock is not None:
                self._lock.close()

    def _begin(self) -> None:
        if self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if _checkpoint_to_resume(self._requested) is not None:
                raise UserError(f"{self.path}: another training has used it meanwhile; start again")
        if self.checkpoint is None:
            if self.config.training.resume:
                print(f"{self.path}: no checkpoint to resume from; training from the beginning", flush=True)
            if existing := [*checkpoints(self.path), *_results(self.path)]:
                self._set_aside(existing)
        write_text(self.path / "config.yaml", to_yaml(self.config))
        if self.split_file is not None:
            put_copy(self.split_file, self.path / SPLIT)

    def _set_aside(self, existing: list[Path]) -> None:
        aside = _free_name(self.path / "replaced")
        aside.mkdir()
        sync(self.path)
        for each in (*existing, self.path / "config.yaml", self.path / LOG, self.path / LIBRARY_LOG, self.path / SPLIT):
            if each.exists():
                os.rename(each, aside / each.name)
        sync(aside)
        sync(self.path)
        print(f"{self.path}: replaces an earlier run, which is kept in {aside} until this one finishes", flush=True)

    def _finish(self) -> None:
        # Checkpoints go last: if this is interrupted, a resumed run finishes again from the last one.
        remove([path for path in sorted(self.path.iterdir()) if re.fullmatch(r"replaced(-\d+)?", path.name)])
        remove_checkpoints(self.path, kept=0)


def _locked(folder: Path) -> TextIO:
    """Take the folder's lock and return its file. The lock ends with this process; forked workers do not hold it."""
    lock = open(folder / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        with lock:
            raise UserError(
                f"{folder}: another training is using it ({lock.read().strip()}); end that first, or choose another "
                "name for this run with log_fname"
            ) from None
    except OSError:
        pass  # a file system without locks
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _free_name(path: Path) -> Path:
    """Return the path if nothing exists there, else its name with the first free number from 2 up."""
    match = re.fullmatch(r"(?s)(.*?)(?:-(\d{1,9}))?", path.name)
    assert match is not None  # the pattern matches any name
    stem, number = match.groups()
    others = (path.with_name(f"{stem}-{n}") for n in count(int(number or 1) + 1))
    return next(each for each in chain([path], others) if not each.exists())


def _log_has_ended(log: Path) -> bool:
    """Whether a run's log ends with the event of a finished training. A missing log counts as ended."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            return b'"event": "end"' in file.read().rpartition(b"\n{")[2]
    except FileNotFoundError:
        return True
