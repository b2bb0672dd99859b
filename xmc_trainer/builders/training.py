"""Build a training from a configuration, ready to start or to resume from its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from xmc_trainer.builders.data import corpus_of, metrics_of, order_labels, train_rows_of
from xmc_trainer.builders.encoder import (
    backbone_of,
    capture_passes,
    compile_as_configured,
    encoder_of,
    longest_batch,
    prepare_encoder,
    refuse_compilation,
    tokenizer_of,
)
from xmc_trainer.builders.engine import accelerator_of, micro_batches_of
from xmc_trainer.builders.head import head_of, meta_branch_of, require_backend, start_head_from_texts
from xmc_trainer.builders.hooks import default_hooks, require_tracker
from xmc_trainer.builders.inputs import require_clusters, require_data, require_encoder
from xmc_trainer.builders.recipe import require_applied
from xmc_trainer.checkpoint import resume
from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data import Batches, Corpus
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.encoder_step import EncoderStep
from xmc_trainer.errors import UserError, naming
from xmc_trainer.hooks.base import Hook
from xmc_trainer.parallel import Ranks
from xmc_trainer.run_folder import RunFolder
from xmc_trainer.step_clock import StartClock
from xmc_trainer.trainer import Trainer, TrainerState


class Inputs(NamedTuple):
    """The parts of a training that are read from files."""

    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    corpus: Corpus


def load_inputs(config: Config, accelerator: Accelerator, ranks: Ranks) -> Inputs:
    """Load tokenizer, encoder and data of a configuration. Raises UserError if they cannot be read."""
    require_data(config)
    require_clusters(config)
    require_encoder(config)
    require_tracker(config)
    tokenizer = tokenizer_of(config)
    encoder = encoder_of(config, backbone_of(config, tokenizer, accelerator.device))
    with ranks.one_a_machine_first():
        return Inputs(tokenizer, encoder, corpus_of(config, tokenizer, progress=accelerator.is_local_main_process))


def build_trainer(
    config: Config,
    *,
    deepspeed_config: str | None = None,
    hooks: list[Hook] | None = None,
    load: Callable[[Config, Accelerator, Ranks], Inputs] = load_inputs,
) -> Trainer:
    """Build this process's part of a training.

    With `training.resume` set it resumes from the checkpoint in the run's folder, if there is one.

    Args:
        config: as `load_config` returns it.
        deepspeed_config: DeepSpeed JSON file, if the `deepspeed` launcher started this process.
        hooks: run after the hooks that the configuration asks for.
        load: loads tokenizer, encoder and data; a benchmark passes a function that generates them.
    Raises UserError if settings, files and machine do not fit each other.
    """
    require_applied(config)
    clock = StartClock()
    accelerator = accelerator_of(config, deepspeed_config)
    ranks, device = Ranks(config.environment.timeout), accelerator.device
    folder = RunFolder(config, ranks)
    config = folder.config
    # Refuse invalid settings before anything is loaded.
    require_backend(config, device)
    refuse_compilation(config, accelerator)
    set_seed(config.training.seed)
    clock.mark("process group")
    tokenizer, encoder, corpus = load(config, accelerator, ranks)
    clock.mark("encoder and data")
    folder.split_file = corpus.split_file
    corpus, cluster_of = order_labels(config, corpus)
    rows = train_rows_of(config, corpus)
    state = state_of(config, len(corpus.train) if rows is None else len(rows))

    head = head_of(config, encoder.out_features, corpus, ranks, device)
    if folder.checkpoint is None:
        progress = accelerator.is_main_process
        start_head_from_texts(config, head, encoder, tokenizer, corpus, rows, device, progress)
    clock.mark("head")
    micro_batches = micro_batches_of(config, accelerator, encoder, corpus, ranks, device)
    module, optimizer = prepare_encoder(config, accelerator, encoder)
    clock.mark("engine")
    texts = config.texts_a_step // micro_batches
    compiled = compile_as_configured(config, accelerator, encoder, -(-texts // ranks.size), longest_batch(corpus))
    clock.mark("compiling")
    batches = Batches(
        corpus=corpus,
        rank=ranks.rank,
        world_size=ranks.size,
        pad_token_id=tokenizer.pad_token_id,
        workers=config.data.num_workers,
        device=device,
        seed=config.training.seed,
        train_rows=rows,
        texts_a_step=config.texts_a_step,
        micro_batches=micro_batches,
        length_grouped=config.data.length_grouped,
        eval_texts=config.data.test_batch_size,
        fixed_rows=compiled,
    )
    if compiled and device.type == "cuda":
        capture_passes(accelerator, accelerator.unwrap_model(module), batches)
    clock.mark("CUDA graphs")
    meta_branch = None
    if config.model.auxiliary.use_meta_branch:
        assert cluster_of is not None  # `Config.needs_clusters`
        features, steps_per_epoch = encoder.out_features, state.steps_per_epoch
        meta_branch = meta_branch_of(config, features, corpus, cluster_of, steps_per_epoch, ranks, device)
    encoder_step = EncoderStep(
        accelerator,
        module,
        optimizer,
        ranks,
        seed=config.training.seed,
        max_grad_norm=config.training.optimization.max_grad_norm,
        fp16=config.training.amp.mixed_precision == "fp16",
    )
    trainer = Trainer(
        config=config,
        folder=folder,
        accelerator=accelerator,
        ranks=ranks,
        tokenizer=tokenizer,
        corpus=corpus,
        batches=batches,
        encoder_module=encoder,
        encoder=module,
        optimizer=optimizer,
        encoder_step=encoder_step,
        compiled=compiled,
        head=head,
        meta_branch=meta_branch,
        new_metrics=lambda: metrics_of(config, corpus),
        hooks=[*default_hooks(config), *(hooks or [])],
        state=state,
        start_seconds=clock.parts,
    )
    clock.mark("rest")
    if folder.checkpoint is not None:
        with naming(SETTINGS):
            resume.restore(folder.checkpoint, trainer)
        clock.mark("checkpoint")
    return trainer


def state_of(config: Config, texts: int) -> TrainerState:
    """Build the initial state of a training on `texts` texts. Raises UserError if it would end before the head is sparse."""
    optimization = config.training.optimization
    steps_per_epoch = math.ceil(texts / config.texts_a_step)
    total_steps = int(min(optimization.epochs * steps_per_epoch, optimization.max_steps or math.inf))
    if config.model.ffi.use_sparse_layer and optimization.dense_epochs * steps_per_epoch >= total_steps:
        raise UserError(
            f"training.optimization.max_steps={optimization.max_steps}: ends within the "
            f"{optimization.dense_epochs} dense epochs of {steps_per_epoch} steps, so the head would never be sparse; raise it, or "
            "lower training.optimization.dense_epochs"
        )
    return TrainerState(total_steps, steps_per_epoch)
