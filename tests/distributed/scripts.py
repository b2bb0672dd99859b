"""Scripts of launchers/, one after another in the processes of one launch. The argument: a JSON list of lists, a port, a script and its words."""

from __future__ import annotations

import json
import os
import runpy
import sys

if __name__ == "__main__":
    # Each script's ranks meet at a port of its own: in the launcher's store they would find the addresses of the group before.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(False)
    for port, *words in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = port
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
