"""What a training and the label clusters build from a configuration alike: the engine and the encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xmc_trainer.config import Config
from xmc_trainer.encoder.compiling import layer_lists
from xmc_trainer.encoder.flat import FlatEncoder
from xmc_trainer.encoder.text_encoder import (
    TextEncoder,
    check_padding_is_hidden,
    check_tokens_fit,
    load_backbone,
    load_state_dict_file,
    load_tokenizer,
)
from xmc_trainer.engine.accelerator import build_accelerator, whole_weights, zero_stage
from xmc_trainer.errors import UserError
from xmc_trainer.hooks.base import Hook
from xmc_trainer.hooks.checkpoint import CheckpointHook
from xmc_trainer.hooks.evaluate import BestModelHook, EarlyStopHook, EvaluateHook
from xmc_trainer.hooks.logging import JsonLogHook, ProgressHook, WandbHook
from xmc_trainer.hooks.rewire import RewireHook, SparsifyHook
from xmc_trainer.hooks.schedule import ScheduleHook

_ENCODER_OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),  # as the head's, and what is expected of it in the field
}


def accelerator_of(config: Config, deepspeed_config: str | None = None) -> Accelerator:
    """The Accelerator of this process; see `build_accelerator`, which raises UserError."""
    optimization, data = config.training.optimization, config.data
    accumulation = optimization.grad_accum_step if data.micro_batches == "auto" else int(data.micro_batches)
    return build_accelerator(
        device=config.environment.device,
        cuda_device_id=config.environment.cuda_device_id,
        mixed_precision=config.training.amp.mixed_precision,
        accumulation=accumulation,
        micro_batch=config.texts_a_step // accumulation,
        max_grad_norm=optimization.max_grad_norm,
        deepspeed_config=deepspeed_config,
        timeout=config.environment.timeout,
    )


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that a configuration names. Raises UserError where it is not to be had."""
    chosen = config.model.encoder
    # By default it is the encoder's own, and that is the setting which the user wrote.
    field = "encoder_model" if chosen.encoder_tokenizer == chosen.encoder_model else "encoder_tokenizer"
    return load_tokenizer(
        chosen.encoder_tokenizer,
        where=f"model.encoder.{field}={chosen.encoder_tokenizer}",
        trust_remote_code=chosen.trust_remote_code,
    )


def backbone_of(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """The backbone that a configuration names. Raises UserError where it is not to be had, or does not fit the tokenizer."""
    chosen = config.model.encoder
    backbone = load_backbone(
        chosen.encoder_model, for_cpu=device.type == "cpu", trust_remote_code=chosen.trust_remote_code
    )
    check_tokens_fit(
        backbone,
        tokenizer,
        config.data.max_len,
        tokenizer_is=f"model.encoder.encoder_tokenizer={chosen.encoder_tokenizer}",
        max_len_is=f"data.max_len={config.data.max_len}",
    )
    return backbone


def encoder_of(config: Config, backbone: PreTrainedModel) -> TextEncoder:
    """The encoder around `backbone`, with its first weights, on the CPU.

    Raises UserError where other settings contradict it.
    """
    chosen, penultimate, ffi = config.model.encoder, config.model.penultimate, config.model.ffi
    where = f"model.encoder.encoder_model={chosen.encoder_model}"
    if chosen.use_ngame_encoder_weights:
        load_state_dict_file(backbone, chosen.ngame_checkpoint, chosen.ngame_key_prefix)
    if chosen.encoder_ftr_dim not in (None, backbone.config.hidden_size):
        raise UserError(
            f"model.encoder.encoder_ftr_dim={chosen.encoder_ftr_dim}: the encoder's is {backbone.config.hidden_size}"
        )
    if chosen.feature_layers > backbone.config.num_hidden_layers:
        raise UserError(
            f"model.encoder.feature_layers={chosen.feature_layers}: the encoder has {backbone.config.num_hidden_layers}"
        )
    encoder = TextEncoder(
        backbone,
        pool_mode=chosen.pool_mode,
        feature_layers=chosen.feature_layers,
        embed_dropout=chosen.embed_dropout,
        penultimate_size=penultimate.penultimate_size if penultimate.use_penultimate_layer else None,
        penultimate_activation=penultimate.penultimate_activation,
    )
    with whole_weights(encoder):
        check_padding_is_hidden(encoder, config.data.max_len, where)
    if ffi.input_features not in (None, encoder.out_features):
        raise UserError(f"model.ffi.input_features={ffi.input_features}: there are {encoder.out_features}")
    config.check_fan_in(encoder.out_features)
    return encoder


def prepare_encoder(config: Config, accelerator: Accelerator, encoder: TextEncoder) -> tuple[Any, Any]:
    """(module, optimizer) of `accelerator.prepare`: only the encoder meets the engine; the head is its own."""
    optimization = config.training.optimization
    stage = zero_stage(accelerator)
    groups = encoder.parameter_groups(optimization.encoder_lr, optimization.penultimate_lr, optimization.wd_encoder)
    flat = None
    if stage == 3:
        # It gathers parameters when their module's turn comes, so that they stay apart; but a layer's all at once.
        from deepspeed.utils import set_z3_leaf_module

        for _, layers in layer_lists(encoder.backbone):
            for layer in layers:
                set_z3_leaf_module(layer, True)
    else:
        flat = FlatEncoder(encoder, groups)
    optimizer = _ENCODER_OPTIMIZERS[optimization.encoder_optimizer](
        flat.groups if flat is not None else groups,
        lr=optimization.encoder_lr,
        # torch's gradient scaler hands a fused optimizer its overflows, and then nobody can tell that a step was skipped.
        fused=stage is not None or config.training.amp.mixed_precision != "fp16",
    )
    module, optimizer = accelerator.prepare(flat if flat is not None else encoder, optimizer)
    if flat is not None:
        flat.attach()
    return module, optimizer


def in_precision_of(
    config: Config, forward: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """`forward` (input_ids, attention_mask) -> features on `device`, as `training.amp` says, with float32 out of it."""
    amp = config.training.amp
    autocast = torch.autocast(device.type, dtype=getattr(torch, amp.dtype), enabled=amp.enabled)

    def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with autocast:
            return forward(input_ids.to(device), attention_mask.to(device)).float()

    return encode


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
