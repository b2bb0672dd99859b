"""Hooks: everything that happens around the training step. A user's own run after ours.

class MyHook(Hook):
    def on_step_end(self, trainer):
        ...

Trainer(config, hooks=[MyHook()]).train()
"""

from xmc_trainer.hooks.base import Hook

__all__ = ["Hook"]
