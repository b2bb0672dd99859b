"""Measure what ranks send for a head step, and how much memory the head takes on each.

torchrun --nproc_per_node 2 -m xmc_trainer bench ranks
torchrun --nproc_per_node 1 -m xmc_trainer bench ranks      # one rank, for comparison

`exchange` is the time of the step's collectives alone. Overlapping them with the head's work could save at most that. `sent`
counts the bytes that one rank sends per step with the ring algorithms of gloo and NCCL: (N - 1) times its part of gathered and
scattered tensors, 2 (N - 1) / N times summed ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmc_trainer.commands.bench.arguments import count, counts
from xmc_trainer.files import require_writable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=counts, default=[20000, 80000], help="comma-separated; default: 20000,80000")
    parser.add_argument(
        "--batch", type=counts, default=[64, 128], help="texts over all ranks, comma-separated; default: 64,128"
    )
    parser.add_argument("--features", type=counts, default=[384, 768], help="default: 384,768")
    parser.add_argument("--fan-in", type=count, default=32)
    parser.add_argument("--positives", type=count, default=5, help="labels per text")
    parser.add_argument("--repeat", type=count, default=5)
    parser.add_argument("--csv", type=Path, default=Path("bench_ranks.csv"), help="file to write")
    options = parser.parse_args()
    require_writable(options.csv, "--csv")

    from xmc_trainer.commands.bench.rank_times import measure  # imports torch, for which the checks above do not wait

    measure(options)
