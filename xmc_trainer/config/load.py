"""Build a checked `Config` from YAML files and `key=value` words."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from xmc_trainer.config import yaml_nodes
from xmc_trainer.config.fields import (
    REQUIRED,
    RawValue,
    Setting,
    build,
    check_domain,
    escaped,
    parse_value,
    resolve,
    settings_of,
    suggestion,
    to_text,
)
from xmc_trainer.config.schema import Config
from xmc_trainer.errors import UserError, shown

_NOTHING = RawValue(None)
# Former name of a setting -> its name. Files and commands may still use it.
_RENAMED = {
    "data.hf_source": "data.source",
    "data.hf_train_split": "data.train_split",
    "data.hf_test_split": "data.test_split",
}


@cache
def _readable() -> dict[str, Setting]:
    """Return every setting by its name and by its former name."""
    settings = settings_of(Config)
    return settings | {former: dataclasses.replace(settings[name], name=former) for former, name in _RENAMED.items()}


def _with_new_names(values: Iterable[tuple[str, RawValue]]) -> dict[str, RawValue]:
    """Collect (setting name, raw value) pairs, and give renamed settings their names of today.

    The config.yaml of an earlier version holds every former name, so one with its default does not count.
    """
    found = dict(values)
    for former, name in _RENAMED.items():
        raw, setting = found.pop(former, _NOTHING), settings_of(Config)[name]
        if raw.text not in (None, setting.default):
            found[name] = raw
            _say_renamed(former, name)
        elif raw is not _NOTHING:
            found.setdefault(name, raw)
    return found


@cache
def _say_renamed(former: str, name: str) -> None:
    print(f"{former} is called {name} now; the former name still works", file=sys.stderr, flush=True)


def shipped_configs() -> dict[str, Any]:
    """Return the package's data set YAML files as name -> resource."""
    folder = resources.files("xmc_trainer.config") / "datasets"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def _read_dataset_file(dataset: str) -> dict[str, RawValue]:
    """Read the YAML file of a data set: setting name -> raw value."""
    if dataset.endswith((".yaml", ".yml")):
        return _with_new_names(_read_tree(yaml_nodes.read_file(Path(dataset), "settings"), dataset))
    shipped = shipped_configs()
    if dataset not in shipped:
        raise UserError(
            f"dataset={shown(dataset)}: no such data set{suggestion(dataset, shipped)}; choose one of "
            f"{', '.join(sorted(shipped))}, or give the path of a .yaml file"
        )
    return dict(_read_tree(yaml_nodes.parse(shipped[dataset].read_text(encoding="utf-8"), dataset), dataset))


_read_shipped_file = cache(_read_dataset_file)


def _read_tree(root: Node | None, where: str, known_only: bool = True) -> Iterator[tuple[str, RawValue]]:
    """Yield (setting name, raw value) for a whole file. With `known_only`, an unknown name raises UserError."""
    if root is None or yaml_nodes.is_null(root):
        return
    if not isinstance(root, MappingNode):
        raise UserError(
            f"{where}: must contain sections such as data, model and training; start from a copy of a shipped file"
        )
    yield from _read_section(root, "", where, known_only)


def _read_section(node: Node, prefix: str, where: str, known_only: bool) -> Iterator[tuple[str, RawValue]]:
    settings = _readable()
    for key, value in yaml_nodes.entries(node, where):
        name, location = prefix + key, yaml_nodes.location(value, where)
        is_section = any(setting.startswith(f"{name}.") for setting in settings)
        if name in settings:
            yield from _read_node(settings[name], value, where)
        elif is_section and yaml_nodes.is_null(value):
            continue  # an empty section
        elif isinstance(value, MappingNode) and (is_section or not known_only):
            yield from _read_section(value, f"{name}.", where, known_only)
        elif is_section:
            raise UserError(f"{location}: {name}: is a section: put settings below it, not a {yaml_nodes.kind(value)}")
        elif known_only:
            raise UserError(f"{location}: {_unknown(name)}")
        elif isinstance(value, ScalarNode):
            yield name, RawValue(value.value)


def _read_node(setting: Setting, node: Node, where: str) -> Iterator[tuple[str, RawValue]]:
    """Yield (setting name, raw value) for a node. A dict setting yields one pair per entry, named `setting.key`."""
    name, location = setting.name, f"{yaml_nodes.location(node, where)}: "
    if setting.type is dict:
        if not isinstance(node, MappingNode):
            raise UserError(
                f"{location}{name}: must be a mapping such as {{guest: ./data}}, not a {yaml_nodes.kind(node)}"
            )
        for key, value in yaml_nodes.entries(node, where):
            yield f"{name}.{key}", RawValue(yaml_nodes.scalar(value, where), location)
    elif setting.type is list and isinstance(node, SequenceNode):
        yield name, RawValue([yaml_nodes.scalar(item, where) for item in node.value], location)
    elif not isinstance(node, ScalarNode):
        raise UserError(
            f"{location}{name}: needs a single value, not a {yaml_nodes.kind(node)}; quote it if it is text"
        )
    else:
        text = yaml_nodes.scalar(node, where)
        is_null = yaml_nodes.is_null(node) and (setting.optional or setting.type is not str)
        yield name, RawValue(None if is_null else text, location)


def _unknown(name: str) -> str:
    settings = settings_of(Config)
    return f"{shown(name)}: there is no such setting{suggestion(name, settings) or '; xmc-trainer settings lists them'}"


