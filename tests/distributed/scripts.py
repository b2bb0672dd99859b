"""Run several scripts of launchers/ in the processes of one launch. Argument: a JSON list of [port, script, word, ...]."""

from __future__ import annotations

import json
import os
import runpy
import sys

if __name__ == "__main__":
    # Each script needs its own port: the launcher's store still holds the addresses of the previous process group.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(False)
    for port, *words in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = port
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
