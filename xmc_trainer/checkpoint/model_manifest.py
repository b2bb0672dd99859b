"""The manifest of a saved model: what is known of it within a moment, because reading it needs neither torch nor the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from xmc_trainer import calibration
from xmc_trainer.checkpoint.folder import (
    CARD,
    MANIFEST,
    NAME,
    SHA256,
    TEXT,
    Kind,
    ListOf,
    one_of,
    or_null,
    read_manifest,
    verify_file,
    whole,
)
from xmc_trainer.config.schema import LOSS_REDUCTIONS
from xmc_trainer.errors import UserError
from xmc_trainer.files import PARTIAL, check_can_create, writing

SHARDS = ListOf({"file": NAME, "labels": (whole(0), whole(1))})
_HEAD = {
    "prefix": one_of("", "frequent."),
    "arguments": {
        "in_features": whole(1, 1 << 16),
        "num_labels": whole(1),
        "fan_in": or_null(whole(1, 1 << 16)),
        "group_size": whole(1),
        "bias": one_of(True, False),
        "loss": one_of(*LOSS_REDUCTIONS),
        "weight_dtype": one_of("float32", "bfloat16"),
    },
    "shards": SHARDS,
}
MODEL = Kind(
    name="a saved model",
    formats=(3, 4),  # 3: a list of heads, index rows ascending; 4: a digest of the manifest
    signed=4,
    shape={
        "xmc_trainer": TEXT,
        "step": whole(0),
        "max_len": whole(1),
        "config_sha256": SHA256,
        "encoder": {
            "pool_mode": one_of("last_hidden_avg", "last_nhidden_conlast", "last_token"),
            "feature_layers": whole(1),
            "penultimate_size": or_null(whole(1, 1 << 16)),
            "penultimate_activation": one_of("relu", "gelu", "tanh", "none"),
        },
        "heads": ListOf(_HEAD),
    },
    files=lambda manifest: [
        "config.yaml",
        "labels.parquet",
        "encoder/config.json",
        "tokenizer/tokenizer_config.json",
        *(["encoder/penultimate.safetensors"] if manifest["encoder"]["penultimate_size"] else []),
        *(shard["file"] for head in manifest["heads"] for shard in head["shards"]),
    ],
)


class ModelFacts(NamedTuple):
    """What the manifest of a saved model says."""

    labels: int
    has_biases: bool
    is_calibrated: bool
    feature_layers: int


def facts_of_model(folder: Path) -> ModelFacts:
    """Read a model's manifest. Raises UserError if the folder is not a saved model, or lacks a file.

    The content of its files is not verified, as `load_model` does.
    """
    manifest = read_manifest(folder, MODEL)
    heads = [head["arguments"] for head in manifest["heads"]]
    return ModelFacts(
        labels=sum(head["num_labels"] for head in heads),
        has_biases=all(head["bias"] for head in heads),
        is_calibrated=calibration.FILE in manifest["sha256"],
        feature_layers=manifest["encoder"]["feature_layers"],
    )


def require_replaceable(folder: Path) -> None:
    """Raise UserError unless a model's folder can be replaced by a changed copy: it holds nothing else, and can be written."""
    own = {*read_manifest(folder, MODEL)["sha256"], MANIFEST, CARD}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in own:
            raise UserError(f"{path}: does not belong to the model, whose folder is replaced; move it elsewhere first")
    with writing(folder):
        check_can_create(Path(os.path.realpath(folder) + PARTIAL))


def read_label_ids(folder: Path) -> list[str]:
    """Return the names of a model's labels, in order. Raises UserError if their file is damaged."""
    import pyarrow.parquet

    path = verify_file(folder, "labels.parquet")
    try:
        return pyarrow.parquet.read_table(path, columns=["id"])["id"].to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or save the whole folder again") from None
