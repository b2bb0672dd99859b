"""Report a training's progress on the terminal, in log.jsonl and to a tracker."""

from __future__ import annotations

import json
import os
import resource
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tqdm import tqdm

from xmc_trainer import __version__
from xmc_trainer.engine.accelerator import engine_name
from xmc_trainer.errors import UserError, reason
from xmc_trainer.evaluation import most_popular
from xmc_trainer.files import sync, writing
from xmc_trainer.head import RewireReport
from xmc_trainer.hooks.base import Hook
from xmc_trainer.metrics import table
from xmc_trainer.run_folder import ELSEWHERE, LOG
from xmc_trainer.version import commit

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


def head_bytes(trainer: Trainer) -> int:
    """Return the bytes of this process's part of the head: weights, index and optimizer state."""
    return sum(buffer.nbytes for buffer in trainer.head.buffers())


def head_kernels(trainer: Trainer) -> list[str]:
    """Describe the kernels that each part of the head uses for an optimizer step, and why."""
    return [part.describe_kernels() for _, part in trainer.head.parts()]


def summary(trainer: Trainer) -> str:
    """Describe a training in a few lines: data, labels, model, head, memory and engine."""
    config, corpus, batches, size = trainer.config, trainer.corpus, trainer.batches, trainer.ranks.size
    positives = corpus.label_counts().sum() / corpus.texts
    held_out = " (held out)" if corpus.split_file is not None else ""
    lines = {
        "data": f"{config.data_name}: {batches.train_texts:,} training texts, {len(corpus.test):,} {config.data.test_split} "
        f"texts{held_out}, up to {corpus.lengths('train').max()} tokens",
        "labels": f"{corpus.num_labels:,}, {positives:.1f} for a text",
        "model": f"{config.model.encoder.encoder_model}, {trainer.head.in_features:,} features; "
        f"head of {head_bytes(trainer) / 2**20:,.1f} MiB{' a process' if size > 1 else ''}",
        "kernels": "\n         ".join(part.removeprefix("head: ") for part in head_kernels(trainer)),
        "memory": f"{host_gib():.1f} GiB of this process" + _gpu_memory(trainer.device),
        "engine": f"{engine_name(trainer.accelerator)}, {size} process{'es' if size > 1 else ''} on {trainer.device.type}, built in "
        f"{sum(trainer.start_seconds.values()):.0f} s; {trainer.state.total_steps:,} steps of {batches.texts_a_step:,} texts, "
        f"{trainer.state.steps_per_epoch:,} an epoch",
    }
    return "\n".join(f"{name:9}{line}" for name, line in lines.items())


def _gpu_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, whole = torch.cuda.mem_get_info(device)
    return f"; GPU: {(whole - free) / 2**30:.1f} of {whole / 2**30:.1f} GiB in use"


