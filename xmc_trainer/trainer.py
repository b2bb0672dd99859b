"""The trainer: the loop over epochs and steps, with everything it needs built already. Read `train` first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from xmc_trainer import signals
from xmc_trainer.checkpoint.finite import require_finite
from xmc_trainer.checkpoint.saved_model import save_model
from xmc_trainer.config import SETTINGS, Config, model_card, portable_yaml
from xmc_trainer.data import Batches, Corpus
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.encoder_step import EncoderStep
from xmc_trainer.engine.accelerator import leave
from xmc_trainer.errors import naming
from xmc_trainer.evaluation import evaluate
from xmc_trainer.head import FixedFanInHead, Head, multi_head_step
from xmc_trainer.head.cluster_branch import MetaBranch
from xmc_trainer.hooks.base import Hook
from xmc_trainer.metrics import RankingMetrics
from xmc_trainer.parallel import Ranks
from xmc_trainer.run_folder import MODEL, RunFolder
from xmc_trainer.step_records import StepRecords


@dataclass
class TrainerState:
    """Progress of the training."""

    total_steps: int
    steps_per_epoch: int
    epoch: int = 0  # from 0
    step: int = 0  # optimizer steps made over all epochs, including those that fp16 skipped
    stopped: bool = False  # a hook ends the training after this epoch

    @property
    def finished(self) -> bool:
        return self.stopped or self.step >= self.total_steps


@dataclass(kw_only=True, eq=False)
class Trainer:
    """One training run on this process's share of the work. `build_trainer` makes it from a configuration."""

    config: Config  # the settings of the run, as they are saved with the model
    folder: RunFolder  # held by this training
    accelerator: Accelerator  # the engine; it trains `encoder` alone
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase  # made the tokens of `corpus`
    corpus: Corpus  # its labels are in the head's order
    batches: Batches  # of `corpus`, for this rank
    encoder_module: TextEncoder
    encoder: nn.Module  # `encoder_module` as the engine runs it: (input_ids, attention_mask) -> features [b, d]
    optimizer: Any  # of the encoder, as the engine runs it
    encoder_step: EncoderStep  # of this encoder and optimizer
    compiled: bool  # whether the encoder is compiled
    head: Head
    meta_branch: MetaBranch | None
    new_metrics: Callable[[], RankingMetrics]  # makes the empty metrics of an evaluation
    hooks: list[Hook]  # called in this order
    state: TrainerState
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # the latest evaluation of each split
    start_seconds: dict[str, float] = field(default_factory=dict)  # of parts of building this trainer

    def __post_init__(self) -> None:
        self.device, self.run_folder = self.accelerator.device, self.folder.path
        fp16 = self.config.training.amp.mixed_precision == "fp16"
        self.records = StepRecords(self.device, self.config.texts_a_step, fp16)

    # The loop -------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Train, evaluate and save to <run folder>/model. Returns the metrics on the test set.

        Raises Interrupted, on all ranks, if the program listens to signals (see `xmc_trainer.signals`) and one came.
        """
        with signals.deferred(), naming(SETTINGS):
            with self.folder.at_work():
                try:
                    self.dispatch("on_train_start")
                    while True:
                        self.train_epoch()
                        self.read_losses()
                        self.dispatch("on_epoch_end")
                        self.state.epoch += 1
                        if self.state.finished:
                            break
                    self.save(self.run_folder / MODEL)
                    self.dispatch("on_train_end")
                except signals.Interrupted:
                    self.dispatch("on_interrupt")
                    self.close()
                    raise
            if number := self.ranks.largest(lambda: [signals.pending()])()[0]:
                raise signals.Interrupted(number, f"after the training; the model is in {self.run_folder / MODEL}")
        return self.metrics["test"]

    def train_epoch(self) -> None:
        """Make the remaining steps of this epoch."""
        self.encoder.train()
        self.head.train()
        made = self.state.step - self.state.epoch * self.state.steps_per_epoch  # by a run that this one resumes
        steps = self.batches.plan(self.state.epoch)[made : made + self.state.total_steps - self.state.step]
        batches = iter(self.batches.train(steps))
        batch = self._fetch(batches)
        for _ in steps:
            self.dispatch("on_step_begin")
            self.encoder_step.begin(self.state.step)
            loss = torch.zeros((), device=self.device)
            for micro in range(self.batches.micro_batches):
                part, batch = self._micro_step(batch, batches, end_of_step=micro == self.batches.micro_batches - 1)
                loss += part
            applied = self.encoder_step.finish()
            self.state.step += 1
            self._record(loss, applied)
            if applied:
                self.dispatch("on_step_end")

    def _fetch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the next batch and start its transfer to the device; empty if there is none."""
        batch = next(batches, {})
        return batch | {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}

    def _micro_step(
        self, batch: dict[str, Any], batches: Iterator[dict[str, Any]], end_of_step: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run one micro-batch forward and backward, and at the end of a step both updates. Returns (loss, the next batch)."""
        clock = self.records.clock
        clock.mark(None)
        meta_weight = self._meta_weight(self.state.step)
        with self.accelerator.accumulate(self.encoder):
            features = self.encoder(batch["input_ids"], batch["attention_mask"])
            clock.mark("forward")
            terms = self.head.terms(1.0 - meta_weight)
            if self.meta_branch is not None and meta_weight > 0:
                terms += self.meta_branch.terms(meta_weight)
            loss = multi_head_step(
                terms,
                features[: batch["label_counts"].shape[0]],
                batch["label_ids"],
                batch["label_counts"],
                end_of_step=end_of_step,
                texts_in_step=batch["rows_in_step"],
                # The engine averages gradients over ranks and micro-batches; the head's loss is a sum.
                engine_divisor=float(self.ranks.size * self.batches.micro_batches),
                rank_sizes=batch["rank_sizes"],
            )
            clock.mark("head")
            self.encoder_step.keep(batch["input_ids"], batch["attention_mask"], loss)
            # At the end of a step the engine may wait for the device. A batch fetched then would come too late.
            following = self._fetch(batches)
            clock.mark("data")
            self.encoder_step.backward(loss)
        clock.mark("engine")  # the backward pass, and the update at the end of a step
        return loss.detach(), following

    def _meta_weight(self, step: int) -> float:
        return 0.0 if self.meta_branch is None else self.meta_branch.weight(step)

    def _record(self, loss: Tensor, applied: bool) -> None:
        record = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "lr": self.head.lr,
            "encoder_lr": self.optimizer.param_groups[0]["lr"],
            "encoder_skipped": not applied,
            "meta_weight": self._meta_weight(self.state.step - 1),
        }
        self.records.add(record, loss)
        if self.records.due:
            self.read_losses()

    def read_losses(self) -> None:
        """Read the losses from the device and call the hooks. Raises UserError if too many in a row are not finite."""
        if records := self.records.read(self.head.skipped, self.encoder_step.captured_bytes):
            self.dispatch("on_losses", records)
            self.records.require_finite(records)

    # Around the loop ------------------------------------------------------------------------------------------------

    def dispatch(self, event: str, *arguments: Any) -> None:
        """Call a method of every hook, in order."""
        for hook in self.hooks:
            getattr(hook, event)(self, *arguments)

    def evaluate(self, split: str) -> dict[str, float]:
        """Evaluate on "test", or on as many texts of "train". Call it between two steps, on every rank."""
        self.encoder.eval()
        self.head.eval()
        self.metrics[split] = evaluate(
            self.encoder,
            self.head,
            self._announced(self.batches.evaluate(split)),
            self.new_metrics(),
            self.device,
            progress=self.accelerator.is_main_process,
            timed=lambda seconds: self.dispatch("on_timed", "evaluation", {"split": split} | seconds),
        )
        self.encoder.train()
        self.head.train()
        return self.metrics[split]

    def _announced(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self.dispatch("on_evaluation_batch")
            yield batch
        self.dispatch("on_evaluation_batch")

    def heads(self) -> list[tuple[str, FixedFanInHead]]:
        """Return the parts of all heads, each with a prefix for the names of its tensors."""
        return self.head.parts() + ([] if self.meta_branch is None else [("meta.", self.meta_branch.head)])

    def head_tensors(self) -> list[tuple[str, Tensor]]:
        """Return (name, tensor) of the weights and optimizer state of this rank's labels."""
        return [(f"head {p}{name}", value) for p, head in self.heads() for name, value in head.state_dict().items()]

    def save(self, folder: Path) -> None:
        """Write the model for evaluation and prediction. Call it between two steps, on every rank.

        Raises UserError, on all ranks, if weights are not finite.
        """
        state = self.accelerator.get_state_dict(self.encoder)  # under ZeRO 3 on the main rank alone
        require_finite((*(state or {}).items(), *self.head_tensors()), self.ranks, self.device, self.state.step, folder)
        save_model(
            folder,
            encoder=self.encoder_module,
            encoder_state=state,
            tokenizer=self.tokenizer,
            head=self.head,
            labels=self.corpus.labels,
            max_len=self.config.data.max_len,
            step=self.state.step,
            config_yaml=portable_yaml(self.config),
            card=model_card(self.config, self.metrics, self.corpus.num_labels, self.corpus.texts, self.state.step),
        )
        self.dispatch("on_save", folder)

    def close(self) -> None:
        """Leave the process group. The trainer cannot be used afterwards."""
        del self.encoder, self.optimizer, self.encoder_step
        leave(self.accelerator)
