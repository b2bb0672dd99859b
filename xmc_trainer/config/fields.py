"""What a setting is: a dataclass field with a description and, for numbers, a domain; and how text becomes its value.

What a setting is told, in a file or on the command line, stays text until its field's type says what to read in it: text
settings take it as it stands. `${other.setting}` in it is replaced by what that setting is told, `${oc.env:NAME}` by an
environment variable; `\\${` stands for the characters.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from xmc_trainer.errors import UserError, shown

REQUIRED = "???"  # the default of a setting that has none
_TRUTH = dict.fromkeys(("true", "yes", "y", "on", "1"), True) | dict.fromkeys(("false", "no", "n", "off", "0"), False)
_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?\.?(inf|nan)", re.IGNORECASE)
_MARK = re.compile(r"(?<!\\)(\\*)\$\{")
_REFERENCE = re.compile(
    r"\s*(?:oc\.env:\s*(?P<variable>\w+)\s*(?:,(?P<otherwise>[^{}]*))?|(?P<setting>[^{}:,]+?))\s*\}"
)
_LONGEST_TEXT = 1 << 14  # characters


@dataclass(frozen=True)
class Domain:
    """An interval, in the usual notation: a bracket includes its bound, a parenthesis does not."""

    text: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Domain:
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.text[0] == "[" else value > self.low
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)  # nan is nowhere


def option(default: Any, help: str, domain: str | None = None) -> Any:
    """A dataclass field that is a setting.

    Args:
        help: one line, which `xmc-trainer settings` lists.
        domain: of a number, such as "[0, 1)"; every number has a finite one.
    """
    metadata = {"help": help, "domain": None if domain is None else Domain.parse(domain)}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A dataclass of settings: refuses numbers outside their domain and text that no file, name or variable can hold."""

    _prefix = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        """`prefix`: where the section stands in the tree, such as "model.ffi."."""
        cls._prefix = prefix

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if "help" not in item.metadata:
                continue
            name, value = self._prefix + item.name, getattr(self, item.name)
            check_domain(name, value, item.metadata["domain"])
            for text in value.values() if isinstance(value, dict) else [value]:
                if isinstance(text, str):
                    _check_text(name, text, may_be_empty=item.default == "")


def check_domain(name: str, value: Any, domain: Domain | None) -> None:
    """UserError for a number, or one of a list, that is outside."""
    for number in value if isinstance(value, list) else [value]:
        if domain is not None and number is not None and number not in domain:
            raise UserError(f"{name}={shown(number)}: must be in {domain.text}")


def _check_text(name: str, text: str, may_be_empty: bool) -> None:
    if not text and not may_be_empty:
        raise UserError(f"{name}: is empty; give it a value, or leave it out for its default")
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{name}={shown(text)}: at most {_LONGEST_TEXT} characters")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name}={shown(text)}: holds a NUL or what is not UTF-8; write it anew")


@dataclass(frozen=True)
class Setting:
    """A leaf of the tree."""

    name: str  # dotted
    type: type  # str, bool, int, float, list (of int) or dict (of str)
    optional: bool  # may be None
    default: Any
    help: str
    domain: Domain | None


@cache
def settings_of(section: type) -> dict[str, Setting]:
    """Every setting under a section, by dotted name, in the order of the tree."""
    return {setting.name: setting for setting in _walk(section, "")}


def _walk(section: type, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if "help" not in item.metadata:
            yield from _walk(item.default_factory, f"{prefix}{item.name}.")
            continue
        hint = hints[item.name]
        optional = isinstance(hint, types.UnionType)
        kind = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType) if optional else hint
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield Setting(
            prefix + item.name,
            typing.get_origin(kind) or kind,
            optional,
            default,
            item.metadata["help"],
            item.metadata["domain"],
        )


def build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The section's dataclass, and those below it, from values by dotted name. UserError for what they refuse."""
    made = {}
    for item in dataclasses.fields(section):
        name = prefix + item.name
        made[item.name] = values[name] if "help" in item.metadata else build(item.default_factory, values, f"{name}.")
    return section(**made)


@dataclass(frozen=True)
class Said:
    """What a file or the command line says of a setting, or of an entry of one that is a dict."""

    text: str | list[str] | None  # a list for settings that are lists; None for null
    where: str = ""  # of a file: what a message begins with


