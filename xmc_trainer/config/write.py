"""Write a `Config` as YAML: complete for a run's folder, or without this machine's paths for a saved model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xmc_trainer.config import yaml_nodes
from xmc_trainer.config.fields import escaped
from xmc_trainer.config.schema import Config, DataConfig


def portable(tree: Any) -> Any:
    """Shorten each absolute path in a configuration's dicts, lists and values to its last component.

    Used for everything that leaves this machine: saved models and remote logs.
    """
    if isinstance(tree, dict):
        return {name: portable(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [portable(value) for value in tree]
    # The root folder has no last component, and reveals nothing about the machine.
    return Path(tree).name or tree if isinstance(tree, str) and Path(tree).is_absolute() else tree


def portable_yaml(config: Config) -> str:
    """Format a configuration for a saved model: without absolute paths, and with trust_remote_code=false."""
    return _yaml(portable_settings(config))


def portable_settings(config: Config) -> dict[str, Any]:
    """Return the nested settings that `portable_yaml` writes."""
    tree = portable(dataclasses.asdict(config))
    tree["model"]["encoder"]["trust_remote_code"] = False
    if Path(config.data.cache_dir).is_absolute():
        # Its last component alone would name a folder wherever the model is evaluated.
        tree["data"]["cache_dir"] = DataConfig.cache_dir
    return tree


def to_yaml(config: Any) -> str:
    """Write a resolved configuration section as YAML that loads as an equal section."""
    return _yaml(dataclasses.asdict(config))


def _yaml(tree: Any) -> str:
    def escape_texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: escape_texts(each) for name, each in value.items()}
        return escaped(value) if isinstance(value, str) else value

    return yaml_nodes.dump(escape_texts(tree))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
