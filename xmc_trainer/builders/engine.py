"""Build the engine that a configuration asks for, and choose its micro-batches per step."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from xmc_trainer.builders.encoder import in_precision_of, longest_batch
from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data import Corpus
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.engine.accelerator import build_accelerator, set_accumulation, whole_weights
from xmc_trainer.engine.micro_batches import bytes_a_text, fewest_parts, free_bytes
from xmc_trainer.errors import naming
from xmc_trainer.parallel import Ranks

# Parameter of `build_accelerator` -> its setting, for error messages.
NAMES = SETTINGS | {
    "mixed_precision": "training.amp",
    "mixed_precision=fp16": "training.amp.dtype=float16",
    "mixed_precision=bf16": "training.amp.dtype=bfloat16",
    "mixed_precision=no": "training.amp.enabled=false",
    "optimizer": "training.optimization",
    "accumulation": "training.optimization.grad_accum_step",
    "micro_batch": "data.batch_size",
    "rank_batch": "data.batch_size / processes",
    "step_batch": "data.batch_size x grad_accum_step",
}


def accelerator_of(config: Config, deepspeed_config: str | None = None) -> Accelerator:
    """Build the Accelerator of this process. Raises UserError; see `build_accelerator`.

    Args:
        deepspeed_config: DeepSpeed JSON file, if the `deepspeed` launcher started this process.
    """
    optimization, data = config.training.optimization, config.data
    accumulation = optimization.grad_accum_step if data.micro_batches == "auto" else int(data.micro_batches)
    with naming(NAMES):
        return build_accelerator(
            device=config.environment.device,
            cuda_device_id=config.environment.cuda_device_id,
            mixed_precision=config.training.amp.mixed_precision,
            accumulation=accumulation,
            micro_batch=config.texts_a_step // accumulation,
            max_grad_norm=optimization.max_grad_norm,
            deepspeed_config=deepspeed_config,
            timeout=config.environment.timeout,
            timeout_is="environment.timeout_minutes",
        )


def micro_batches_of(
    config: Config, accelerator: Accelerator, encoder: TextEncoder, corpus: Corpus, ranks: Ranks, device: torch.device
) -> int:
    """Choose the micro-batches per step, equal on all ranks. On a GPU "auto" takes the fewest that fit its memory.

    Call it after `head_of` and before `prepare_encoder`, because it measures free memory.
    """
    if config.data.micro_batches != "auto" or device.type != "cuda":
        return accelerator.gradient_accumulation_steps
    encoder = encoder.to(device).train()
    with whole_weights(encoder):
        forward = in_precision_of(config, encoder, device)
        text_bytes = bytes_a_text(forward, encoder, longest_batch(corpus), device)
    own = fewest_parts(config.texts_a_step, ranks.size, text_bytes, free_bytes(encoder, device))
    parts = max(ranks.sizes(own, device))
    set_accumulation(accelerator, parts)
    return parts
