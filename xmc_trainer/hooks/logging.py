"""Hooks: everything that happens around the training step. A user's own are added the same way, after ours.

class MyHook(Hook):
    def on_step_end(self, trainer):
        ...

Trainer(config, hooks=[MyHook()]).train()
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from xmc_trainer import __version__, signals
from xmc_trainer.checkpoint.saved_model import head_parts
from xmc_trainer.config import Config, EvaluationConfig, FFIConfig, OptimizationConfig, portable
from xmc_trainer.engine import engine_name
from xmc_trainer.evaluation import metrics_of, most_popular
from xmc_trainer.files import sync, writing
from xmc_trainer.head import RewireReport, RewireRule
from xmc_trainer.head.rewire import scheduled_amount
from xmc_trainer.metrics import table
from xmc_trainer.run_folder import ELSEWHERE, LOG
from xmc_trainer.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer


def commit() -> str:
    """The git commit of this code, with a + where it was edited since; "none" if it does not lie in a repository."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        inside = subprocess.run([*words[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() if inside.returncode == done.returncode == 0 else "none"


def head_bytes(trainer: Trainer) -> int:
    """Of this process's part of the head: weights, index and optimizer state."""
    return sum(buffer.nbytes for buffer in trainer.head.buffers())


def head_kernels(trainer: Trainer) -> list[str]:
    """Which kernels the labels' head, or each part of a split one, uses for an optimizer step, and why."""
    return [part.describe_kernels(trainer.config.texts_a_step) for _, part in head_parts(trainer.head)]


class Hook:
    """The protocol. Every method is called on every rank, with the trainer, whose `state` says where training is."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first after the checkpoint that the training goes on from."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the micro-batches of an optimizer step."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After a real optimizer step: encoder and head hold new weights. Not after one that fp16 skipped."""

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Every second or so: the steps since the last call, as {"step", "epoch", "loss", "lr", "encoder_lr", ...}.

        The last one also has the speed of them all: "texts_per_s", the milliseconds of a step "encoder_ms" (forward, backward and
        update) and "head_ms", the share of the time "waiting" for data, and on a GPU "gib", the memory allocated at most.
        """

    def on_rewire(self, trainer: Trainer, report: RewireReport, amount: float) -> None:
        """After a rewiring with the scheduled threshold or fraction `amount`; the report covers this rank's labels."""

    def on_epoch_end(self, trainer: Trainer) -> None: ...

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None: ...

    def on_save(self, trainer: Trainer, folder: Any) -> None: ...

    def on_train_end(self, trainer: Trainer) -> None: ...

    def on_interrupt(self, trainer: Trainer) -> None:
        """Instead of `on_train_end`: a signal ends the training, which may go on in another process."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this hook, of rank 0's; JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it over, on every rank, before `on_train_start`."""


class CheckpointHook(Hook):
    """Writes the training's checkpoint every `interval` optimizer steps and every `minutes`, and ends the training for a signal.

    0 turns an interval off. Ranks get signals, and see minutes pass, at different moments, but must act before the same
    step: they ask each other at the beginning of a step and hear the answer a step later, when it has long arrived.
    """

    def __init__(self, interval: int, minutes: float) -> None:
        self.interval, self.seconds = interval, 60 * minutes
        self._answer: Callable[[], list[int]] = lambda: [0, 0]

    def on_train_start(self, trainer: Trainer) -> None:
        self._last_step, self._last_time = trainer.state.step, time.monotonic()

    def on_step_begin(self, trainer: Trainer) -> None:
        # Not at the end of a step: every hook is to be through with it.
        number, minutes_over = self._answer()
        if number:
            trainer.stop(number)
        step = trainer.state.step
        if step > self._last_step and (minutes_over or (self.interval and step % self.interval == 0)):
            trainer.save_checkpoint()
            self._last_step, self._last_time = step, time.monotonic()

        def ask() -> list[int]:
            minutes_over = (
                trainer.ranks.rank == 0 and self.seconds and time.monotonic() - self._last_time >= self.seconds
            )
            return [signals.pending(), int(minutes_over)]

        self._answer = trainer.ranks.largest(ask)

    def on_epoch_end(self, trainer: Trainer) -> None:
        number, _ = self._answer()
        if number:
            trainer.stop(number)


