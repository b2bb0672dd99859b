"""Checkpoints of a training under way: what an interrupted run goes on from, as if nothing had happened.

A folder that appears whole or not at all; each replaces the one before. No pickle.

manifest.json              format, where training was, the state of the hooks, checksums
config.yaml                the run's configuration
encoder.safetensors        of the encoder, whole and in float32: weights and optimizer state, see `engine_state`
head-00000-of-00001.safetensors   one a rank: weights, index, bias and optimizer state of its labels
recent.safetensors         features and labels of the latest steps, for growth by gradient

Nothing in it depends on the engine or on the number of ranks that wrote it. What else a step depends on, the order of the
texts and the random draws, follows from seed, epoch, step and rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmc_trainer.checkpoint import (
    begin_folder,
    finish_folder,
    head_parts,
    load_shards,
    read_manifest,
    shard_names,
    shard_ranges,
    verify_files,
)
from xmc_trainer.config import to_yaml
from xmc_trainer.engine_state import EncoderState
from xmc_trainer.errors import UserError
from xmc_trainer.head import FixedFanInHead
from xmc_trainer.run_folder import CHECKPOINT

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer

FORMAT = 1


def save(trainer: Trainer) -> None:
    """Write the training's checkpoint, between two optimizer steps; every rank must call."""
    folder, ranks, state = trainer.run_folder / CHECKPOINT, trainer.ranks, trainer.state
    partial = begin_folder(folder, ranks)
    encoder = EncoderState(trainer.accelerator, trainer.encoder_module, trainer.optimizer)
    tensors = {}
    for name, value in encoder.tensors():
        if ranks.rank == 0:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    heads, shards = _heads(trainer), shard_names(ranks)
    own = {prefix + name: value.contiguous() for prefix, head in heads for name, value in head.state_dict().items()}
    save_file(own, partial / shards[ranks.rank])
    manifest: dict[str, Any] = {}
    if ranks.rank == 0:
        save_file(tensors, partial / "encoder.safetensors")
        recent = {
            f"{prefix}{number}.{name}": value.contiguous()
            for prefix, head in heads
            for number, step in enumerate(head.recent_steps())
            for name, value in step.items()
        }
        save_file(recent, partial / "recent.safetensors")
        (partial / "config.yaml").write_text(to_yaml(trainer.config), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "epoch": state.epoch,
            "not_finite": trainer.not_finite,
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
    finish_folder(partial, folder, ranks, manifest)


def _heads(trainer: Trainer) -> list[tuple[str, FixedFanInHead]]:
    branch = [] if trainer.meta_branch is None else [("meta.", trainer.meta_branch.head)]
    return head_parts(trainer.head) + branch


def restore(folder: Path, trainer: Trainer) -> None:
    """Bring a trainer that was just built to where the checkpoint was made; on every rank."""
    manifest, corpus, ranks = read_manifest(folder, FORMAT, "a checkpoint"), trainer.corpus, trainer.ranks
    if ranks.rank == 0:
        verify_files(folder, manifest, f"put it back, or remove {folder} to begin anew")
    ranks.barrier()
    if manifest["corpus"] != corpus.fingerprint:
        raise UserError(f"{folder}: was made with other texts, or another tokenizer; put them back, or name another run by log_fname")
    if manifest["label_order"] != corpus.label_order:
        raise UserError(f"{folder}: was made with other label clusters; put {trainer.config.cluster_file} back")
    encoder = EncoderState(trainer.accelerator, trainer.encoder_module, trainer.optimizer)
    saved = manifest["encoder"]
    with safe_open(folder / "encoder.safetensors", framework="pt") as file:
        known = set(file.keys())

        def get(name: str) -> Tensor:
            if name not in known:
                raise ValueError(f"{name} is not in it")
            return file.get_tensor(name)

        try:
            encoder.load(get, tuple(saved["states"]), saved["steps"])
        except ValueError as error:
            raise UserError(f"{folder}: is of another encoder ({error}); set model.encoder.encoder_model to it") from None
    encoder.load_loss_scale(saved["loss_scale"])
    recent = load_file(folder / "recent.safetensors")
    for (prefix, head), described in zip(_heads(trainer), manifest["heads"], strict=True):
        if described["fan_in"] is not None and head.index is None:
            head.become_sparse(described["fan_in"], described["group_size"])
        load_shards(head, folder, prefix, described["shards"], head.state_dict())
        head.steps = described["steps"]
        head.skipped.fill_(described["skipped"])
        names = ("features", "labels", "rows")
        head.load_recent_steps(
            [{name: recent[f"{prefix}{number}.{name}"] for name in names} for number in range(described["recent"])]
        )
    trainer.state.step, trainer.state.epoch = manifest["step"], manifest["epoch"]
    trainer.not_finite, trainer.metrics = manifest["not_finite"], manifest["metrics"]
    states = list(manifest["hooks"])
    for hook in trainer.hooks:
        # By name and in order: hooks may have come or gone.
        number = next((i for i, (name, _) in enumerate(states) if name == type(hook).__name__), None)
        if number is not None:
            hook.load_state_dict(states.pop(number)[1])
