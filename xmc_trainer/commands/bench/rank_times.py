"""What ranks send for a head step, and its time: the work of `xmc-trainer bench ranks`."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.files import replacing
from xmc_trainer.head import SGD, FixedFanInHead
from xmc_trainer.parallel import Ranks, joined_ranks


class CountingRanks(Ranks):
    """Counts the bytes that this rank sends."""

    sent = 0.0

    def sizes(self, length: int, device: torch.device) -> list[int]:
        self.sent += 8 * (self.size - 1)
        return super().sizes(length, device)

    def gather_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        self.sent += (self.size - 1) * max(sizes) * x.element_size() * math.prod(x.shape[1:])
        return super().gather_rows(x, sizes)

    def gather_rows_of(self, tensors: list[Tensor], sizes: list[list[int]]) -> list[Tensor]:
        for x, each in zip(tensors, sizes):
            self.sent += (self.size - 1) * max(each) * x.element_size() * math.prod(x.shape[1:])
        return super().gather_rows_of(tensors, sizes)

    def scatter_sum_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        self.sent += (self.size - 1) * max(sizes) * x.element_size() * math.prod(x.shape[1:])
        return super().scatter_sum_rows(x, sizes)

    def sum(self, x: Tensor) -> Tensor:
        self.sent += 2 * (self.size - 1) / self.size * x.nbytes
        return super().sum(x)


def milliseconds(step: Callable[[], None], ranks: Ranks, gpu: bool) -> float:
    ranks.barrier()
    begin = time.perf_counter()
    step()
    if gpu:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


def measure_shape(
    options: argparse.Namespace, ranks: CountingRanks, device: torch.device, labels: int, batch: int, features: int
) -> dict[str, Any]:
    """Measure one row of the table."""
    gpu = device.type == "cuda"
    head = FixedFanInHead(
        features, labels, fan_in=options.fan_in, optimizer=SGD(), lr=1e-3, first_bias=-9.0, ranks=ranks, device=device
    )
    texts = batch // ranks.size
    feat = torch.randn(texts, features, device=device, requires_grad=True)
    ids = torch.randint(labels, (texts * options.positives,), device=device)
    counts = torch.full((texts,), options.positives, device=device)
    known = [texts] * ranks.size, [len(ids)] * ranks.size

    def step() -> None:
        head(feat, ids, counts, rank_sizes=known).backward()

    def exchange() -> None:
        gathered, _, _ = ranks.gather_rows_of([feat.detach(), ids, counts], [known[0], known[1], known[0]])
        ranks.scatter_sum_rows(gathered, known[0])
        ranks.sum(torch.zeros((), device=device))

    times, alone, sent = [], [], 0.0
    for _ in range(options.repeat + 1):
        ranks.sent = 0.0
        times.append(milliseconds(step, ranks, gpu))
        sent = ranks.sent
        alone.append(milliseconds(exchange, ranks, gpu))
    return {
        "labels": labels,
        "batch": batch,
        "features": features,
        "fan_in": options.fan_in,
        "positives": options.positives,
        "sent_bytes": round(sent),
        "head_mib": round(sum(buffer.nbytes for buffer in head.buffers()) / 2**20, 3),
        "ms": round(statistics.median(times[1:]), 2),
        "exchange_ms": round(statistics.median(alone[1:]), 3),
    }


def measure(options: argparse.Namespace) -> None:
    """Measure, print and write all rows. Args: options: of `xmc-trainer bench ranks`."""
    with joined_ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu")) as device:
        _measure_on(device, options)


def _measure_on(device: torch.device, options: argparse.Namespace) -> None:
    gpu, ranks = device.type == "cuda", CountingRanks()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads per rank"
    if ranks.rank == 0:
        print(f"{ranks.size} ranks; {name}; torch {torch.__version__}")
        print("   labels   batch  features    sent, bytes per step  head, MiB per rank      ms  exchange, ms")
    rows = []
    for shape in itertools.product(options.labels, options.batch, options.features):
        row = measure_shape(options, ranks, device, *shape)
        rows.append({"ranks": ranks.size, "device": name, "torch": torch.__version__} | row)
        if ranks.rank == 0:
            print(
                "{labels:9,d}{batch:8d}{features:10d}{sent_bytes:22,d}{head_mib:20.2f}{ms:8.1f}{exchange_ms:14.2f}".format(
                    **row
                ),
                flush=True,
            )
    if ranks.rank == 0:
        with replacing(options.csv, newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"written to {options.csv}")
