"""Settings as dataclass fields, and the parser of their values.

A setting is a field with a help text and, if it is a number, a domain. Values from files and the command line stay text
until the field's type decides how to parse them; text settings take them verbatim. `${other.setting}` inserts another
setting's text, `${oc.env:NAME}` an environment variable, and `\\${` a literal `${`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from xmc_trainer.errors import UserError, shown

REQUIRED = "???"  # the default of a setting that must be given
_BOOLS = dict.fromkeys(("true", "yes", "y", "on", "1"), True) | dict.fromkeys(("false", "no", "n", "off", "0"), False)
_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?\.?(inf|nan)", re.IGNORECASE)
_MARK = re.compile(r"(?<!\\)(\\*)\$\{")
_REFERENCE = re.compile(r"\s*(?:oc\.env:\s*(?P<variable>\w+)\s*(?:,(?P<default>[^{}]*))?|(?P<setting>[^{}:,]+?))\s*\}")
_LONGEST_TEXT = 1 << 14  # characters


@dataclass(frozen=True)
class Domain:
    """An interval such as "[0, 1)": a bracket includes the bound, a parenthesis excludes it."""

    text: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Domain:
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.text[0] == "[" else value > self.low
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)  # nan is in no domain


def option(default: Any, help: str, domain: str | None = None, *, choices: Iterable[str] = ()) -> Any:
    """Declare a dataclass field as a setting.

    Args:
        help: one line, listed by `xmc-trainer settings`.
        domain: interval such as "[0, 1)"; required for numbers, with finite bounds.
        choices: the only values that a text setting takes; none for any text.
    """
    metadata = {"help": help, "domain": None if domain is None else Domain.parse(domain), "choices": tuple(choices)}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Section:
    """Base class of settings dataclasses.

    Rejects numbers outside their domain, text that is not among the choices, and text that is empty, too long or not UTF-8.
    """

    _prefix = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        """`prefix`: the section's path in the tree, such as "model.ffi."."""
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
            if choices := item.metadata["choices"]:
                check_choice(name, value, choices)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless the text is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name}={shown(repr(value))}: choose one of {', '.join(choices)}")


def check_domain(name: str, value: Any, domain: Domain | None) -> None:
    """Raise UserError if the number, or any number of the list, is outside `domain`. None passes."""
    for number in value if isinstance(value, list) else [value]:
        if domain is not None and number is not None and number not in domain:
            raise UserError(f"{name}={shown(number)}: must be in {domain.text}")


def _check_text(name: str, text: str, may_be_empty: bool) -> None:
    if not text and not may_be_empty:
        raise UserError(f"{name}: is empty; give it a value, or omit it to use its default")
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{name}={shown(text)}: is longer than {_LONGEST_TEXT} characters; shorten it")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name}={shown(text)}: contains a NUL or is not UTF-8; retype it")


@dataclass(frozen=True)
class Setting:
    """A leaf of the configuration tree."""

    name: str  # dotted
    type: type  # str, bool, int, float, list (of int) or dict (of str)
    optional: bool  # may be None
    default: Any
    help: str
    domain: Domain | None
    choices: tuple[str, ...]  # empty: any text


@cache
def settings_of(section: type) -> dict[str, Setting]:
    """Return every setting below a section, by dotted name, in declaration order."""
    return {setting.name: setting for setting in _walk(section, "")}


@cache
def names_of_parameters(section: type) -> dict[str, str]:
    """Return last part -> dotted name of each setting below a section whose last part is unique; for `errors.naming`."""
    names = list(settings_of(section))
    last = [name.rpartition(".")[2] for name in names]
    return {short: name for short, name in zip(last, names) if last.count(short) == 1}


