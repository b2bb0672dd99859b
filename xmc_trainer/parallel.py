"""Process groups and collectives. No other module imports torch.distributed.

Transfers hold features, ragged labels or scalars of one batch. Their size does not grow with the number of labels.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from xmc_trainer.errors import UserError, reason
from xmc_trainer.launch import launched_processes

# After this time without a heartbeat of a rank, the others exit; see `_Heartbeat`.
TIMEOUT = timedelta(minutes=10)
# Collectives and the job's store wait longer, so that the heartbeat's error comes first: it names the rank. Only collectives
# notice a rank that is alive but stuck.
_LONGER_THAN_HEARTBEAT = timedelta(minutes=1)
# Other ranks wait while one tokenises, which may take an hour.
_LONG_TIMEOUT = timedelta(hours=2)

# torch 2.13 renamed these functions; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def form_process_group(backend: str, timeout: timedelta = TIMEOUT, timeout_is: str = "its timeout") -> None:
    """Join the launcher's process group and start the heartbeat. UserError if the processes cannot connect.

    Args:
        timeout: how long another rank's heartbeat may be missing before this process exits.
        timeout_is: what the error calls it.
    """
    if dist.is_initialized():
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(backend, timeout=timeout + _LONGER_THAN_HEARTBEAT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"port {os.environ['MASTER_PORT']} is in use on this machine: choose another with --master_port "
                "(deepspeed, torchrun) or --main_process_port (accelerate launch)"
            ) from None
        raise UserError(
            f"{where}: the first process cannot be reached ({reason(error)}); check the address, port and network"
        ) from None
    except (dist.DistStoreError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: not all {os.environ['WORLD_SIZE']} processes connected ({reason(error)}); start all of them"
        ) from None
    _Heartbeat(timeout, timeout_is)


def leave_process_group() -> None:
    """Stop the heartbeat and leave the process group, if there is one."""
    _Heartbeat.stop_current()
    if dist.is_initialized():
        dist.destroy_process_group()


def announce_failure() -> None:
    """Tell the other ranks that this one failed. Ranks that wait for it on a GPU would not notice otherwise."""
    if (heartbeat := _Heartbeat.current) is not None:
        heartbeat.announce_failure()


def lost_ranks(error: BaseException) -> bool:
    """Whether `error` comes from a collective that lost its other ranks, not from this rank's own work."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class _Heartbeat:
    """Exits this process, naming the rank, when another rank has failed or sent no heartbeat for `timeout`.

    Every rank writes a counter to the job's store and reads the others' counters. Collectives cannot do this: they do
    not know which rank is missing, and a process that waits for its GPU cannot raise. Time is counted in intervals of
    this process, so a job that is suspended and resumed as a whole continues.
    """

    current: _Heartbeat | None = None
    _FAILED = b"failed"

    def __init__(self, timeout: timedelta, timeout_is: str) -> None:
        self._timeout_is = timeout_is
        self._rank, self._names = dist.get_rank(), [str(rank) for rank in range(dist.get_world_size())]
        self._limit = timeout.total_seconds()
        self._interval = min(10.0, self._limit / 10)
        self._silent = [0] * len(self._names)  # intervals since a rank's counter moved
        self._stopped = threading.Event()
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Use a separate connection: torch's own is busy while a new group forms. It waits longer than `_watch`, or torch would
        # log its own timeout before this rank's error.
        wait = timeout + _LONGER_THAN_HEARTBEAT
        store = dist.TCPStore(self._host, self._port, is_master=False, timeout=wait)
        self._store = dist.PrefixStore("heartbeat", store)
        _Heartbeat.current = self
        # If the store does not answer, the first thread hangs and the second one notices.
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    @classmethod
    def stop_current(cls) -> None:
        if cls.current is not None:
            cls.current._stopped.set()
            cls.current = None

    def announce_failure(self) -> None:
        self.stop_current()
        with suppress(dist.DistError):
            self._store.set(self._names[self._rank], self._FAILED.decode())

    def _beat(self) -> None:
        last, number = [b""] * len(self._names), 0
        while not self._stopped.is_set():
            number += 1
            try:
                self._store.set(self._names[self._rank], str(number))
                beats = self._store.multi_get(self._names)
            except dist.DistError:
                return  # The store's process has ended. The launcher or the next collective notices.
            for rank, beat in enumerate(beats):
                if beat == self._FAILED:
                    self._end(f"rank {rank} failed; see its own error")
                if beat != last[rank]:
                    last[rank], self._silent[rank] = beat, 0
            self._stopped.wait(self._interval)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._silent = [count + 1 for count in self._silent]
            silent = [rank for rank, count in enumerate(self._silent) if count * self._interval > self._limit]
            if not silent:
                continue
            who = f"rank {', '.join(map(str, silent))} gave no sign of life"
            # Its own counter moves in each interval that the store answers in. If it has not moved for long, the store is gone;
            # the counters of rank 0 and of this rank stop up to an interval apart.
            if self._silent[self._rank] * self._interval > self._limit / 2:
                who = f"rank 0 or the launcher on its machine, {self._host}:{self._port}, gave no sign of life"
            self._end(
                f"{who} for {self._limit / 60:g} min ({self._timeout_is}); check its machine and network, "
                "then start the job again"
            )

    def _end(self, message: str) -> None:
        if not self._stopped.is_set():
            os.write(2, f"\nerror (rank {self._rank}): {message}\n".encode())
            os._exit(2)


