"""Measure time and memory of the head on this machine, next to a dense classifier in plain torch.

xmc-trainer bench head                      # Amazon-3M's shape; a smaller one without a GPU
xmc-trainer bench head --labels 670091 --group-sizes 1,32 --csv head.csv
xmc-trainer bench head --batch 128 256 512 1024                   # as on 1, 2, 4 and 8 GPUs: N times the texts, 1/N of the labels
xmc-trainer bench head --compare docs/results/head_h200.csv       # fails if a row takes over 3 % longer than there

A step computes loss, feature gradient and weight update. "GiB" is the peak memory of head and step. "% of copy" is the share
of the device's copy bandwidth that reading and writing weights and state once would take in that time. The baseline
stores weights in bfloat16 (float32 without a GPU) and full logits and gradients, and makes a plain SGD step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmc_trainer.commands.bench.arguments import OPTIMIZERS, count, counts
from xmc_trainer.errors import UserError
from xmc_trainer.files import require_writable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=count, help="default: 2812281; 131073 without a GPU")
    parser.add_argument("--features", type=count, help="default: 768; 384 without a GPU")
    parser.add_argument("--fan-in", type=count, help="default: 128; 32 without a GPU")
    parser.add_argument(
        "--batch",
        type=count,
        nargs="+",
        help="texts, default 128; 64 without a GPU. A value that is N times the first is measured with labels / N, as on N GPUs",
    )
    parser.add_argument("--positives", type=count, default=36, help="labels per text")
    parser.add_argument(
        "--group-sizes", type=counts, default=[1, 4, 8, 16, 32, 64, 128], help="comma-separated; default: 1,4,8 ... 128"
    )
    parser.add_argument(
        "--optimizers", default=",".join(OPTIMIZERS), help=f"comma-separated, from {', '.join(OPTIMIZERS)}"
    )
    parser.add_argument("--backend", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument(
        "--weight-dtype", choices=("bfloat16", "float32"), help="default: bfloat16; float32 without a GPU"
    )
    parser.add_argument("--repeat", type=count, default=10)
    parser.add_argument("--loss", choices=("bce", "squared_hinge"), default="bce")
    parser.add_argument("--csv", type=Path, default=Path("bench_head.csv"), help="file to write")
    parser.add_argument("--compare", type=Path, help="an earlier CSV; fail if a row is over 3 %% slower than there")
    options = parser.parse_args()
    options.optimizers = options.optimizers.split(",")
    if unknown := set(options.optimizers) - set(OPTIMIZERS):
        parser.error(f"--optimizers: {', '.join(unknown)}: choose from {', '.join(OPTIMIZERS)}")
    require_writable(options.csv, "--csv")
    if options.compare is not None and not options.compare.is_file():
        raise UserError(f"--compare={options.compare}: no such file; name a CSV of an earlier run")

    from xmc_trainer.commands.bench.head_times import measure  # imports torch, for which the checks above do not wait

    measure(options)
