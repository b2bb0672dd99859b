"""Evaluate a saved model, by default on the test set of its training data.

xmc-trainer evaluate outputs/wordnet/model
xmc-trainer evaluate outputs/wordnet/model dataset_path=/elsewhere data.test_batch_size=512 --json
torchrun --nproc_per_node 2 launchers/evaluate.py outputs/wordnet/model     # the processes share the labels
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path


def main() -> None:
    from xmc_trainer.checkpoint.model_config import MODEL_SETTINGS, config_of_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help=f"override a setting of the model: {', '.join(MODEL_SETTINGS)}"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object, as fractions")
    arguments = parser.parse_intermixed_args()
    folder = Path(arguments.model)
    config = config_of_model(folder, arguments.settings)

    # torch and transformers import slowly; the checks above must not wait for them.
    import torch

    from xmc_trainer.builders.data import metrics_of
    from xmc_trainer.builders.saved_model import evaluate_saved
    from xmc_trainer.evaluation import most_popular
    from xmc_trainer.metrics import table
    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import joined_ranks

    device, timeout = torch.device(config.environment.device_name()), config.environment.timeout
    with joined_ranks(device, timeout, "environment.timeout_minutes") as own_device:
        model = XMCModel.load(folder, own_device)
        metrics, corpus = evaluate_saved(model.saved, config, model.device)
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.json:
        print(json.dumps(metrics))
        return
    baseline = most_popular(corpus, metrics_of(config, corpus))
    print(f"{config.data.test_split}: {len(corpus.test)} texts, {corpus.num_labels} labels, per cent")
    for names in (("P", "PSP"), ("nDCG", "PSnDCG"), ("R",)):
        columns = tuple(f"{name}@{k}" for name in names for k in (1, 3, 5) if f"{name}@{k}" in metrics)
        print(table({"this model": metrics, "most popular labels": baseline}, columns))
