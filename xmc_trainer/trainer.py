"""The trainer: builds everything from a configuration, then runs the loop. Read `train` first."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from xmc_trainer import resume, signals
from xmc_trainer.builders import accelerator_of, backbone_of, encoder_of, in_precision_of, prepare_encoder, tokenizer_of
from xmc_trainer.captured import CannotCapture
from xmc_trainer.checkpoint import head_parts, save_model
from xmc_trainer.clusters import LabelClusters
from xmc_trainer.compiling import compile_encoder, undo, warm_up
from xmc_trainer.config import Config, portable_yaml
from xmc_trainer.data import Corpus, MicroBatch, padded_width, plan_epoch, plan_eval, sample_rows
from xmc_trainer.encoder import TextEncoder
from xmc_trainer.engine import (
    leave,
    own_weights,
    set_accumulation,
    step_was_applied,
    whole_weights,
    zero_stage,
)
from xmc_trainer.errors import UserError, reason
from xmc_trainer.evaluation import corpus_of, evaluate, loader_of, metrics_of
from xmc_trainer.finite import require_finite
from xmc_trainer.head import (
    SGD,
    AdamW,
    FixedFanInHead,
    RowwiseRMSprop,
    SplitHead,
    feature_gradient,
    multi_head_step,
)
from xmc_trainer.head.losses import starting_bias
from xmc_trainer.hooks import Hook, default_hooks
from xmc_trainer.kernels.dispatch import select_backend
from xmc_trainer.label_features import LabelSums, encode_training_texts, whitener
from xmc_trainer.meta_branch import MetaBranch
from xmc_trainer.micro_batches import bytes_a_text, fewest_parts, free_bytes
from xmc_trainer.parallel import Ranks
from xmc_trainer.run_folder import MODEL, RunFolder
from xmc_trainer.step_clock import StepClock

# Losses stay on the device until this many seconds have passed: reading one waits for the device.
_SECONDS_BETWEEN_LOSSES = 1.0
# The lengths of batches for which the encoder's steps are CUDA graphs: each takes some MiB and a quarter of a second.
_MOST_GRAPHS = 32
# From its first 2^12 the loss scale of fp16 has halved to nothing long before.
_FP16_STEPS_TO_RECOVER = 50


class _SignalInEvaluation(Exception):
    pass


@dataclass
class TrainerState:
    """Where training is."""

    total_steps: int
    steps_per_epoch: int
    epoch: int = 0  # from 0
    step: int = 0  # optimizer steps made, over all epochs; fp16's skipped ones count
    stopped: bool = False  # a hook asks for the end of the training after this epoch

    @property
    def finished(self) -> bool:
        return self.stopped or self.step >= self.total_steps


class Trainer:
    """One training run on this process's share of the work.

    Args:
        config: of `load_config`.
        deepspeed_config: DeepSpeed JSON file, if the `deepspeed` launcher started this process.
        hooks: run after the ones that the configuration asks for.
    """

    def __init__(self, config: Config, *, deepspeed_config: str | None = None, hooks: list[Hook] | None = None) -> None:
        optimization, data = config.training.optimization, config.data
        self.accelerator = accelerator_of(config, deepspeed_config)
        self.ranks, self.device = Ranks(config.environment.timeout), self.accelerator.device
        self._folder = RunFolder(config, self.ranks)
        self.config, self.run_folder, self._checkpoint = self._folder.config, self._folder.path, self._folder.checkpoint
        # What can be refused is refused before anything is loaded.
        try:
            select_backend(config.model.ffi.backend, self.device)
        except ValueError as error:
            raise UserError(f"model.ffi.{error}") from None
        plugin = self.accelerator.state.deepspeed_plugin
        if config.model.encoder.use_torch_compile == "true" and plugin is not None and plugin.zero_stage == 3:
            raise UserError(
                "model.encoder.use_torch_compile=true: not under ZeRO stage 3, where parameters come and go while compiled code "
                "expects them in their place; take stage 2, or set it to false"
            )
        self._require_data()
        if config.needs_clusters:
            LabelClusters.require(config.cluster_file)
        set_seed(config.training.seed)
        self.tokenizer, self.encoder_module = self._load_encoder()
        self.corpus = self._load_corpus()
        cluster_of = self._order_labels()
        self.train_rows = sample_rows(len(self.corpus.train), data.train_sample, config.training.seed)
        self._train_lengths = self.corpus.lengths("train")
        self._test_lengths = self.corpus.lengths("test")
        self.train_texts = len(self._train_lengths) if self.train_rows is None else len(self.train_rows)
        most = math.ceil(self.train_texts / data.batch_size)
        if optimization.grad_accum_step > most:
            raise UserError(
                f"training.optimization.grad_accum_step={optimization.grad_accum_step}: the {self.train_texts} training texts fill "
                f"only {most} batches of data.batch_size={data.batch_size}; set it to {most} at most"
            )
        steps_per_epoch = math.ceil(self.train_texts / config.texts_a_step)
        total_steps = min(optimization.epochs * steps_per_epoch, optimization.max_steps or math.inf)
        self.state = TrainerState(int(total_steps), steps_per_epoch)
        dense_steps = optimization.dense_epochs * steps_per_epoch
        if config.model.ffi.use_sparse_layer and dense_steps >= total_steps:
            raise UserError(
                f"training.optimization.max_steps={optimization.max_steps}: ends no later than the "
                f"{optimization.dense_epochs} dense epochs of {steps_per_epoch} steps, and the head would never be trained "
                "sparse; raise it or lower dense_epochs"
            )

        self.head = self._build_head(self.encoder_module.out_features)
        if self._checkpoint is None:
            self._start_head_from_texts()
        self.micro_batches = self._cut_steps()
        self.encoder, self.optimizer = prepare_encoder(config, self.accelerator, self.encoder_module)
        self.compiled = self._compile_encoder()
        if self.compiled and self.device.type == "cuda":
            self._capture_encoder()
        self.meta_branch = None
        if config.model.auxiliary.use_meta_branch:
            self.meta_branch = self._build_meta_branch(cluster_of)
        self.hooks = default_hooks(config) + list(hooks or [])
        self.metrics: dict[str, dict[str, float]] = {}  # the last evaluation of each split
        self._losses: list[tuple[dict[str, Any], Tensor]] = []  # steps whose loss is still on the device
        self._losses_read = time.monotonic()
        self.clock = StepClock(self.device)
        self._of_step: list[tuple[Tensor, Tensor, Tensor]] = []  # its micro-batches and feature gradients, in float16
        self.not_finite = 0  # latest steps in a row whose loss is not
        if self._checkpoint is not None:
            resume.restore(self._checkpoint, self)

    # The loop -------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Train, evaluate and save to <run folder>/model. Returns the metrics on the test set.

        A signal, where the program listens to them (see `xmc_trainer.signals`), ends this by `Interrupted`, on all ranks.
        """
        with signals.deferred():
            with self._folder.at_work():
                self._saved = self.state.step, self.state.epoch
                self.dispatch("on_train_start")
                while True:
                    self._train_epoch()
                    self._flush_losses()
                    self.dispatch("on_epoch_end")
                    self.state.epoch += 1
                    if self.state.finished:
                        break
                self.save(self.run_folder / MODEL)
                self.dispatch("on_train_end")
            if number := self.ranks.largest(lambda: [signals.pending()])()[0]:
                raise signals.Interrupted(number, f"after the training; the model is in {self.run_folder / MODEL}")
        return self.metrics["test"]

    def stop(self, number: int) -> NoReturn:
        """End the training for a signal, between two steps, after a checkpoint; every rank must call."""
        training, (step, epoch) = self.config.training, (self.state.step, self.state.epoch)
        keeps = training.checkpoint_interval or training.checkpoint_minutes
        if keeps and self._saved != (step, epoch):
            self.save_checkpoint()
        self.dispatch("on_interrupt")
        self.close()
        if step == 0:
            said = "before the first step"
        elif keeps:
            said = f"after step {step:,}, with a checkpoint in {self.run_folder}; the same command goes on with training.resume=true"
        else:
            said = f"after step {step:,}, without a checkpoint (training.checkpoint_interval=0, training.checkpoint_minutes=0)"
        raise signals.Interrupted(number, said)

    def _train_epoch(self) -> None:
        self.encoder.train()
        self.head.train()
        steps = self._plan(self.state.epoch)
        made = self.state.step - self.state.epoch * self.state.steps_per_epoch  # of this epoch, before a checkpoint
        steps = steps[made : made + self.state.total_steps - self.state.step]
        batches = iter(
            self._loader(
                "train", [micro for step in steps for micro in step], self.config.texts_a_step // self.micro_batches
            )
        )
        self._fetch(batches)
        for _ in steps:
            self.dispatch("on_step_begin")
            self._seed_draws()
            self._of_step = []
            loss = torch.zeros((), device=self.device)
            for micro in range(self.micro_batches):
                loss += self._micro_step(batches, end_of_step=micro == self.micro_batches - 1)
            applied = step_was_applied(self.accelerator, self.encoder, self.optimizer)
            if not applied and self._of_step:
                applied = self._repeat_encoder_step()
            self.state.step += 1
            self._record_loss(loss, applied)
            if applied:
                self.dispatch("on_step_end")

    def _plan(self, epoch: int) -> list[list[MicroBatch]]:
        """The steps of an epoch."""
        return plan_epoch(
            self._train_lengths,
            batch_size=self.config.texts_a_step // self.micro_batches,
            accumulation=self.micro_batches,
            world_size=self.ranks.size,
            seed=self.config.training.seed,
            epoch=epoch,
            length_grouped=self.config.data.length_grouped,
            rows=self.train_rows,
        )

    def _seed_draws(self) -> None:
        """Ranks drop out different features; a step's draws are the same whether or not the training was interrupted before."""
        key = f"{self.config.training.seed} {self.state.step} {self.ranks.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))

    def _fetch(self, batches: Iterator[dict[str, Any]]) -> None:
        """Have the next batch on the device, if there is one."""
        self._next = next(batches, None)
        if self._next is not None:
            self._next |= self._to_device(self._next)

    def _micro_step(self, batches: Iterator[dict[str, Any]], end_of_step: bool) -> Tensor:
        """Forward and backward of one micro-batch, at the end of the step both updates. Returns its loss, detached."""
        tensors = self._next
        self.clock.mark(None)
        meta_weight = self.meta_branch.weight(self.state.step) if self.meta_branch is not None else 0.0
        with self.accelerator.accumulate(self.encoder):
            features = self.encoder(tensors["input_ids"], tensors["attention_mask"])
            self.clock.mark("forward")
            terms = self.head.terms(1.0 - meta_weight)
            if meta_weight > 0:
                terms += self.meta_branch.terms(meta_weight)
            loss = multi_head_step(
                terms,
                features[: tensors["label_counts"].shape[0]],
                tensors["label_ids"],
                tensors["label_counts"],
                end_of_step=end_of_step,
                texts_in_step=tensors["rows_in_step"],
                # The engine averages gradients over ranks and micro-batches; the head's loss is meant as it stands.
                engine_divisor=float(self.ranks.size * self.micro_batches),
                rank_sizes=tensors["rank_sizes"],
            )
            self.clock.mark("head")
            if self.config.training.amp.mixed_precision == "fp16":
                self._of_step.append((tensors["input_ids"], tensors["attention_mask"], feature_gradient(loss)))
            # Now, for at a step's end the engine may wait for the device, which then waits for the next step's launches.
            self._fetch(batches)
            self.clock.mark("data")
            self._encoder_step(loss)
        self.clock.mark("engine")  # which runs the backward pass, and at the end of a step the update
        return loss.detach()

    def _encoder_step(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch, and at the end of the step the encoder's update."""
        most = self.config.training.optimization.max_grad_norm
        self.accelerator.backward(loss)
        if most and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.encoder.parameters(), most)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _repeat_encoder_step(self) -> bool:
        """The encoder's part of a step that overflowed float16, with the loss scale that was lowered since, until it fits.

        The head's part is done: encoder and head make the same steps. Where a feature was not finite, neither does (false).
        """
        for _ in range(_FP16_STEPS_TO_RECOVER):
            if self.ranks.largest(lambda: [int(not all(g.isfinite().all() for *_, g in self._of_step))])()[0]:
                return False
            self._seed_draws()
            for input_ids, attention_mask, grad in self._of_step:
                with self.accelerator.accumulate(self.encoder):
                    features = self.encoder(input_ids, attention_mask)[: grad.shape[0]]
                    self._encoder_step((features.float() * grad).sum())
            if step_was_applied(self.accelerator, self.encoder, self.optimizer):
                return True
        raise UserError(
            f"the encoder's gradient overflows float16 at step {self.state.step + 1}, whatever the loss scale: set training.amp.dtype="
            "bfloat16, or fp16.loss_scale=0 in the DeepSpeed JSON"
        )

    # Losses ---------------------------------------------------------------------------------------------------------

    def _record_loss(self, loss: Tensor, applied: bool) -> None:
        record = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "lr": self.head.lr,
            "encoder_lr": self.optimizer.param_groups[0]["lr"],
            "encoder_skipped": not applied,
            "meta_weight": self.meta_branch.weight(self.state.step - 1) if self.meta_branch is not None else 0.0,
        }
        self._losses.append((record, loss))
        if time.monotonic() - self._losses_read >= _SECONDS_BETWEEN_LOSSES:
            self._flush_losses()

    def _flush_losses(self) -> None:
        if not self._losses:
            return
        values = torch.stack([loss for _, loss in self._losses]).tolist()
        records = [record | {"loss": value} for (record, _), value in zip(self._losses, values)]
        self._losses, self._losses_read = [], time.monotonic()
        records[-1]["head_skipped"] = int(self.head.skipped)
        records[-1] |= self._speed(len(records))
        self.dispatch("on_losses", records)
        # fp16's features may overflow now and then: encoder and head skip such a step.
        allowed = _FP16_STEPS_TO_RECOVER if self.config.training.amp.mixed_precision == "fp16" else 0
        for record in records:
            self.not_finite = 0 if math.isfinite(record["loss"]) else self.not_finite + 1
            if self.not_finite > allowed:
                raise UserError(
                    f"the loss is not finite at step {record['step']}: lower training.optimization.encoder_lr or lr, or "
                    "set training.optimization.max_grad_norm=1.0"
                )

    def _speed(self, steps: int) -> dict[str, float]:
        """Of the last `steps`, all whole but an epoch's last one: rate, the parts of a step, the GPU's memory in use at most."""
        parts = self.clock.read()
        ms = sum(parts.values())
        speed = {
            "texts_per_s": 1000 * steps * self.config.texts_a_step / ms,
            "encoder_ms": (parts["forward"] + parts["engine"]) / steps,
            "head_ms": parts["head"] / steps,
            "waiting": parts["data"] / ms,
        }
        if self.device.type == "cuda":
            graphs = getattr(self.accelerator.unwrap_model(self.encoder), "captured_bytes", 0)
            speed["gib"] = (torch.cuda.max_memory_allocated(self.device) + graphs) / 2**30
        return {name: round(value, 4) for name, value in speed.items()}

    def close(self) -> None:
        """Leave the process group; this trainer is of no more use."""
        del self.encoder, self.optimizer
        leave(self.accelerator)

    # Around the loop ------------------------------------------------------------------------------------------------

    def dispatch(self, event: str, *arguments: Any) -> None:
        """Call a method of every hook, in order."""
        for hook in self.hooks:
            getattr(hook, event)(self, *arguments)

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics on "test", or on "train" (as many training texts as there are test texts); between two steps.

        A signal ends it, and the training; one that goes on repeats the end of the epoch.
        """
        self.encoder.eval()
        self.head.eval()
        lengths, rows = (
            (self._test_lengths, None) if split == "test" else (self._train_lengths, self._train_eval_rows())
        )
        plan = plan_eval(lengths, batch_size=self.config.data.test_batch_size, world_size=self.ranks.size, rows=rows)
        try:
            metrics = evaluate(
                self.encoder,
                self.head,
                self._until_signal(self._loader(split, plan, self.config.data.test_batch_size)),
                metrics_of(self.config.training.evaluation, self.corpus),
                self.device,
                progress=self.accelerator.is_main_process,
            )
        except _SignalInEvaluation as end:  # raised through the progress bar, which it closes
            self.stop(*end.args)
        self.encoder.train()
        self.head.train()
        self.metrics[split] = metrics
        return metrics

    def _until_signal(self, batches: DataLoader) -> Iterator[dict[str, Any]]:
        for batch in batches:
            answer = self.ranks.largest(lambda: [signals.pending()])
            yield batch
            if number := answer()[0]:
                raise _SignalInEvaluation(number)

    def _train_eval_rows(self) -> Any:
        size = min(len(self._test_lengths), len(self._train_lengths))
        return sample_rows(len(self._train_lengths), size, self.config.training.seed)

    def save_checkpoint(self) -> None:
        """Write what an interrupted training goes on from; between two steps, every rank must call. See `xmc_trainer.resume`."""
        self._flush_losses()
        own = (*own_weights(self.encoder_module, self.ranks.rank), *self._head_tensors())
        require_finite(own, self.ranks, self.device, self.state.step, self.run_folder)
        resume.save(self)
        self._saved = self.state.step, self.state.epoch

    def save(self, folder: Any) -> None:
        """Write the model for evaluation and prediction; see `xmc_trainer.checkpoint`."""
        encoder_state = self.accelerator.get_state_dict(self.encoder)
        own = (*(encoder_state or {}).items(), *self._head_tensors())  # ZeRO 3 gives it to the main rank alone
        require_finite(own, self.ranks, self.device, self.state.step, folder)
        save_model(
            folder,
            encoder=self.encoder_module,
            encoder_state=encoder_state,
            tokenizer=self.tokenizer,
            head=self.head,
            labels=self.corpus.labels,
            max_len=self.config.data.max_len,
            step=self.state.step,
            config_yaml=portable_yaml(self.config),
        )
        self.dispatch("on_save", folder)

    def _head_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and optimizer state of this rank's labels."""
        heads = head_parts(self.head) + ([] if self.meta_branch is None else [("meta.", self.meta_branch.head)])
        return ((f"head {prefix}{name}", value) for prefix, head in heads for name, value in head.state_dict().items())

    # Building -------------------------------------------------------------------------------------------------------

    def _require_data(self) -> None:
        if self.config.data.hf_source is None and not self.config.data_folder.is_dir():
            raise UserError(f"{self.config.data_folder}: no such folder; set dataset_path or data.folder")

    def _load_encoder(self) -> tuple[Any, TextEncoder]:
        """(tokenizer, encoder)."""
        tokenizer = tokenizer_of(self.config)
        return tokenizer, encoder_of(self.config, backbone_of(self.config, tokenizer, self.device))

    def _load_corpus(self) -> Corpus:
        with self.ranks.one_a_machine_first():
            return corpus_of(self.config, self.tokenizer, progress=self.accelerator.is_local_main_process)

    def _order_labels(self) -> np.ndarray | None:
        """Put the corpus's labels in the head's order. Returns the cluster of each, if the run uses clusters."""
        ffi = self.config.model.ffi
        order, cluster_of = np.arange(self.corpus.num_labels), None
        if self.config.needs_clusters:
            clusters = LabelClusters.load(self.config.cluster_file, self.corpus.labels["id"])
            cluster_of = clusters.cluster_of
            if ffi.semantic_groups:
                order = clusters.order.astype(np.int64)
        if ffi.head_ratio:
            # The most frequent come first; the others stay in order.
            frequent = np.argsort(-self.corpus.label_counts(), kind="stable")[: self._frequent_labels()]
            order = np.concatenate([frequent, order[~np.isin(order, frequent)]])
        if ffi.semantic_groups or ffi.head_ratio:
            self.corpus = self.corpus.reordered(order)
        return None if cluster_of is None else cluster_of[order]

    def _frequent_labels(self) -> int:
        """How many labels `head_ratio` means."""
        return round(self.config.model.ffi.head_ratio * self.corpus.num_labels)

    def _cut_steps(self) -> int:
        """Into how many micro-batches; all ranks agree."""
        if self.config.data.micro_batches != "auto" or self.device.type != "cuda":
            return self.accelerator.gradient_accumulation_steps
        encoder = self.encoder_module.to(self.device).train()
        with whole_weights(encoder):
            forward = in_precision_of(self.config, encoder, self.device)
            text_bytes = bytes_a_text(forward, encoder, self._longest(), self.device)
        own = fewest_parts(self.config.texts_a_step, self.ranks.size, text_bytes, free_bytes(encoder, self.device))
        parts = max(self.ranks.sizes(own, self.device))
        set_accumulation(self.accelerator, parts)
        return parts

    def _longest(self) -> int:
        """Tokens of the longest batch, and no fewer than a compiler wants to see."""
        return max(16, int(self._train_lengths.max()))

    def _compile_encoder(self) -> bool:
        """Whether the encoder is compiled from here on."""
        wish = self.config.model.encoder.use_torch_compile
        if wish == "false" or (wish == "auto" and (self.device.type != "cuda" or zero_stage(self.accelerator) == 3)):
            return False
        rows, tokens = self._rows(self.config.texts_a_step // self.micro_batches), self._longest()
        compile_encoder(self.encoder_module, Path(self.config.data.cache_dir).expanduser() / "compiled")
        begin = time.monotonic()
        try:
            # The module itself: the engine must not see a backward pass that belongs to no step.
            with self.accelerator.autocast():
                warm_up(self.encoder_module, self.encoder_module, rows, tokens, self.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            undo(self.encoder_module)
            why = f"{type(error).__name__}: {reason(error)}"
            if wish == "true":
                raise UserError(
                    f"model.encoder.use_torch_compile=true: this encoder cannot be compiled ({why}); set it to auto or false"
                ) from error
            print(f"the encoder cannot be compiled and trains uncompiled, more slowly ({why})", flush=True)
            return False
        if self.accelerator.is_main_process:
            print(f"the encoder was compiled in {time.monotonic() - begin:.0f} s", flush=True)
        return True

    def _capture_encoder(self) -> None:
        """Let the passes of training become CUDA graphs, one for each length that comes often in the first epoch."""
        rows, longest = self._rows(self.config.texts_a_step // self.micro_batches), int(self._train_lengths.max())
        widths = Counter(
            padded_width(int(self._train_lengths[own].max()), longest)
            for step in self._plan(epoch=0)
            for own in (micro.rows[self.ranks.rank] for micro in step)
            if len(own)
        )
        often = sorted((width for width, _ in widths.most_common(_MOST_GRAPHS)), reverse=True)
        ids = [torch.ones(rows, width, dtype=torch.int64, device=self.device) for width in often]
        flat, begin = self.accelerator.unwrap_model(self.encoder), time.monotonic()
        flat.train()
        try:
            with self.accelerator.autocast():
                flat.capture([(each, each.clone()) for each in ids], used_up=self.micro_batches == 1)
        except CannotCapture as error:
            print(f"the encoder's steps are not recorded as CUDA graphs and take longer ({error})", flush=True)
            return
        if self.accelerator.is_main_process:
            print(f"its steps were recorded for {len(often)} lengths in {time.monotonic() - begin:.0f} s", flush=True)

    def _rows(self, texts: int) -> int:
        """The most of a batch's `texts` that one rank gets."""
        return -(-texts // self.ranks.size)

    def _build_head(self, features: int) -> FixedFanInHead | SplitHead:
        ffi, optimization = self.config.model.ffi, self.config.training.optimization
        labels = self.corpus.num_labels
        if ffi.output_features not in (None, labels):
            raise UserError(f"model.ffi.output_features={ffi.output_features}: there are {labels}")
        frequent = self._frequent_labels()
        if -(-(labels - frequent) // ffi.group_size) < self.ranks.size:
            raise UserError(f"model.ffi.group_size={ffi.group_size}: leaves fewer groups of labels than processes")
        if ffi.head_ratio and frequent < self.ranks.size:
            raise UserError(f"model.ffi.head_ratio={ffi.head_ratio}: means {frequent} labels, fewer than processes")
        counts = self.corpus.label_counts()
        adjustment = (
            torch.from_numpy(ffi.logit_adjustment * self.corpus.log_frequency()) if ffi.logit_adjustment else None
        )
        optimizers = {
            "sgd": SGD(optimization.xmc_momentum), "adamw": AdamW(), "adamw_8bit": AdamW(eight_bits=True),
            "rowwise_rmsprop": RowwiseRMSprop(),
        }  # fmt: skip

        def part(fan_in: int | None, group_size: int, labels: slice, **more: Any) -> FixedFanInHead:
            return FixedFanInHead(
                features,
                len(counts[labels]),
                fan_in=fan_in,
                group_size=group_size,
                first_bias=self._first_bias(counts[labels]),
                zero_weights=ffi.weight_init == "zero",
                logit_shift=None if adjustment is None else adjustment[labels],
                optimizer=optimizers[optimization.xmc_optimizer],
                lr=optimization.lr,
                weight_dtype=getattr(torch, ffi.weight_dtype),
                growth_batches=ffi.growth_batches if ffi.growth_mode == "gradient" else 0,
                **self._head_arguments() | more,
            )

        fan_in = ffi.fan_in if ffi.use_sparse_layer and not optimization.dense_epochs else None
        if not ffi.head_ratio:
            return part(fan_in, ffi.group_size, slice(None))
        # The two number their labels from 0 alike: with another seed they do not draw the same numbers.
        first = part(ffi.head_fan_in, 1, slice(frequent), seed=(self.config.training.seed + 1) % (1 << 32))
        return SplitHead(first, part(fan_in, ffi.group_size, slice(frequent, None)))

    def _start_head_from_texts(self) -> None:
        """The first index and weights of the head, as far as the training texts decide them."""
        ffi = self.config.model.ffi
        if not ffi.index_from_texts and ffi.weight_init != "centroid":
            return
        encoder = self.encoder_module.to(self.device).eval()
        with tempfile.TemporaryDirectory(prefix="xmc_trainer.") as folder:
            with whole_weights(encoder):
                features = encode_training_texts(
                    in_precision_of(self.config, encoder, self.device),
                    self.corpus,
                    Path(folder) / "texts.npy",
                    width=encoder.out_features,
                    batch_size=self.config.data.test_batch_size,
                    pad_token_id=self.tokenizer.pad_token_id,
                    workers=self.config.data.num_workers,
                    device=self.device,
                    rows=self.train_rows,
                    ranks=self.ranks,
                    progress=self.accelerator.is_main_process,
                )
            of_labels = LabelSums(features, self.corpus.train_labels(), self.corpus.num_labels, self.train_rows)
            mean_d, deviation_d = (torch.from_numpy(x).to(self.device) for x in of_labels.moments())

            whitener_dd = None
            if ffi.index_from_texts and ffi.index_init == "discriminant":
                shrunk = whitener(of_labels.correlations(), ffi.discriminant_ridge)
                whitener_dd = torch.from_numpy(shrunk).to(self.device)

            def texts_of(labels: range) -> tuple[Tensor, Tensor]:
                sums, counts = (torch.from_numpy(x).to(self.device) for x in of_labels.sums(labels))
                inverse = torch.where(deviation_d > 0, 1 / deviation_d, 0.0)
                return (sums - counts[:, None] * mean_d) * inverse, counts.to(torch.int64)

            self.head.start_from_texts(
                texts_of,
                index=ffi.index_from_texts,
                whitener_dd=whitener_dd,
                centroid_scale=ffi.centroid_scale if ffi.weight_init == "centroid" else 0.0,
                mean_d=mean_d,
                deviation_d=deviation_d,
            )
        encoder.train()

    def _build_meta_branch(self, cluster_of: np.ndarray) -> MetaBranch:
        auxiliary, optimization = self.config.model.auxiliary, self.config.training.optimization
        clusters = int(cluster_of.max()) + 1
        if clusters < self.ranks.size:
            raise UserError(f"{self.config.cluster_file}: has fewer clusters ({clusters}) than there are processes")
        labels = self.corpus.train_labels()
        pairs = (
            np.repeat(np.arange(len(labels.offsets) - 1) * clusters, np.diff(labels.offsets)) + cluster_of[labels.ids]
        )
        return MetaBranch.build(
            self.encoder_module.out_features,
            cluster_of,
            scaling=auxiliary.auxloss_scaling,
            last_step=auxiliary.meta_cutoff_epoch * self.state.steps_per_epoch,
            first_bias=self._first_bias(np.bincount(np.unique(pairs) % clusters, minlength=clusters)),
            lr=optimization.meta_lr,
            **self._head_arguments(),
        )

    def _first_bias(self, counts: np.ndarray) -> Tensor:
        """float32, for each output by how many texts it is a positive of (`counts`)."""
        loss, init = self.config.training.optimization.loss_fn, self.config.model.ffi.bias_init
        return starting_bias(loss, init, torch.from_numpy(counts), self.corpus.texts)

    def _head_arguments(self) -> dict[str, Any]:
        """What the labels' head and the meta branch's have in common."""
        ffi, optimization = self.config.model.ffi, self.config.training.optimization
        return {
            "loss": optimization.loss_fn,
            "text_reduction": optimization.text_reduction,
            "weight_decay": optimization.wd,
            "product_dtype": torch.bfloat16 if self.config.training.amp.enabled else torch.float32,
            "seed": self.config.training.seed,
            "tile_labels": ffi.tile_labels,
            "backend": ffi.backend,
            "ranks": self.ranks,
            "device": self.device,
        }

    def _loader(self, split: str, plan: list[MicroBatch], texts: int) -> DataLoader:
        """This rank's batches of a plan, of at most `texts` over all ranks."""
        return loader_of(
            self.corpus,
            split,
            plan,
            rank=self.ranks.rank,
            pad_token_id=self.tokenizer.pad_token_id,
            workers=self.config.data.num_workers,
            device=self.device,
            # Code is compiled for a number of rows.
            least_rows=self._rows(texts) if self.compiled else 1,
        )

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
