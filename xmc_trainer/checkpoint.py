"""The saved model: a folder of safetensors, JSON, YAML and Parquet. No pickle.

manifest.json              format, shapes, label range and checksum of every file: the first thing read
config.yaml                the resolved configuration of the run
encoder/                   Hugging Face layout, and penultimate.safetensors if there is such a layer
tokenizer/                 Hugging Face layout
head-00000-of-00001.safetensors   one a rank: weight, index, bias of its labels (and of frequent ones: frequent.weight ...)
labels.parquet             id and text of every label
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import xmc_trainer
from xmc_trainer.errors import UserError
from xmc_trainer.head import SGD, FixedFanInHead, SplitHead
from xmc_trainer.parallel import Ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from xmc_trainer.encoder import TextEncoder

FORMAT = 3  # 2: every row of the index is ascending; 3: a list of heads
_HEAD_TENSORS = ("weight", "index", "bias")
_FREQUENT = "frequent."  # prefix of a split head's first part


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_model(
    folder: Path,
    *,
    encoder: TextEncoder,
    encoder_state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    head: FixedFanInHead | SplitHead,
    labels: Dataset,
    max_len: int,
    step: int,
    config_yaml: str,
) -> None:
    """Write the model; every rank must call, on one file system. The folder appears whole or not at all.

    Args:
        encoder_state: the full state dict of `encoder`, on the main rank.
        labels: columns id and text, in label order.
        max_len: tokens a text is cut to.
    """
    ranks = head.ranks
    partial = begin_folder(folder, ranks)
    shards = shard_names(ranks)
    parts = head_parts(head)
    tensors = {
        prefix + name: tensor.contiguous()
        for prefix, part in parts
        for name, tensor in zip(_HEAD_TENSORS, (part.weight, part.index, part.ranking_bias), strict=True)
        if tensor is not None
    }
    save_file(tensors, partial / shards[ranks.rank])
    manifest: dict[str, Any] = {}
    if ranks.rank == 0:
        encoder.save_pretrained(partial / "encoder", encoder_state)
        tokenizer.save_pretrained(partial / "tokenizer")
        pyarrow.parquet.write_table(labels.with_format("arrow")[:], partial / "labels.parquet")
        (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
        penultimate = encoder.penultimate is not None
        manifest = {
            "format": FORMAT,
            "xmc_trainer": xmc_trainer.__version__,
            "step": step,
            "max_len": max_len,
            "config_sha256": hashlib.sha256(config_yaml.encode()).hexdigest(),
            "encoder": {
                "pool_mode": encoder.pool_mode,
                "feature_layers": encoder.feature_layers,
                "penultimate_size": encoder.out_features if penultimate else None,
                "penultimate_activation": encoder.penultimate_activation,
            },
            "heads": [_description(prefix, part, shards) for prefix, part in parts],
        }
    finish_folder(partial, folder, ranks, manifest)


def begin_folder(folder: Path, ranks: Ranks) -> Path:
    """Where the ranks write what is to be `folder`, on one file system; empty."""
    partial = folder.with_name(folder.name + ".partial")
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    return partial


def finish_folder(partial: Path, folder: Path, ranks: Ranks, manifest: dict[str, Any]) -> None:
    """Put the folder in its place, whole, once every rank has written its files.

    Args: manifest: rank 0's; the checksums of all files are added to it.
    """
    ranks.barrier()
    if ranks.rank == 0:
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        manifest = manifest | {"sha256": {str(path.relative_to(partial)): _sha256(path) for path in files}}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        mask = os.umask(0)
        os.umask(mask)
        for path in files:
            path.chmod(0o666 & ~mask)  # safetensors' files would be for their writer alone
        _swap_in(partial, folder)
    ranks.barrier()


def read_manifest(folder: Path, known_format: int, what: str) -> dict[str, Any]:
    """The manifest of `finish_folder`. UserError if there is none, or of another format; `what` the folder should be."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        inside = folder / "model"
        found = f", such as {inside}" if os.path.isfile(inside / "manifest.json") else ""  # whatever the name
        raise UserError(f"{path}: {error.strerror}; name the folder of {what}{found}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error.msg}); {what} has to be saved again") from None
    if manifest.get("format") != known_format:
        raise UserError(f"{path}: format {manifest.get('format')}, this version reads {known_format}")
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any], remedy: str = "copy or save the whole folder again") -> None:
    """UserError for a file that is missing or whose checksum is another."""
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; {remedy}")
        if _sha256(path) != expected:
            raise UserError(f"{path}: damaged, its checksum differs from manifest.json; {remedy}")


