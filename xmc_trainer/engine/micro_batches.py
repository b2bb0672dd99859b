"""Choose the number of micro-batches per step: the fewest that fit the GPU's memory. The training does not depend on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Of a trained parameter: 16-bit weights and gradients, each twice while the engine builds its buffers; float32 weights and two optimizer states.
BYTES_A_PARAMETER = 20
# Share of the GPU's memory for the head's working memory, the collectives' buffers and the allocator's fragmentation.
SPARED = 0.15
_TEXTS = 8


def bytes_a_text(
    forward: Callable[[Tensor, Tensor], Tensor], encoder: nn.Module, tokens: int, device: torch.device
) -> int:
    """Measure the GPU memory, in bytes, that forward and backward pass need for one more text of `tokens` tokens."""
    parameters, peaks = [p for p in encoder.parameters() if p.requires_grad], []
    for texts in (_TEXTS, 2 * _TEXTS):
        ids = torch.ones(texts, tokens, dtype=torch.int64, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.autograd.grad(forward(ids, ids.clone()).sum(), parameters, allow_unused=True)
        peaks.append(torch.cuda.max_memory_allocated(device))
    return (peaks[1] - peaks[0]) // _TEXTS


def free_bytes(encoder: nn.Module, device: torch.device) -> int:
    """Return the bytes of GPU memory that will be left for texts once the engine holds the encoder. The head must exist already."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused - SPARED * total) - BYTES_A_PARAMETER * sum(
        p.numel() for p in encoder.parameters() if p.requires_grad
    )


def fewest_parts(texts: int, ranks: int, text_bytes: int, free: int) -> int:
    """Return the smallest number of equal parts of a step of `texts` texts for which each rank's share of a part fits `free` bytes.

    If not even one text per rank fits, return parts of one text per rank: the estimate is cautious, so that may work.
    """
    possible = [parts for parts in range(1, texts // ranks + 1) if texts % (parts * ranks) == 0]
    return next((parts for parts in possible if texts // (parts * ranks) * text_bytes <= free), possible[-1])
