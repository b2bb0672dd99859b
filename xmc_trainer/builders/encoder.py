"""Build the encoder that a configuration names, with tokenizer and optimizer; compile it and record its passes."""

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

from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data import Batches, Corpus, padded_width
from xmc_trainer.data.texts import encode_texts, set_instruction
from xmc_trainer.encoder.adapters import add_adapters
from xmc_trainer.encoder.captured import CannotCapture
from xmc_trainer.encoder.compiling import compile_encoder, layer_lists, undo, warm_up
from xmc_trainer.encoder.flat import FlatEncoder
from xmc_trainer.encoder.loading import (
    attend_both_ways,
    check_padding_is_hidden,
    check_tokens_fit,
    choose_attention,
    load_backbone,
    load_state_dict_file,
    load_tokenizer,
    sees_later_tokens,
)
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.engine.accelerator import whole_weights, zero_stage
from xmc_trainer.engine.zero import shorten_step
from xmc_trainer.errors import UserError, naming, reason

_ENCODER_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),  # with momentum, like the head's sgd
}
# Recording a graph takes a quarter of a second and some MiB.
_MOST_GRAPHS = 32


@naming(SETTINGS)
def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a configuration names. Raises UserError if it cannot be loaded."""
    chosen = config.model.encoder
    # If both are equal, the tokenizer comes from the encoder's setting.
    field = "encoder_model" if chosen.encoder_tokenizer == chosen.encoder_model else "encoder_tokenizer"
    tokenizer = load_tokenizer(
        chosen.encoder_tokenizer,
        where=f"model.encoder.{field}={chosen.encoder_tokenizer}",
        trust_remote_code=chosen.trust_remote_code,
    )
    set_instruction(tokenizer, chosen.instruction)
    tokens = len(encode_texts(tokenizer, [""], config.data.max_len)[0])
    if chosen.instruction and tokens == config.data.max_len:
        raise UserError(
            f"model.encoder.instruction: leaves no room for a text in the {tokens} tokens of data.max_len; shorten it, or raise that"
        )
    return tokenizer


@naming(SETTINGS)
def backbone_of(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """Load the backbone that a configuration names. Raises UserError if it cannot be loaded or does not fit the tokenizer."""
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


def text_encoder_of(config: Config, backbone: PreTrainedModel) -> TextEncoder:
    """Add what the configuration puts on a backbone: adapters, in place, pooling and the penultimate layer.

    Raises UserError if the backbone cannot have the adapters.
    """
    chosen, penultimate = config.model.encoder, config.model.penultimate
    if chosen.lora_rank:
        add_adapters(
            backbone,
            rank=chosen.lora_rank,
            alpha=chosen.lora_alpha,
            dropout=chosen.lora_dropout,
            target=chosen.lora_target,
        )
    return TextEncoder(
        backbone,
        pool_mode=chosen.pool_mode,
        feature_layers=chosen.feature_layers,
        embed_dropout=chosen.embed_dropout,
        penultimate_size=penultimate.penultimate_size if penultimate.use_penultimate_layer else None,
        penultimate_activation=penultimate.penultimate_activation,
    )


@naming(SETTINGS)
def encoder_of(config: Config, backbone: PreTrainedModel) -> TextEncoder:
    """Build the encoder around `backbone`, on the CPU, with its initial weights. Raises UserError if settings contradict it."""
    chosen, ffi = config.model.encoder, config.model.ffi
    where = f"model.encoder.encoder_model={chosen.encoder_model}"
    if chosen.use_ngame_encoder_weights:
        assert chosen.ngame_checkpoint is not None  # the settings are refused without
        load_state_dict_file(backbone, chosen.ngame_checkpoint, chosen.ngame_key_prefix)
    if chosen.bidirectional:
        attend_both_ways(backbone)
    if chosen.encoder_ftr_dim not in (None, backbone.config.hidden_size):
        raise UserError(
            f"model.encoder.encoder_ftr_dim={chosen.encoder_ftr_dim}: the encoder has a hidden size of "
            f"{backbone.config.hidden_size}; set that, or null"
        )
    if chosen.feature_layers > backbone.config.num_hidden_layers:
        raise UserError(
            f"model.encoder.feature_layers={chosen.feature_layers}: the encoder has only "
            f"{backbone.config.num_hidden_layers} layers; lower it"
        )
    encoder = text_encoder_of(config, backbone)
    with whole_weights(encoder):
        check_padding_is_hidden(encoder, config.data.max_len, where)
        both_ways = sees_later_tokens(backbone)
    if chosen.bidirectional and not both_ways:
        raise UserError(
            f"model.encoder.bidirectional=true: {type(backbone).__name__} of {where} cannot attend to later tokens; set it to false"
        )
    if chosen.pool_mode == "last_nhidden_conlast" and not both_ways:
        raise UserError(
            f"model.encoder.pool_mode=last_nhidden_conlast: the first token of {type(backbone).__name__}, a decoder, sees none of "
            "the others; set it to last_token or last_hidden_avg"
        )
    if chosen.attn_implementation != "auto":
        choose_attention(backbone, chosen.attn_implementation, "model.encoder.attn_implementation")
    if chosen.gradient_checkpointing:
        try:
            encoder.recompute_layers(True)
        except ValueError:
            raise UserError(
                f"model.encoder.gradient_checkpointing=true: {type(backbone).__name__} of {where} cannot compute its layers "
                "again; set it to false"
            ) from None
    if ffi.input_features not in (None, encoder.out_features):
        raise UserError(
            f"model.ffi.input_features={ffi.input_features}: the encoder gives {encoder.out_features} features; set that, or null"
        )
    config.check_fan_in(encoder.out_features)
    return encoder


def prepare_encoder(config: Config, accelerator: Accelerator, encoder: TextEncoder) -> tuple[Any, Any]:
    """Give the encoder and its optimizer to the engine. Returns (module, optimizer) of `accelerator.prepare`."""
    optimization = config.training.optimization
    stage = zero_stage(accelerator)
    groups = encoder.parameter_groups(optimization.encoder_lr, optimization.penultimate_lr, optimization.wd_encoder)
    flat = None
    if stage == 3:
        # ZeRO 3 gathers parameters module by module; a leaf module is gathered as a whole.
        from deepspeed.utils import set_z3_leaf_module

        for _, layers in layer_lists(encoder.backbone):
            for layer in layers:
                set_z3_leaf_module(layer, True)
        if config.model.encoder.lora_rank:
            # It empties a layer's parameters when the gradient of the layer's input is known. Frozen embeddings have none.
            encoder.backbone.enable_input_require_grads()
    else:
        flat = FlatEncoder(encoder, groups)
    optimizer = _ENCODER_OPTIMIZERS[optimization.encoder_optimizer](
        flat.groups if flat is not None else groups,
        lr=optimization.encoder_lr,
        # With torch's gradient scaler a fused optimizer skips overflowed steps itself and does not report them.
        fused=stage is not None or config.training.amp.mixed_precision != "fp16",
    )
    module, optimizer = accelerator.prepare(flat if flat is not None else encoder, optimizer)
    if flat is not None:
        flat.attach()
        shorten_step(optimizer)
    return module, optimizer


def in_precision_of(
    config: Config, forward: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap `forward` to run in the precision of `training.amp`: (input_ids, attention_mask) -> float32 features on `device`."""
    amp = config.training.amp
    autocast = torch.autocast(device.type, dtype=getattr(torch, amp.dtype), enabled=amp.enabled)

    def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with autocast:
            return forward(input_ids.to(device), attention_mask.to(device)).float()

    return encode


