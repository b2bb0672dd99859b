"""Compiling the encoder with torch.compile, in seconds rather than minutes, for batches of every length.

The layers of a backbone are alike. Each is compiled by itself, so that the first one's code serves all of them, and what stands
around them (embeddings, attention mask) is compiled once more. The compiled code is kept on disk for the next run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from xmc_trainer.encoder.text_encoder import TextEncoder

_DYNAMIC = {"dynamic": True}  # one compilation for all lengths
# Of what a backward pass reads of a layer, the share that is kept; the rest is computed again, what costs least first. On a GPU this
# takes about a tenth of the encoder's time, and saves a third of the memory that grows with the texts.
_KEPT = 0.6


def layer_lists(backbone: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """(owner, list) of every list of layers of one class that is in no other one."""
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    inside: set[nn.Module] = set()
    for owner in backbone.modules():
        for child in owner.children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child) > 1
                and len({type(layer) for layer in child}) == 1
                and child not in inside
            ):
                found.append((owner, child))
                inside.update(child.modules())
    return found


def compile_encoder(encoder: TextEncoder, cache_dir: Path) -> None:
    """Compile the backbone in place; the work happens in its first forward and backward passes.

    Args: cache_dir: where the code is kept, unless TORCHINDUCTOR_CACHE_DIR says otherwise.
    """
    # torch, when imported, may have set it to a folder for temporary files, which is gone after a restart.
    chosen = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir() + "/torchinductor_"))
    if chosen.parent == Path(tempfile.gettempdir()) and chosen.name.startswith("torchinductor_"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)
    # As many texts as tokens in the first batch are not always so.
    torch.fx.experimental._config.use_duck_shape = False
    if torch.cuda.is_available():
        torch._functorch.config.activation_memory_budget = _KEPT
    backbone = encoder.backbone
    lists = layer_lists(backbone)
    for owner, layers in lists:
        for layer in layers:
            layer.compile(**_DYNAMIC)
        if owner is not backbone:
            owner.forward = torch.compiler.disable(owner.forward, recursive=False)  # the loop over the layers itself
    if all(owner is not backbone for owner, _ in lists):
        backbone.compile(**_DYNAMIC)


def undo(encoder: TextEncoder) -> None:
    """The encoder as it was before `compile_encoder`."""
    for module in encoder.backbone.modules():
        module._compiled_call_impl = None
        module.__dict__.pop("forward", None)


def warm_up(
    encoder: TextEncoder, forward: Callable[[Tensor, Tensor], Tensor], rows: int, tokens: int, device: torch.device
) -> None:
    """Let the encoder be compiled now, for training and for evaluation.

    Args:
        forward: calls the encoder in the precision of the training.
        rows, tokens: of the largest batch.
    """
    training = encoder.training
    ids, mask = (torch.ones(rows, tokens, dtype=torch.int64, device=device) for _ in range(2))
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    encoder.train()
    torch.autograd.grad(forward(ids, mask).float().sum(), parameters, allow_unused=True)
    encoder.eval()
    with torch.no_grad():
        forward(ids, mask)
    encoder.train(training)
