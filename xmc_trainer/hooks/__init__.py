"""Hooks: everything around the training step. Your own hooks run after the built-in ones.

class MyHook(Hook):
    def on_step_end(self, trainer):
        ...

build_trainer(config, hooks=[MyHook()]).train()
"""

from xmc_trainer.hooks.base import Hook

__all__ = ["Hook"]
