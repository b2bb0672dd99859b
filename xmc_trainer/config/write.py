"""A `Config` as YAML: for a run's folder, or without this machine's paths for a saved model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xmc_trainer.config import yaml_nodes
from xmc_trainer.config.fields import (
    escaped,
)
from xmc_trainer.config.schema import Config, DataConfig


def portable(tree: Any) -> Any:
    """`tree` (dicts, lists and values of a configuration) with the last part of each absolute path alone.

    For what leaves this machine: a saved model, or what is logged elsewhere.
    """
    if isinstance(tree, dict):
        return {name: portable(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [portable(value) for value in tree]
    # The root itself has no last part, and says nothing of a machine.
    return Path(tree).name or tree if isinstance(tree, str) and Path(tree).is_absolute() else tree


def portable_yaml(config: Config) -> str:
    """A configuration for a saved model's folder: without absolute paths, and without leave to run anybody's code."""
    return _yaml(portable_settings(config))


def portable_settings(config: Config) -> dict[str, Any]:
    tree = portable(dataclasses.asdict(config))
    tree["model"]["encoder"]["trust_remote_code"] = False
    if Path(config.data.cache_dir).is_absolute():
        tree["data"]["cache_dir"] = (
            DataConfig.cache_dir
        )  # its last part would be a folder wherever the model is evaluated
    return tree


def to_yaml(config: Any) -> str:
    """A resolved configuration section as YAML, which is read as the very same."""
    return _yaml(dataclasses.asdict(config))


def _yaml(tree: Any) -> str:
    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: written(each) for name, each in value.items()}
        return escaped(value) if isinstance(value, str) else value

    return yaml_nodes.dump(written(tree))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
