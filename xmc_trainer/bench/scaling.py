"""A training step of encoder and head on 1, 2, 4, 8 processes, one a GPU: times, memory, what travels, whether they train alike.

xmc-trainer bench scaling                                       # Amazon-3M's shape; without GPUs a small one, said so
xmc-trainer bench scaling --processes 1,2 --launchers deepspeed --stages 2 --csv scaling.csv

From the repository's root: the launchers read launchers/accelerate_zero*.yaml and ds_configs/. BERT with random weights under
ZeRO, the head sharded by labels, random texts of equal length. The batch a process is fixed; `efficiency` is the texts a second
against as many times one process's, of the same launcher and stage. Bytes are those that a rank sends in a step for the head (see
`bench ranks`), and the times beside them those of its collectives alone; `nccl` is the time of all NCCL kernels of a step, ZeRO's
too, which may run beside others. Then, in float32 and by the first launcher, every number of processes trains --exact-steps on
one and the same batch a step: the largest relative difference of the losses from one process's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmc_trainer.bench.ranks import CountingRanks
from xmc_trainer.bench.zero import random_encoder
from xmc_trainer.engine import build_accelerator, leave
from xmc_trainer.files import replacing
from xmc_trainer.head import SGD, FixedFanInHead

_LAUNCHERS = ("accelerate", "deepspeed")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "xmc-trainer bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.device_count()
    parser.add_argument(
        "--processes", default="1,2,4,8" if gpus else "1,2", help="comma-separated; more than there are GPUs are left out"
    )
    parser.add_argument("--launchers", default=",".join(_LAUNCHERS), help="comma-separated: accelerate, deepspeed")
    parser.add_argument("--stages", default="1,2,3", help="comma-separated stages of ZeRO")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16", "fp16"))
    parser.add_argument("--batch", type=int, default=128 if gpus else 4, help="texts a process")
    parser.add_argument("--max-len", type=int, default=128 if gpus else 16, help="tokens a text")
    parser.add_argument("--hidden", type=int, default=768 if gpus else 64)
    parser.add_argument("--layers", type=int, default=12 if gpus else 2)
    parser.add_argument("--labels", type=int, default=2_812_281 if gpus else 20_011)
    parser.add_argument("--fan-in", type=int, default=128 if gpus else 16)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--positives", type=int, default=36, help="labels a text")
    parser.add_argument("--repeat", type=int, default=10, help="steps that are timed")
    parser.add_argument("--exact-steps", type=int, default=20, help="0: do not compare")
    parser.add_argument("--csv", default="bench_scaling.csv", help="file to write")
    # What a rank is told, by us and by deepspeed.
    parser.add_argument("--rank-of", choices=("speed", "exact"), help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for name in ("processes", "stages"):
        value = getattr(options, name)
        if not all(word.isdecimal() for word in value.split(",")):
            parser.error(f"--{name} {value}: comma-separated whole numbers")
        setattr(options, name, list(map(int, value.split(","))))
    options.launchers = options.launchers.split(",")
    if unknown := set(options.launchers) - set(_LAUNCHERS):
        parser.error(f"--launchers: {', '.join(unknown)}: choose from {', '.join(_LAUNCHERS)}")
    return options


def main() -> None:
    options = parse()
    if options.rank_of:
        (measure if options.rank_of == "speed" else train_exactly)(options)
        return
    gpus = torch.cuda.device_count()
    counts = [count for count in options.processes if not gpus or count <= gpus]
    if not gpus:
        print("no GPU here: processes on the CPU, with gloo, and by default a small shape")
    elif left := [str(count) for count in options.processes if count > gpus]:
        print(f"{gpus} GPUs here: {', '.join(left)} processes are left out")
    rows: list[dict[str, Any]] = []
    alone: dict[tuple[str, int], float] = {}
    columns = "launcher    ZeRO  processes       ms   texts/s  efficiency  GiB a rank  gather: kB, ms   scatter: kB, ms    nccl, ms"
    print(columns, flush=True)
    for launcher in options.launchers:
        for stage in options.stages:
            for count in counts:
                row = start(options, "speed", launcher, stage, count)
                if row is None:
                    continue
                if count == 1:
                    alone[launcher, stage] = row["texts_s"]
                one = alone.get((launcher, stage))
                row["efficiency"] = None if one is None else round(row["texts_s"] / count / one, 3)
                rows.append(row)
                write(rows, options.csv)  # of many starts one may be the last
                share = "" if one is None else f"{100 * row['efficiency']:.0f} %"
                nccl = "" if row["nccl_ms"] is None else f"{row['nccl_ms']:12.2f}"
                step = f"{row['ms']:9.1f}{row['texts_s']:10.0f}{share:>12s}{row['peak_gib']:12.2f}"
                travels = f"{row['gather_bytes'] / 1e3:10.1f}{row['gather_ms']:6.2f}{row['scatter_bytes'] / 1e3:12.1f}{row['scatter_ms']:6.2f}"
                print(f"{launcher:12s}{stage:4d}{count:11d}{step}{travels}{nccl}", flush=True)
    failed = not rows
    if options.exact_steps:
        batch = options.batch * max(counts)
        for stage in options.stages:
            launcher = options.launchers[0]
            curves = {count: start(options, "exact", launcher, stage, count, batch // count) for count in counts}
            found = {count: row["losses"] for count, row in curves.items() if row is not None}
            for count, losses in found.items():
                if count != 1 and 1 in found:
                    far = max(abs(a - b) / abs(b) for a, b in zip(losses, found[1], strict=True))
                    said = f"ZeRO {stage}, {count} processes: losses of {len(losses)} steps within {far:.1e} of one process's"
                    print(said, flush=True)
                    for row in rows:
                        if (row["launcher"], row["stage"], row["processes"]) == (launcher, stage, count):
                            row["loss_difference"] = far
            failed |= not found
    write(rows, options.csv)
    print(f"written to {options.csv}")
    if failed:
        sys.exit(1)


def write(rows: list[dict[str, Any]], path: str) -> None:
    with replacing(Path(path), newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)


def start(
    options: argparse.Namespace, what: str, launcher: str, stage: int, count: int, batch: int | None = None
) -> dict[str, Any] | None:
    """Start the ranks of one setting; rank 0's row, or None after saying what went wrong."""
    same = ("precision", "max_len", "hidden", "layers", "labels", "fan_in", "group_size", "positives", "repeat", "exact_steps")
    words = {"rank-of": what, "batch": batch or options.batch}
    words |= {name.replace("_", "-"): getattr(options, name) for name in same}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module = "xmc_trainer.bench.scaling"
    if launcher == "accelerate":
        file = f"launchers/accelerate_zero{stage}.yaml"
        command = ["accelerate", "launch", "--config_file", file, "--num_processes", str(count), "--main_process_port", port]
        command += ["-m", module]
    else:
        # Counts processes where there is no GPU, too.
        command = ["deepspeed", "--num_gpus", str(count), "--master_port", port, "--module", module]
        words["deepspeed_config"] = f"ds_configs/zero{stage}.json"
    command += [part for name, value in words.items() for part in (f"--{name}", str(value))]
    # NVLink multicast can take the GPUs of a shared host out of service, and nothing here gains by it.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NCCL_NVLS_ENABLE": "0"})
    lines = [line[line.index('{"processes"') :] for line in done.stdout.splitlines() if '{"processes"' in line]
    if done.returncode == 0 and lines:
        return {"launcher": launcher, "stage": stage} | json.loads(lines[0])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error") or "Error: " in line]
    print(f"{launcher:12s}{stage:4d}{count:11d}  {(errors or ['failed'])[0].strip()}", flush=True)
    return None


