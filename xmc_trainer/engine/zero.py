"""What we change in DeepSpeed's optimizer of ZeRO 1 and 2, for an encoder whose gradients are a few long tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xmc_trainer.launch import launched_processes
from xmc_trainer.parallel import average_own_part, largest_of_ranks


def shorten_step(optimizer: Any) -> None:
    """Make ZeRO 1 and 2 copy less and wait later. Without effect on other engines.

    Args:
        optimizer: as `accelerator.prepare` returned it. Each of its groups has one parameter.
    """
    zero: Any = getattr(optimizer, "optimizer", None)
    if not hasattr(zero, "buffered_reduce_fallback"):
        return
    _reduce_in_place(zero)
    # The norm of the gradient needs the host's answer first. Of torch's optimizers only these may skip their first step.
    adam = isinstance(zero.optimizer, (torch.optim.Adam, torch.optim.AdamW))
    if zero.check_grad_overflow and not zero.compute_grad_norm and not zero.cpu_offload and adam:
        _skip_on_the_device(zero)


def _reduce_in_place(zero: Any) -> None:
    """Reduce a gradient where it is, and only to the ranks that update its parts.

    DeepSpeed copies it into a bucket, reduces it to all ranks, and copies it back.
    """
    by_deepspeed, ranks = zero.buffered_reduce_fallback, launched_processes()

    def reduce(rank: None, grads: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
        for grad in grads:
            # DeepSpeed pads a group to equal parts of whole pairs.
            if grad.dtype == dtype and grad.numel() % (2 * ranks) == 0:
                average_own_part(grad)
            else:
                by_deepspeed(rank, [grad], dtype, **options)

    zero.buffered_reduce_fallback = reduce


def _skip_on_the_device(zero: Any) -> None:
    """Start the update before the host knows whether a gradient overflows float16. Then the device skips it.

    DeepSpeed waits for the answer first, so the GPU idles while the host starts the update and prepares the next step. And
    where the loss scale rises, it divides the gradient by the next step's scale, which halves the gradient.
    """
    by_deepspeed, update_scale = zero.step, zero._update_scale
    on_gpu = zero.single_partition_of_fp32_groups[0].is_cuda
    answer = torch.zeros((), pin_memory=on_gpu)
    known = torch.cuda.Event() if on_gpu else None

    def ask(partition_gradients: bool = True) -> None:
        overflows = largest_of_ranks(zero.has_overflow_partitioned_grads_serial().float()).squeeze()
        zero.optimizer.found_inf = overflows  # read by torch's fused optimizers
        answer.copy_(overflows, non_blocking=True)
        if known is not None:
            known.record()

    def step(closure: None = None) -> None:
        by_deepspeed()
        if known is not None:
            known.synchronize()
        zero.overflow = bool(answer)
        update_scale(zero.overflow)

    zero.check_overflow, zero.step, zero._update_scale = ask, step, lambda overflow: None
