"""Refuse to overwrite a good model or checkpoint with NaN or infinite weights."""

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
    """Raise UserError, on every rank, if a floating-point tensor of any rank holds NaN or an infinity. Collective.

    Each tensor is reduced on its own device, with one synchronisation for all of them.

    Args:
        tensors: (name, tensor) of this rank; may be empty.
        device: this rank's device for collectives.
        step: number of optimizer steps made, for the message.
        folder: the folder to be written, for the message.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor.detach())).float().to(device))  # NaN if any value is
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    bad = [name for name, good in zip(names, finite) if not good]
    if any(ranks.sizes(len(bad), device)):
        which = f" ({bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''})" if bad else ""
        raise UserError(
            f"{folder}: not written at step {step}, because weights are no longer finite{which}; earlier saves are "
            "kept. Lower `encoder_lr` or `lr`, or set `max_grad_norm`=1.0"
        )