class Training:
    """One rank's encoder, head and batches. Rank r of N takes the r-th N-th of each batch; batches depend on `seed` alone."""

    def __init__(self, options: argparse.Namespace, precision: str) -> None:
        self.options = options
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator = build_accelerator(
            device="auto", cuda_device_id=0, mixed_precision=precision, accumulation=1,
            micro_batch=options.batch * self.processes, max_grad_norm=0.0, deepspeed_config=options.deepspeed_config,
        )  # fmt: skip
        self.device, self.gpu = self.accelerator.device, self.accelerator.device.type == "cuda"
        self.ranks = CountingRanks()
        torch.manual_seed(0)
        module = random_encoder(options.hidden, options.layers, dropout=0.0)
        groups = module.parameter_groups(1e-5, 0.0, 0.01)
        optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=precision != "fp16")
        self.encoder, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.vocabulary = module.backbone.config.vocab_size
        low = torch.float32 if precision == "no" else torch.bfloat16
        self.head = FixedFanInHead(
            options.hidden, options.labels, fan_in=options.fan_in, group_size=options.group_size, first_bias=-11.0, lr=1e-4,
            optimizer=SGD(), weight_dtype=low if self.gpu else torch.float32, product_dtype=low, ranks=self.ranks,
            device=self.device,
        )  # fmt: skip
        texts = options.batch
        self.sizes = [texts] * self.processes, [texts * options.positives] * self.processes

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """(token ids int64 [b, T], label ids int64 [b * positives]) of this rank."""
        options, whole = self.options, self.options.batch * self.processes
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (whole, options.max_len), generator=generator)
        labels = torch.randint(options.labels, (whole, options.positives), generator=generator)
        own = slice(self.ranks.rank * options.batch, (self.ranks.rank + 1) * options.batch)
        return ids[own].to(self.device), labels[own].flatten().to(self.device)

    def step(self, ids: Tensor, labels: Tensor) -> Tensor:
        counts = torch.full((ids.shape[0],), self.options.positives, device=self.device)
        features = self.encoder(ids, torch.ones_like(ids))
        loss = self.head(features, labels, counts, engine_divisor=float(self.processes), rank_sizes=self.sizes)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def report(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            os.write(1, (json.dumps({"processes": self.processes} | row) + "\n").encode())
        del self.encoder, self.optimizer
        leave(self.accelerator)

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """From where all ranks are ready until this one is done."""
        self.ranks.barrier()
        if self.gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if self.gpu:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begin)


