"""Build the hooks that a configuration asks for."""

from __future__ import annotations

from xmc_trainer.config import Config
from xmc_trainer.hooks.base import Hook
from xmc_trainer.hooks.checkpoint import CheckpointHook
from xmc_trainer.hooks.evaluate import BestModelHook, EarlyStopHook, EvaluateHook
from xmc_trainer.hooks.logging import JsonLogHook, ProgressHook, WandbHook
from xmc_trainer.hooks.rewire import RewireHook, SparsifyHook
from xmc_trainer.hooks.schedule import ScheduleHook


def default_hooks(config: Config) -> list[Hook]:
    """Build the hooks in the order in which they run.

    The checkpoint comes first: it saves the state after the previous step. Then the schedule sets the learning rates. Sparsifying
    and rewiring edit the head before anything reads it. Evaluation precedes the hooks that use its result.
    """
    training, ffi, optimization = config.training, config.model.ffi, config.training.optimization
    dense_epochs = optimization.dense_epochs if ffi.use_sparse_layer else 0
    hooks: list[Hook] = [
        CheckpointHook(training.checkpoint_interval, training.checkpoint_minutes, training.checkpoints_kept),
        ScheduleHook(optimization),
    ]
    if dense_epochs:
        hooks.append(SparsifyHook(dense_epochs, ffi))
    if ffi.use_sparse_layer and ffi.rewire_interval:
        hooks.append(RewireHook(ffi))
    hooks.append(EvaluateHook(training.evaluation))
    if training.evaluation.early_stop_patience:
        hooks.append(EarlyStopHook(training.evaluation, dense_epochs))
    if training.use_checkpoint:
        hooks.append(BestModelHook(training.checkpoint_file, training.best_p1, dense_epochs))
    hooks.append(ProgressHook(training.verbose.print_iter if training.verbose.show_iter else None))
    if training.verbose.logging:
        hooks.append(JsonLogHook())
    if training.verbose.use_wandb:
        hooks.append(WandbHook(config))
    return hooks
