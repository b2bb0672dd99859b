"""Read tables: CSV and TSV files with a header, plain or gzip."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from xmc_trainer.errors import UserError, reason, shown

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = tuple(f"{extension}{packed}" for extension in _DELIMITERS for packed in ("", ".gz"))
_PYTHON_LIST = re.compile(r"\s*\[\s*'.*'\s*,?\s*\]\s*", re.DOTALL)  # pandas writes lists so
_LONGEST_CELL = 1 << 27  # characters; the csv module's own limit is 131,072


def is_table(path: Path) -> bool:
    """Tell a table from other files by its name."""
    return path.name.endswith(EXTENSIONS)


def table_records(path: Path, label_column: str, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, row n", column name -> cell) for each row after the header; rows count from 1.

    A cell is a string, except in the label column. There, a JSON list becomes that list. Any other cell is split at
    `separator`; spaces around names and empty names are removed.

    Raises UserError, which names the file and the row, for a file that cannot be read, is not UTF-8, has a row whose number of
    cells differs from the header's, or has lists of labels in Python's spelling.
    """
    number = 0
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with _open(path) as file:
            # strict: a quote in the wrong place is an error, not a cell that swallows the following rows.
            rows = csv.reader(file, delimiter=_DELIMITERS[Path(path.name.removesuffix(".gz")).suffix], strict=True)
            header = [name.strip() for name in next(rows, [])]
            repeated = next((name for name in header if header.count(name) > 1), None)
            if repeated is not None:
                raise UserError(f"{path}: two columns are named {repeated!r}; rename one in the first line")
            for cells in rows:
                if not cells:  # an empty line
                    continue
                number += 1
                where = f"{path}, row {number}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: has {len(cells)} cells, but the first line names {len(header)} columns; put cells "
                        f"that contain {'a comma' if rows.dialect.delimiter == ',' else 'a tab'} in double quotes"
                    )
                record: dict[str, Any] = dict(zip(header, cells))
                if label_column in record:
                    record[label_column] = names_in_cell(record[label_column], separator, where)
                yield where, record
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (csv.Error, EOFError, OSError, zlib.error) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{path}, after row {number}: cannot be read ({why}); correct the file") from None


def _open(path: Path) -> TextIO:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", newline="")


def names_in_cell(cell: str, separator: str, where: str) -> list[Any]:
    """Return the labels in a cell: a JSON list as it is, anything else split at `separator`; see `table_records`.

    Raises UserError, which begins with `where`, for a list as Python prints it.
    """
    if _PYTHON_LIST.fullmatch(cell):
        raise UserError(
            f"{where}: the labels are a list as Python prints it, {shown(cell)}; write it as JSON (json.dumps), or "
            f"the names with {separator!r} between them"
        )
    if cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except (ValueError, RecursionError):
            listed = None  # a name may begin with a bracket
        if isinstance(listed, list):
            return listed
    return [name.strip() for name in cell.split(separator) if name.strip()]
