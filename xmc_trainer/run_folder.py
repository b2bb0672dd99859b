"""A run's folder: whose it is, what lies in it, and what a training that is to begin there may do.

config.yaml     the run's configuration
log.jsonl       what happened, a JSON object a line
checkpoint/     where the training was, until it is finished; see `resume`
model/          what it came to; see `checkpoint`
.lock           held by the training that is at work
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from xmc_trainer.config import Config, flatten, to_yaml
from xmc_trainer.errors import NothingToDo, UserError

CHECKPOINT = "checkpoint"  # in the run's folder
# What a training may go on with otherwise than it began: places, and what does not change what is learned.
_FREE = (
    "dataset", "dataset_path", "log_fname", "output_dir", "environment", "data.folder", "data.num_workers", "data.cache_dir",
    "data.test_batch_size", "model.encoder.encoder_model", "model.encoder.encoder_tokenizer", "model.encoder.ngame_checkpoint",
    "model.encoder.use_torch_compile", "model.ffi.backend", "model.ffi.tile_labels", "training.verbose", "training.resume",
    "training.checkpoint_interval", "training.use_checkpoint", "training.checkpoint_file", "training.best_p1",
)  # fmt: skip


def find_checkpoint(run_folder: Path) -> Path | None:
    """The run's last whole checkpoint."""
    # Cut off between two renamings, the one before has stepped aside.
    for name in (CHECKPOINT, f"{CHECKPOINT}.old"):
        if (run_folder / name / "manifest.json").is_file():
            return run_folder / name
    return None


def remove_checkpoint(run_folder: Path) -> None:
    for name in (CHECKPOINT, f"{CHECKPOINT}.old", f"{CHECKPOINT}.partial"):
        shutil.rmtree(run_folder / name, ignore_errors=True)


def differences(config: Config, file: Path) -> list[str]:
    """In which settings that matter to what is learned a run's config.yaml differs from `config`: "name=there, not here"."""
    there, here = (
        {name: str(value) for name, value in flatten(OmegaConf.to_container(tree)).items()}
        for tree in (OmegaConf.load(file), OmegaConf.create(to_yaml(config)))
    )
    names = [name for name in here | there if not any(f"{name}.".startswith(f"{free}.") for free in _FREE)]
    # A setting that one version does not know is at its default there.
    return [f"{name}={there[name]}, not {here[name]}" for name in names if name in here and name in there and here[name] != there[name]]


def checkpoint_to_resume(config: Config) -> Path | None:
    """The one to go on from. UserError rather than a run that would undo what another has done."""
    folder, found = config.run_folder, find_checkpoint(config.run_folder)
    if not config.training.resume:
        if found is not None:
            raise UserError(
                f"{folder}: holds a run that was interrupted; go on with training.resume=true, name another run by log_fname, or "
                f"remove {found}"
            )
        return None
    if found is not None:
        if differ := differences(config, found / "config.yaml"):
            raise UserError(
                f"{found}: was made with {'; '.join(differ)}; set that again, name another run by log_fname, or remove {found} to begin anew"
            )
    elif (folder / "model" / "manifest.json").is_file() and not differences(config, folder / "config.yaml"):
        raise NothingToDo(f"{folder}: this run is finished; training.resume=false would train it anew, in its place")
    return found


@contextmanager
def own(config: Config, goes_on: bool) -> Iterator[None]:
    """Make the run's folder ready, and hold it. UserError where another training is at work in it."""
    folder, there = config.run_folder, config.run_folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set output_dir to a folder of yours") from None
    with lock:
        try:
            # It goes with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder}: another training is at work in it ({lock.read().strip()}); end it first (a launcher that was "
                "killed leaves its processes behind), or name this run otherwise by log_fname"
            ) from None
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        if not goes_on and config.training.resume:
            print(f"{folder}: no checkpoint to go on from; the training begins", flush=True)
        if not goes_on and there:
            print(f"{folder}: replaces an earlier run; name another by log_fname", flush=True)
            for name in ("model", config.training.checkpoint_file):
                if (folder / name / "manifest.json").is_file():
                    shutil.rmtree(folder / name)  # or it would pass for this run's
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        yield
