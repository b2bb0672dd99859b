"""The classifier: a fixed fan-in linear layer over labels that trains itself inside its forward pass."""

from xmc_trainer.head.layer import FixedFanInHead
from xmc_trainer.head.optimizers import SGD, AdamW, RowwiseRMSprop
from xmc_trainer.head.protocol import Head, exclude_from_ddp
from xmc_trainer.head.rewire import RewireReport, RewireRule
from xmc_trainer.head.split import SplitHead
from xmc_trainer.head.step import HeadTerm, feature_gradient, multi_head_step

__all__ = [
    "SGD",
    "AdamW",
    "FixedFanInHead",
    "Head",
    "HeadTerm",
    "RewireReport",
    "RewireRule",
    "RowwiseRMSprop",
    "SplitHead",
    "exclude_from_ddp",
    "feature_gradient",
    "multi_head_step",
]