def host_gib() -> float:
    """Peak memory of this process in GiB, with the pages of memory-mapped data."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


class ProgressHook(Hook):
    """Prints a summary, a progress bar, and metrics; at the end also those of always predicting the most popular labels.

    Args:
        print_iter: steps between lines with loss and learning rate; None for no such lines.
    """

    def __init__(self, print_iter: int | None) -> None:
        self.print_iter = print_iter
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            steps = trainer.state.total_steps
            print(summary(trainer), flush=True)
            if trainer.state.step:
                print(f"resumed after step {trainer.state.step:,}, in epoch {trainer.state.epoch + 1}", flush=True)
            warmup = trainer.config.training.optimization.warmup_steps
            if warmup is not None and steps <= warmup:
                print(
                    f"warning: all {steps:,} steps are warm-up (training.optimization.warmup_steps={warmup}), so the learning "
                    "rates never reach their peaks; lower it",
                    flush=True,
                )
            self._bar = tqdm(
                total=trainer.state.total_steps,
                initial=trainer.state.step,
                desc="train",
                unit="step",
                mininterval=1.0,
                smoothing=0.05,
            )

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        if self._bar is None:
            return
        last = records[-1]
        memory = f", {last['gib']:.1f} GiB" if "gib" in last else ""
        self._bar.set_postfix_str(
            f"epoch {trainer.state.epoch + 1} loss {last['loss']:.4g}, {last['texts_per_s']:,.0f} texts/s: encoder {last['encoder_ms']:.1f} ms, "
            f"head {last['head_ms']:.1f} ms, waiting {100 * last['waiting']:.0f} %{memory}",
            refresh=False,
        )
        self._bar.update(len(records))
        for record in records:
            if self.print_iter and record["step"] % self.print_iter == 0:
                self._bar.write(f"step {record['step']}: loss {record['loss']:.6g}, lr {record['lr']:.3g}")

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if self._bar is not None:
            called = trainer.config.data.test_split if split == "test" else split
            self._bar.write(table({f"epoch {trainer.state.epoch + 1} {called}": metrics}))

    def on_train_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            floor = most_popular(trainer.corpus, trainer.new_metrics())
            called = trainer.config.data.test_split
            print(
                f"\n{called} set, per cent, after {trainer.state.step} steps; model in {trainer.run_folder / 'model'}"
            )
            print(table({"this model": trainer.metrics["test"], "most popular labels": floor}), flush=True)

    def on_interrupt(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()


class JsonLogHook(Hook):
    """Writes log.jsonl in the run's folder: one JSON object per line for start, steps, evaluations, rewirings, saves and end.

    "start" and "resume" have the seconds of each part of the start, "rewire" its ms. "checkpoint_time" and "evaluation_time" have seconds
    and bytes.

    A resumed training removes the records after its checkpoint and writes "resume" instead of "start". Its "seconds"
    continue from the checkpoint.
    """

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._start = time.monotonic()
        self._kept_bytes: int | None = None

    def state_dict(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "seconds": time.monotonic() - self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept_bytes, self._start = state.get("bytes"), time.monotonic() - state.get("seconds", 0.0)

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            with writing(Path(self._file.name), ELSEWHERE):
                line = json.dumps(record | {"seconds": round(time.monotonic() - self._start, 3)}).encode() + b"\n"
                while line:  # a nearly full disk may write only a part
                    line = line[self._file.write(line) :]

    def on_train_start(self, trainer: Trainer) -> None:
        all_bytes = int(trainer.ranks.sum(torch.tensor(head_bytes(trainer), device=trainer.device)))
        if trainer.accelerator.is_main_process:
            path = trainer.run_folder / LOG
            with writing(path, ELSEWHERE):
                if self._kept_bytes is not None and path.is_file():
                    os.truncate(path, min(self._kept_bytes, path.stat().st_size))
                self._file = open(path, "wb" if self._kept_bytes is None else "ab", buffering=0)
                sync(trainer.run_folder)
            on_gpu = trainer.device.type == "cuda"
            device = torch.cuda.get_device_name(trainer.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
            versions = {"torch": torch.__version__, "version": __version__, "commit": commit()}
            sizes = {
                "processes": trainer.ranks.size,
                "micro_batches": trainer.batches.micro_batches,
                "compiled": trainer.compiled,
                "head_bytes": all_bytes,
                "labels": trainer.corpus.num_labels,
            }
            event = {"event": "resume", "step": trainer.state.step} if trainer.state.step else {"event": "start"}
            engine = {"engine": engine_name(trainer.accelerator), "kernels": head_kernels(trainer)}
            seconds = {part: round(value, 3) for part, value in trainer.start_seconds.items()}
            times = {"host_gib": host_gib(), "start_s": seconds}
            self.write(event | {"device": device} | engine | versions | sizes | times)

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.write({"event": "step"} | record)

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        self.write({"event": "evaluate", "split": split, "step": trainer.state.step} | metrics)

    def on_rewire(self, trainer: Trainer, report: RewireReport, amount: float) -> None:
        moved, slots = trainer.ranks.sum(torch.tensor([report.moved, report.slots], device=trainer.device)).tolist()
        counts = {"moved": moved, "survivors": slots - moved, "share": moved / max(slots, 1), "ms": round(report.ms, 1)}
        self.write({"event": "rewire", "step": trainer.state.step, "amount": amount} | counts)

    def on_timed(self, trainer: Trainer, what: str, facts: dict[str, Any]) -> None:
        self.write({"event": f"{what}_time", "step": trainer.state.step} | facts)

    def on_save(self, trainer: Trainer, folder: Any) -> None:
        self.write({"event": "save", "step": trainer.state.step, "folder": str(folder)})

    def on_train_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self.write({"event": "end", "step": trainer.state.step, "host_gib": host_gib()})
            with writing(Path(self._file.name), ELSEWHERE):
                os.fsync(self._file.fileno())
                self._file.close()

    def on_interrupt(self, trainer: Trainer) -> None:
        self.write({"event": "interrupt", "step": trainer.state.step})


class TrackerHook(Hook):
    """Sends losses, learning rates and metrics to a tracker of accelerate: wandb, tensorboard or mlflow.

    A resumed training continues its run. TensorBoard's files are in <run folder>/tensorboard. Weights & Biases gets no console output, host
    or git data; WANDB_MODE=offline works. MLflow writes where MLFLOW_TRACKING_URI says.

    Args:
        run_name: None lets the tracker choose one; TensorBoard has none.
        settings: stored with the run; they leave this machine.
    """

    def __init__(self, tracker: str, run_name: str | None, settings: dict[str, Any]) -> None:
        self.name, self._run_name = tracker, run_name
        self._settings = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in settings.items()
        }
        self._tracker: Any = None
        self._id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            try:
                self._start(trainer)
            except Exception as error:  # trackers have no exception in common
                raise UserError(
                    f"training.verbose.tracker={self.name}: cannot be started ({reason(error)}); correct that, or set it to none"
                ) from None

    def _start(self, trainer: Trainer) -> None:
        resumed = trainer.state.step > 0
        make = LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "tensorboard":
            # Events after the checkpoint that the training resumes from are dropped.
            after = trainer.state.step + 1 if resumed else None
            self._tracker = make("tensorboard", logging_dir=str(trainer.run_folder), purge_step=after)
        elif self.name == "mlflow":
            self._tracker = make("xmc_trainer", run_id=self._id, run_name=self._run_name)
        else:
            import wandb

            self._tracker = make(
                "xmc_trainer",
                name=self._run_name,
                id=self._id,  # None, or that of the resumed run
                resume="allow",
                dir=str(trainer.run_folder),
                config=self._settings,
                # Console output and metadata name folders of this machine.
                settings=wandb.Settings(console="off", disable_git=True, x_disable_meta=True),
            )
        self._tracker.start()
        if self.name == "wandb":
            self._id = self._tracker.tracker.id
        elif not resumed:
            self._tracker.store_init_configuration(self._settings)
        if self.name == "mlflow":
            self._id = self._tracker.tracker.info.run_id

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.name == "mlflow":  # whose names may not have an @
            values = {name.replace("@", "_at_"): value for name, value in values.items()}
        self._tracker.log(values, step=step)

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        if self._tracker is not None:
            for record in records:
                self._log({f"train/{key}": record[key] for key in ("loss", "lr", "encoder_lr")}, record["step"])

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if self._tracker is not None:
            self._log({f"{split}/{name}": value for name, value in metrics.items()}, trainer.state.step)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._tracker is not None:
            self._tracker.finish()

    on_interrupt = on_train_end
