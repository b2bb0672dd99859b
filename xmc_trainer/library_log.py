"""Keep what libraries log and warn off the terminal: it goes to a file of the run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Their loggers have handlers of their own, or pass records to the handlers above.
_LIBRARIES = ("accelerate", "datasets", "filelock", "huggingface_hub", "torch", "transformers")
# This logger gets a handler when DeepSpeed is imported, which may be later.
_LATER = "DeepSpeed"
_OURS = str(Path(__file__).parent)


class _Keeper(logging.Handler):
    """Appends records to a file once its folder exists, and holds them back until then."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        self._waiting: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._path is None:
            return
        self._waiting.append(f"{self.format(record)}\n")
        if self._path.parent.is_dir():
            try:
                with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(self._waiting)
            except OSError:
                return  # a full disk is reported by what the run itself writes
            self._waiting.clear()

    def take(self, record: logging.LogRecord) -> bool:
        """Handle a record as a filter of its logger, so that no other handler gets it."""
        self.handle(record)
        return False


@contextmanager
def libraries_log_to(path: Path | None) -> Iterator[None]:
    """Inside, append what libraries log and warn to a file. Import the libraries first.

    Args:
        path: its folder may not exist yet; None drops the records.
    """
    keeper = _Keeper(path)
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    show = warnings.showwarning

    def keep(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        if filename.startswith(_OURS):
            show(message, category, filename, lineno, file, line)
        else:
            said = warnings.formatwarning(message, category, filename, lineno, line).strip()
            keeper.handle(logging.makeLogRecord({"name": "warnings", "levelname": "WARNING", "msg": said}))

    for logger in loggers:
        logger.handlers, logger.propagate = [keeper], False
    logging.getLogger(_LATER).addFilter(keeper.take)
    warnings.showwarning = keep
    try:
        yield
    finally:
        warnings.showwarning = show
        logging.getLogger(_LATER).removeFilter(keeper.take)
        for logger, (handlers, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
