"""If one rank's disk fails, all ranks raise the same error, and the folder is unchanged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.integration.test_launchers import ROOT, free_port

pytestmark = pytest.mark.slow

CODE = """
import errno, os, sys
from pathlib import Path
import torch
from xmc_trainer.errors import UserError
from xmc_trainer.parallel import Ranks, joined_ranks
from xmc_trainer.checkpoint.folder import TEXT, Kind, read_folder, save_folder

folder = Path(sys.argv[1]) / "saved"
kind = Kind("a saved test", (1,), 1, {"said": TEXT}, lambda manifest: ["rank-0", "rank-1"])
with joined_ranks(torch.device("cpu")):
    ranks = Ranks()
    for said, failing in (("first", None), ("second", 1), ("third", 0)):

        def write(partial):
            if ranks.rank == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            (partial / f"rank-{ranks.rank}").write_text(said)
            return None if ranks.rank else {"said": said}

        try:
            save_folder(folder, ranks, kind, write)
        except UserError as error:
            print(error, flush=True)
        print(read_folder(folder, kind)["said"], flush=True)
"""


def test_all_ranks_raise_the_error_of_one_disk(tmp_path):
    port, running = free_port(), []
    for rank in range(2):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        words = [sys.executable, "-c", CODE, str(tmp_path)]
        running.append(subprocess.Popen(words, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=120)[0].splitlines() for process in running]
    finally:
        for process in running:
            process.kill()
    failed = f"{tmp_path / 'saved.partial'}: cannot be written (No space left on device); free some space there, or choose another folder"
    assert outputs == [["first", failed, "first", failed, "first"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
