"""The arguments of GPU kernels: a batch's features, a step's parameters, and the CUDA kernels' `Arguments` struct."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmc_trainer.kernels.interface import HeadTensors, LossFn, Update
from xmc_trainer.rng import Stream, make_key

# The values of LOSS and RULE in the kernels.
LOSSES = {"bce": 0, "squared_hinge": 1}
RULES = {"sgd": 0, "momentum": 1, "adamw": 2, "rowwise_rmsprop": 3}
TEXTS = 128  # texts in a tile of the CUDA kernels
BLOCK = 128  # labels in a block, of which a ranking first keeps only the largest logit


class Batch(NamedTuple):
    """A batch's features, padded with zeros to whole tiles of texts."""

    texts: int
    columns: int  # texts, rounded up to whole tiles
    tile: int  # texts in a tile: a power of two from 32 to 128
    rows: Tensor  # [columns, d], bfloat16 or float32
    transposed: Tensor  # [d, columns]

    @classmethod
    def of(cls, feat_Bd: Tensor, least: int = 32) -> Batch:
        """Pad and transpose features of any float dtype. least: smallest number of columns."""
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
    """The loss and the update of a step, as kernel arguments."""

    loss: int
    text_weight: float
    finite: Tensor  # int32 scalar; 0: update nothing
    update: bool
    rule: dict[str, Any]  # the update of weights and biases
    decay: dict[str, Any]  # for weights only: weight decay and the rounding keys

    @classmethod
    def of(cls, loss_fn: LossFn, text_weight: float, finite: Tensor, update: Update | None) -> Step:
        rule = dict(lr=0.0, beta0=0.0, beta1=0.0, eps=0.0, correct0=1.0, correct1=1.0, RULE=RULES["sgd"])
        decay: dict[str, Any] = {}
        if update is not None:
            chosen: Any = update.rule  # each rule has its own hyperparameters
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


# Bytes of workspace for a chunk of labels that should stay in the L2 cache.
WORKSPACE = 48 << 20
# The same for kernels that want few, large chunks: the larger of this and this share of the head's weights and index.
STEP_WORKSPACE, STEP_SHARE = 256 << 20, 0.2


def step_workspace(head: HeadTensors) -> float:
    """Return the bytes of workspace for a large chunk of labels."""
    index_bytes = 0 if head.index_RF is None else head.index_RF.nbytes
    return max(STEP_WORKSPACE, STEP_SHARE * (head.weight_LF.nbytes + index_bytes))


