"""The encoder that a configuration names: its tokenizer, backbone, optimizer and compiled code."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xmc_trainer.config import Config
from xmc_trainer.data import Batches, Corpus, padded_width
from xmc_trainer.encoder.captured import CannotCapture
from xmc_trainer.encoder.compiling import compile_encoder, layer_lists, undo, warm_up
from xmc_trainer.encoder.flat import FlatEncoder
from xmc_trainer.encoder.text_encoder import (
    TextEncoder,
    check_padding_is_hidden,
    check_tokens_fit,
    load_backbone,
    load_state_dict_file,
    load_tokenizer,
)
from xmc_trainer.engine.accelerator import whole_weights, zero_stage
from xmc_trainer.errors import UserError, reason

_ENCODER_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),  # with momentum, like the head's sgd
}
# Each graph takes a quarter of a second and some MiB.
_MOST_GRAPHS = 32


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that a configuration names. Raises UserError if it cannot be loaded."""
    chosen = config.model.encoder
    # By default it is the encoder's own: then the user wrote the encoder's setting.
    field = "encoder_model" if chosen.encoder_tokenizer == chosen.encoder_model else "encoder_tokenizer"
    return load_tokenizer(
        chosen.encoder_tokenizer,
        where=f"model.encoder.{field}={chosen.encoder_tokenizer}",
        trust_remote_code=chosen.trust_remote_code,
    )


def backbone_of(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """The backbone that a configuration names. Raises UserError if it cannot be loaded or does not fit the tokenizer."""
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
    """The encoder around `backbone`, with its initial weights, on the CPU. Raises UserError if settings contradict it."""
    chosen, penultimate, ffi = config.model.encoder, config.model.penultimate, config.model.ffi
    where = f"model.encoder.encoder_model={chosen.encoder_model}"
    if chosen.use_ngame_encoder_weights:
        assert chosen.ngame_checkpoint is not None  # the settings are refused without
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
    """(module, optimizer) of `accelerator.prepare`. Only the encoder meets the engine; the head trains itself."""
    optimization = config.training.optimization
    stage = zero_stage(accelerator)
    groups = encoder.parameter_groups(optimization.encoder_lr, optimization.penultimate_lr, optimization.wd_encoder)
    flat = None
    if stage == 3:
        # ZeRO 3 gathers parameters module by module. As a leaf module a layer is gathered at once.
        from deepspeed.utils import set_z3_leaf_module

        for _, layers in layer_lists(encoder.backbone):
            for layer in layers:
                set_z3_leaf_module(layer, True)
    else:
        flat = FlatEncoder(encoder, groups)
    optimizer = _ENCODER_OPTIMIZERS[optimization.encoder_optimizer](
        flat.groups if flat is not None else groups,
        lr=optimization.encoder_lr,
        # torch's gradient scaler leaves overflows to a fused optimizer, which does not tell that it skipped a step.
        fused=stage is not None or config.training.amp.mixed_precision != "fp16",
    )
    module, optimizer = accelerator.prepare(flat if flat is not None else encoder, optimizer)
    if flat is not None:
        flat.attach()
    return module, optimizer


def in_precision_of(
    config: Config, forward: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """(input_ids, attention_mask) -> float32 features on `device`: `forward` in the precision of `training.amp`."""
    amp = config.training.amp
    autocast = torch.autocast(device.type, dtype=getattr(torch, amp.dtype), enabled=amp.enabled)

    def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with autocast:
            return forward(input_ids.to(device), attention_mask.to(device)).float()

    return encode


def capture_passes(accelerator: Accelerator, module: FlatEncoder, batches: Batches) -> None:
    """Record the passes of training as CUDA graphs, one for each width of a batch that is frequent in the first epoch.

    Says so, and leaves the encoder as it is, where that is not possible.
    """
    lengths = batches.corpus.lengths("train")
    longest, rows = int(lengths.max()), -(-batches.texts_a_step // batches.micro_batches // batches.world_size)
    widths = Counter(
        padded_width(int(lengths[own].max()), longest)
        for step in batches.plan(epoch=0)
        for own in (micro.rows[batches.rank] for micro in step)
        if len(own)
    )
    frequent = sorted((width for width, _ in widths.most_common(_MOST_GRAPHS)), reverse=True)
    ids = [torch.ones(rows, width, dtype=torch.int64, device=batches.device) for width in frequent]
    begin = time.monotonic()
    module.train()
    try:
        with accelerator.autocast():
            module.capture([(each, each.clone()) for each in ids], used_up=batches.micro_batches == 1)
    except CannotCapture as error:
        print(f"the encoder's steps are not recorded as CUDA graphs and take longer ({error})", flush=True)
        return
    if accelerator.is_main_process:
        print(f"its steps were recorded for {len(frequent)} lengths in {time.monotonic() - begin:.0f} s", flush=True)


def longest_batch(corpus: Corpus) -> int:
    """Tokens of the longest batch, and at least 16, which a compiler needs for a varying size."""
    return max(16, int(corpus.lengths("train").max()))


def refuse_compilation(config: Config, accelerator: Accelerator) -> None:
    """Raise UserError if the configuration asks for a compiled encoder where it cannot be compiled."""
    if config.model.encoder.use_torch_compile == "true" and zero_stage(accelerator) == 3:
        raise UserError(
            "model.encoder.use_torch_compile=true: not under ZeRO stage 3, where parameters come and go while compiled code "
            "expects them in their place; take stage 2, or set it to false"
        )


def compile_as_configured(
    config: Config, accelerator: Accelerator, encoder: TextEncoder, rows: int, tokens: int
) -> bool:
    """Compile the encoder for batches of `rows` texts of up to `tokens` tokens. Returns whether it is compiled.

    Call it when the engine has the encoder. Raises UserError if a compiled encoder is asked for and compilation fails.
    """
    wish, device = config.model.encoder.use_torch_compile, accelerator.device
    if wish == "false" or (wish == "auto" and (device.type != "cuda" or zero_stage(accelerator) == 3)):
        return False
    compile_encoder(encoder, Path(config.data.cache_dir).expanduser() / "compiled")
    begin = time.monotonic()
    try:
        # The module itself: the engine must not see a backward pass that belongs to no step.
        with accelerator.autocast():
            warm_up(encoder, encoder, rows, tokens, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        undo(encoder)
        why = f"{type(error).__name__}: {reason(error)}"
        if wish == "true":
            raise UserError(
                f"model.encoder.use_torch_compile=true: this encoder cannot be compiled ({why}); set it to auto or false"
            ) from error
        print(f"the encoder cannot be compiled and trains uncompiled, more slowly ({why})", flush=True)
        return False
    if accelerator.is_main_process:
        print(f"the encoder was compiled in {time.monotonic() - begin:.0f} s", flush=True)
    return True
