"""What launchers tell a process by its environment, checked."""

from __future__ import annotations

import os

from xmc_trainer.errors import UserError

# The tasks of a cluster's own starter, which know nothing of each other here.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_REMEDY = "start with accelerate launch, deepspeed or torchrun, which set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT"


def launched_processes() -> int:
    """How many processes a launcher started. UserError if they could not find each other: each would do all the work."""
    size = _number("WORLD_SIZE", 1)
    if size is None:
        if "RANK" in os.environ:
            raise UserError(f"RANK={os.environ['RANK']} without WORLD_SIZE: {_REMEDY}, or unset RANK for one process")
        _refuse_lone_tasks()
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(f"WORLD_SIZE={size} without {', '.join(missing)}: {_REMEDY}, or unset WORLD_SIZE for one process")
    rank = _number("RANK", 0)
    if rank is not None and rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; {_REMEDY}")
    _number("LOCAL_RANK", 0)
    if (_number("MASTER_PORT", 0) or 0) > 65535:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: must be below 65536")
    return size


def _number(name: str, smallest: int) -> int | None:
    """The variable's value; None if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= smallest):
        raise UserError(f"{name}={text!r} in the environment: must be a whole number of at least {smallest}; {_REMEDY}, or unset it")
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
