"""Scripts of launchers/, one after another in the processes of one launch. The argument: a JSON list of lists, a script and its words."""

from __future__ import annotations

import json
import runpy
import sys

if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
