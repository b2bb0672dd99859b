"""How much higher a saved model should rank rare labels: its figures at several strengths, and one of them made its own.

xmc-trainer adjust outputs/mine/model data.test_split=dev
xmc-trainer adjust outputs/mine/model data.test_split=dev --strengths 0,0.2,0.4
xmc-trainer adjust outputs/mine/model --keep 0.3        # what evaluate.py and predict.py then rank by

A strength s takes s * log(a label's training texts / an average label's) off its score, as model.ffi.logit_adjustment does for
a model to come (Menon et al., Long-tail learning via logit adjustment, 2021). Choose it on texts that are neither for training
nor for the final figures. The features of the test set are kept in memory: 4 bytes for each of `texts x features`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from xmc_trainer.builders.data import metrics_of
from xmc_trainer.builders.saved_model import corpus_of_saved, loader_of_test_set
from xmc_trainer.checkpoint.folder import MANIFEST, read_folder, save_folder
from xmc_trainer.checkpoint.model_config import MODEL_SETTINGS, config_of_model
from xmc_trainer.checkpoint.saved_model import MODEL, SavedModel, save_tensors
from xmc_trainer.config import Config, portable_yaml
from xmc_trainer.data import Corpus
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError
from xmc_trainer.evaluation import evaluate
from xmc_trainer.metrics import table
from xmc_trainer.model import XMCModel


def figures(
    saved: SavedModel, config: Config, corpus: Corpus, strengths: list[float], device: torch.device
) -> dict[float, dict[str, float]]:
    """Metrics on the test set of `corpus`, by strength. The model is left as it was."""
    rare = -torch.from_numpy(corpus.log_frequency()).to(device)
    encode = _Remembering(saved.encoder)
    found = {}
    for strength in strengths:
        added = (strength - config.model.ffi.logit_adjustment) * rare
        encode.batch = 0
        _add_to_biases(saved, added)
        loader = loader_of_test_set(saved, corpus, config, device)
        metrics = metrics_of(config, corpus)
        found[strength] = evaluate(encode, saved.head, loader, metrics, device, progress=not found)
        _add_to_biases(saved, -added)
    return found


class _Remembering:
    """An encoder that is called with the same batches again and again, from `batch` 0 on, and works only the first time."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.features, self.batch = encoder, [], 0

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.batch == len(self.features):
            self.features.append(self.encoder(input_ids, attention_mask))
        self.batch += 1
        return self.features[self.batch - 1]


def _add_to_biases(saved: SavedModel, added: Tensor) -> None:
    first = 0
    for _, head in saved.head.parts():
        head.bias += added[first : first + head.num_labels]
        first += head.num_labels


def keep(saved: SavedModel, config: Config, corpus: Corpus, strength: float) -> None:
    """Write the model's folder anew, whole or not at all, with the biases of that strength.

    Raises UserError where the folder holds somebody's file that is no part of the model: it would go, or be sealed with it.
    """
    folder = saved.folder
    manifest = read_folder(folder, MODEL)
    others = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in manifest["sha256"]
    ]
    if others := [path for path in others if path != folder / MANIFEST]:
        raise UserError(f"{others[0]}: is no part of the model, whose folder is written anew; move it elsewhere first")
    added = (config.model.ffi.logit_adjustment - strength) * torch.from_numpy(corpus.log_frequency())
    ffi = dataclasses.replace(config.model.ffi, logit_adjustment=strength)
    yaml = portable_yaml(dataclasses.replace(config, model=dataclasses.replace(config.model, ffi=ffi)))

    def write(partial: Path) -> dict[str, Any]:
        shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        first = 0  # label of a head that counts from 0
        for head in manifest["heads"]:
            for shard in head["shards"]:
                tensors = load_file(partial / shard["file"])
                start, stop = (first + label for label in shard["labels"])
                tensors[head["prefix"] + "bias"] += added[start:stop]
                save_tensors(tensors, partial / shard["file"])
            first += head["arguments"]["num_labels"]
        (partial / "config.yaml").write_text(yaml, encoding="utf-8")
        own = {name: manifest[name] for name in MODEL.shape}
        return own | {"config_sha256": hashlib.sha256(yaml.encode()).hexdigest()}

    save_folder(folder, saved.head.ranks, MODEL, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help=f"of {', '.join(MODEL_SETTINGS)}: where it differs"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--strengths", default="0,0.1,0.2,0.3,0.4", help="comma-separated")
    what.add_argument(
        "--keep",
        type=float,
        metavar="STRENGTH",
        help="write this one into the model's folder, and evaluate nothing; 0 takes it out",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the metrics as one JSON object by strength, as fractions"
    )
    options = parser.parse_intermixed_args()
    try:
        strengths = [float(word) for word in options.strengths.split(",")]
    except ValueError:
        parser.error(f"--strengths {options.strengths!r}: comma-separated numbers")
    if not all(0 <= strength < float("inf") for strength in (*strengths, options.keep or 0.0)):
        parser.error("a strength is 0 or more")
    config = config_of_model(options.model, options.settings)
    device = torch.device(config.environment.device_name())
    saved = XMCModel.load(options.model, device).saved
    if any(head.bias is None for _, head in saved.head.parts()):
        raise UserError(f"{options.model}: its head has no biases, which is where an adjustment stands")
    corpus = corpus_of_saved(saved, config)
    if options.keep is not None:
        keep(saved, config_of_model(options.model, []), corpus, options.keep)
        print(f"{options.model}: logit_adjustment {config.model.ffi.logit_adjustment:g} -> {options.keep:g}")
        return
    found = figures(saved, config, corpus, strengths, device)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{config.data.evaluated_split}: {len(corpus.test)} texts, per cent; the model's own strength is {config.model.ffi.logit_adjustment:g}"
    )
    print(table({f"{strength:g}": metrics for strength, metrics in found.items()}))
