"""The classifier: a fixed fan-in linear layer over labels that trains itself inside its forward pass."""

from xmc_trainer.head.layer import FixedFanInHead, HeadTerm, feature_gradient, multi_head_step
from xmc_trainer.head.optimizers import SGD, AdamW, RowwiseRMSprop
from xmc_trainer.head.rewire import RewireReport, RewireRule
from xmc_trainer.head.split import SplitHead

__all__ = [
    "SGD",
    "AdamW",
    "FixedFanInHead",
    "HeadTerm",
    "RewireReport",
    "RewireRule",
    "RowwiseRMSprop",
    "SplitHead",
    "feature_gradient",
    "multi_head_step",
]
