"""Exceptions whose messages are written for users, and helpers for such messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LONGEST_MESSAGE = 4000  # characters
_PARAMETER = re.compile(r"`([\w=]+)`")


class UserError(ValueError):
    """An error that the user can fix. The message is one line that names the field, or the file and line, to change.

    The launchers print it without a traceback and exit with status 2. Messages may quote files, so unprintable
    characters are escaped: the message stays one line and cannot control the terminal. Very long messages lose their
    middle.
    """

    def __init__(self, message: str = "") -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(_shortened(line, _LONGEST_MESSAGE))


class NothingToDo(UserError):
    """The requested result already exists. The launchers print the message and exit with status 0."""


@contextmanager
def naming(settings: Mapping[str, str]) -> Iterator[None]:
    """Inside, UserErrors name settings in place of parameters.

    Functions that take plain arguments write the names of their parameters in backticks: "`batch_size`=33: is not ...".

    Args:
        settings: name of a parameter, or "name=value", -> setting.
    """
    try:
        yield
    except UserError as error:
        error.args = (_PARAMETER.sub(lambda match: settings.get(match[1], match[0]), str(error)),)
        raise


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message without terminal codes, or the name of its type."""
    lines = _TERMINAL_CODES.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown(value: Any) -> str:
    """Format a value for a message, in about 100 characters at most."""
    if isinstance(value, int) and value.bit_length() > 256:
        value = hex(value)  # str raises for integers of more than 4300 digits
    return _shortened(str(value), 100)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} ... ({len(text)} characters) ... {text[-longest // 4 :]}"
