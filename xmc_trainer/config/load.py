"""From YAML files and `key=value` words to a checked `Config`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from xmc_trainer.config import yaml_nodes
from xmc_trainer.config.fields import (
    REQUIRED,
    Said,
    Setting,
    build,
    check_domain,
    escaped,
    near,
    plain,
    resolve,
    settings_of,
    value_of,
)
from xmc_trainer.config.schema import Config
from xmc_trainer.errors import UserError, shown


def shipped_configs() -> dict[str, Any]:
    """name -> resource of every data set YAML in the package."""
    folder = resources.files("xmc_trainer.config") / "datasets"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def _told_by_file(dataset: str) -> dict[str, Said]:
    """What the YAML file of a data set says, by setting."""
    if dataset.endswith((".yaml", ".yml")):
        return dict(_told_by_tree(yaml_nodes.read_file(Path(dataset), "settings"), dataset))
    shipped = shipped_configs()
    if dataset not in shipped:
        raise UserError(
            f"dataset={shown(dataset)}: no such data set{near(dataset, shipped)}; shipped are {', '.join(sorted(shipped))}; or name "
            "a .yaml file"
        )
    return dict(_told_by_tree(yaml_nodes.parse(shipped[dataset].read_text(encoding="utf-8"), dataset), dataset))


_told_by_shipped_file = cache(_told_by_file)


def _told_by_tree(root: Node | None, where: str, known_only: bool = True) -> Iterator[tuple[str, Said]]:
    """(setting, what is said of it) of a whole file. UserError for a name that no setting has, unless `known_only` is False."""
    if root is None or yaml_nodes.is_null(root):
        return
    if not isinstance(root, MappingNode):
        raise UserError(
            f"{where}: must hold sections such as data, model and training; begin with a copy of a shipped file"
        )
    yield from _told_by_section(root, "", where, known_only)


def _told_by_section(node: Node, prefix: str, where: str, known_only: bool) -> Iterator[tuple[str, Said]]:
    settings = settings_of(Config)
    for key, value in yaml_nodes.entries(node, where):
        name, place = prefix + key, yaml_nodes.place(value, where)
        is_section = any(setting.startswith(f"{name}.") for setting in settings)
        if name in settings:
            yield from _told_by_node(settings[name], value, where)
        elif is_section and yaml_nodes.is_null(value):
            continue  # a heading with nothing below it
        elif isinstance(value, MappingNode) and (is_section or not known_only):
            yield from _told_by_section(value, f"{name}.", where, known_only)
        elif is_section:
            raise UserError(
                f"{place}: {name}: is a section, and needs settings below it, not a {yaml_nodes.kind(value)}"
            )
        elif known_only:
            raise UserError(f"{place}: {_unknown(name)}")
        elif isinstance(value, ScalarNode):
            yield name, Said(value.value)


def _told_by_node(setting: Setting, node: Node, where: str) -> Iterator[tuple[str, Said]]:
    """(setting, or entry of one that is a dict; what the node says of it)."""
    name, place = setting.name, f"{yaml_nodes.place(node, where)}: "
    if setting.type is dict:
        if not isinstance(node, MappingNode):
            raise UserError(
                f"{place}{name}: must be a mapping such as {{guest: ./data}}, not a {yaml_nodes.kind(node)}"
            )
        for key, value in yaml_nodes.entries(node, where):
            yield f"{name}.{key}", Said(yaml_nodes.scalar(value, where), place)
    elif setting.type is list and isinstance(node, SequenceNode):
        yield name, Said([yaml_nodes.scalar(item, where) for item in node.value], place)
    elif not isinstance(node, ScalarNode):
        raise UserError(
            f"{place}{name}: needs one value, not a {yaml_nodes.kind(node)}; put it in quotes if it is text"
        )
    else:
        text = yaml_nodes.scalar(node, where)
        says_null = yaml_nodes.is_null(node) and (setting.optional or setting.type is not str)
        yield name, Said(None if says_null else text, place)


def _unknown(name: str) -> str:
    settings = settings_of(Config)
    return f"{shown(name)}: there is no such setting{near(name, settings) or '; xmc-trainer settings lists them'}"


def _told_by_word(word: str) -> Iterator[tuple[str, Said]]:
    """(setting, what is said of it) of a `key=value` word. Refuses hydra's spellings, which users of Spartex know, with the right one."""
    bare = word.lstrip("+")
    if word.startswith("~"):
        key = word[1:].partition("=")[0]
        raise UserError(
            f"argument {shown(repr(word))}: settings cannot be removed; write {shown(key)}=null, or leave it at its default"
        )
    if bare.startswith("dataset."):
        bare = bare.removeprefix("dataset.")
    if bare != word:
        raise UserError(f"argument {shown(repr(word))}: write {shown(bare)}")
    if "=" not in word:
        raise UserError(f"argument {shown(repr(word))}: write key=value, for example model.ffi.fan_in=64")
    name, _, text = word.partition("=")
    settings = settings_of(Config)
    setting, owner = settings.get(name), settings.get(name.rpartition(".")[0])
    for other in settings.values():
        if other.type is dict and name.startswith(f"{other.name}."):
            owner = other  # the keys of its entries may hold dots
    if setting is None and owner is not None and owner.type is dict:
        yield name, Said(text)
    elif setting is None:
        if any(other.startswith(f"{name}.") for other in settings):
            raise UserError(
                f"argument {shown(repr(word))}: {name} is a section; set what is in it, such as {_first_of(name)}=..."
            )
        raise UserError(_unknown(name))
    elif setting.type in (dict, list):
        node = yaml_nodes.parse(text, name)
        if node is None:
            raise UserError(f"{name}: is empty; give it a value, or leave it out for its default")
        yield from _told_by_node(setting, node, name)
    else:
        yield name, Said(None if text == "null" and (setting.optional or setting.type is not str) else text)


