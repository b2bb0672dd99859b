"""Evaluate a saved model on a test set: by default the one that it was trained for.

python launchers/evaluate.py outputs/wordnet/model
python launchers/evaluate.py outputs/wordnet/model dataset_path=/elsewhere data.test_batch_size=512 --json
torchrun --nproc_per_node 2 launchers/evaluate.py outputs/wordnet/model     # the processes share the labels
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from xmc_trainer.cli import run
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError

_ALLOWED = ("dataset_path", "data.", "environment.", "training.evaluation.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"of {', '.join(_ALLOWED)}: where it differs")
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object, as fractions")
    arguments = parser.parse_intermixed_args()
    for word in arguments.settings:
        if not word.startswith(_ALLOWED):
            raise UserError(f"{word}: a saved model can be given only {', '.join(_ALLOWED)} settings")
    folder = Path(arguments.model)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder / 'config.yaml'}: missing; name the folder of a saved model")
    config = load_config([f"dataset={folder / 'config.yaml'}", *arguments.settings])

    import torch

    from xmc_trainer.evaluation import evaluate_saved, metrics_of, most_popular
    from xmc_trainer.metrics import table
    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import joined_ranks

    device = config.environment.device
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{config.environment.cuda_device_id}"
    with joined_ranks(torch.device("cpu" if device == "auto" else device)) as own_device:
        model = XMCModel.load(folder, own_device)
        metrics, corpus = evaluate_saved(model.saved, config, model.device)
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.json:
        print(json.dumps(metrics))
        return
    floor = most_popular(corpus, metrics_of(config.training.evaluation, corpus))
    print(f"{corpus.num_labels} labels, {len(corpus.test)} test texts, per cent")
    for names in (("P", "PSP"), ("nDCG", "PSnDCG"), ("R",)):
        columns = tuple(f"{name}@{k}" for name in names for k in (1, 3, 5) if f"{name}@{k}" in metrics)
        print(table({"this model": metrics, "most popular labels": floor}, columns))


if __name__ == "__main__":
    run(main)
