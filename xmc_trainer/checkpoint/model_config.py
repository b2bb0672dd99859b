"""The configuration that a saved model was trained with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from xmc_trainer.checkpoint.folder import verify_file
from xmc_trainer.config.fields import (
    escaped,
)
from xmc_trainer.config.load import load_config
from xmc_trainer.config.schema import Config
from xmc_trainer.config.write import flatten, portable_settings
from xmc_trainer.errors import UserError

# What may be another than in training, by how it begins.
MODEL_SETTINGS = ("dataset_path", "data.", "environment.", "training.evaluation.")


def config_of_model(folder: Path, overrides: list[str]) -> Config:
    """The configuration that a saved model's folder holds, and of `MODEL_SETTINGS` what is said of them now. UserError for any other."""
    for word in overrides:
        if not word.startswith(MODEL_SETTINGS):
            raise UserError(f"{word}: a saved model can be given only {', '.join(MODEL_SETTINGS)} settings")
    own_file = verify_file(folder, "config.yaml")
    config = load_config([f"dataset={own_file}", *overrides])
    try:
        # Where the model still lies in its run's folder, that knows the paths which the model does not hold.
        of_run = load_config([f"dataset={Path(os.path.realpath(folder)).parent / 'config.yaml'}"])
    except UserError:
        return config  # no run's folder
    paths = _whole_paths(config, of_run)
    return load_config([f"dataset={own_file}", *paths, *overrides])


def _whole_paths(config: Config, of_run: Config) -> list[str]:
    """Settings of a model, as key=value words, whose absolute paths the configuration of its run still has."""
    own, left, whole = (
        flatten(tree) for tree in (dataclasses.asdict(config), portable_settings(of_run), dataclasses.asdict(of_run))
    )
    names = [name for name in own if name in whole and whole[name] != own[name] == left[name]]
    return [f"{name}={escaped(whole[name])}" for name in names if name.startswith(MODEL_SETTINGS)]