def chunk_labels(labels: int, workspace: float, bytes_a_label: int, unit: int) -> int:
    """Return how many labels a chunk has: a multiple of `unit`, as many as fit the workspace, no more than needed."""
    return min(max(1, int(workspace) // bytes_a_label // unit), -(-labels // unit)) * unit


def two_states(state: list[Tensor], missing: Tensor) -> list[Tensor]:
    """Pad a list of zero to two states to two tensors. Kernels do not read states that their rule does not use."""
    return [*state, missing, missing][:2]


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_CTYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "float": ctypes.c_float}


class Layout:
    """A kernel's `Arguments` struct, generated for Python and C++ from one table.

    Args:
        rows: (C type, space-separated names, meaning), in the order of the fields.
        constants: constants of this kernel, added to those that all kernels share.
    Attributes:
        structure: the ctypes.Structure.
        header: the text of arguments.cuh, which the sources include.
    """

    def __init__(self, *rows: tuple[str, str, str], **constants: int) -> None:
        fields = [
            (name, ctypes.c_void_p if "*" in kind else _CTYPES[kind])
            for kind, names, _ in rows
            for name in names.split()
        ]
        self.structure = type("Arguments", (ctypes.Structure,), {"_fields_": fields})
        constants |= {"TEXTS": TEXTS, "BLOCK": BLOCK} | {
            name.upper(): value for name, value in (LOSSES | RULES).items()
        }
        lines = [
            "// Written by xmc_trainer/kernels/arguments.py.",
            "#pragma once",
            "#include <cstddef>",
            "#include <cstdint>",
        ]
        lines += ["#include <cuda_bf16.h>", "using bfloat16 = __nv_bfloat16;"]
        lines += [f"constexpr int {name} = {value};" for name, value in constants.items()]
        lines += ["struct Arguments {"]
        lines += [f"    {kind} {name};  // {meaning}" for kind, names, meaning in rows for name in names.split()] + [
            "};"
        ]
        places = {f"offsetof(Arguments, {name})": getattr(self.structure, name).offset for name, _ in fields}
        places["sizeof(Arguments)"] = ctypes.sizeof(self.structure)
        lines += [f'static_assert({place} == {value}, "as in Python");' for place, value in places.items()]
        self.header = "\n".join(lines) + "\n"


# For logits.cu, feature_gradient.cu and weight_gradient.cu; see cuda/densify.py.
DENSIFY = Layout(
    ("const void*", "weight", "[L, F]"),
    ("const void*", "index", "[R, F], rows ascending"),
    ("const float*", "bias", "[L], or null"),
    ("const uint16_t*", "first_slots", "[R, columns_of_64]: a row's first slot with a feature of 64 i or more"),
    ("const bfloat16*", "x", "[columns, features of the launch, padded]"),
    ("bfloat16*", "slopes", "[tiles of labels from first_label on, columns / TEXTS, TEXTS, LABELS]"),
    ("const uint32_t*", "bits", "[labels from first_label on, columns / 32]: one bit for each (label, text); or null"),
    ("float*", "bias_gradient", "[columns / 16, labels_pitch]: each row sums 16 texts; or null"),
    ("float*", "loss", "[lanes, columns]; with BEST the largest logits [blocks of labels, columns]"),
    ("const float*", "partial_in", "[tiles of labels, columns / TEXTS, TEXTS * LABELS]: logits over earlier features; or null"),
    ("float*", "partial_out", "the same, for the next launch; or null"),
    ("float*", "dx", "[lanes, columns, features of all blocks]"),
    ("void*", "gradient", "[labels from first_label on, F]"),
    ("int64_t", "labels_pitch", "row length of bias_gradient"),
    ("int32_t", "first_label last_label", "the labels of this launch"),
    ("int32_t", "texts columns", "columns: texts padded to a multiple of TEXTS"),
    ("int32_t", "first_text_tile text_tiles first_feature", "the tiles of texts and the features of this launch"),
    ("int32_t", "fan_in columns_of_64", "columns_of_64: ceil(d / 64)"),
    ("int32_t", "add", "not zero: add to `gradient` instead of overwriting it"),
    LABELS=64,
)  # fmt: skip
# For group.cu; see cuda/group.py.
GROUP = Layout(
    ("void*", "weight state0 state1", "[L, F]"),
    ("const void*", "index", "[R, F], rows ascending"),
    ("float*", "bias bias_state0 bias_state1", "[L], or null"),
    ("const bfloat16*", "x", "[d, columns], the columns in the order of `in_warpgroup_order`"),
    ("float*", "dx", "[d, columns], without text_weight"),
    ("const uint32_t*", "positive", "[labels of rows from first_row on, columns / 32]: one bit for each (label, text)"),
    ("const int32_t*", "any_positive", "[rows, tiles in a row]: not zero if the tile has a positive"),
    ("float*", "loss", "[blocks, columns]"),
    ("const int32_t*", "finite", "scalar; 0: update nothing"),
    ("int64_t", "labels", "L"),
    ("int32_t", "first_row last_row", "the index rows of this launch"),
    ("int32_t", "label_start texts columns fan_in group update", "as in `interface` and `Step`"),
    ("float", "text_weight lr weight_decay beta0 beta1 eps correct0 correct1", "as in `Step`"),
    ("uint32_t", "row_key column_key", "rounding keys; column_key is k ^ (k >> 16)"),
)  # fmt: skip
