"""Read and check the environment variables that launchers set."""

from __future__ import annotations

import os

from xmc_trainer.errors import UserError

# Numeric variables that launchers set, with their smallest values. They also set MASTER_ADDR.
_VARIABLES = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1}
# Task counts set by cluster schedulers, whose tasks do not form a process group here.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_REMEDY = "start with accelerate launch, deepspeed or torchrun, which set all these variables"


def launched_processes() -> int:
    """Return the number of processes that a launcher started, or 1.

    Raises UserError for processes that would not find each other, because each would do all the work.
    """
    numbers = {name: _number(name, smallest) for name, smallest in _VARIABLES.items()}
    size, rank, given = numbers["WORLD_SIZE"], numbers["RANK"], [name for name in _VARIABLES if os.environ.get(name)]
    # Only WORLD_SIZE=1 means that a cluster's tasks are separate runs. Only MASTER_ADDR and MASTER_PORT mean nothing.
    launched = size is not None and size > 1 or "RANK" in given or "LOCAL_RANK" in given
    missing = [name for name in (*_VARIABLES, "MASTER_ADDR") if not os.environ.get(name)]
    if launched and missing:
        assignments = ", ".join(f"{name}={os.environ[name]}" for name in given)
        raise UserError(f"{assignments} without {', '.join(missing)}: {_REMEDY}; or unset them for one process")
    if rank is not None and size is not None and rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; {_REMEDY}")
    if (numbers["MASTER_PORT"] or 0) > 65535:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: must be below 65536; choose another port")
    if size is None:
        _refuse_lone_tasks()
    return size or 1


def _number(name: str, smallest: int) -> int | None:
    """Return a variable's value, or None if it is not set. UserError unless it is a whole number from `smallest`."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= smallest):
        raise UserError(
            f"{name}={text!r} in the environment: must be a whole number of at least {smallest}; correct or unset it"
        )
    return int(text)


def _refuse_lone_tasks() -> None:
    for name in _TASK_COUNTS:
        if (_number(name, 1) or 1) > 1:
            raise UserError(
                f"{os.environ[name]} processes were started ({name}) but would not work together; start one per "
                "machine that runs accelerate launch or torchrun, as launchers/examples/slurm.sh does; for separate "
                "runs set WORLD_SIZE=1"
            )
    # accelerate launch sets MASTER_ADDR for several processes, but starts only one without GPUs or with --cpu.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --num_processes started only one process, as it does with --cpu or a single GPU; add "
            "--config_file launchers/accelerate_zero2.yaml, or start with torchrun; for one process, unset MASTER_ADDR"
        )
