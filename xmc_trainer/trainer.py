"""The trainer: builds everything from a configuration, then runs the loop. Read `train` first."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from xmc_trainer import resume
from xmc_trainer.builders import accelerator_of, encoder_of, in_precision_of
from xmc_trainer.checkpoint import save_model
from xmc_trainer.clusters import LabelClusters
from xmc_trainer.config import Config, to_yaml
from xmc_trainer.data import Corpus, MicroBatch, plan_epoch, plan_eval, sample_rows
from xmc_trainer.encoder import load_tokenizer
from xmc_trainer.engine import leave, step_was_applied, whole_weights
from xmc_trainer.errors import NothingToDo, UserError
from xmc_trainer.evaluation import corpus_of, evaluate, loader_of, metrics_of
from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RowwiseRMSprop, SplitHead, multi_head_step
from xmc_trainer.head.losses import best_constant
from xmc_trainer.hooks import Hook, default_hooks
from xmc_trainer.label_features import LabelSums, encode_training_texts, whitener
from xmc_trainer.meta_branch import MetaBranch
from xmc_trainer.kernels.dispatch import select_backend
from xmc_trainer.parallel import Ranks

_ENCODER_OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),  # as the head's, and what is expected of it in the field
}
# Losses stay on the device until this many seconds have passed: reading one waits for the device.
_SECONDS_BETWEEN_LOSSES = 1.0
# From its first 2^12 the loss scale of fp16 has halved to nothing long before.
_FP16_STEPS_TO_RECOVER = 50


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
        self.config = config
        self.accelerator = accelerator_of(config, deepspeed_config)
        self.ranks, self.device = Ranks(), self.accelerator.device
        self.run_folder = config.run_folder
        self._checkpoint = self._find_checkpoint()
        # What can be refused is refused before anything is loaded.
        try:
            select_backend(config.model.ffi.backend, self.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        plugin = self.accelerator.state.deepspeed_plugin
        if config.model.encoder.use_torch_compile and plugin is not None and plugin.zero_stage == 3:
            raise UserError(
                "model.encoder.use_torch_compile=true: not under ZeRO stage 3, where parameters come and go while compiled code "
                "expects them in their place; take stage 2, or set it to false"
            )
        if data.hf_source is None and not config.data_folder.is_dir():
            raise UserError(f"{config.data_folder}: no such folder; set dataset_path or data.folder")
        if config.needs_clusters:
            LabelClusters.require(config.cluster_file)
        set_seed(config.training.seed)
        self.tokenizer = load_tokenizer(config.model.encoder.encoder_tokenizer)
        self.encoder_module = encoder_of(config, self.device)
        self.corpus = self._load_corpus()
        cluster_of = self._order_labels()
        self.train_rows = sample_rows(len(self.corpus.train), data.train_sample, config.training.seed)
        self._train_lengths = self.corpus.lengths("train")
        self._test_lengths = self.corpus.lengths("test")
        self.train_texts = len(self._train_lengths) if self.train_rows is None else len(self.train_rows)
        steps_per_epoch = math.ceil(self.train_texts / (data.batch_size * optimization.grad_accum_step))
        total_steps = min(optimization.epochs * steps_per_epoch, optimization.max_steps or math.inf)
        self.state = TrainerState(int(total_steps), steps_per_epoch)
        dense_steps = optimization.dense_epochs * steps_per_epoch
        if config.model.ffi.use_sparse_layer and dense_steps >= total_steps:
            raise UserError(
                f"training.optimization.max_steps={optimization.max_steps}: ends no later than the "
                f"{optimization.dense_epochs} dense epochs of {steps_per_epoch} steps, and the head would never be trained "
                "sparse; raise it or lower dense_epochs"
            )

        if config.model.encoder.use_torch_compile:
            self._compile_backbone()
        self.head = self._build_head(self.encoder_module.out_features)
        if self._checkpoint is None:
            self._start_head_from_texts()
        optimizer = _ENCODER_OPTIMIZERS[optimization.encoder_optimizer](
            self.encoder_module.parameter_groups(
                optimization.encoder_lr, optimization.penultimate_lr, optimization.wd_encoder
            ),
            lr=optimization.encoder_lr,
            # A gradient scaler hands a fused optimizer its overflows, and then nobody can tell that a step was skipped.
            fused=config.training.amp.mixed_precision != "fp16",
        )
        # Only the encoder meets the engine; the head is its own.
        self.encoder, self.optimizer = self.accelerator.prepare(self.encoder_module, optimizer)
        self.meta_branch = None
        if config.model.auxiliary.use_meta_branch:
            self.meta_branch = self._build_meta_branch(cluster_of)
        self.hooks = default_hooks(config) + list(hooks or [])
        self.metrics: dict[str, dict[str, float]] = {}  # the last evaluation of each split
        self._losses: list[tuple[dict[str, Any], Tensor]] = []  # steps whose loss is still on the device
        self._losses_read = time.monotonic()
        self.not_finite = 0  # latest steps in a row whose loss is not
        if self._checkpoint is not None:
            self._checkpoint.restore(self)

    # The loop -------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Train, evaluate and save to <run folder>/model. Returns the metrics on the test set."""
        with self._own_run_folder():
            self.ranks.barrier()
            self.dispatch("on_train_start")
            while not self.state.finished:
                self._train_epoch()
                self._flush_losses()
                self.dispatch("on_epoch_end")
                self.state.epoch += 1
            self.save(self.run_folder / "model")
            self.dispatch("on_train_end")
            if self.accelerator.is_main_process:
                resume.remove(self.run_folder)
        return self.metrics["test"]

    def _train_epoch(self) -> None:
        self.encoder.train()
        self.head.train()
        optimization, data = self.config.training.optimization, self.config.data
        accumulation = optimization.grad_accum_step
        steps = plan_epoch(
            self._train_lengths,
            batch_size=data.batch_size,
            accumulation=accumulation,
            world_size=self.ranks.size,
            seed=self.config.training.seed,
            epoch=self.state.epoch,
            length_grouped=data.length_grouped,
            rows=self.train_rows,
        )
        made = self.state.step - self.state.epoch * self.state.steps_per_epoch  # of this epoch, before a checkpoint
        steps = steps[made : made + self.state.total_steps - self.state.step]
        batches = iter(self._loader("train", [micro for step in steps for micro in step]))
        for _ in steps:
            self.dispatch("on_step_begin")
            self._seed_draws()
            loss = torch.zeros((), device=self.device)
            for micro in range(accumulation):
                loss += self._micro_step(next(batches), end_of_step=micro == accumulation - 1)
            applied = step_was_applied(self.accelerator, self.encoder, self.optimizer)
            self.state.step += 1
            self._record_loss(loss, applied)
            if applied:
                self.dispatch("on_step_end")

    def _seed_draws(self) -> None:
        """Ranks drop out different features; a step's draws are the same whether or not the training was interrupted before."""
        key = f"{self.config.training.seed} {self.state.step} {self.ranks.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))

    def _micro_step(self, batch: dict[str, Any], end_of_step: bool) -> Tensor:
        """Forward and backward of one micro-batch, at the end of the step both updates. Returns its loss, detached."""
        optimization = self.config.training.optimization
        tensors = self._to_device(batch)
        meta_weight = self.meta_branch.weight(self.state.step) if self.meta_branch is not None else 0.0
        with self.accelerator.accumulate(self.encoder):
            features = self._encode(tensors["input_ids"], tensors["attention_mask"])
            parts = self.head.terms(1.0 - meta_weight)
            if meta_weight > 0:
                parts += self.meta_branch.terms(meta_weight)
            loss = multi_head_step(
                parts,
                features[: tensors["label_counts"].shape[0]],
                tensors["label_ids"],
                tensors["label_counts"],
                end_of_step=end_of_step,
                texts_in_step=batch["rows_in_step"],
                # The engine averages gradients over ranks and micro-batches; the head's loss is meant as it stands.
                engine_divisor=float(self.ranks.size * optimization.grad_accum_step),
                rank_sizes=batch["rank_sizes"],
            )
            self.accelerator.backward(loss)
            if optimization.max_grad_norm and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.encoder.parameters(), optimization.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.model.encoder.use_torch_compile:  # else this would import the compiler, which takes seconds
            torch.compiler.cudagraph_mark_step_begin()  # what a recorded graph gave before may be overwritten
        return self.encoder(input_ids, attention_mask)

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
        self.dispatch("on_losses", records)
        # fp16 may overflow now and then: its loss scale recovers, and the head skips such a step.
        allowed = _FP16_STEPS_TO_RECOVER if self.config.training.amp.mixed_precision == "fp16" else 0
        for record in records:
            self.not_finite = 0 if math.isfinite(record["loss"]) else self.not_finite + 1
            if self.not_finite > allowed:
                raise UserError(
                    f"the loss is not finite at step {record['step']}: lower training.optimization.encoder_lr or lr, or "
                    "set training.optimization.max_grad_norm=1.0"
                )

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
        """Metrics on "test", or on "train" (as many training texts as there are test texts)."""
        self.encoder.eval()
        self.head.eval()
        lengths, rows = (
            (self._test_lengths, None) if split == "test" else (self._train_lengths, self._train_eval_rows())
        )
        plan = plan_eval(lengths, batch_size=self.config.data.test_batch_size, world_size=self.ranks.size, rows=rows)
        metrics = evaluate(
            self._encode,
            self.head,
            self._loader(split, plan),
            metrics_of(self.config.training.evaluation, self.corpus),
            self.device,
            progress=self.accelerator.is_main_process,
        )
        self.encoder.train()
        self.head.train()
        self.metrics[split] = metrics
        self.dispatch("on_evaluate", split, metrics)
        return metrics

    def _train_eval_rows(self) -> Any:
        size = min(len(self._test_lengths), len(self._train_lengths))
        return sample_rows(len(self._train_lengths), size, self.config.training.seed)

    def save_checkpoint(self) -> None:
        """Write what an interrupted training goes on from; between two steps, every rank must call. See `xmc_trainer.resume`."""
        self._flush_losses()
        resume.save(self)

    def _find_checkpoint(self) -> resume.Checkpoint | None:
        """The one to go on from. UserError rather than a run that would undo what another has done."""
        folder, found = self.run_folder, resume.find(self.run_folder)
        if not self.config.training.resume:
            if found is not None:
                raise UserError(
                    f"{folder}: holds a run that was interrupted after step {found.step}; go on with training.resume=true, name "
                    f"another run by log_fname, or remove {found.folder}"
                )
            return None
        if found is not None:
            found.check_settings(self.config)
        elif (folder / "model" / "manifest.json").is_file() and not resume.differences(self.config, folder / "config.yaml"):
            raise NothingToDo(f"{folder}: this run is finished; training.resume=false would train it anew, in its place")
        return found

    @contextmanager
    def _own_run_folder(self) -> Iterator[None]:
        """Make the run's folder ready. UserError where another training is at work in it."""
        if not self.accelerator.is_main_process:
            yield
            return
        folder, there = self.run_folder, self.run_folder.exists()
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
            if self._checkpoint is None and self.config.training.resume:
                print(f"{folder}: no checkpoint to go on from; the training begins", flush=True)
            if self._checkpoint is None and there:
                print(f"{folder}: replaces an earlier run; name another by log_fname", flush=True)
                for name in ("model", self.config.training.checkpoint_file):
                    if (folder / name / "manifest.json").is_file():
                        shutil.rmtree(folder / name)  # or it would pass for this run's
            (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            yield

    def save(self, folder: Any) -> None:
        """Write the model for evaluation and prediction; see `xmc_trainer.checkpoint`."""
        save_model(
            folder,
            encoder=self.encoder_module,
            encoder_state=self.accelerator.get_state_dict(self.encoder),
            tokenizer=self.tokenizer,
            head=self.head,
            labels=self.corpus.labels,
            max_len=self.config.data.max_len,
            step=self.state.step,
            config_yaml=to_yaml(self.config),
        )
        self.dispatch("on_save", folder)

    # Building -------------------------------------------------------------------------------------------------------

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

    def _compile_backbone(self) -> None:
        # One compilation for all lengths. On a GPU each length is then recorded as a graph, for launches cost more than work;
        # but not if gradients of several micro-batches meet: a graph's next run overwrites what it gave before.
        recorded = self.device.type == "cuda" and self.config.training.optimization.grad_accum_step == 1
        self.encoder_module.backbone.compile(dynamic=True, mode="reduce-overhead" if recorded else None)

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
        adjustment = torch.from_numpy(ffi.logit_adjustment * self.corpus.log_frequency()) if ffi.logit_adjustment else None
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
        pairs = np.repeat(np.arange(len(labels.offsets) - 1) * clusters, np.diff(labels.offsets)) + cluster_of[labels.ids]
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
        init, outputs = self.config.model.ffi.bias_init, len(counts)
        if init == "zero":
            return torch.zeros(outputs)
        mean = counts.sum() / (self.corpus.texts * outputs)
        share = torch.full((outputs,), mean, dtype=torch.float64)
        if init == "frequency":
            # One more text, with an average set of labels: no share is 0 or 1.
            share = (torch.from_numpy(counts) + share) / (self.corpus.texts + 1)
        return best_constant(self.config.training.optimization.loss_fn, share).float()

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

    def _loader(self, split: str, plan: list[MicroBatch]) -> DataLoader:
        return loader_of(
            self.corpus,
            split,
            plan,
            rank=self.ranks.rank,
            pad_token_id=self.tokenizer.pad_token_id,
            workers=self.config.data.num_workers,
            device=self.device,
        )

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
