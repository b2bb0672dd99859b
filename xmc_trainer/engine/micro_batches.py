"""Into how many micro-batches the texts of a step are cut: as few as the GPU's memory takes, for every cut trains the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Weights and gradients in 16 bits, once more while they are put together, float32 weights and two states of an optimizer.
BYTES_A_PARAMETER = 20
# Of the GPU's memory: left to the head's working memory, the collectives' buffers and what the allocator cannot use.
SPARED = 0.15
_TEXTS = 8


def bytes_a_text(
    forward: Callable[[Tensor, Tensor], Tensor], encoder: nn.Module, tokens: int, device: torch.device
) -> int:
    """GPU memory that forward and backward pass need for one more text of `tokens` tokens."""
    parameters, peaks = [p for p in encoder.parameters() if p.requires_grad], []
    for texts in (_TEXTS, 2 * _TEXTS):
        ids = torch.ones(texts, tokens, dtype=torch.int64, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.autograd.grad(forward(ids, ids.clone()).sum(), parameters, allow_unused=True)
        peaks.append(torch.cuda.max_memory_allocated(device))
    return (peaks[1] - peaks[0]) // _TEXTS


def free_bytes(encoder: nn.Module, device: torch.device) -> int:
    """What of the GPU's memory is left for texts once the engine has the encoder; the head is there already."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused - SPARED * total) - BYTES_A_PARAMETER * sum(p.numel() for p in encoder.parameters())


def fewest_parts(texts: int, ranks: int, text_bytes: int, free: int) -> int:
    """The smallest number of equal parts of a step's `texts` of which the ranks' equal shares fit into `free` bytes each.

    Where a single text of a rank does not fit, one a rank: it may do, for the estimate is careful.
    """
    possible = [parts for parts in range(1, texts // ranks + 1) if texts % (parts * ranks) == 0]
    return next((parts for parts in possible if texts // (parts * ranks) * text_bytes <= free), possible[-1])