def average_own_part(x: Tensor) -> None:
    """Average x, [ranks * n], over ranks, in place: this rank's n elements alone. The others are undefined afterwards."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return
    own = x.chunk(ranks)[rank]
    if x.is_cuda:
        _reduce_scatter(own, x, op=dist.ReduceOp.AVG)
    else:  # gloo has no average
        _reduce_scatter(own, x.div_(ranks))


def largest_of_ranks(x: Tensor) -> Tensor:
    """Replace x by its elementwise maximum over ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def broadcast_by_ddp(buffer: Tensor) -> bool:
    """Whether a DistributedDataParallel module, whose forward pass this is, overwrites `buffer` with rank 0's."""
    active = DistributedDataParallel._get_active_ddp_module()
    return active is not None and any(buffer is each for each in active.modules_buffers)


def use_gpu(number: int) -> None:
    """Make a GPU this process's default device. UserError if the machine has no such GPU."""
    count = torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"GPU {number}: this machine has {count}, counted from 0; start fewer processes, or choose another GPU"
        )
    torch.cuda.set_device(number)


@contextmanager
def joined_ranks(
    device: torch.device, timeout: timedelta = TIMEOUT, timeout_is: str = "its timeout"
) -> Iterator[torch.device]:
    """Form the process group for prediction and evaluation, and leave it at the end. Training uses accelerate instead.

    Gives this process's device: the GPU that belongs to its rank on this machine if there are several processes and
    `device` is a GPU, else `device`.
    """
    if launched_processes() == 1:
        if device.type == "cuda":
            use_gpu(device.index or 0)
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        use_gpu(device.index)
    form_process_group("nccl" if device.type == "cuda" else "gloo", timeout, timeout_is)
    yield device
    # Not in a finally block: after an error, the barrier would wait for ranks that wait for this one.
    dist.barrier()
    leave_process_group()


class Ranks:
    """The ranks of the default process group, or a single rank without one.

    Tensors of different lengths are padded to the longest for a transfer, because collectives need equal sizes.
    """

    def __init__(self, timeout: timedelta = TIMEOUT) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if active else 0
        self.size: int = dist.get_world_size() if active else 1
        self._timeout = timeout
        self._long_wait_group: dist.ProcessGroup | None = None  # with _LONG_TIMEOUT
        self._host_group: dist.ProcessGroup | None = None  # gloo, which does not involve the GPU

    def sizes(self, length: int, device: torch.device) -> list[int]:
        """Return `length` of every rank, in rank order. Synchronises device and host."""
        if self.size == 1:
            return [length]
        out = torch.empty(self.size, dtype=torch.int64, device=device)
        _all_gather(out, torch.tensor([length], device=device))
        return out.tolist()

    def gather_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate x, [n_r, ...] on rank r, to [sum n_r, ...] on every rank, in rank order. `sizes`: all n_r."""
        if self.size == 1:
            return x
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        out = x.new_empty(self.size * longest, *x.shape[1:])
        _all_gather(out, padded)
        return torch.cat([out[r * longest : r * longest + n] for r, n in enumerate(sizes)])

    def gather_rows_of(self, tensors: list[Tensor], sizes: list[list[int]]) -> list[Tensor]:
        """`gather_rows` for several tensors in one transfer. For small tensors, the number of transfers dominates."""
        if self.size == 1:
            return tensors
        # 16-byte alignment suits every dtype.
        row_bytes = [x.element_size() * math.prod(x.shape[1:]) for x in tensors]
        spans = [-(-max(each) * length // 16) * 16 for each, length in zip(sizes, row_bytes)]
        sent = torch.zeros(sum(spans), dtype=torch.uint8, device=tensors[0].device)
        for x, span in zip(tensors, sent.split(spans)):
            span[: x.nbytes].view(x.dtype).copy_(x.reshape(-1))
        out = sent.new_empty(self.size, sent.shape[0])
        _all_gather(out.view(-1), sent)
        return [
            torch.cat([column[r, : n * length].view(x.dtype).view(n, *x.shape[1:]) for r, n in enumerate(each)])
            for x, each, length, column in zip(tensors, sizes, row_bytes, out.split(spans, dim=1))
        ]

    def scatter_sum_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Sum x, [sum n_r, ...], over ranks and return this rank's rows, [n_r, ...]. The transpose of `gather_rows`."""
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
        """Sum x over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def largest(self, values: Callable[[], list[int]]) -> Callable[[], list[int]]:
        """Start the elementwise maximum of `values()` over ranks. Returns a function that waits for it and returns it.

        The transfer runs between hosts in the background, so a wait one step later costs nothing. With a single rank,
        `values` is called only at the wait.
        """
        if self.size == 1:
            return values
        if self._host_group is None:
            try:
                self._host_group = dist.new_group(backend="gloo", timeout=self._timeout + _LONGER_THAN_HEARTBEAT)
            except RuntimeError as error:
                raise UserError(
                    f"the machines cannot reach each other ({reason(error)}); set GLOO_SOCKET_IFNAME to the network "
                    "interface"
                ) from None
        maxima = torch.tensor(values())
        work = dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._host_group, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return maxima.tolist()

        return wait

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value`, any object that can be pickled, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank and wait for all. A UserError on one rank is raised on all. Collective."""
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        every = [own]
        if self.size > 1:
            every = [None] * self.size
            dist.all_gather_object(every, own)
        if failed := [error for error in (own, *every) if error is not None]:
            raise failed[0]

    @contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """Run the block on one process per machine first, then on the others, which use its results. May take long."""
        if self.size == 1:
            yield
            return
        if self._long_wait_group is None:
            self._long_wait_group = dist.new_group(timeout=_LONG_TIMEOUT)
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            dist.barrier(self._long_wait_group)
        yield
        if first:
            dist.barrier(self._long_wait_group)
