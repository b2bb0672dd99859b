"""Training, evaluating and using extreme multi-label classifiers with a sharded fixed fan-in head."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xmc_trainer.builders.training import build_trainer
    from xmc_trainer.classifier import XMCClassifier
    from xmc_trainer.config import load_config
    from xmc_trainer.head import FixedFanInHead
    from xmc_trainer.model import XMCModel
    from xmc_trainer.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["FixedFanInHead", "Trainer", "XMCClassifier", "XMCModel", "build_trainer", "load_config"]

# Loaded at the first use: torch, transformers and the engine take seconds.
_MODULES = {
    "FixedFanInHead": "head",
    "Trainer": "trainer",
    "XMCClassifier": "classifier",
    "XMCModel": "model",
    "build_trainer": "builders.training",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
