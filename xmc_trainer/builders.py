"""What a training and the label clusters build from a configuration alike: the engine and the encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xmc_trainer.config import Config
from xmc_trainer.encoder import (
    TextEncoder,
    check_padding_is_hidden,
    check_tokens_fit,
    load_backbone,
    load_state_dict_file,
    load_tokenizer,
)
from xmc_trainer.engine import build_accelerator, whole_weights
from xmc_trainer.errors import UserError


def accelerator_of(config: Config, deepspeed_config: str | None = None) -> Accelerator:
    """The Accelerator of this process; see `build_accelerator`, which raises UserError."""
    optimization = config.training.optimization
    return build_accelerator(
        device=config.environment.device,
        cuda_device_id=config.environment.cuda_device_id,
        mixed_precision=config.training.amp.mixed_precision,
        accumulation=optimization.grad_accum_step,
        micro_batch=config.data.batch_size,
        max_grad_norm=optimization.max_grad_norm,
        deepspeed_config=deepspeed_config,
        timeout=config.environment.timeout,
    )


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that a configuration names. Raises UserError where it is not to be had."""
    chosen = config.model.encoder
    return load_tokenizer(chosen.encoder_tokenizer, trust_remote_code=chosen.trust_remote_code)


def encoder_of(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> TextEncoder:
    """The encoder with its first weights, on the CPU; `device` is where it will run.

    Raises UserError where the model is not to be had, does not fit the tokenizer, or other settings contradict it.
    """
    chosen, penultimate, ffi = config.model.encoder, config.model.penultimate, config.model.ffi
    where = f"model.encoder.encoder_model={chosen.encoder_model}"
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
