"""The one exception that users are meant to read."""

from __future__ import annotations

import re
from typing import Any

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LONGEST_MESSAGE = 4000  # characters


class UserError(ValueError):
    """Something that the user can mend: the message is one line that names the field, or the file and line, to change.

    The launchers print it without a traceback and exit with status 2. A message often quotes a file: characters that do not
    print are escaped, so that it stays one line and cannot drive the terminal, and its middle is cut where it is very long.
    """

    def __init__(self, message: str = "") -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(_shortened(line, _LONGEST_MESSAGE))


class NothingToDo(UserError):
    """What was asked for is there already: the launchers print it and exit with status 0."""


def reason(error: Exception) -> str:
    """What a library's exception says, for a message of ours: its first line, without colours, or its type."""
    lines = _TERMINAL_CODES.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        value = hex(value)  # str refuses integers of more than 4300 digits
    return _shortened(str(value), 100)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} ... ({len(text)} characters) ... {text[-longest // 4 :]}"
