"""Launches best_pass.cu: the largest logit of every block of labels that share index rows with few others or none, for `topk`."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from xmc_trainer.kernels import cuda_source, topk
from xmc_trainer.kernels.cuda_source import TEXTS
from xmc_trainer.kernels.reference import HeadTensors

_LABELS, _WARPS, _MOST_FEATURES = 64, 12, 768  # a tile; of a block
_NO_UPDATE = dict(RULE=0, lr=0.0, beta0=0.0, beta1=0.0, eps=0.0, correct0=1.0, correct1=1.0)


def takes(head: HeadTensors, rows: Tensor) -> bool:
    """Whether `launch` takes this head and these texts."""
    if head.index_RF is None or rows.dtype != torch.bfloat16 or rows.shape[1] > _MOST_FEATURES:
        return False
    return cuda_source.can_compile(rows.device) and torch.cuda.get_device_capability(rows.device) == cuda_source.HOPPER


def launch(
    head: HeadTensors, rows: Tensor, first_label: int, last_label: int, best: Tensor, skip: Tensor | None, any_skip: Tensor | None
) -> None:
    """The largest logits of labels first_label..last_label, on the current stream.

    Args:
        rows: bfloat16 [columns, d], columns a multiple of 32.
        first_label: a multiple of `topk.BLOCK`.
        best: out: float32 [blocks of these labels, columns].
        skip, any_skip: `bits` and `any` of `PairBits` in tiles of `topk.BLOCK`, for these labels, or None.
    """
    columns, d = rows.shape
    fan_in, features, tiles = head.weight_LF.shape[1], -(-d // 64) * 64, -(-columns // TEXTS)
    library = cuda_source.library(
        "best_pass.cu", head, rows.device, _NO_UPDATE, 0, FEATURES=features, FAN_IN=fan_in, CHUNK=math.gcd(fan_in, 4),
        LABELS=_LABELS, WARPS=_WARPS,
    )  # fmt: skip
    programs = min(cuda_source.checked(library.launch_blocks()) // tiles, -(-(last_label - first_label) // topk.BLOCK))
    x = torch.nn.functional.pad(rows, (0, features - d, 0, tiles * TEXTS - columns))
    arguments = cuda_source.Arguments.of(
        head, first_label, last_label, x=x, columns=columns, texts=columns, dx=None, losses=best, positive=skip, any_positive=any_skip,
        finite=None, text_weight=1.0, update=False, rule=_NO_UPDATE, decay={},
    )  # fmt: skip
    cuda_source.checked(-library.launch(ctypes.byref(arguments), max(1, programs) * tiles, cuda_source.stream(rows.device)))
