"""Time and memory of the head's step: the work of `xmc-trainer bench head`."""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xmc_trainer.commands.bench.arguments import OPTIMIZERS
from xmc_trainer.files import replacing
from xmc_trainer.head import FixedFanInHead
from xmc_trainer.head.optimizers import optimizer_named

_OPTIMIZERS = {"momentum": optimizer_named("sgd", 0.9)} | {
    name: optimizer_named(name) for name in OPTIMIZERS if name != "momentum"
}


def milliseconds(step: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Return the median time of `repeat` calls after two warm-up calls. On a GPU the calls are queued ahead, as in training."""
    step()
    step()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
        torch.cuda.synchronize()
        keep_busy(device, 5 * repeat)  # a busy host may launch a step more slowly than the GPU runs it
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in zip(events, events[1:]))
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def keep_busy(device: torch.device, milliseconds: float) -> None:
    """Keep a GPU busy for at least this time, so the host gets ahead with launches, as in training.

    The GPU sleeps. Real work would heat it and lower its clock (an H100's steps took a fifth longer).
    """
    with torch.cuda.device(device):
        torch.cuda._sleep(round(2e6 * milliseconds))  # cycles


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    source = torch.ones(1 << 30 if device.type == "cuda" else 1 << 27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 5)


def dense_baseline(labels: int, feat: Tensor, ids: Tensor, counts: Tensor) -> Callable[[], Tensor]:
    """Return a step of a dense classifier in plain torch."""
    labels = -(-labels // 64) * 64  # the library's products are half as fast otherwise
    weight = torch.empty(labels, feat.shape[1], dtype=feat.dtype, device=feat.device).uniform_(-0.05, 0.05)
    row = torch.repeat_interleave(torch.arange(len(counts), device=feat.device), counts)

    def step() -> Tensor:
        logits = feat @ weight.T
        target = torch.zeros_like(logits)
        target[row, ids] = 1
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        slope = torch.sigmoid(logits) - target
        feature_grad = slope @ weight
        weight.add_(slope.T @ feat, alpha=-1e-6)
        return loss + 0 * feature_grad[0, 0]

    return step


def slower_rows(earlier: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Describe the rows that take more than 3 % longer than the same row of an earlier CSV on the same kind of device."""
    keys = ("device", "what", "batch", "labels", "features", "weight_dtype", "loss")
    with earlier.open(newline="", encoding="utf-8") as file:
        before = {tuple(row.get(key) for key in keys): float(row["ms"]) for row in csv.DictReader(file)}
    found = [(row, before.get(tuple(str(row[key]) for key in keys))) for row in rows]
    return [
        f"{row['what']}, {row['batch']} texts, {row['labels']} labels: {row['ms']:.2f} ms, before {old:.2f}"
        for row, old in found if old is not None and row["ms"] > 1.03 * old
    ]  # fmt: skip


def measure_batch(
    options: argparse.Namespace, device: torch.device, product_dtype: torch.dtype, batch: int, labels: int, bandwidth: float,
    common: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure and print all rows for one number of texts and labels."""
    print(f"{batch} texts, {labels:,} labels")
    gpu, rows, baseline = device.type == "cuda", [], float("nan")
    torch.manual_seed(0)
    feat = torch.randn(batch, options.features, device=device).to(product_dtype)
    counts = torch.full((batch,), options.positives, device=device)
    ids = torch.randint(labels, (batch * options.positives,), device=device)
    common = common | {"batch": batch, "labels": labels}
    described: dict[str, str] = {}  # kernels of the current row's head

    def measure(what: str, build: Callable[[], tuple[Callable[[], Any], int]], **settings: Any) -> float:
        """Measure one row. `build` returns the function to time and the least bytes that it moves."""
        described.clear()
        if gpu:
            gc.collect()  # or an earlier head would count as memory in use
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            step, least_bytes = build()
            step()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            time_ms = milliseconds(step, device, options.repeat)
        except torch.OutOfMemoryError:
            print(f"{what:34s} does not fit into the device's memory")
            return float("nan")
        peak = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3) if gpu else None
        ratio = time_ms / baseline if baseline == baseline else 1.0
        share = least_bytes / bandwidth / time_ms * 1e3
        memory = f"{peak:8.2f} GiB" if gpu else ""
        print(f"{what:34s}{time_ms:10.2f} ms{memory}{100 * share:7.0f} % of copy{ratio:8.2f} x dense", flush=True)
        rows.append(
            common | settings | described
            | {"what": what, "ms": round(time_ms, 3), "peak_gib": peak, "copy_share": round(share, 3)}
            | {"ratio_to_dense": round(ratio, 3)}
        )  # fmt: skip
        return time_ms

    def head_of(fan_in: int | None, group: int, optimizer: str) -> FixedFanInHead:
        return FixedFanInHead(
            options.features, labels, fan_in=fan_in, group_size=group, first_bias=-11.0, lr=1e-4, loss=options.loss,
            optimizer=_OPTIMIZERS[optimizer], weight_dtype=getattr(torch, options.weight_dtype),
            product_dtype=product_dtype, backend=options.backend, device=device,
        )  # fmt: skip

    def head_step(fan_in: int | None, group: int, optimizer: str, end_of_step: bool = True):
        def build() -> tuple[Callable[[], Any], int]:
            head = head_of(fan_in, group, optimizer)
            described["kernels"] = head.describe_kernels()
            print(described["kernels"])
            x = feat.clone().requires_grad_()
            moved = head.weight.nbytes
            if end_of_step:
                moved = 2 * (moved + sum(state.nbytes for state in head.tensors().weight_state))

            def step() -> Tensor:
                loss = head(x, ids, counts, end_of_step=end_of_step)
                head.drop_micro_batches()  # no update follows
                return loss

            return step, moved

        return build

    def ranking(fan_in: int | None, group: int):
        def build() -> tuple[Callable[[], Any], int]:
            head = head_of(fan_in, group, "sgd")
            texts = torch.randn(max(256, batch), options.features, device=device).to(product_dtype)
            return lambda: head.topk(texts, 10), head.weight.nbytes

        return build

    weights = labels * options.features * feat.element_size()
    baseline = measure(
        "dense, plain torch, sgd", lambda: (dense_baseline(labels, feat, ids, counts), 2 * weights), optimizer="sgd"
    )
    groups = options.group_sizes
    for optimizer in options.optimizers:
        for group in [None, *groups]:
            fan_in = options.fan_in if group else None
            label = f"F={fan_in} G={group}, {optimizer}" if group else f"dense head (F={options.features}), {optimizer}"
            if group or optimizer == "sgd":
                measure(
                    label,
                    head_step(fan_in, group or 1, optimizer),
                    fan_in=fan_in,
                    group_size=group,
                    optimizer=optimizer,
                )
    for group in dict.fromkeys((groups[0], groups[-1])):
        settings = {"fan_in": options.fan_in, "group_size": group}
        measure(f"G={group}, feature gradient only", head_step(options.fan_in, group, "sgd", False), **settings)
        measure(f"G={group}, top 10 of {max(256, batch)} texts", ranking(options.fan_in, group), **settings)
    return rows


def measure(options: argparse.Namespace) -> None:
    """Measure, print and write all rows. Args: options: of `xmc-trainer bench head`."""
    gpu = torch.cuda.is_available()
    for name, of_gpu, of_cpu in (
        ("labels", 2_812_281, 131_073), ("features", 768, 384), ("fan_in", 128, 32), ("batch", [128], [64]),
        ("weight_dtype", "bfloat16", "float32"),
    ):  # fmt: skip
        if getattr(options, name) is None:
            setattr(options, name, of_gpu if gpu else of_cpu)
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        print("no GPU: measuring the reference backend on the CPU")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    triton = version("triton") if importlib.util.find_spec("triton") else "none"
    bandwidth = copy_bandwidth(device)
    print(f"{name}; torch {torch.__version__}, triton {triton}; a copy moves {bandwidth / 1e9:.0f} GB/s")
    print(
        f"features {options.features}, fan-in {options.fan_in}, {options.positives} labels per text, {options.weight_dtype} weights; "
        f"median of {options.repeat}"
    )
    product_dtype = torch.bfloat16 if gpu else torch.float32
    common = {
        "device": name, "torch": torch.__version__, "triton": triton, "copy_gb_s": round(bandwidth / 1e9),
        "features": options.features, "positives": options.positives, "weight_dtype": options.weight_dtype,
        "loss": options.loss, "backend": options.backend,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        labels = options.labels * options.batch[0] // batch
        rows += measure_batch(options, device, product_dtype, batch, labels, bandwidth, common)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(options.csv, newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {options.csv}")
    if options.compare and (slower := slower_rows(options.compare, rows)):
        sys.exit("\n".join(["more than 3 % slower:", *slower]))
