"""Weights that are no numbers are never written over a model or checkpoint that is good."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from xmc_trainer.errors import UserError
from xmc_trainer.parallel import Ranks


def require_finite(
    tensors: Iterable[tuple[str, Tensor]], ranks: Ranks, device: torch.device, step: int, folder: Path
) -> None:
    """UserError, on every rank, if a floating-point tensor of any rank holds NaN or an infinity; every rank must call.

    One reduction a tensor on its own device, and a single wait for them all.

    Args:
        tensors: this rank's, by name; may be none.
        device: this rank's, by which ranks talk to each other.
        step: optimizer steps made, for the message.
        folder: what would have been written.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor.detach())).float().to(device))  # of NaN both are NaN
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    bad = [name for name, good in zip(names, finite) if not good]
    if any(ranks.sizes(len(bad), device)):
        which = f" ({bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''})" if bad else ""
        raise UserError(
            f"{folder}: not written at step {step}, for weights are not finite any more{which}; what was saved before is still "
            "there. Lower training.optimization.encoder_lr or lr, or set training.optimization.max_grad_norm=1.0"
        )
