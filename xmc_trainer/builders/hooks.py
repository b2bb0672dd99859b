"""Build the hooks that a configuration asks for."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from functools import partial

from xmc_trainer.config import Config, flatten, portable
from xmc_trainer.errors import UserError
from xmc_trainer.head import RewireRule
from xmc_trainer.hooks.base import Hook
from xmc_trainer.hooks.checkpoint import CheckpointHook
from xmc_trainer.hooks.evaluate import BestModelHook, EarlyStopHook, EvaluateHook
from xmc_trainer.hooks.logging import JsonLogHook, ProgressHook, TrackerHook
from xmc_trainer.hooks.rewire import RewireHook, SparsifyHook
from xmc_trainer.hooks.schedule import ScheduleHook
from xmc_trainer.schedules import SCHEDULES, Schedule, usual_warmup


def default_hooks(config: Config) -> list[Hook]:
    """Build the hooks in the order in which they run.

    The checkpoint comes first: it saves the state after the previous step. Then the schedule sets the learning rates. Sparsifying
    and rewiring edit the head before anything reads it. Evaluation precedes the hooks that use its result.

    Hooks take plain arguments. What they print names settings all the same: it goes to the user as it is.
    """
    training, ffi, optimization = config.training, config.model.ffi, config.training.optimization
    evaluation = training.evaluation
    dense_epochs = optimization.dense_epochs if ffi.use_sparse_layer else 0
    hooks: list[Hook] = [
        CheckpointHook(training.checkpoint_interval, training.checkpoint_minutes, training.checkpoints_kept),
        schedule_hook_of(config),
    ]
    if dense_epochs:
        hooks.append(SparsifyHook(dense_epochs, ffi.fan_in, ffi.group_size))
    if ffi.use_sparse_layer and ffi.rewire_interval:
        hooks.append(rewire_hook_of(config))
    hooks.append(
        EvaluateHook(
            evaluation.test_evaluate_every, evaluation.train_evaluate_every if evaluation.train_evaluate else None
        )
    )
    if evaluation.early_stop_patience:
        hooks.append(
            EarlyStopHook(
                evaluation.early_stop_metric, evaluation.early_stop_patience, evaluation.early_stop_delta, dense_epochs
            )
        )
    if training.use_checkpoint:
        hooks.append(BestModelHook(training.checkpoint_file, training.best_p1, dense_epochs))
    hooks.append(ProgressHook(training.verbose.print_iter if training.verbose.show_iter else None))
    if training.verbose.logging:
        hooks.append(JsonLogHook())
    if (tracker := training.verbose.chosen_tracker) is not None:
        name = training.verbose.wandb_runname
        settings = flatten(portable(asdict(config)))
        hooks.append(TrackerHook(tracker, None if name == "none" else name, settings))
    return hooks


def require_tracker(config: Config) -> None:
    """Raise UserError if the package of the chosen tracker is not installed."""
    tracker = config.training.verbose.chosen_tracker
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise UserError(
            f"training.verbose.tracker={tracker}: is not installed; run pip install 'xmc_trainer[{tracker}]'"
        )


def schedule_hook_of(config: Config) -> ScheduleHook:
    """Build the hook that sets the learning rates."""
    optimization = config.training.optimization

    def schedule(name: str, total_steps: int, steps_per_epoch: int) -> Schedule:
        warmup_steps = optimization.warmup_steps
        return SCHEDULES[name](
            warmup_steps=usual_warmup(total_steps) if warmup_steps is None else warmup_steps,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            milestones=optimization.lr_milestones,
            gamma=optimization.lr_gamma,
            patience=optimization.lr_patience,
        )

    return ScheduleHook(
        partial(schedule, optimization.lr_scheduler),
        partial(schedule, optimization.lr_scheduler_xmc),
        lr=optimization.lr,
        meta_lr=optimization.meta_lr,
    )


def rewire_hook_of(config: Config) -> RewireHook:
    """Build the hook that rewires the head."""
    ffi = config.model.ffi
    by_threshold = ffi.prune_mode == "threshold"
    amount = ffi.rewire_threshold if by_threshold else ffi.rewire_fraction
    last = min(ffi.rewire_end_threshold, amount) if by_threshold else 0.0
    return RewireHook(
        ffi.rewire_interval,
        ffi.rewire_end_epoch,
        RewireRule(ffi.prune_mode, amount, ffi.growth_init_mode, ffi.growth_mode),
        last if ffi.use_rewire_scheduling else None,
    )
