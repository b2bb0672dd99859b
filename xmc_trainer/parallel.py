"""Collectives between ranks: the only module that imports torch.distributed.

Everything here moves features, ragged labels or scalars of one batch; nothing grows with the number of labels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_ranks(device: torch.device) -> None:
    """Join the process group that torchrun's environment describes; trainings leave that to accelerate."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop_ranks() -> None:
    dist.destroy_process_group()


class Ranks:
    """The processes that train one model, on the default process group; one rank if there is none.

    Tensors of different lengths are padded to the longest for the transfer, because the collectives want equal ones.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if active else 0
        self.size: int = dist.get_world_size() if active else 1

    def sizes(self, length: int, device: torch.device) -> list[int]:
        """`length` of every rank, in rank order. Synchronises with the host."""
        if self.size == 1:
            return [length]
        out = torch.empty(self.size, dtype=torch.int64, device=device)
        _all_gather(out, torch.tensor([length], device=device))
        return out.tolist()

    def gather_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[n_r, ...] of every rank r -> [sum n_r, ...] on every rank, in rank order. `sizes` as of `sizes()`."""
        if self.size == 1:
            return x
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        out = x.new_empty(self.size * longest, *x.shape[1:])
        _all_gather(out, padded)
        return torch.cat([out[r * longest : r * longest + n] for r, n in enumerate(sizes)])

    def scatter_sum_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[sum n_r, ...] on every rank -> this rank's rows of the sum over ranks: the transpose of `gather_rows`."""
        if self.size == 1:
            return x
        longest = max(sizes)
        padded = x.new_zeros(self.size, longest, *x.shape[1:])
        for r, part in enumerate(x.split(sizes)):
            padded[r, : part.shape[0]] = part
        out = x.new_empty(longest, *x.shape[1:])
        _reduce_scatter(out, padded.flatten(0, 1))
        return out[: sizes[self.rank]]

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
