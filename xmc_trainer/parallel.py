"""Collectives between ranks: the only module that imports torch.distributed.

Everything here moves features, ragged labels or scalars of one batch; nothing grows with the number of labels.
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

from xmc_trainer.errors import UserError, reason
from xmc_trainer.launch import launched_processes

# After this time without a sign of life from a rank the others end; see `_Heartbeat`.
TIMEOUT = timedelta(minutes=10)
# Collectives wait longer than that, so that the error names the rank. They alone notice a rank that lives but is stuck.
_COLLECTIVES_WAIT_LONGER = timedelta(minutes=1)
# Tokenising, under which the other ranks wait, may take an hour.
_PATIENCE = timedelta(hours=2)

# torch 2.13 renamed them; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def form_process_group(backend: str, timeout: timedelta = TIMEOUT) -> None:
    """Meet the other processes of the launcher, and watch over them: after `timeout` without a sign of life of one, this process ends.

    UserError if they cannot meet.
    """
    if dist.is_initialized():
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(backend, timeout=timeout + _COLLECTIVES_WAIT_LONGER)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"port {os.environ['MASTER_PORT']} is in use on this machine: choose another with --master_port (deepspeed, torchrun) or "
                "--main_process_port (accelerate launch)"
            ) from None
        raise UserError(
            f"{where}: the first process is out of reach ({reason(error)}); check the address, the port and the network"
        ) from None
    except (dist.DistStoreError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: the {os.environ['WORLD_SIZE']} processes did not all meet ({reason(error)}); start every one of them"
        ) from None
    _Heartbeat(timeout)


def leave_process_group() -> None:
    """The end of this process's part in the job, if it has one."""
    _Heartbeat.stop_current()
    if dist.is_initialized():
        dist.destroy_process_group()


def announce_failure() -> None:
    """Tell the other ranks that this one ends with an error: they may be waiting for it on a GPU, where they would not notice."""
    if (heartbeat := _Heartbeat.current) is not None:
        heartbeat.announce_failure()


def lost_ranks(error: BaseException) -> bool:
    """Whether `error` is a collective's whose other ranks are gone, not one of this rank's own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class _Heartbeat:
    """Ends this process when another rank has failed, or has given no sign of life for `timeout`, with a line that names it.

    Every rank writes a counter to the job's store and reads the others'. Collectives cannot do this: they do not know whom
    they wait for, and a process that waits for its GPU cannot raise. Time is counted in intervals of this process, so that
    a job that was stopped and continued as a whole goes on.
    """

    current: _Heartbeat | None = None
    _FAILED = b"failed"

    def __init__(self, timeout: timedelta) -> None:
        self._rank, self._names = dist.get_rank(), [str(rank) for rank in range(dist.get_world_size())]
        self._limit = timeout.total_seconds()
        self._interval = min(10.0, self._limit / 10)
        self._silent = [0] * len(self._names)  # intervals since a rank's counter moved
        self._stopped = threading.Event()
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: torch's is busy while a new group forms.
        store = dist.TCPStore(self._host, self._port, is_master=False, timeout=timeout)
        self._store = dist.PrefixStore("heartbeat", store)
        _Heartbeat.current = self
        # Two threads: if the store does not answer, the first hangs and the second notices.
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
            self._store.set(self._names[self._rank], self._FAILED)

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
            if self._rank in silent:  # without the store a rank does not hear itself
                who = f"rank 0 or the launcher on its machine, {self._host}:{self._port}, gave no sign of life"
            self._end(
                f"{who} for {self._limit / 60:g} min (environment.timeout_minutes); look at its machine and network, then start "
                "the job again"
            )

    def _end(self, said: str) -> None:
        if not self._stopped.is_set():
            os.write(2, f"\nerror (rank {self._rank}): {said}\n".encode())
            os._exit(2)


def use_gpu(number: int) -> None:
    """Make it this process's. UserError if the machine has no such GPU."""
    there = torch.cuda.device_count()
    if number >= there:
        raise UserError(
            f"GPU {number}: there are {there} on this machine, counted from 0; start fewer processes, or choose another GPU"
        )
    torch.cuda.set_device(number)


@contextmanager
def joined_ranks(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """The process group of a launcher's processes, if there are several. Trainings leave that to accelerate.

    Gives this process's device: its own of the machine's GPUs, or `device`.
    """
    if launched_processes() == 1:
        if device.type == "cuda":
            use_gpu(device.index or 0)
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        use_gpu(device.index)
    form_process_group("nccl" if device.type == "cuda" else "gloo", timeout)
    yield device
    # Not after an error: it would wait for ranks that wait for this one.
    dist.barrier()
    leave_process_group()


class Ranks:
    """The processes that train one model, on the default process group; one rank if there is none.

    Tensors of different lengths are padded to the longest for the transfer, because the collectives want equal ones.
    """

    def __init__(self, timeout: timedelta = TIMEOUT) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if active else 0
        self.size: int = dist.get_world_size() if active else 1
        self._timeout = timeout
        self._patient: dist.ProcessGroup | None = None  # for waits of an hour
        self._of_hosts: dist.ProcessGroup | None = None  # does not meet the device

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
            place[: x.nbytes].view(x.dtype).copy_(x.reshape(-1))
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

    def largest(self, values: Callable[[], list[int]]) -> Callable[[], list[int]]:
        """Begin to find the largest of all ranks' `values()`, one by one; the function that it gives waits for them.

        Between hosts and in the background: who asks now and waits a step later waits for nobody. One rank's values are
        those of the moment that they are waited for.
        """
        if self.size == 1:
            return values
        if self._of_hosts is None:
            try:
                self._of_hosts = dist.new_group(backend="gloo", timeout=self._timeout + _COLLECTIVES_WAIT_LONGER)
            except RuntimeError as error:
                raise UserError(
                    f"the machines do not reach each other ({reason(error)}); name the network interface: GLOO_SOCKET_IFNAME"
                ) from None
        found = torch.tensor(values())
        work = dist.all_reduce(found, dist.ReduceOp.MAX, group=self._of_hosts, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return found.tolist()

        return wait

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
    def together(self) -> Iterator[None]:
        """Every rank runs the block, and waits for the others; where it ends in a UserError on one, it does on all."""
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
