"""The configuration that a saved model was trained with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from xmc_trainer.checkpoint.folder import verify_file
from xmc_trainer.config.fields import escaped
from xmc_trainer.config.load import load_config
from xmc_trainer.config.schema import Config
from xmc_trainer.config.write import flatten, portable_settings
from xmc_trainer.errors import UserError

# Prefixes of the settings that may differ from training.
MODEL_SETTINGS = ("dataset_path", "data.", "environment.", "training.evaluation.")


def config_of_model(folder: Path, overrides: list[str]) -> Config:
    """Read a saved model's configuration and apply key=value overrides. UserError for others than `MODEL_SETTINGS`."""
    for word in overrides:
        if not word.startswith(MODEL_SETTINGS):
            raise UserError(
                f"{word}: cannot be changed for a saved model; only {', '.join(MODEL_SETTINGS)} settings can"
            )
    own_file = verify_file(folder, "config.yaml")
    config = load_config([f"dataset={own_file}", *overrides])
    try:
        # A model stores no absolute paths. If it is still in its run folder, that configuration has them.
        run_config = load_config([f"dataset={Path(os.path.realpath(folder)).parent / 'config.yaml'}"])
    except UserError:
        return config  # not in a run folder
    paths = _absolute_paths(config, run_config)
    return load_config([f"dataset={own_file}", *paths, *overrides])


def _absolute_paths(config: Config, run_config: Config) -> list[str]:
    """Return key=value words for the model's settings whose absolute paths only the run's configuration has."""
    own, portable, absolute = (
        flatten(tree)
        for tree in (dataclasses.asdict(config), portable_settings(run_config), dataclasses.asdict(run_config))
    )
    names = [name for name in own if name in absolute and absolute[name] != own[name] == portable[name]]
    return [f"{name}={escaped(absolute[name])}" for name in names if name.startswith(MODEL_SETTINGS)]
