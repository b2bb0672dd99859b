"""What launchers tell a process by its environment, checked."""

from __future__ import annotations

import os

from xmc_trainer.errors import UserError

# What launchers set, with the smallest value. MASTER_ADDR is no number.
_OWN = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1}
# The tasks of a cluster's own starter, which know nothing of each other here.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_REMEDY = "start with accelerate launch, deepspeed or torchrun, which set all of them"


def launched_processes() -> int:
    """How many processes a launcher started. UserError if they could not find each other: each would do all the work."""
    numbers = {name: _number(name, smallest) for name, smallest in _OWN.items()}
    size, rank, given = numbers["WORLD_SIZE"], numbers["RANK"], [name for name in _OWN if os.environ.get(name)]
    # WORLD_SIZE=1 alone says that a cluster's tasks are separate runs; MASTER_ADDR and MASTER_PORT alone say nothing.
    launched = size is not None and size > 1 or "RANK" in given or "LOCAL_RANK" in given
    missing = [name for name in (*_OWN, "MASTER_ADDR") if not os.environ.get(name)]
    if launched and missing:
        set_ones = ", ".join(f"{name}={os.environ[name]}" for name in given)
        raise UserError(f"{set_ones} without {', '.join(missing)}: {_REMEDY}; or unset them for one process")
    if rank is not None and size is not None and rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; {_REMEDY}")
    if (numbers["MASTER_PORT"] or 0) > 65535:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: must be below 65536; choose another port")
    if size is None:
        _refuse_lone_tasks()
    return size or 1


def _number(name: str, smallest: int) -> int | None:
    """The variable's value; None if it is not set."""
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
                f"{os.environ[name]} processes were started ({name}) but would not work together; start one a machine, "
                "and in it accelerate launch or torchrun, as launchers/examples/slurm.sh does; for separate runs set "
                "WORLD_SIZE=1"
            )
    # accelerate launch sets MASTER_ADDR for several processes; without GPUs, or with --cpu, it starts one and says nothing.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --num_processes started only one process, as it does with --cpu or a single GPU; add "
            "--config_file launchers/accelerate_zero2.yaml, start with torchrun, or for one process unset MASTER_ADDR"
        )
