"""The saved model: a folder of safetensors, JSON, YAML and Parquet. No pickle.

manifest.json              format, shapes, label ranges and checksums; read first, see `folder`
config.yaml                the resolved configuration of the run
encoder/                   Hugging Face layout, plus penultimate.safetensors if the encoder has that layer
tokenizer/                 Hugging Face layout
head-00000-of-00001.safetensors   one per rank: weight, index, bias of its labels; frequent.weight ... in a split head
labels.parquet             id and text of each label
README.md                  the model card, if the model has one; not in the manifest, because people edit it
calibration.safetensors    only after `xmc-trainer calibrate`: probabilities and thresholds; see `xmc_trainer.calibration`
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.special import expit
from torch import Tensor

import xmc_trainer
from xmc_trainer import calibration
from xmc_trainer.checkpoint.folder import CARD, MANIFEST, read_folder, save_folder, tensor_header
from xmc_trainer.checkpoint.model_manifest import MODEL, require_replaceable
from xmc_trainer.errors import UserError
from xmc_trainer.files import sync
from xmc_trainer.head import SGD, FixedFanInHead, Head
from xmc_trainer.head.rewire import index_dtype
from xmc_trainer.head.split import FREQUENT, head_of_parts
from xmc_trainer.parallel import Ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from xmc_trainer.encoder.text_encoder import TextEncoder

_HEAD_TENSORS = ("weight", "index", "bias")
# safetensors' names for the dtypes of a head's tensors.
STORED_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int16: "I16", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8",
}  # fmt: skip


def save_tensors(tensors: dict[str, Tensor], path: Path, rank: int = 0) -> None:
    """Write a rank's safetensors file, and sync it to disk unless `save_folder` does (rank 0)."""
    save_file(tensors, path)
    if rank:
        sync(path)