def shard_names(ranks: Ranks) -> list[str]:
    """Of the file of each rank."""
    return [f"head-{rank:05d}-of-{ranks.size:05d}.safetensors" for rank in range(ranks.size)]


def shard_ranges(head: FixedFanInHead, shards: list[str]) -> list[dict[str, Any]]:
    """Which of the head's labels each file has."""
    ranges = (head.labels_of(rank) for rank in range(len(shards)))
    return [{"file": name, "labels": [part.start, part.stop]} for name, part in zip(shards, ranges)]


def load_shards(
    head: FixedFanInHead, folder: Path, prefix: str, shards: list[dict[str, Any]], names: Iterable[str]
) -> None:
    """Read this rank's labels of the tensors `names`, of which none or all of a file's may be missing."""
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


def head_parts(head: FixedFanInHead | SplitHead) -> list[tuple[str, FixedFanInHead]]:
    """(prefix of its tensors, head), in the order of their labels."""
    return [(_FREQUENT, head.frequent), ("", head.tail)] if isinstance(head, SplitHead) else [("", head)]


def _description(prefix: str, head: FixedFanInHead, shards: list[str]) -> dict[str, Any]:
    """What a head is made from again: arguments of its class, and which of its labels each file has."""
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


def _swap_in(partial: Path, folder: Path) -> None:
    # At every moment one of the three names has a whole folder.
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class SavedModel:
    """What `load_model` gives: ready for inference on one device."""

    encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    head: FixedFanInHead | SplitHead
    label_ids: Any  # pyarrow string columns, in label order
    label_texts: Any
    max_len: int
    folder: Path


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> SavedModel:
    """Read a folder of `save_model`, whatever number of ranks wrote it; of the labels those of this rank.

    Raises UserError if the folder is not a model, is of another format, or a file does not match its checksum.
    """
    # It imports transformers, which takes seconds: who only looks for checkpoints, as a sweep does, need not wait for it.
    from xmc_trainer.encoder import TextEncoder, check_tokens_fit, load_backbone, load_tokenizer

    folder = Path(folder)
    manifest = read_manifest(folder, FORMAT, "a saved model")
    verify_files(folder, manifest)
    backbone, tokenizer = load_backbone(str(folder / "encoder"), saved=True), load_tokenizer(str(folder / "tokenizer"), saved=True)
    max_len_is = f"{folder}: max_len={manifest['max_len']} in manifest.json"
    check_tokens_fit(backbone, tokenizer, manifest["max_len"], tokenizer_is=str(folder / "tokenizer"), max_len_is=max_len_is)
    encoder = TextEncoder(backbone, **manifest["encoder"])
    encoder.load_penultimate(folder / "encoder")
    heads = [_load_head(folder, description, device) for description in manifest["heads"]]
    head = SplitHead(*heads) if len(heads) > 1 else heads[0]
    table = pyarrow.parquet.read_table(folder / "labels.parquet")
    return SavedModel(
        encoder=encoder.to(device).eval(),
        tokenizer=tokenizer,
        head=head.eval(),
        label_ids=table["id"],
        label_texts=table["text"],
        max_len=manifest["max_len"],
        folder=folder,
    )


def _load_head(folder: Path, description: dict[str, Any], device: str | torch.device) -> FixedFanInHead:
    options, prefix = dict(description["arguments"]), description["prefix"]
    options["weight_dtype"] = getattr(torch, options["weight_dtype"])
    # Made without memory first: nothing is drawn at random only to be overwritten.
    head = FixedFanInHead(**options, optimizer=SGD(), device="meta").to_empty(device=device)
    head.skipped.zero_()
    load_shards(head, folder, prefix, description["shards"], _HEAD_TENSORS)
    return head
