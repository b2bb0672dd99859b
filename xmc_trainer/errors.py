"""The one exception that users are meant to read."""

from __future__ import annotations

import re

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def printable(text: str) -> str:
    """The text with control characters, line breaks and the like spelled out ("\\x1b")."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """What a file holds, in quotation marks, for a message: of a long text the first 60 characters."""
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


class UserError(ValueError):
    """Something that the user can mend: the message is one line that names the field, or the file and line, to change.

    The launchers print it without a traceback and exit with status 2. Messages quote files of anyone's: what a terminal would
    obey, or a line break, is spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NothingToDo(UserError):
    """What was asked for is there already: the launchers print it and exit with status 0."""


def reason(error: Exception) -> str:
    """What a library's exception says, for a message of ours: its first line, without colours, or its type."""
    lines = _TERMINAL_CODES.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
