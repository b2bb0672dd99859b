"""Measure whole training steps on this machine: texts/s, the parts of a step, and the parts on their own.

xmc-trainer bench train                                                   # Amazon-3M's shape, one process without DeepSpeed
deepspeed --module xmc_trainer.commands.bench.train --deepspeed_config ds_configs/zero2.json dataset=amazon3m
accelerate launch --config_file launchers/accelerate_zero2.yaml -m xmc_trainer bench train dataset=wordnet dataset_path=./data

The steps are those of a training with these settings, from the loader's batches to the update. If the data set is missing, texts
are generated: its number of labels, lengths around --tokens truncated to data.max_len, and a BERT with random weights to read them.
Rank 0 prints these figures and appends them to --csv:

texts/s, ms                 of whole steps
data, forward, head, backward, engine    ms per step on the GPU's timeline: waiting for a batch, the encoder's forward pass, the
                            head with its collectives, the encoder's backward pass, the engine's gradient exchange and update
exchange                    ms of the head's collectives alone
host waits                  how often per step the host waits for the GPU (GPU only)
encoder, floor, ratio       ms of the encoder's step under the engine on batches of one length; the same in plain torch, compiled for
                            that length, with all activations kept, and replayed as a CUDA graph; their ratio
head alone                  ms of the head on the same batch
efficiency                  texts/s per process relative to one process, if --csv has a row of one
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmc_trainer.builders.inputs import require_clusters, require_data, require_encoder
from xmc_trainer.builders.recipe import require_applied
from xmc_trainer.commands.bench.arguments import count
from xmc_trainer.commands.cli import run
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.files import require_writable

_COUNTED = 4  # steps after the timed ones, in which the host's waits are counted


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of a training; default: dataset=amazon3m"
    )
    parser.add_argument(
        "--steps", type=count, default=50, help="timed steps, after as many warm-up steps but at most 10"
    )
    parser.add_argument("--texts", type=count, default=100_000, help="texts to generate; more if the labels need them")
    parser.add_argument("--tokens", type=count, default=96, help="median length of generated texts")
    parser.add_argument("--positives", type=count, default=36, help="labels per generated text")
    parser.add_argument("--layers", type=count, default=12, help="layers of the BERT with random weights")
    parser.add_argument(
        "--no-floor", action="store_true", help="skip the floor, whose compilation takes most of a minute"
    )
    parser.add_argument("--csv", type=Path, default=Path("bench_train.csv"), help="file to append a row to")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="for the deepspeed launcher: a file of ds_configs/")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    settings = (
        options.settings
        if any(word.startswith("dataset=") for word in options.settings)
        else ["dataset=amazon3m", *options.settings]
    )
    warm = min(options.steps, 10)
    config = load_config([*settings, f"training.optimization.max_steps={warm + options.steps + _COUNTED}"])
    require_applied(config)
    require_writable(options.csv, "--csv")
    require_clusters(config)
    generated = config.data.source is None and not config.data_folder.is_dir()
    if not generated:
        require_data(config)
        require_encoder(config)
    elif config.data.num_labels is None:
        raise UserError(
            f"{config.data_folder}: no such folder; set dataset_path or data.folder, or set data.num_labels to generate data"
        )

    from xmc_trainer.commands.bench.step_times import measure  # imports torch, for which the checks above do not wait

    measure(config, options, warm, _COUNTED, generated)


if __name__ == "__main__":
    run(main)