def value_of(setting: Setting, said: Said) -> Any:
    """What is said, as the setting's type. UserError if it is of another. References are resolved already."""
    text, name = said.text, f"{said.where}{setting.name}"
    if text is None:
        if setting.optional:
            return None
        raise UserError(
            f"{name}: cannot be null; give it a value, or leave it out for its default, {shown(setting.default)}"
        )
    if setting.type is list:
        if not isinstance(text, list):
            raise UserError(f"{name}={shown(text)}: must be a list of whole numbers such as [3, 5]")
        return [_scalar(int, name, one, False) for one in text]
    if isinstance(text, list):
        raise UserError(f"{name}: is a list; give it one value")
    return _scalar(setting.type, name, text, setting.optional)


def _scalar(kind: type, name: str, text: str, optional: bool) -> Any:
    if kind in (str, dict):
        return text
    word = text.strip()
    or_null = " or null" if optional else ""
    if kind is bool:
        if word.lower() not in _TRUTH:
            raise UserError(f"{name}={shown(text)}: must be true or false{or_null}")
        return _TRUTH[word.lower()]
    if kind is int:
        if not _WHOLE.fullmatch(word):
            raise UserError(f"{name}={shown(text)}: must be a whole number{or_null}")
        # Python reads no more than 4300 digits; what is far outside every domain may as well be infinite.
        return int(word) if len(word) < 100 else float(word.replace("_", ""))
    if not _NUMBER.fullmatch(word):
        raise UserError(f"{name}={shown(text)}: must be a number{or_null}")
    return float(word.lower().replace("_", "").replace(".i", "i").replace(".n", "n"))


def plain(value: Any) -> str:
    """A value as a file would say it, for references to it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def escaped(text: str) -> str:
    """As a file must say it so that it is read as this very text."""
    return _MARK.sub(lambda match: rf"{match[1] * 2}\${{", text)


def resolve(told: Mapping[str, Said]) -> dict[str, Said]:
    """The same with every reference replaced. UserError for one to nothing, to itself, or to endless text."""
    done: dict[str, Said] = {}
    for name in told:
        _resolve(name, told, done, ())
    return done


def _resolve(name: str, told: Mapping[str, Said], done: dict[str, Said], asking: tuple[str, ...]) -> Said:
    if name in done:
        return done[name]
    said = told[name]
    if name in asking:
        raise UserError(
            f"{said.where}{name}: refers to itself, by {' -> '.join((*asking, name))}; give one of them a value"
        )
    if isinstance(said.text, str) and "${" in said.text:
        said = dataclasses.replace(said, text=_replaced(name, said, told, done, (*asking, name)))
    done[name] = said
    return said


def _replaced(
    name: str, said: Said, told: Mapping[str, Said], done: dict[str, Said], asking: tuple[str, ...]
) -> str | None:
    text, at, parts, length = said.text, 0, [], 0
    while mark := _MARK.search(text, at):
        parts += [text[at : mark.start()], "\\" * (len(mark[1]) // 2)]
        at = mark.end()
        if len(mark[1]) % 2:
            parts.append("${")
            continue
        reference = _REFERENCE.match(text, at)
        if reference is None:
            raise UserError(
                f"{said.where}{name}={shown(text)}: write a reference as ${{data.dataset}} or ${{oc.env:NAME}}, and the characters "
                "themselves as \\${"
            )
        at = reference.end()
        if reference["variable"]:
            found = os.environ.get(reference["variable"], reference["otherwise"])
            if found is None:
                raise UserError(
                    f"{said.where}{name}: the environment variable {reference['variable']} is not set; set it"
                )
        else:
            # Spartex mounts its files under the key `dataset`, and references in them say so.
            target = reference["setting"].removeprefix("dataset.")
            if target not in told:
                raise UserError(
                    f"{said.where}{name}: refers to {shown(target)}, and there is no such setting{near(target, told)}"
                )
            found = _resolve(target, told, done, asking).text
            if found is None and mark.start() == 0 and at == len(text):
                return None
            if not isinstance(found, str):
                raise UserError(
                    f"{said.where}{name}: refers to {target}, which is {'null' if found is None else 'a list'}; set it"
                )
        parts.append(found)
        length += len(found)
        if length > _LONGEST_TEXT:
            raise UserError(f"{said.where}{name}: its references give more than {_LONGEST_TEXT} characters; shorten it")
    return "".join((*parts, text[at:]))


def near(name: str, names: Mapping[str, Any]) -> str:
    """For a message: "; write ..." with what was most likely meant, or nothing."""
    last = name.rsplit(".", 1)[-1]
    meant = [known for known in names if known.rsplit(".", 1)[-1] == last]
    if not meant:
        ends = {known.rsplit(".", 1)[-1]: known for known in reversed(list(names))}
        meant = get_close_matches(name[:100], names, n=1, cutoff=0.75) or [
            ends[word] for word in get_close_matches(last[:100], ends, n=1, cutoff=0.75)
        ]
    return f"; write {' or '.join(meant)}" if meant else ""