class ScheduleHook(Hook):
    """Sets the learning rates of encoder (and meta branch) and head before each step."""

    def __init__(self, config: OptimizationConfig) -> None:
        self.config = config
        self._peaks: list[float] = []
        self._loaded: dict[str, Any] = {"encoder": {}, "head": {}}

    def state_dict(self) -> dict[str, Any]:
        return {"encoder": self._encoder.state_dict(), "head": self._head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def on_train_start(self, trainer: Trainer) -> None:
        self._peaks = [group["lr"] for group in trainer.optimizer.param_groups]
        config, state = self.config, trainer.state

        def schedule(name: str) -> Schedule:
            return SCHEDULES[name](
                warmup_steps=config.warmup_steps, total_steps=state.total_steps, steps_per_epoch=state.steps_per_epoch,
                milestones=config.lr_milestones, gamma=config.lr_gamma, patience=config.lr_patience,
            )  # fmt: skip

        self._encoder, self._head = schedule(config.lr_scheduler), schedule(config.lr_scheduler_xmc)
        self._encoder.load_state_dict(self._loaded["encoder"])
        self._head.load_state_dict(self._loaded["head"])

    def on_step_begin(self, trainer: Trainer) -> None:
        factor = self._encoder.factor(trainer.state.step)
        for group, peak in zip(trainer.optimizer.param_groups, self._peaks):
            group["lr"] = peak * factor
        if trainer.meta_branch is not None:
            trainer.meta_branch.head.lr = self.config.meta_lr * factor
        trainer.head.lr = self.config.lr * self._head.factor(trainer.state.step)

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split == "test":
            self._encoder.observe(metrics["P@1"])
            self._head.observe(metrics["P@1"])


class SparsifyHook(Hook):
    """Turns the dense head of the first `dense_epochs` epochs into the sparse one."""

    def __init__(self, dense_epochs: int, ffi: FFIConfig) -> None:
        self.dense_epochs, self.ffi = dense_epochs, ffi

    def on_epoch_end(self, trainer: Trainer) -> None:
        # It is sparse already if the training was stopped in the evaluation that followed.
        if trainer.state.epoch + 1 == self.dense_epochs and trainer.head.index is None:
            trainer.head.become_sparse(self.ffi.fan_in, self.ffi.group_size)


class RewireHook(Hook):
    """Rewires the head every `rewire_interval` real steps until the share `rewire_end_epoch` of the training."""

    def __init__(self, ffi: FFIConfig) -> None:
        self.ffi = ffi
        self._real_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"real_steps": self._real_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._real_steps = state["real_steps"]

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.head.index is None:
            return  # still dense
        self._real_steps += 1
        last_step = int(self.ffi.rewire_end_epoch * trainer.state.total_steps)
        if self._real_steps % self.ffi.rewire_interval or trainer.state.step > last_step:
            return
        by_threshold = self.ffi.prune_mode == "threshold"
        amount = self.ffi.rewire_threshold if by_threshold else self.ffi.rewire_fraction
        if self.ffi.use_rewire_scheduling:
            end = min(self.ffi.rewire_end_threshold, amount) if by_threshold else 0.0
            amount = scheduled_amount(amount, end, trainer.state.step, last_step)
        rule = RewireRule(self.ffi.prune_mode, amount, self.ffi.growth_init_mode, self.ffi.growth_mode)
        report = trainer.head.rewire(rule)
        trainer.dispatch("on_rewire", report, amount)


class EvaluateHook(Hook):
    """Evaluates at the end of epochs; always after the last."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config

    def on_epoch_end(self, trainer: Trainer) -> None:
        done, last = trainer.state.epoch + 1, trainer.state.finished
        splits = ["test"] if last or done % self.config.test_evaluate_every == 0 else []
        if self.config.train_evaluate and (last or done % self.config.train_evaluate_every == 0):
            splits.append("train")
        # A signal may end an evaluation, which is then repeated: no hook has heard of it before all are done.
        found = {split: trainer.evaluate(split) for split in splits}
        for split, metrics in found.items():
            trainer.dispatch("on_evaluate", split, metrics)


class EarlyStopHook(Hook):
    """Ends the training after `early_stop_patience` test evaluations without a better `early_stop_metric`.

    Evaluations of the first `dense_epochs` epochs do not count: a dense head is better than the sparse one made of it.
    """

    def __init__(self, config: EvaluationConfig, dense_epochs: int) -> None:
        self.config, self.dense_epochs = config, dense_epochs
        self._best, self._waited = -math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split != "test" or trainer.state.epoch < self.dense_epochs:
            return
        value = metrics[self.config.early_stop_metric]
        if value > self._best + self.config.early_stop_delta:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.config.early_stop_patience and not trainer.state.finished:
            trainer.state.stopped = True
            if trainer.accelerator.is_main_process:
                print(
                    f"stopped early: {self.config.early_stop_metric} has not risen above {100 * self._best:.2f} for "
                    f"{self._waited} evaluations",
                    flush=True,
                )


class BestModelHook(Hook):
    """Keeps the model with the best test P@1 so far, of those after the first `dense_epochs` epochs."""

    def __init__(self, folder_name: str, best_p1: float, dense_epochs: int) -> None:
        self.folder_name, self.best_p1, self.dense_epochs = folder_name, best_p1, dense_epochs

    def state_dict(self) -> dict[str, Any]:
        return {"best_p1": self.best_p1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_p1 = max(self.best_p1, state["best_p1"])

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if split == "test" and trainer.state.epoch >= self.dense_epochs and metrics["P@1"] > self.best_p1:
            self.best_p1 = metrics["P@1"]
            trainer.save(trainer.run_folder / self.folder_name)


class ProgressHook(Hook):
    """What is trained in one line; a progress bar with loss, rate and time left; on request a line every `print_iter` steps; metrics as a table, at
    the end beside the floor of predicting the most popular labels."""

    def __init__(self, print_iter: int | None) -> None:
        self.print_iter = print_iter
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            size, steps = trainer.ranks.size, trainer.state.total_steps
            print(
                f"{size} process{'es' if size > 1 else ''} on {trainer.device.type}, {engine_name(trainer.accelerator)}: "
                f"{trainer.train_texts:,} texts, "
                f"{trainer.corpus.num_labels:,} labels; head: {head_bytes(trainer) / 2**20:,.1f} MiB a process; {steps:,} steps, "
                f"{trainer.state.steps_per_epoch:,} an epoch",
                flush=True,
            )
            print("\n".join(head_kernels(trainer)), flush=True)
            if trainer.state.step:
                print(f"goes on after step {trainer.state.step:,}, in epoch {trainer.state.epoch + 1}", flush=True)
            warmup = trainer.config.training.optimization.warmup_steps
            if steps <= warmup:
                print(
                    f"warning: all {steps:,} steps are warm-up (training.optimization.warmup_steps={warmup}), and the learning "
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
            called = trainer.config.data.evaluated_split if split == "test" else split
            self._bar.write(table({f"epoch {trainer.state.epoch + 1} {called}": metrics}))

    def on_train_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            floor = most_popular(trainer.corpus, metrics_of(trainer.config.training.evaluation, trainer.corpus))
            called = trainer.config.data.evaluated_split
            print(
                f"\n{called} set, per cent, after {trainer.state.step} steps; model in {trainer.run_folder / 'model'}"
            )
            print(table({"this model": trainer.metrics["test"], "most popular labels": floor}), flush=True)

    def on_interrupt(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()


class JsonLogHook(Hook):
    """log.jsonl in the run folder: one object a line, for the start, every step, evaluation, rewiring and save, and the end.

    A training that goes on from a checkpoint drops what was written after that and says "resume". Seconds are those of the
    training that counts.
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
                while line:  # a disk that is nearly full takes a part
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
                "micro_batches": trainer.micro_batches,
                "compiled": trainer.compiled,
                "head_bytes": all_bytes,
                "labels": trainer.corpus.num_labels,
            }
            event = {"event": "resume", "step": trainer.state.step} if trainer.state.step else {"event": "start"}
            engine = {"engine": engine_name(trainer.accelerator), "kernels": head_kernels(trainer)}
            self.write(event | {"device": device} | engine | versions | sizes)

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.write({"event": "step"} | record)

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        self.write({"event": "evaluate", "split": split, "step": trainer.state.step} | metrics)

    def on_rewire(self, trainer: Trainer, report: RewireReport, amount: float) -> None:
        # `report` is of this rank's rows.
        moved, slots = trainer.ranks.sum(torch.tensor([report.moved, report.slots], device=trainer.device)).tolist()
        counts = {"moved": moved, "survivors": slots - moved, "share": moved / max(slots, 1)}
        self.write({"event": "rewire", "step": trainer.state.step, "amount": amount} | counts)

    def on_save(self, trainer: Trainer, folder: Any) -> None:
        self.write({"event": "save", "step": trainer.state.step, "folder": str(folder)})

    def on_train_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self.write({"event": "end", "step": trainer.state.step})
            with writing(Path(self._file.name), ELSEWHERE):
                os.fsync(self._file.fileno())
                self._file.close()

    def on_interrupt(self, trainer: Trainer) -> None:
        self.write({"event": "interrupt", "step": trainer.state.step})