def save_model(
    folder: Path,
    *,
    encoder: TextEncoder,
    encoder_state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    labels: Dataset,
    max_len: int,
    step: int,
    config_yaml: str,
    card: str | None = None,
) -> None:
    """Write a model folder atomically. Collective; all ranks must share the file system.

    Args:
        encoder_state: the full state dict of `encoder`, on rank 0.
        labels: columns id and text, in label order.
        max_len: maximal number of tokens per text.
        card: content of README.md.
    Raises CannotWrite on all ranks if a write of any rank fails.
    """
    ranks, parts = head.ranks, head.parts()
    shards = shard_names(ranks)

    def write(partial: Path) -> dict[str, Any] | None:
        tensors = {
            prefix + name: tensor.contiguous()
            for prefix, part in parts
            for name, tensor in zip(_HEAD_TENSORS, (part.weight, part.index, part.ranking_bias), strict=True)
            if tensor is not None
        }
        save_tensors(tensors, partial / shards[ranks.rank], ranks.rank)
        if ranks.rank:
            return None
        encoder.save_pretrained(partial / "encoder", encoder_state)
        tokenizer.save_pretrained(partial / "tokenizer")
        pyarrow.parquet.write_table(labels.with_format("arrow")[:], partial / "labels.parquet")
        (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        return {
            "xmc_trainer": xmc_trainer.__version__,
            "step": step,
            "max_len": max_len,
            "config_sha256": hashlib.sha256(config_yaml.encode()).hexdigest(),
            "encoder": {
                "pool_mode": encoder.pool_mode,
                "feature_layers": encoder.feature_layers,
                "penultimate_size": encoder.out_features if encoder.penultimate is not None else None,
                "penultimate_activation": encoder.penultimate_activation,
            },
            "heads": [_description(prefix, part, shards) for prefix, part in parts],
        }

    save_folder(folder, ranks, MODEL, write)


def shard_names(ranks: Ranks) -> list[str]:
    """Return the file name of each rank's shard."""
    return [f"head-{rank:05d}-of-{ranks.size:05d}.safetensors" for rank in range(ranks.size)]


def shard_ranges(head: FixedFanInHead, shards: list[str]) -> list[dict[str, Any]]:
    """Return the range of the head's labels in each file, as the manifest stores it."""
    ranges = (head.labels_of(rank) for rank in range(len(shards)))
    return [{"file": name, "labels": [part.start, part.stop]} for name, part in zip(shards, ranges)]


def load_shards(
    head: FixedFanInHead, folder: Path, prefix: str, shards: list[dict[str, Any]], names: Iterable[str]
) -> None:
    """Read this rank's labels of the tensors `names`, skipping tensors that a file does not have."""
    for shard in shards:
        first, last = shard["labels"]
        start, stop = max(first, head.labels.start), min(last, head.labels.stop)
        if start >= stop:
            continue
        tensors = {}
        with safe_open(folder / shard["file"], framework="pt") as file:
            for name in names:
                if prefix + name in file.keys():
                    unit = head.group_size if name == "index" else 1
                    rows = slice((start - first) // unit, -(-(stop - first) // unit))
                    tensors[name] = file.get_slice(prefix + name)[rows]
        head.load_labels(range(start, stop), tensors)


def _description(prefix: str, head: FixedFanInHead, shards: list[str]) -> dict[str, Any]:
    """Describe a head for the manifest: constructor arguments, and the range of labels in each file."""
    return {
        "prefix": prefix,
        "arguments": {
            "in_features": head.in_features,
            "num_labels": head.num_labels,
            "fan_in": head.fan_in,
            "group_size": head.group_size,
            "bias": head.bias is not None,
            "loss": head.loss_name,
            "weight_dtype": str(head.weight.dtype).removeprefix("torch."),
        },
        "shards": shard_ranges(head, shards),
    }


@dataclass(frozen=True)
class SavedModel:
    """A loaded model, ready for inference on one device."""

    encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    head: Head
    label_ids: Any  # pyarrow string columns, in label order
    label_texts: Any
    max_len: int
    folder: Path
    manifest: dict[str, Any]  # of the folder when it was loaded
    calibration: calibration.Calibration | None = None

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return the scores of predictions, float32, for logits of any shape: calibrated, or the sigmoid for bce, or the margin itself."""
        if self.calibration is not None:
            return self.calibration.scores(logits)
        return expit(logits) if self.head.loss_name == "bce" else logits

    def chosen(self, scores: np.ndarray, labels: np.ndarray, threshold: float | str | None) -> np.ndarray:
        """Tell which of the k best labels a threshold lets through, bool [texts, k].

        Args:
            scores, labels: [texts, k].
            threshold: a score, "fitted" for those of `xmc-trainer calibrate`, or None for no threshold. Raises UserError for others, and if
                the model has no fitted ones.
        """
        if threshold is None:
            return np.full(scores.shape, True)
        if isinstance(threshold, str) and threshold == "fitted":
            if self.calibration is None:
                raise UserError(f"{self.folder}: has no fitted thresholds; run xmc-trainer calibrate on it")
            return self.calibration.chosen(scores, labels)
        if not isinstance(threshold, (int, float, np.number)) or threshold != threshold:
            raise UserError(f"threshold={threshold}: must be a number or 'fitted'")
        return scores >= np.float32(threshold)


def replace_model(saved: SavedModel, change: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """Replace a model's folder, atomically, by a changed copy.

    Args:
        change: gets the copy and its manifest, edits the files, and returns entries of the manifest to replace.
    Raises UserError if the folder contains a file that does not belong to the model, cannot be replaced, or holds another model than
    `saved`, for which the change was not made.
    """
    folder = saved.folder
    require_replaceable(folder)
    manifest = read_folder(folder, MODEL)
    if manifest != saved.manifest:
        raise UserError(f"{folder}: was replaced while this command ran; run it again")

    def write(partial: Path) -> dict[str, Any]:
        shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        return {name: manifest[name] for name in MODEL.shape} | change(partial, manifest)

    save_folder(folder, saved.head.ranks, MODEL, write)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> SavedModel:
    """Load a folder of `save_model`, written by any number of ranks. The head holds only this rank's labels.

    Raises UserError if the folder is not a saved model, has an unknown format, or a file differs from the manifest.
    """
    # This imports transformers, which takes seconds. Sweeps, which only look for checkpoints, need not wait for it.
    from xmc_trainer.encoder.loading import check_tokens_fit, load_backbone, load_tokenizer
    from xmc_trainer.encoder.text_encoder import TextEncoder

    folder = Path(folder)
    manifest = read_folder(folder, MODEL)
    described = manifest["heads"]
    for name in manifest["sha256"]:
        if name.startswith("encoder/") and not name.endswith((".json", ".safetensors")):
            raise UserError(f"{folder / name}: may hold code; a saved encoder has only .json and .safetensors files")
    try:
        _check_heads(folder, manifest)
        num_labels = sum(each["arguments"]["num_labels"] for each in described)
        labels = _read_labels(folder / "labels.parquet", num_labels)
        calibrated = calibration.FILE in manifest["sha256"]
        found = calibration.Calibration.load(folder / calibration.FILE, num_labels) if calibrated else None
    except ValueError as error:
        raise UserError(f"{folder}: {error}; save the model again") from None
    backbone, tokenizer = (
        load_backbone(str(folder / "encoder"), saved=True),
        load_tokenizer(str(folder / "tokenizer"), saved=True),
    )
    options, max_len_is = manifest["encoder"], f"{folder}: max_len={manifest['max_len']} in manifest.json"
    check_tokens_fit(
        backbone, tokenizer, manifest["max_len"], tokenizer_is=str(folder / "tokenizer"), max_len_is=max_len_is
    )
    if options["feature_layers"] > getattr(backbone.config, "num_hidden_layers", 1):
        raise UserError(
            f"{folder}: the encoder has fewer than {options['feature_layers']} layers; save the model again"
        )
    encoder = TextEncoder(backbone, **options)
    _check_encoder(encoder, folder, described[0]["arguments"]["in_features"])
    encoder.load_penultimate(folder / "encoder")
    heads = [_load_head(folder, description, device) for description in described]
    head = head_of_parts(heads)
    return SavedModel(
        encoder=encoder.to(device).eval(),
        tokenizer=tokenizer,
        head=head.eval(),
        label_ids=labels["id"],
        label_texts=labels["text"],
        max_len=manifest["max_len"],
        folder=folder,
        manifest=manifest,
        calibration=found,
    )


def _check_heads(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that the heads' files fit the manifest, before memory is allocated for them. Raises ValueError."""
    described = manifest["heads"]
    prefixes = [each["prefix"] for each in described]
    if prefixes not in ([""], [FREQUENT, ""]):
        raise ValueError(f"has the heads {prefixes}, which must be one head, or a frequent and a tail part")
    if len({(each["arguments"]["in_features"], each["arguments"]["loss"]) for each in described}) > 1:
        raise ValueError("its two heads differ in in_features or loss")
    headers: dict[str, dict[str, Any]] = {}
    for each in described:
        options = each["arguments"]
        d, fan_in = options["in_features"], options["fan_in"]
        if fan_in is not None and fan_in > d:
            raise ValueError(f"its fan_in {fan_in} exceeds its {d} features")
        group = 1 if fan_in is None else options["group_size"]
        rows = {
            "weight": (STORED_DTYPES[getattr(torch, options["weight_dtype"])], [1, fan_in or d]),
            "index": None if fan_in is None else (STORED_DTYPES[index_dtype(d)], [group, fan_in]),
            "bias": ("F32", [1]) if options["bias"] else None,
        }
        check_shards(
            folder, each["shards"], options["num_labels"], options["group_size"], each["prefix"], rows, headers
        )
    if left := [name for file, header in headers.items() for name in header]:
        raise ValueError(f"a head's file holds the unknown tensor {left[0]!r}")


def check_shards(
    folder: Path,
    shards: list[dict[str, Any]],
    labels: int,
    group_size: int,
    prefix: str,
    rows: Mapping[str, tuple[str, list[int]] | None],
    headers: dict[str, dict[str, Any]],
) -> None:
    """Check the shards of a head. Raises ValueError.

    The files' ranges must cover the labels 0 to `labels` in order, cut between groups, and the tensors must fit the
    ranges.

    Args:
        rows: tensor name -> (safetensors' dtype name, [labels per row, columns ...]); None for a tensor that must be
            absent.
        headers: file name -> `tensor_header`. Filled here; tensors that were checked are removed.
    """
    at = 0
    for shard in shards:
        name, (start, stop) = shard["file"], shard["labels"]
        if start != at or stop <= start or stop > labels or (stop % group_size and stop != labels):
            raise ValueError(
                f"{name} has the labels {start} to {stop} of {labels}, but must begin at {at} and end between groups "
                f"of {group_size}"
            )
        at = stop
        header = headers.setdefault(name, tensor_header(folder / name))
        for tensor, row in rows.items():
            found = header.pop(prefix + tensor, None)
            expected = row and (row[0], [-(-(stop - start) // row[1][0]), *row[1][1:]])
            if found != expected:
                raise ValueError(f"{name}: {prefix + tensor} is {_described(found)}, must be {_described(expected)}")
    if at != labels:
        raise ValueError(f"its files have {at} of {labels} labels")


def _described(tensor: tuple[str, list[int]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {tensor[1]}"


def _check_encoder(encoder: TextEncoder, folder: Path, features: int) -> None:
    """Raise UserError unless the encoder, its penultimate layer's file and the head's `features` fit together."""
    if encoder.out_features != features:
        raise UserError(
            f"{folder}: the encoder has {encoder.out_features} features, the head needs {features}; save the model again"
        )
    if encoder.penultimate is not None:
        expected = {
            f"penultimate.{name}": list(value.shape) for name, value in encoder.penultimate.state_dict().items()
        }
        path = folder / "encoder" / "penultimate.safetensors"
        if expected != {name: shape for name, (_, shape) in tensor_header(path).items()}:
            raise UserError(f"{path}: does not fit this model, which needs {expected}; save the model again")


def _read_labels(path: Path, count: int) -> Any:
    """Read the table of label ids and texts. ValueError if it is damaged or does not have `count` labels."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if file.metadata.num_rows != count or {"id", "text"} - set(file.schema_arrow.names):
            raise ValueError(
                f"{path.name} has {file.metadata.num_rows} labels with the columns {file.schema_arrow.names}, must "
                f"have {count} with id and text"
            )
        return file.read(["id", "text"])
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None


def _load_head(folder: Path, description: dict[str, Any], device: str | torch.device) -> FixedFanInHead:
    options, prefix = dict(description["arguments"]), description["prefix"]
    options["weight_dtype"] = getattr(torch, options["weight_dtype"])
    # Start on the meta device, so that no random weights are drawn only to be overwritten.
    head = FixedFanInHead(**options, optimizer=SGD(), device="meta").to_empty(device=device)
    head.skipped.zero_()
    load_shards(head, folder, prefix, description["shards"], _HEAD_TENSORS)
    check_index(head, folder)
    return head


def check_index(head: FixedFanInHead, folder: Path) -> None:
    """Raise UserError if the index names a feature out of range, because kernels would read out of bounds."""
    if head.index is not None and not 0 <= int(head.index.min()) <= int(head.index.max()) < head.in_features:
        raise UserError(
            f"{folder}: its index names features beyond the {head.in_features} of the encoder; save it again"
        )
