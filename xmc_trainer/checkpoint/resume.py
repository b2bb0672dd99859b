"""Checkpoints: an interrupted run resumes from one exactly as if it had not been interrupted.

A checkpoint is a folder that is written atomically, see `checkpoint.folder`. It holds no pickle.

manifest.json              format, step and epoch, the state of the hooks, checksums
config.yaml                the run's configuration
encoder.safetensors        weights and optimizer state of the encoder, whole and in float32, see `encoder_state`
head-00000-of-00001.safetensors   one file per rank: weights, index, bias and optimizer state of its labels
recent.safetensors         features and labels of the latest steps, for growth by gradient

Nothing in it depends on the engine or the number of ranks that wrote it. The order of the texts and the random numbers
of a step follow from seed, epoch, step and rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmc_trainer.checkpoint.encoder_state import EncoderState
from xmc_trainer.checkpoint.finite import require_finite
from xmc_trainer.checkpoint.folder import (
    NUMBER,
    TEXT,
    Entry,
    Kind,
    ListOf,
    MapOf,
    or_null,
    read_folder,
    save_folder,
    tensor_header,
    whole,
)
from xmc_trainer.checkpoint.model_manifest import SHARDS
from xmc_trainer.checkpoint.saved_model import (
    STORED_DTYPES,
    check_index,
    check_shards,
    load_shards,
    save_tensors,
    shard_names,
    shard_ranges,
)
from xmc_trainer.config import to_yaml
from xmc_trainer.engine.accelerator import own_weights
from xmc_trainer.errors import UserError
from xmc_trainer.files import writing
from xmc_trainer.head import FixedFanInHead
from xmc_trainer.run_folder import ELSEWHERE, checkpoint_folder, remove_checkpoints

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer

_LOSS_SCALE = Entry(
    "null, or numbers with scale and good_steps among them",
    lambda value: value is None
    or isinstance(value, dict) and value.keys() >= {"scale", "good_steps"} and all(NUMBER.holds(each) for each in value.values()),
)  # fmt: skip
CHECKPOINT = Kind(
    name="a checkpoint",
    formats=(2,),  # format 1 names the texts by a fingerprint that this version does not compute
    signed=2,
    shape={
        "step": whole(0),
        "epoch": whole(0),
        "not_finite": whole(0),
        "metrics": MapOf(TEXT, MapOf(TEXT, NUMBER)),
        "corpus": TEXT,
        "label_order": TEXT,
        "encoder": {"states": ListOf(TEXT), "steps": NUMBER, "loss_scale": _LOSS_SCALE},
        "heads": ListOf(
            {
                "prefix": TEXT,
                "fan_in": or_null(whole(1, 1 << 16)),
                "group_size": whole(1),
                "steps": whole(0),
                "skipped": whole(0),
                "recent": whole(0),
                "shards": SHARDS,
            }
        ),
        "hooks": ListOf((TEXT, Entry("an object", lambda value: isinstance(value, dict)))),
    },
    files=lambda manifest: [
        "config.yaml",
        "encoder.safetensors",
        "recent.safetensors",
        *(shard["file"] for head in manifest["heads"] for shard in head["shards"]),
    ],
)


def save(trainer: Trainer, kept: int) -> Path:
    """Write the training's checkpoint, between two optimizer steps, and return its folder; every rank must call.

    Once it is on the disk, all but the last `kept` checkpoints are removed. Raises, on all ranks, UserError if weights are not
    finite and CannotWrite if the disk of one of them fails.
    """
    ranks, state = trainer.ranks, trainer.state
    own = (*own_weights(trainer.encoder_module, ranks.rank), *trainer.head_tensors())
    require_finite(own, ranks, trainer.device, state.step, trainer.run_folder)
    encoder = EncoderState(trainer.accelerator, trainer.encoder, trainer.optimizer)
    tensors = {}
    for name, value in encoder.tensors():
        if ranks.rank == 0:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    heads, shards = trainer.heads(), shard_names(ranks)

    def write(partial: Path) -> dict[str, Any] | None:
        own = {prefix + name: value.contiguous() for prefix, head in heads for name, value in head.state_dict().items()}
        save_tensors(own, partial / shards[ranks.rank], ranks.rank)
        if ranks.rank:
            return None
        save_file(tensors, partial / "encoder.safetensors")
        recent = {
            f"{prefix}{number}.{name}": value.contiguous()
            for prefix, head in heads
            for number, step in enumerate(head.recent_steps())
            for name, value in step.items()
        }
        save_file(recent, partial / "recent.safetensors")
        (partial / "config.yaml").write_text(to_yaml(trainer.config), encoding="utf-8")
        return {
            "step": state.step,
            "epoch": state.epoch,
            "not_finite": trainer.records.not_finite,
            "metrics": trainer.metrics,
            "corpus": trainer.corpus.fingerprint,
            "label_order": trainer.corpus.label_order,
            "encoder": {"states": encoder.names(), "steps": encoder.steps(), "loss_scale": encoder.loss_scale()},
            "heads": [
                {
                    "prefix": prefix,
                    "fan_in": head.fan_in,
                    "group_size": head.group_size,
                    "steps": head.steps,
                    "skipped": int(head.skipped),
                    "recent": len(head.recent_steps()),
                    "shards": shard_ranges(head, shards),
                }
                for prefix, head in heads
            ],
            "hooks": [[type(hook).__name__, hook.state_dict()] for hook in trainer.hooks],
        }

    folder = checkpoint_folder(trainer.run_folder, state.step)
    save_folder(folder, ranks, CHECKPOINT, write)
    with ranks.together(), writing(trainer.run_folder, ELSEWHERE):
        if ranks.rank == 0:
            remove_checkpoints(trainer.run_folder, kept)
    return folder


def restore(folder: Path, trainer: Trainer) -> None:
    """Load a checkpoint into a trainer that was just built; every rank must call.

    Raises UserError, on all ranks, if the checkpoint is damaged or does not fit the trainer.
    """
    corpus, ranks, manifest = trainer.corpus, trainer.ranks, None
    with ranks.together():
        if ranks.rank == 0:
            manifest = read_folder(folder, CHECKPOINT, f"put it back, or remove {folder} to continue without it")
    manifest = ranks.broadcast(manifest)
    with ranks.together():
        former = corpus.former_fingerprint
        if manifest["corpus"] != corpus.fingerprint and (former is None or manifest["corpus"] != former()):
            raise UserError(
                f"{folder}: was made with other texts or another tokenizer; restore them, or name another run with "
                "log_fname"
            )
    if manifest["label_order"] != corpus.label_order:
        raise UserError(f"{folder}: was made with other label clusters; restore {trainer.config.cluster_file}")
    try:
        _restore_state(folder, manifest, trainer)
        _restore_heads(folder, manifest["heads"], trainer)
    except ValueError as error:
        raise UserError(
            f"{folder}: does not fit this training ({error}); remove {folder} to continue without it"
        ) from None
    try:
        _restore_encoder(folder, manifest["encoder"], trainer)
    except ValueError as error:
        raise UserError(f"{folder}: was made with another encoder ({error}); set `encoder_model` to it") from None
    states = list(manifest["hooks"])
    for hook in trainer.hooks:
        # By class name and in order: the run may have other hooks now.
        number = next((i for i, (name, _) in enumerate(states) if name == type(hook).__name__), None)
        if number is not None:
            name, state = states.pop(number)
            try:
                hook.load_state_dict(state)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{folder}: its state of {name} cannot be loaded ({error!r}); use the code that wrote it"
                ) from error


def _restore_state(folder: Path, manifest: dict[str, Any], trainer: Trainer) -> None:
    state, step, epoch = trainer.state, manifest["step"], manifest["epoch"]
    if step > state.total_steps or not 0 <= step - epoch * state.steps_per_epoch <= state.steps_per_epoch:
        raise ValueError(
            f"step {step} in epoch {epoch + 1}, and there are {state.total_steps} steps, {state.steps_per_epoch} an epoch"
        )
    state.step, state.epoch = step, epoch
    trainer.records.not_finite, trainer.metrics = manifest["not_finite"], manifest["metrics"]


def _restore_encoder(folder: Path, saved: dict[str, Any], trainer: Trainer) -> None:
    encoder = EncoderState(trainer.accelerator, trainer.encoder, trainer.optimizer)
    left = tensor_header(folder / "encoder.safetensors")
    with safe_open(folder / "encoder.safetensors", framework="pt") as file:

        def get(name: str) -> Tensor:
            dtype, _ = left.pop(name, ("missing", None))
            if dtype != "F32":
                raise ValueError(f"{name} is {dtype}, must be F32")
            return file.get_tensor(name)

        encoder.load(get, tuple(saved["states"]), saved["steps"])
    if left:
        raise ValueError(f"it has {min(left)}, which no part of the training reads")
    encoder.load_loss_scale(saved["loss_scale"])


def _restore_heads(folder: Path, described: list[dict[str, Any]], trainer: Trainer) -> None:
    """Load all heads. Raises ValueError if the files do not fit them."""
    heads = trainer.heads()
    if [each["prefix"] for each in described] != [prefix for prefix, _ in heads]:
        raise ValueError(f"it has the heads {[each['prefix'] for each in described]}")
    headers: dict[str, dict[str, Any]] = {}
    tensor_header(folder / "recent.safetensors")
    recent = load_file(folder / "recent.safetensors")
    for (prefix, head), each in zip(heads, described):
        if each["fan_in"] is not None and head.index is None:
            head.become_sparse(min(each["fan_in"], head.in_features), each["group_size"])
        if (each["fan_in"], each["group_size"]) != (head.fan_in, head.group_size):
            raise ValueError(
                f"fan_in {each['fan_in']} in groups of {each['group_size']}, not {head.fan_in} of {head.group_size}"
            )
        state = head.state_dict()
        rows = {
            name: (STORED_DTYPES[value.dtype], [head.group_size if name == "index" else 1, *value.shape[1:]])
            for name, value in state.items()
        }
        check_shards(folder, each["shards"], head.num_labels, head.group_size, prefix, rows, headers)
        load_shards(head, folder, prefix, each["shards"], state)
        check_index(head, folder)
        head.steps = each["steps"]
        head.skipped.fill_(each["skipped"])
        head.load_recent_steps([_recent_step(recent, f"{prefix}{number}.", head) for number in range(each["recent"])])
    if recent:
        raise ValueError(f"it has {min(recent)}, which no part of the training reads")


def _recent_step(recent: dict[str, Tensor], prefix: str, head: FixedFanInHead) -> dict[str, Tensor]:
    """Take one step for `FixedFanInHead.load_recent_steps` out of `recent`. Raises ValueError if it does not fit the head."""
    if missing := {f"{prefix}{name}" for name in ("features", "labels", "rows")} - recent.keys():
        raise ValueError(f"{min(missing)} is not in it")
    step = {name: recent.pop(prefix + name) for name in ("features", "labels", "rows")}
    features, labels, rows = step.values()
    fits = features.ndim == 2 and features.shape[1] == head.in_features and features.dtype == head.product_dtype
    fits = fits and labels.shape == rows.shape == (len(rows),) and labels.dtype == rows.dtype == torch.int64
    if not fits or len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(features):
        raise ValueError(f"{prefix}features, labels and rows do not fit each other or the head")
    return step