class WandbHook(Hook):
    """Losses, rates and metrics to Weights & Biases (WANDB_MODE=offline works)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._run: Any = None
        self._id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def on_train_start(self, trainer: Trainer) -> None:
        if not trainer.accelerator.is_main_process:
            return
        import wandb

        name = self.config.training.verbose.wandb_runname
        self._run = wandb.init(
            project="xmc_trainer",
            name=None if name == "none" else name,
            id=self._id,  # of the run that was interrupted, if there was one
            resume="allow",
            dir=str(trainer.run_folder),
            config=portable(dataclasses.asdict(self.config)),
            # What it collects by itself, and what is printed, names folders of this machine.
            settings=wandb.Settings(console="off", disable_git=True, x_disable_meta=True),
        )
        self._id = self._run.id

    def on_losses(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        if self._run is not None:
            for record in records:
                self._run.log(
                    {f"train/{key}": record[key] for key in ("loss", "lr", "encoder_lr")}, step=record["step"]
                )

    def on_evaluate(self, trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
        if self._run is not None:
            self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=trainer.state.step)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.finish()

    on_interrupt = on_train_end


def default_hooks(config: Config) -> list[Hook]:
    """The hooks of a configuration, in the order in which they run.

    Checkpoints are of what the step before left. Rates are set before anything else; rewiring and sparsifying edit the head before anyone looks at it; evaluation comes
    before the hooks that save, show and act on its result.
    """
    ffi, verbose, optimization = config.model.ffi, config.training.verbose, config.training.optimization
    dense_epochs = optimization.dense_epochs if ffi.use_sparse_layer else 0
    hooks: list[Hook] = [
        CheckpointHook(config.training.checkpoint_interval, config.training.checkpoint_minutes),
        ScheduleHook(optimization),
    ]
    if dense_epochs:
        hooks.append(SparsifyHook(dense_epochs, ffi))
    if ffi.use_sparse_layer and ffi.rewire_interval:
        hooks.append(RewireHook(ffi))
    hooks.append(EvaluateHook(config.training.evaluation))
    if config.training.evaluation.early_stop_patience:
        hooks.append(EarlyStopHook(config.training.evaluation, dense_epochs))
    if config.training.use_checkpoint:
        hooks.append(BestModelHook(config.training.checkpoint_file, config.training.best_p1, dense_epochs))
    hooks.append(ProgressHook(verbose.print_iter if verbose.show_iter else None))
    if verbose.logging:
        hooks.append(JsonLogHook())
    if verbose.use_wandb:
        hooks.append(WandbHook(config))
    return hooks
