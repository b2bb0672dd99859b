"""A power failure or kill before any file operation of a run loses no result that was reached."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.crash_disk import CrashDisk
from tests.fuzz import examples
from tests.integration.test_resume import new_process
from tests.integration.test_training import log_of, train
from xmc_trainer.checkpoint.folder import read_folder
from xmc_trainer.checkpoint.model_manifest import MODEL
from xmc_trainer.checkpoint.resume import CHECKPOINT
from xmc_trainer.config import load_config
from xmc_trainer.errors import NothingToDo, UserError
from xmc_trainer.hooks import Hook
from xmc_trainer.parallel import Ranks
from xmc_trainer.run_folder import RunFolder, differences
from xmc_trainer.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]
RUN = "run"


def held(path: Path, config) -> tuple[str, int]:
    """Return what the next start does in a run's folder: "begins", resumes "after" a step, or "finished"."""
    try:
        found = RunFolder(config, Ranks()).checkpoint
    except NothingToDo:
        return "finished", read_folder(path / "model", MODEL)["step"]
    return ("begins", 0) if found is None else ("after", read_folder(found, CHECKPOINT)["step"])


def readable(folder: Path) -> bool:
    try:
        return bool(read_folder(folder, MODEL))
    except UserError:
        return False


class Reached(Hook):
    """The results that no crash may lose."""

    step, best, finished = 0, False, False

    def on_step_end(self, trainer: Trainer) -> None:
        # Checkpoints are written just before a step.
        interval = trainer.config.training.checkpoint_interval
        self.step = (trainer.state.step - 1) // interval * interval

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        self.best |= folder.name == "best"
        self.finished |= folder.name == "model"


@pytest.fixture
def in_memory(tmp_path) -> Iterator[Path]:
    """Return a folder in memory, because files are written and removed thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_no_power_failure_loses_results(toy_settings, tmp_path, in_memory, monkeypatch):
    settings = [*toy_settings, f"log_fname={RUN}", "training.optimization.max_steps=11", "data.train_sample=128"]
    settings += ["training.checkpoint_interval=3", "training.use_checkpoint=true", "training.verbose.print_iter=100"]
    earlier, _ = train([*settings, "training.optimization.max_steps=2", "training.use_checkpoint=false"])
    assert readable(earlier.run_folder / "model")
    new_process()
    random, reached, states = Random(1), Reached(), []
    image = in_memory / RUN
    crashed = load_config([*settings, "training.resume=true", f"output_dir={image.parent}"])
    # Parsing YAML would take most of the time.
    known: dict[bytes, list[str]] = {}
    monkeypatch.setattr(
        "xmc_trainer.run_folder.differences",
        lambda config, file: (
            known[text] if (text := file.read_bytes()) in known else known.setdefault(text, differences(config, file))
        ),
    )

    def crash(disk: CrashDisk) -> None:
        for each in (None, *[random] * examples(1)):
            disk.crash(image, each)
            models = [path for path in (image / "model", *image.glob("replaced*/model")) if readable(path)]
            if not reached.finished and not any(read_folder(path, MODEL)["step"] == 2 for path in models):
                raise AssertionError(f"the earlier run is lost at operation {disk.operations}")
            if (image / "model").exists() and reached.step == 0:  # the earlier run has not been moved to replaced/ yet
                shutil.rmtree(image)
                continue
            what, step = held(image, crashed)
            assert (what, step) >= ("after", reached.step) or reached.step == 0, (what, step, disk.operations)
            assert what == "finished" if reached.finished and not list(image.glob("checkpoint-*")) else True
            assert readable(image / "best") or not reached.best
            states.append((what, step))
            if random.random() < 0.004:
                shutil.copytree(image, tmp_path / "kept" / str(len(states)) / RUN)
            shutil.rmtree(image)

    disk = CrashDisk(earlier.run_folder, crash)
    with monkeypatch.context() as patch:
        disk.watch(patch)
        trainer, metrics = train([*settings, "training.overwrite=true"], hooks=[reached])
    assert {what for what, _ in states} == {"begins", "after", "finished"} and disk.operations > 100
    assert {step for what, step in states if what == "after"} == {3, 6, 9}
    losses = [record["loss"] for record in log_of(trainer, "step")]
    kept = list((tmp_path / "kept").iterdir())[:3]
    assert kept
    for folder in kept:
        new_process()
        try:
            again, found = train([*settings, "training.resume=true", f"output_dir={folder}"])
        except NothingToDo:
            continue
        assert found == metrics and losses[-2:] == [record["loss"] for record in log_of(again, "step")][-2:]