def _first_of(section: str) -> str:
    return next(name for name in settings_of(Config) if name.startswith(f"{section}."))


def _told_by_defaults() -> dict[str, Said]:
    told = {}
    for setting in settings_of(Config).values():
        value = setting.default
        if setting.type is dict:
            told |= {f"{setting.name}.{key}": Said(text) for key, text in value.items()}
        elif value != REQUIRED:
            told[setting.name] = Said(value if value is None or isinstance(value, list) else plain(value))
    return told


def _values(told: dict[str, Said], check: bool) -> dict[str, Any]:
    """The value of every setting that something is said of, by name. UserError for what its type or domain does not allow."""
    values: dict[str, Any] = {}
    settings = settings_of(Config)
    dicts = [setting for setting in settings.values() if setting.type is dict]
    for name, said in told.items():
        owner = next((each for each in dicts if name.startswith(f"{each.name}.")), None)
        if owner is not None:
            values.setdefault(owner.name, {})[name.removeprefix(f"{owner.name}.")] = said.text
        elif name in settings:
            values[name] = value_of(settings[name], said)
            if check:
                check_domain(f"{said.where}{name}", values[name], settings[name].domain)
        else:
            values[name] = said.text
    return values


def load_config(overrides: list[str]) -> Config:
    """The configuration of a run, from the command line's `key=value` words.

    `dataset=` names the YAML to start from, the others are dotted overrides of single fields. `key=null` empties a setting
    that may be empty; all else that a text setting is told, it takes letter by letter, but for references (`xmc_trainer.config.fields`).
    Raises UserError with the field to change: unknown keys, wrong types, impossible combinations.
    """
    words: dict[str, Said] = {}
    for word in overrides:
        words.update(_told_by_word(word))
    if "dataset" not in words:
        raise UserError(
            f"dataset=NAME is missing; shipped are {', '.join(sorted(shipped_configs()))}; or name a .yaml file"
        )
    dataset = words["dataset"].text
    shipped = shipped_configs()
    told = {"data.dataset": Said(escaped(Path(dataset).stem))} | _told_by_defaults()
    told |= (_told_by_shipped_file if dataset in shipped else _told_by_file)(dataset)
    told |= words | {"dataset": Said(escaped(dataset))}
    short, whole = "log_fname", "training.verbose.log_fname"
    if whole in words and (words.get(short) or Said(None)).text not in (None, words[whole].text):
        raise UserError(f"{short} and {whole}: are the same setting, given two names; say one of them")
    if whole in words:
        told[short] = Said(None)  # the command line wins over a file, whichever name each has for it
    elif told[short].text is not None:
        told[whole] = told[short]
    values = _values(resolve(told), check=True)
    if values["data.folder"] is None and values["data.dataset"] in shipped:
        folder = _told_by_shipped_file(values["data.dataset"]).get("data.folder")
        values["data.folder"] = folder and folder.text
    return build(Config, values)


def saved_settings(file: Path) -> dict[str, Any]:
    """What a config.yaml of `to_yaml` says, by dotted name, of whatever version. UserError where it is damaged."""
    root = yaml_nodes.read_file(file, "settings")
    return _values(resolve(dict(_told_by_tree(root, str(file), known_only=False))), check=False)