def measure(options: argparse.Namespace) -> None:
    """Times and memory of one rank; rank 0 reports."""
    import deepspeed

    training = Training(options, options.precision)
    ids, labels = training.batch(0)
    for _ in range(3):
        training.step(ids, labels)
    start_s = time.time() - os.stat("/proc/self").st_ctime if Path("/proc/self").exists() else None
    times = [training.milliseconds(lambda: training.step(ids, labels)) for _ in range(options.repeat)]
    peak = torch.cuda.max_memory_allocated() if training.gpu else _peak_resident()
    sent, alone = _collectives(training, labels)
    ms = statistics.median(times)
    texts = options.batch * training.processes
    name = torch.cuda.get_device_name() if training.gpu else f"CPU, {torch.get_num_threads()} threads a rank"
    training.report(
        {"ms": round(ms, 2), "texts_s": round(1000 * texts / ms, 1), "peak_gib": round(peak / 2**30, 3)}
        | {f"{what}_bytes": round(count) for what, count in sent.items()}
        | {f"{what}_ms": round(value, 3) for what, value in alone.items()}
        | {"nccl_ms": _nccl(training, ids, labels), "start_s": start_s and round(start_s, 1)}
        | {name: getattr(options, name) for name in ("precision", "batch", "max_len", "hidden", "layers", "labels", "fan_in")}
        | {"group_size": options.group_size, "positives": options.positives, "device": name}
        | {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    )


def _collectives(training: Training, labels: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """What the head's collectives send in a step, and how long each kind takes alone, in ms."""
    ranks, sizes, options, device = training.ranks, training.sizes, training.options, training.device
    features = torch.zeros(options.batch, options.hidden, device=device, dtype=training.head.product_dtype)
    counts = torch.full((options.batch,), options.positives, device=device)
    every = torch.zeros(sum(sizes[0]), options.hidden, device=device)
    kinds = {
        "gather": lambda: [
            ranks.gather_rows(x, size) for x, size in ((features, sizes[0]), (counts, sizes[0]), (labels, sizes[1]))
        ],
        "scatter": lambda: ranks.scatter_sum_rows(every, sizes[0]),
        "sum": lambda: ranks.sum(torch.zeros((), device=device)),
    }  # fmt: skip
    sent, times = {}, {}
    for kind, work in kinds.items():
        ranks.sent = 0.0
        work()
        sent[kind] = ranks.sent
        times[kind] = statistics.median(training.milliseconds(work) for _ in range(options.repeat))
    return sent, times


def _nccl(training: Training, ids: Tensor, labels: Tensor, steps: int = 3) -> float | None:
    """Milliseconds of NCCL's kernels in a step; None where there are none."""
    if not training.gpu:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            training.step(ids, labels)
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in profile.key_averages() if event.key.startswith("ncclDevKernel"))
    return round(total / 1000 / steps, 3)


def train_exactly(options: argparse.Namespace) -> None:
    """The losses of some steps in float32, each on a batch of its own; rank 0 reports."""
    training = Training(options, "no")
    losses = [training.step(*training.batch(step)) for step in range(options.exact_steps)]
    training.report({"losses": torch.stack(losses).tolist()})


def _peak_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
