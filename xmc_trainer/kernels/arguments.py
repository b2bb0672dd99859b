"""What the GPU's kernels are called with: the features of a batch, and what a step does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels.interface import LossFn, Update
from xmc_trainer.rng import Stream, make_key

# Values of the kernels' LOSS and RULE.
LOSSES = {"bce": 0, "squared_hinge": 1}
RULES = {"sgd": 0, "momentum": 1, "adamw": 2, "rowwise_rmsprop": 3}


class Batch(NamedTuple):
    """The features as the kernels read them, padded with zeros to whole tiles of texts."""

    texts: int
    columns: int  # texts, rounded up to whole tiles
    tile: int  # texts a tile: a power of two from 32 to 128
    rows: Tensor  # [columns, d], bfloat16 or float32
    transposed: Tensor  # [d, columns]

    @classmethod
    def of(cls, feat_Bd: Tensor, least: int = 32) -> Batch:
        """`least`: columns at least."""
        texts, d = feat_Bd.shape
        tile = min(128, max(least, 1 << max(0, texts - 1).bit_length()))
        columns = max(1, -(-texts // tile)) * tile
        dtype = torch.float32 if feat_Bd.dtype == torch.float32 else torch.bfloat16
        rows = feat_Bd.new_zeros(columns, d, dtype=dtype)
        rows[:texts] = feat_Bd
        return cls(texts, columns, tile, rows, rows.T.contiguous())

    @property
    def bf16(self) -> bool:
        return self.rows.dtype == torch.bfloat16


class Step(NamedTuple):
    """The kernels' arguments that say what a step does."""

    loss: int
    text_weight: float
    finite: Tensor  # int32 scalar; nothing is updated where it is 0
    update: bool
    rule: dict[str, Any]  # of the bias's update
    decay: dict[str, Any]  # and what the weights' takes besides

    @classmethod
    def of(cls, loss_fn: LossFn, text_weight: float, finite: Tensor, update: Update | None) -> Step:
        rule = dict(lr=0.0, beta0=0.0, beta1=0.0, eps=0.0, correct0=1.0, correct1=1.0, RULE=RULES["sgd"])
        decay: dict[str, Any] = {}
        if update is not None:
            chosen = update.rule
            rule |= dict(lr=update.lr, RULE=RULES[chosen.name])
            if chosen.name == "momentum":
                rule["beta0"] = chosen.momentum
            elif chosen.name == "adamw":
                rule |= dict(beta0=chosen.beta1, beta1=chosen.beta2, eps=chosen.eps)
                rule |= dict(correct0=1 / (1 - chosen.beta1**update.step), correct1=1 / (1 - chosen.beta2**update.step))
            elif chosen.name == "rowwise_rmsprop":
                rule |= dict(beta1=chosen.beta2, eps=chosen.eps, correct1=1 / (1 - chosen.beta2**update.step))
            keys = (key - (1 << 32) if key >> 31 else key for key in make_key(update.seed, update.step, Stream.ROUND))
            decay = dict(weight_decay=update.weight_decay) | {f"key{i}": key for i, key in enumerate(keys)}
        return cls(LOSSES[loss_fn.__name__], text_weight, finite.to(torch.int32), update is not None, rule, decay)


# A chunk of labels takes this many bytes of memory of its own.
WORKSPACE = 48 << 20


def chunk_labels(labels: int, workspace: float, bytes_a_label: int, unit: int) -> int:
    """How many labels to take at a time, a multiple of `unit`."""
    return min(max(1, int(workspace) // bytes_a_label // unit), -(-labels // unit)) * unit


def two_states(state: list[Tensor], missing: Tensor) -> list[Tensor]:
    """Two tensors, whatever the optimizer has: the kernels do not read what their rule does not use."""
    return [*state, missing, missing][:2]


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
