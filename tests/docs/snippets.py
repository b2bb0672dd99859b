"""The code blocks of a Markdown page, and how a test runs them.

A comment right above a block changes what the test does with it:

    <!-- test: skip, REASON -->                     only its syntax is checked
    <!-- test: replace "OLD" by "NEW", "OLD" by "NEW" -->   the test runs it with other words; each OLD must be there
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:^<!-- test: (?P<mark>.*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Snippet:
    """One code block."""

    where: str  # file:line
    language: str
    code: str
    skipped: str | None  # why


def snippets_of(page: Path, languages: tuple[str, ...] = ("bash", "python")) -> list[Snippet]:
    """Return the blocks of a page in these languages, in order, or the code of a notebook. Raises ValueError for an unknown comment."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [Snippet(page.name, "python", "\n".join("".join(cell["source"]) for cell in cells), None)]
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] not in languages:
            continue
        where = f"{page.name}:{text.count(chr(10), 0, match.start('language')) + 1}"
        code, mark, skipped = match["code"], match["mark"] or "", None
        if mark.startswith("skip, "):
            skipped = mark.removeprefix("skip, ")
        elif mark.startswith("replace "):
            for old, new in re.findall(r'"(.*?)" by "(.*?)"', mark):
                if old not in code:
                    raise ValueError(f"{where}: replaces {old!r}, which is not in the block")
                code = code.replace(old, new)
        elif mark:
            raise ValueError(f"{where}: unknown comment {mark!r}")
        found.append(Snippet(where, match["language"], code, skipped))
    return found
