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

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
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
from xmc_trainer.config import Config, flatten, to_yaml
from xmc_trainer.engine_state import EncoderState
from xmc_trainer.errors import UserError
from xmc_trainer.head import FixedFanInHead

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer

FORMAT = 1
FOLDER = "checkpoint"  # in the run's folder
# What a training may go on with otherwise than it began: places, and what does not change what is learned.
_FREE = (
    "dataset", "dataset_path", "log_fname", "output_dir", "environment", "data.folder", "data.num_workers", "data.cache_dir",
    "data.test_batch_size", "data.micro_batches", "model.encoder.encoder_model", "model.encoder.encoder_tokenizer", "model.encoder.ngame_checkpoint",
    "model.encoder.use_torch_compile", "model.ffi.backend", "model.ffi.tile_labels", "training.verbose", "training.resume",
    "training.checkpoint_interval", "training.use_checkpoint", "training.checkpoint_file", "training.best_p1",
)  # fmt: skip


def find(run_folder: Path) -> Checkpoint | None:
    """The run's last whole checkpoint."""
    # Cut off between two renamings, the one before has stepped aside.
    for name in (FOLDER, f"{FOLDER}.old"):
        if (run_folder / name / "manifest.json").is_file():
            folder = run_folder / name
            return Checkpoint(folder, read_manifest(folder, FORMAT, "a checkpoint"))
    return None


def remove(run_folder: Path) -> None:
    for name in (FOLDER, f"{FOLDER}.old", f"{FOLDER}.partial"):
        shutil.rmtree(run_folder / name, ignore_errors=True)


def differences(config: Config, file: Path) -> list[str]:
    """In which settings that matter to what is learned a run's config.yaml differs from `config`: "name=there, not here"."""
    there, here = (
        {name: str(value) for name, value in flatten(OmegaConf.to_container(tree)).items()}
        for tree in (OmegaConf.load(file), OmegaConf.create(to_yaml(config)))
    )
    names = [name for name in here | there if not any(f"{name}.".startswith(f"{free}.") for free in _FREE)]
    # A setting that one version does not know is at its default there.
    return [f"{name}={there[name]}, not {here[name]}" for name in names if name in here and name in there and here[name] != there[name]]


def save(trainer: Trainer) -> None:
    """Write the training's checkpoint, between two optimizer steps; every rank must call."""
    folder, ranks, state = trainer.run_folder / FOLDER, trainer.ranks, trainer.state
    partial = begin_folder(folder, ranks)
    encoder = EncoderState(trainer.accelerator, trainer.encoder, trainer.optimizer)
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


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def check_settings(self, config: Config) -> None:
        """UserError if `config` would train something else."""
        if differ := differences(config, self.folder / "config.yaml"):
            raise UserError(
                f"{self.folder}: was made with {'; '.join(differ)}; set that again, name another run by log_fname, or remove {self.folder} to begin anew"
            )

    def restore(self, trainer: Trainer) -> None:
        """Bring a trainer that was just built to where the checkpoint was made; on every rank."""
        manifest, corpus, ranks = self.manifest, trainer.corpus, trainer.ranks
        if ranks.rank == 0:
            verify_files(self.folder, manifest, f"put it back, or remove {self.folder} to begin anew")
        ranks.barrier()
        if manifest["corpus"] != corpus.fingerprint:
            raise UserError(f"{self.folder}: was made with other texts, or another tokenizer; put them back, or name another run by log_fname")
        if manifest["label_order"] != corpus.label_order:
            raise UserError(f"{self.folder}: was made with other label clusters; put {trainer.config.cluster_file} back")
        encoder = EncoderState(trainer.accelerator, trainer.encoder, trainer.optimizer)
        saved = manifest["encoder"]
        with safe_open(self.folder / "encoder.safetensors", framework="pt") as file:
            known = set(file.keys())

            def get(name: str) -> Tensor:
                if name not in known:
                    raise ValueError(f"{name} is not in it")
                return file.get_tensor(name)

            try:
                encoder.load(get, tuple(saved["states"]), saved["steps"])
            except ValueError as error:
                raise UserError(f"{self.folder}: is of another encoder ({error}); set model.encoder.encoder_model to it") from None
        encoder.load_loss_scale(saved["loss_scale"])
        recent = load_file(self.folder / "recent.safetensors")
        for (prefix, head), described in zip(_heads(trainer), manifest["heads"], strict=True):
            if described["fan_in"] is not None and head.index is None:
                head.become_sparse(described["fan_in"], described["group_size"])
            load_shards(head, self.folder, prefix, described["shards"], head.state_dict())
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
