"""Rank rare labels of a saved model higher: evaluate several strengths, or write one into the model.

xmc-trainer adjust outputs/mine/model data.test_split=dev
xmc-trainer adjust outputs/mine/model data.test_split=dev --strengths 0,0.2,0.4
xmc-trainer adjust outputs/mine/model --keep 0.3        # evaluate.py and predict.py then rank with 0.3

Strength s subtracts s * log(training texts of the label / mean over labels) from a label's score, as
model.ffi.logit_adjustment does for a new model (Menon et al., Long-tail learning via logit adjustment, 2021). Choose it
on texts used neither for training nor for the reported metrics. The test set's features are held in memory as float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmc_trainer import calibration
from xmc_trainer.builders.inputs import require_data
from xmc_trainer.checkpoint.folder import CARD
from xmc_trainer.checkpoint.model_config import MODEL_SETTINGS, config_of_model
from xmc_trainer.checkpoint.model_manifest import facts_of_model, require_replaceable
from xmc_trainer.config import Config, changed_card, portable_yaml
from xmc_trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from xmc_trainer.checkpoint.saved_model import SavedModel
    from xmc_trainer.data import Corpus
    from xmc_trainer.encoder.text_encoder import TextEncoder


def evaluate_strengths(
    saved: SavedModel, config: Config, corpus: Corpus, strengths: list[float], device: torch.device
) -> dict[float, dict[str, float]]:
    """Evaluate on the test set of `corpus`: strength -> metrics (0 to 1). The model is unchanged afterwards."""
    import torch

    from xmc_trainer.builders.data import metrics_of
    from xmc_trainer.builders.saved_model import loader_of_test_set
    from xmc_trainer.evaluation import evaluate

    shift = -torch.from_numpy(corpus.log_frequency()).to(device)
    encode = _CachedEncoder(saved.encoder)
    by_strength: dict[float, dict[str, float]] = {}
    for strength in strengths:
        added = (strength - config.model.ffi.logit_adjustment) * shift
        encode.batch = 0
        _add_to_biases(saved, added)
        loader = loader_of_test_set(saved, corpus, config, device)
        metrics = metrics_of(config, corpus)
        by_strength[strength] = evaluate(encode, saved.head, loader, metrics, device, progress=not by_strength)
        _add_to_biases(saved, -added)
    return by_strength


class _CachedEncoder:
    """Encodes each batch once. Later passes, after `batch = 0`, must repeat the batches in the same order."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.batch = encoder, 0
        self.features: list[Tensor] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.batch == len(self.features):
            self.features.append(self.encoder(input_ids, attention_mask))
        self.batch += 1
        return self.features[self.batch - 1]


def _add_to_biases(saved: SavedModel, added: Tensor) -> None:
    """Add `added`, float32 [L], to the biases of all heads."""
    first = 0
    for _, head in saved.head.parts():
        assert head.bias is not None  # the heads of a training have one
        head.bias += added[first : first + head.num_labels]
        first += head.num_labels


def write_strength(saved: SavedModel, config: Config, corpus: Corpus, strength: float) -> None:
    """Replace the model's folder, atomically, by one with the biases of that strength. A calibration is dropped: it fits other scores.

    Raises UserError if the folder contains a file that does not belong to the model.
    """
    import torch
    from safetensors.torch import load_file

    from xmc_trainer.checkpoint.saved_model import replace_model, save_tensors

    added = (config.model.ffi.logit_adjustment - strength) * torch.from_numpy(corpus.log_frequency())
    ffi = dataclasses.replace(config.model.ffi, logit_adjustment=strength)
    yaml = portable_yaml(dataclasses.replace(config, model=dataclasses.replace(config.model, ffi=ffi)))

    def change(copy: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        first = 0  # first label of the head
        for head in manifest["heads"]:
            for shard in head["shards"]:
                tensors = load_file(copy / shard["file"])
                start, stop = (first + label for label in shard["labels"])
                tensors[head["prefix"] + "bias"] += added[start:stop]
                save_tensors(tensors, copy / shard["file"])
            first += head["arguments"]["num_labels"]
        (copy / "config.yaml").write_text(yaml, encoding="utf-8")
        (copy / calibration.FILE).unlink(missing_ok=True)
        if (card := copy / CARD).is_file():
            was = config.model.ffi.logit_adjustment
            said = f"`xmc-trainer adjust` changed `model.ffi.logit_adjustment` from {was:g} to {strength:g}."
            card.write_text(changed_card(card.read_text(encoding="utf-8"), said), encoding="utf-8")
        return {"config_sha256": hashlib.sha256(yaml.encode()).hexdigest()}

    replace_model(saved, change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help=f"override a setting of the model: {', '.join(MODEL_SETTINGS)}"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--strengths", default="0,0.1,0.2,0.3,0.4", help="comma-separated list")
    mode.add_argument(
        "--keep",
        type=float,
        metavar="STRENGTH",
        help="write this strength into the model instead of evaluating; 0 removes it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, strength -> metrics as fractions")
    options = parser.parse_intermixed_args()
    if options.json and options.keep is not None:
        parser.error("--json: prints metrics, which --keep does not compute")
    try:
        strengths = [float(word) for word in options.strengths.split(",")]
    except ValueError:
        parser.error(f"--strengths={options.strengths!r}: must be comma-separated numbers")
    if not all(0 <= strength < float("inf") for strength in (*strengths, options.keep or 0.0)):
        parser.error("--strengths and --keep: must be finite numbers from 0")
    config = config_of_model(options.model, options.settings)
    if not facts_of_model(options.model).has_biases:
        raise UserError(f"{options.model}: its head has no biases, which an adjustment changes; name another model")
    if options.keep is not None:
        require_replaceable(options.model)
    require_data(config, options.model)

    # torch and transformers import slowly; the checks above do not wait for them.
    import torch

    from xmc_trainer.builders.saved_model import corpus_of_saved
    from xmc_trainer.metrics import table
    from xmc_trainer.model import XMCModel

    device = torch.device(config.environment.device_name())
    saved = XMCModel.load(options.model, device).saved
    corpus = corpus_of_saved(saved, config)
    if options.keep is not None:
        write_strength(saved, config_of_model(options.model, []), corpus, options.keep)
        dropped = "; its calibration is removed, run xmc-trainer calibrate again" * (saved.calibration is not None)
        print(f"{options.model}: logit_adjustment {config.model.ffi.logit_adjustment:g} -> {options.keep:g}{dropped}")
        return
    by_strength = evaluate_strengths(saved, config, corpus, strengths, device)
    if options.json:
        print(json.dumps(by_strength))
        return
    print(
        f"{config.data.test_split}: {len(corpus.test)} texts, per cent; the model's own strength is "
        f"{config.model.ffi.logit_adjustment:g}"
    )
    print(table({f"{strength:g}": metrics for strength, metrics in by_strength.items()}))