def _read_word(word: str) -> Iterator[tuple[str, RawValue]]:
    """Yield (setting name, raw value) for a `key=value` word.

    Errors for Hydra spellings, which Spartex uses, give the right spelling.
    """
    bare = word.lstrip("+")
    if word.startswith("~"):
        key = word[1:].partition("=")[0]
        raise UserError(
            f"argument {shown(repr(word))}: settings cannot be removed; write {shown(key)}=null, or leave it at "
            "its default"
        )
    if bare.startswith("dataset."):
        bare = bare.removeprefix("dataset.")
    if bare != word:
        raise UserError(f"argument {shown(repr(word))}: write {shown(bare)}")
    if "=" not in word:
        raise UserError(f"argument {shown(repr(word))}: write key=value, for example model.ffi.fan_in=64")
    name, _, text = word.partition("=")
    settings = _readable()
    setting, owner = settings.get(name), settings.get(name.rpartition(".")[0])
    for other in settings.values():
        if other.type is dict and name.startswith(f"{other.name}."):
            owner = other  # keys of a dict setting may contain dots
    if setting is None and owner is not None and owner.type is dict:
        yield name, RawValue(text)
    elif setting is None:
        if any(other.startswith(f"{name}.") for other in settings):
            raise UserError(
                f"argument {shown(repr(word))}: {name} is a section; set one of its settings, "
                f"such as {_first_setting_of(name)}=..."
            )
        raise UserError(_unknown(name))
    elif setting.type in (dict, list):
        node = yaml_nodes.parse(text, name)
        if node is None:
            raise UserError(f"{name}: is empty; give it a value, or omit it to use its default")
        yield from _read_node(setting, node, name)
    else:
        yield name, RawValue(None if text == "null" and (setting.optional or setting.type is not str) else text)


def _first_setting_of(section: str) -> str:
    return next(name for name in settings_of(Config) if name.startswith(f"{section}."))


def _defaults() -> dict[str, RawValue]:
    raw_values: dict[str, RawValue] = {}
    for setting in settings_of(Config).values():
        value = setting.default
        if setting.type is dict:
            raw_values |= {f"{setting.name}.{key}": RawValue(text) for key, text in value.items()}
        elif value != REQUIRED:
            raw_values[setting.name] = RawValue(value if value is None or isinstance(value, list) else to_text(value))
    return raw_values


def _values(raw_values: dict[str, RawValue], check: bool) -> dict[str, Any]:
    """Parse raw values: setting name -> value.

    Raises UserError for a wrong type and, with `check`, for a number outside its domain.
    """
    values: dict[str, Any] = {}
    settings = settings_of(Config)
    dicts = [setting for setting in settings.values() if setting.type is dict]
    for name, raw in raw_values.items():
        owner = next((each for each in dicts if name.startswith(f"{each.name}.")), None)
        if owner is not None:
            values.setdefault(owner.name, {})[name.removeprefix(f"{owner.name}.")] = raw.text
        elif name in settings:
            values[name] = parse_value(settings[name], raw)
            if check:
                check_domain(f"{raw.where}{name}", values[name], settings[name].domain)
        else:
            values[name] = raw.text
    return values


def load_config(overrides: list[str]) -> Config:
    """Build the configuration of a run from `key=value` words.

    `dataset=` names the YAML file to start from; with data.source it may be missing. The other words override single
    settings by dotted name. `key=null` clears an optional setting. Any other value of a text setting is taken verbatim,
    except for references (`xmc_trainer.config.fields`). Raises UserError for unknown names, wrong types and conflicting
    settings.
    """
    words = _with_new_names(pair for word in overrides for pair in _read_word(word))
    shipped = shipped_configs()
    source = words.get("data.source", _NOTHING).text
    if "dataset" not in words and not source:
        raise UserError(
            f"dataset=NAME is missing; choose one of {', '.join(sorted(shipped))}, give the path of a .yaml file, or "
            "name your data with data.source"
        )
    dataset = typing.cast(str, words["dataset"].text if "dataset" in words else source)
    # "." and ".." are good names of a folder, but not of a data set.
    name = Path(dataset).stem.strip(".") or Path(dataset).resolve().stem
    raw_values = {"data.dataset": RawValue(escaped(name))} | _defaults()
    if "dataset" in words:
        raw_values |= (_read_shipped_file if dataset in shipped else _read_dataset_file)(dataset)
    raw_values |= words | {"dataset": RawValue(escaped(dataset)) if "dataset" in words else raw_values["data.dataset"]}
    short, whole = "log_fname", "training.verbose.log_fname"
    if whole in words and words.get(short, _NOTHING).text not in (None, words[whole].text):
        raise UserError(f"{short} and {whole}: are two names of one setting, with different values; give only one")
    if whole in words:
        raw_values[short] = _NOTHING  # the command line overrides the file, whichever name each one uses
    elif raw_values[short].text is not None:
        raw_values[whole] = raw_values[short]
    values = _values(resolve(raw_values), check=True)
    if values["data.folder"] is None and values["data.dataset"] in shipped:
        folder = _read_shipped_file(values["data.dataset"]).get("data.folder")
        values["data.folder"] = folder and folder.text
    return build(Config, values)


def stated_settings(overrides: list[str]) -> set[str]:
    """Return the names of the settings that `key=value` words, or the YAML file that they name, state."""
    words = _with_new_names(pair for word in overrides for pair in _read_word(word))
    dataset = words.get("dataset", _NOTHING).text
    return {*words, *(_read_dataset_file(typing.cast(str, dataset)) if dataset is not None else ())}


def saved_settings(file: Path) -> dict[str, Any]:
    """Read a config.yaml that any version wrote: dotted name -> value. Raises UserError if it is damaged."""
    root = yaml_nodes.read_file(file, "settings")
    return _values(resolve(_with_new_names(_read_tree(root, str(file), known_only=False))), check=False)
