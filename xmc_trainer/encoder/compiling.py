"""Compile the encoder with torch.compile for batches of every length, in seconds instead of minutes.

The layers of a backbone have the same code. Each is compiled by itself, so all reuse the first one's compiled code. The rest
(embeddings, attention mask) is compiled separately. The compiled code is cached on disk for the next run.
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
# Share of a layer's activations that is kept for the backward pass on a GPU. The rest is recomputed, cheapest first.
_KEPT = 0.4
# Keeps a layer's inputs and random draws alone. torch would not keep the draws at 0.
_LEAST_KEPT = 1e-6


def layer_lists(backbone: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Find the outermost lists of two or more layers of one class. Returns (owner, list) of each."""
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


def compile_encoder(encoder: TextEncoder, cache_dir: Path, *, recompute: bool = False) -> None:
    """Compile the backbone in place. The first forward and backward pass do the work; see `warm_up`.

    Args:
        cache_dir: folder for compiled code, unless TORCHINDUCTOR_CACHE_DIR names another.
        recompute: whether the backward pass computes every layer again from its input, to save memory.
    """
    from xmc_trainer.encoder.kept_draws import KeepDraws  # imports the compiler, which takes seconds

    # Importing torch may set the variable to a temporary folder, which does not survive a restart.
    chosen = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir() + "/torchinductor_"))
    if chosen.parent == Path(tempfile.gettempdir()) and chosen.name.startswith("torchinductor_"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)
    # Do not take texts and tokens for one size because they are equal in the first batch.
    torch.fx.experimental._config.use_duck_shape = False
    kept = _KEPT if torch.cuda.is_available() else 1.0
    torch._functorch.config.activation_memory_budget = _LEAST_KEPT if recompute else kept
    torch._inductor.config.joint_custom_post_pass = KeepDraws()
    # torch would fuse reductions for long texts alone, and compile everything once more for short ones.
    if hasattr(torch._inductor.config.triton, "mix_order_reduction_non_strict_mode"):
        torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
    backbone = encoder.backbone
    lists = layer_lists(backbone)
    for owner, layers in lists:
        for layer in layers:
            layer.compile(**_DYNAMIC)
        if owner is not backbone:
            owner.forward = torch.compiler.disable(owner.forward, recursive=False)  # it loops over the layers
    if all(owner is not backbone for owner, _ in lists):
        backbone.compile(**_DYNAMIC)


def undo(encoder: TextEncoder) -> None:
    """Undo `compile_encoder`."""
    for module in encoder.backbone.modules():
        module._compiled_call_impl = None
        module.__dict__.pop("forward", None)


def warm_up(
    encoder: TextEncoder, forward: Callable[[Tensor, Tensor], Tensor], rows: int, tokens: int, device: torch.device
) -> None:
    """Trigger compilation now, for training and for evaluation.

    Args:
        forward: calls the encoder in the precision of training.
        rows, tokens: texts and tokens of the largest batch.
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
