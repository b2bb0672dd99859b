"""Time and memory of the encoder's training step under each DeepSpeed file, and without DeepSpeed.

xmc-trainer bench zero                                         # BERT-base with random weights, one process
xmc-trainer bench zero --processes 2 --precision fp16 ds_configs/zero2.json ds_configs/zero3.json

The encoder alone: forward, backward and AdamW on texts of equal length. Each setting runs in processes of its own; `peak` is
one rank's, on a GPU what torch allocated, on a CPU the growth of the resident memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xmc_trainer.files import replacing

if TYPE_CHECKING:
    from xmc_trainer.encoder import TextEncoder

_NO_DEEPSPEED = "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"DeepSpeed JSON files, or {_NO_DEEPSPEED}; default: that and ds_configs/*.json")
    parser.add_argument("--processes", type=int, default=1, help="ranks")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16", "fp16"))
    parser.add_argument("--batch", type=int, default=128, help="texts of all ranks together")
    parser.add_argument("--max-len", type=int, default=128, help="tokens a text")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--csv", default="bench_zero.csv", help="file to write")
    parser.add_argument("--rank-of", metavar="JSON", help=argparse.SUPPRESS)  # this process is a rank, of that setting
    options = parser.parse_args()
    if options.rank_of:
        measure(options)
        return
    files = options.files or [_NO_DEEPSPEED, *map(str, sorted(Path("ds_configs").glob("*.json")))]
    columns = None
    with replacing(Path(options.csv), newline="") as file:
        for name in files:
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
            done = subprocess.run(
                [*words, "-m", "xmc_trainer", "bench", "zero", *sys.argv[1:], "--rank-of", name], capture_output=True, text=True
            )
            result = [line for line in done.stdout.splitlines() if line.startswith('{"what"')]
            if done.returncode or not result:
                errors = [line for line in done.stderr.splitlines() if line.startswith("error") or "Error: " in line]
                print(f"{name:28s} {(errors or ['failed'])[0].strip()}", flush=True)
                continue
            row = json.loads(result[0])
            if columns is None:
                print(f"{row['device']}; torch {row['torch']}, deepspeed {row['deepspeed']}; {row['parameters'] / 1e6:.1f} M parameters")
                columns = csv.DictWriter(file, row)
                columns.writeheader()
            columns.writerow(row)
            print(f"{row['what']:28s}{row['ms']:10.1f} ms{row['peak_gib']:10.2f} GiB a rank", flush=True)
    print(f"written to {options.csv}")
    if columns is None:
        sys.exit(1)


def random_encoder(hidden: int, layers: int, dropout: float = 0.1) -> TextEncoder:
    """A BERT of random weights, with heads of 64 features."""
    from transformers import BertConfig, BertModel

    from xmc_trainer.encoder import TextEncoder

    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return TextEncoder(BertModel(config, add_pooling_layer=False))


def measure(options: argparse.Namespace) -> None:
    """One rank of one setting; rank 0 prints the row as JSON."""
    import deepspeed

    from xmc_trainer.engine import build_accelerator, leave

    accelerator = build_accelerator(
        device="auto",
        cuda_device_id=0,
        mixed_precision=options.precision,
        accumulation=1,
        micro_batch=options.batch,
        max_grad_norm=0.0,
        deepspeed_config=None if options.rank_of == _NO_DEEPSPEED else options.rank_of,
    )
    device, gpu = accelerator.device, accelerator.device.type == "cuda"
    before = _resident()
    torch.manual_seed(0)
    module = random_encoder(options.hidden, options.layers)
    parameters = sum(p.numel() for p in module.parameters())
    groups = module.parameter_groups(1e-5, 0.0, 0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=options.precision != "fp16")
    encoder, optimizer = accelerator.prepare(module, optimizer)
    texts = options.batch // accelerator.num_processes
    ids = torch.randint(module.backbone.config.vocab_size, (texts, options.max_len), device=device)
    mask = torch.ones_like(ids)
    times = []
    for _ in range(options.repeat + 3):
        begin = time.perf_counter()
        accelerator.backward(encoder(ids, mask).float().square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated() if gpu else _resident() - before
    row: dict[str, Any] = {"what": Path(options.rank_of).stem if options.rank_of != _NO_DEEPSPEED else "without DeepSpeed"}
    row |= {"ms": round(statistics.median(times[3:]), 2), "peak_gib": round(peak / 2**30, 3)}
    row |= {"ranks": accelerator.num_processes, "precision": options.precision, "batch": options.batch}
    row |= {"max_len": options.max_len, "hidden": options.hidden, "layers": options.layers, "parameters": parameters}
    row |= {"device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads a rank"}
    row |= {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    if accelerator.is_main_process:
        os.write(1, (json.dumps(row) + "\n").encode())
    del encoder, optimizer
    leave(accelerator)


def _resident() -> int:
    """Bytes: the peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

