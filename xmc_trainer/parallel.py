"""Collectives between ranks: the only module that imports torch.distributed.

Everything here moves features, ragged labels or scalars of one batch; nothing grows with the number of labels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xmc_trainer.errors import UserError

# A process that is gone ends the job at once, but a lost link is only seen by waiting. Between two collectives a rank
# compiles, or writes and checks its part of a model: minutes at most.
TIMEOUT = timedelta(minutes=10)
# Tokenising, under which the other ranks wait, may take an hour.
_PATIENCE = timedelta(hours=2)

# torch 2.13 renamed them; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def launched_processes() -> int:
    """How many processes a launcher started. UserError where they do not know of each other: each would do it all."""
    size = int(os.environ.get("WORLD_SIZE", "0"))
    if size > 1 and not os.environ.keys() >= {"RANK", "MASTER_ADDR", "MASTER_PORT"}:
        raise UserError(
            f"WORLD_SIZE={size} without RANK, MASTER_ADDR and MASTER_PORT: start the processes by accelerate launch, deepspeed or "
            "torchrun, which set them all, or unset WORLD_SIZE for one process"
        )
    if size:
        return size
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{os.environ[name]} processes were started ({name}) but would not work together; start one a machine, "
                "and in it accelerate launch or torchrun, as launchers/examples/slurm.sh does; for separate runs set "
                "WORLD_SIZE=1"
            )
    # Set for several processes only; without GPUs, or with --cpu, accelerate launch then starts one and says nothing.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --num_processes started only one process, as it does with --cpu or a single GPU; add "
            "--config_file launchers/accelerate_zero2.yaml, start with torchrun, or for one process unset MASTER_ADDR"
        )
    return 1


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[torch.device]:
    """The process group of a launcher's processes, if there are several. Trainings leave that to accelerate.

    Gives this process's device: its own of the machine's GPUs, or `device`.
    """
    if launched_processes() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield device
    # Not after an error: it would wait for ranks that wait for this one.
    dist.barrier()
    dist.destroy_process_group()


class Ranks:
    """The processes that train one model, on the default process group; one rank if there is none.

    Tensors of different lengths are padded to the longest for the transfer, because the collectives want equal ones.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if active else 0
        self.size: int = dist.get_world_size() if active else 1
        self._patient: dist.ProcessGroup | None = None  # for waits of an hour

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

    def gather_rows_of(self, tensors: list[Tensor], sizes: list[list[int]]) -> list[Tensor]:
        """`gather_rows` of each tensor, all in one transfer: for small ones the number of transfers is what counts."""
        if self.size == 1:
            return tensors
        # Places of 16 bytes suit every dtype.
        row_bytes = [x.element_size() * math.prod(x.shape[1:]) for x in tensors]
        places = [-(-max(each) * length // 16) * 16 for each, length in zip(sizes, row_bytes)]
        sent = torch.zeros(sum(places), dtype=torch.uint8, device=tensors[0].device)
        for x, place in zip(tensors, sent.split(places)):
            place[: x.nbytes] = x.contiguous().view(-1).view(torch.uint8)
        out = sent.new_empty(self.size, sent.shape[0])
        _all_gather(out.view(-1), sent)
        return [
            torch.cat([column[r, : n * length].view(x.dtype).view(n, *x.shape[1:]) for r, n in enumerate(each)])
            for x, each, length, column in zip(tensors, sizes, row_bytes, out.split(places, dim=1))
        ]

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

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, any object that can be pickled, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """One process a machine runs the block, then the others do, which find what it left. It may take an hour."""
        if self.size == 1:
            yield
            return
        if self._patient is None:
            self._patient = dist.new_group(timeout=_PATIENCE)
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            dist.barrier(self._patient)
        yield
        if first:
            dist.barrier(self._patient)