def capture_passes(accelerator: Accelerator, module: FlatEncoder, batches: Batches) -> None:
    """Record the passes of training as CUDA graphs, one pair for each batch width that is frequent in the first epoch.

    If they cannot be recorded, prints why and leaves the encoder as it is.
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
        print(f"the encoder's passes are not recorded as CUDA graphs and take longer ({error})", flush=True)
        return
    if accelerator.is_main_process:
        print(
            f"its passes were recorded as CUDA graphs for {len(frequent)} batch widths in {time.monotonic() - begin:.0f} s",
            flush=True,
        )


def longest_batch(corpus: Corpus) -> int:
    """Return the tokens of the longest training text, but at least 16: torch.compile needs that for a dynamic size."""
    return max(16, int(corpus.lengths("train").max()))


def refuse_compilation(config: Config, accelerator: Accelerator) -> None:
    """Raise UserError if the configuration asks for a compiled encoder where it cannot be compiled."""
    if config.model.encoder.use_torch_compile == "true" and zero_stage(accelerator) == 3:
        raise UserError(
            "model.encoder.use_torch_compile=true: does not work under ZeRO stage 3, which moves parameters during a "
            "pass; use stage 2, or set it to false"
        )


def compile_as_configured(
    config: Config, accelerator: Accelerator, encoder: TextEncoder, rows: int, tokens: int
) -> bool:
    """Compile the encoder for batches of `rows` texts of up to `tokens` tokens. Returns whether it is compiled.

    Call it after `prepare_encoder`. Raises UserError if `use_torch_compile=true` and compilation fails.
    """
    wish, device = config.model.encoder.use_torch_compile, accelerator.device
    if wish == "false" or (wish == "auto" and (device.type != "cuda" or zero_stage(accelerator) == 3)):
        return False
    recompute = config.model.encoder.gradient_checkpointing
    if recompute:
        encoder.recompute_layers(False)  # compiled code does it instead
    compile_encoder(encoder, Path(config.data.cache_dir).expanduser() / "compiled", recompute=recompute)
    begin = time.monotonic()
    try:
        # Bypass the engine: it must not see a backward pass outside a step.
        with accelerator.autocast():
            warm_up(encoder, encoder, rows, tokens, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        undo(encoder)
        if recompute:
            encoder.recompute_layers(True)
        why = f"{type(error).__name__}: {reason(error)}"
        if wish == "true":
            raise UserError(
                f"model.encoder.use_torch_compile=true: the encoder cannot be compiled ({why}); set it to auto or false"
            ) from error
        print(f"the encoder cannot be compiled and trains uncompiled, more slowly ({why})", flush=True)
        return False
    if accelerator.is_main_process:
        print(f"the encoder was compiled in {time.monotonic() - begin:.0f} s", flush=True)
    return True