def _walk(section: type, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if "help" not in item.metadata:
            yield from _walk(typing.cast(type, item.default_factory), f"{prefix}{item.name}.")
            continue
        hint = hints[item.name]
        optional = isinstance(hint, types.UnionType)
        kind = next(member for member in typing.get_args(hint) if member is not types.NoneType) if optional else hint
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield Setting(
            prefix + item.name,
            typing.get_origin(kind) or kind,
            optional,
            default,
            item.metadata["help"],
            item.metadata["domain"],
            item.metadata["choices"],
        )


def build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a section and its subsections from values by dotted name. Raises UserError if their checks fail."""
    made = {}
    for item in dataclasses.fields(section):
        name = prefix + item.name
        if "help" in item.metadata:
            made[item.name] = values[name]
        else:
            made[item.name] = build(typing.cast(type, item.default_factory), values, f"{name}.")
    return section(**made)


@dataclass(frozen=True)
class RawValue:
    """The unparsed value of a setting, or of one entry of a dict setting."""

    text: str | list[str] | None  # a list for list settings; None for null
    where: str = ""  # prefix of error messages, such as "mine.yaml, line 3: "; empty for the command line


def parse_value(setting: Setting, raw: RawValue) -> Any:
    """Parse a raw value, its references resolved, as the setting's type. Raises UserError if it has another type."""
    text, name = raw.text, f"{raw.where}{setting.name}"
    if text is None:
        if setting.optional:
            return None
        raise UserError(
            f"{name}: cannot be null; give it a value, or omit it to use its default, {shown(setting.default)}"
        )
    if setting.type is list:
        if not isinstance(text, list):
            raise UserError(f"{name}={shown(text)}: must be a list of whole numbers such as [3, 5]")
        return [_scalar(int, name, item, False) for item in text]
    if isinstance(text, list):
        raise UserError(f"{name}: is a list; give it a single value")
    return _scalar(setting.type, name, text, setting.optional)


def _scalar(kind: type, name: str, text: str, optional: bool) -> Any:
    if kind in (str, dict):
        return text
    word = text.strip()
    or_null = " or null" if optional else ""
    if kind is bool:
        if word.lower() not in _BOOLS:
            raise UserError(f"{name}={shown(text)}: must be true or false{or_null}")
        return _BOOLS[word.lower()]
    if kind is int:
        if not _INTEGER.fullmatch(word):
            raise UserError(f"{name}={shown(text)}: must be a whole number{or_null}")
        # Python parses at most 4300 digits. A number this long is outside every domain, so infinity stands for it.
        return int(word) if len(word) < 100 else float(word.replace("_", ""))
    if not _NUMBER.fullmatch(word):
        raise UserError(f"{name}={shown(text)}: must be a number{or_null}")
    return float(word.lower().replace("_", "").replace(".i", "i").replace(".n", "n"))


def to_text(value: Any) -> str:
    """Format a value as a file would spell it, so that references can insert it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def escaped(text: str) -> str:
    """Escape `${` so that a file or command line with the result is read as exactly `text`."""
    return _MARK.sub(lambda match: rf"{match[1] * 2}\${{", text)


def resolve(values: Mapping[str, RawValue]) -> dict[str, RawValue]:
    """Replace every reference. Raises UserError for an unknown target, a cycle, or a result that is too long."""
    done: dict[str, RawValue] = {}
    for name in values:
        _resolve(name, values, done, ())
    return done


def _resolve(name: str, values: Mapping[str, RawValue], done: dict[str, RawValue], chain: tuple[str, ...]) -> RawValue:
    if name in done:
        return done[name]
    raw = values[name]
    if name in chain:
        raise UserError(
            f"{raw.where}{name}: refers to itself through {' -> '.join((*chain, name))}; give one of them a value"
        )
    if isinstance(raw.text, str) and "${" in raw.text:
        raw = dataclasses.replace(raw, text=_replaced(name, raw, values, done, (*chain, name)))
    done[name] = raw
    return raw


def _replaced(
    name: str, raw: RawValue, values: Mapping[str, RawValue], done: dict[str, RawValue], chain: tuple[str, ...]
) -> str | None:
    text, at, length = typing.cast(str, raw.text), 0, 0
    parts: list[str] = []
    inserted: str | list[str] | None
    while mark := _MARK.search(text, at):
        parts += [text[at : mark.start()], "\\" * (len(mark[1]) // 2)]
        at = mark.end()
        if len(mark[1]) % 2:
            parts.append("${")
            continue
        reference = _REFERENCE.match(text, at)
        if reference is None:
            raise UserError(
                f"{raw.where}{name}={shown(text)}: is not a valid reference; write ${{data.dataset}} or "
                "${oc.env:NAME}, or \\${ for a literal ${"
            )
        at = reference.end()
        if reference["variable"]:
            inserted = os.environ.get(reference["variable"], reference["default"])
            if inserted is None:
                raise UserError(
                    f"{raw.where}{name}: the environment variable {reference['variable']} is not set; set it"
                )
        else:
            # Spartex mounts its files under the key `dataset`, so their references begin with it.
            target = reference["setting"].removeprefix("dataset.")
            if target not in values:
                raise UserError(
                    f"{raw.where}{name}: refers to {shown(target)}: there is no such setting"
                    f"{suggestion(target, values)}"
                )
            inserted = _resolve(target, values, done, chain).text
            if inserted is None and mark.start() == 0 and at == len(text):
                return None
            if not isinstance(inserted, str):
                raise UserError(
                    f"{raw.where}{name}: refers to {target}, which is "
                    f"{'null' if inserted is None else 'a list'}; set it"
                )
        parts.append(inserted)
        length += len(inserted)
        if length > _LONGEST_TEXT:
            raise UserError(f"{raw.where}{name}: expands to more than {_LONGEST_TEXT} characters; shorten it")
    return "".join((*parts, text[at:]))


def suggestion(name: str, names: Mapping[str, Any]) -> str:
    """Return "; write NAME" with the most similar known names, for an error message, or an empty string."""
    last = name.rsplit(".", 1)[-1]
    similar = [known for known in names if known.rsplit(".", 1)[-1] == last]
    if not similar:
        ends = {known.rsplit(".", 1)[-1]: known for known in reversed(list(names))}
        similar = get_close_matches(name[:100], names, n=1, cutoff=0.75) or [
            ends[word] for word in get_close_matches(last[:100], ends, n=1, cutoff=0.75)
        ]
    return f"; write {' or '.join(similar)}" if similar else ""
