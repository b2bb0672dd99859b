"""What the scripts of launchers/ share: arguments, and errors that a user can read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from xmc_trainer.errors import UserError

USAGE = """\
settings are key=value words: dataset=NAME (a shipped data set or a .yaml file), dataset_path=FOLDER, log_fname=NAME,
and dotted fields such as model.ffi.fan_in=64; --print-config shows the whole resolved tree"""


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2, Ctrl-C status 130; no traceback."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what was written so far stays; a run cannot be resumed yet", file=sys.stderr, flush=True)
        sys.exit(130)
