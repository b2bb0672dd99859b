"""Launches logits.cu, feature_gradient.cu and weight_gradient.cu: the step and the best labels for rows that are sparse in memory and
dense on the chip.

Three products, each a kernel that keeps what does not change on the chip and lets the labels pass, a chunk of labels at a time:

    logits.cu              z = X W^T + bias    loss += sum loss(z, y)    s = dloss/dz      keeps 128 texts of X
    feature_gradient.cu    dX += s W                                                       keeps a part of dX
    weight_gradient.cu     dW = (s^T X)[index]                                             keeps a part of X
    dense_step             weight <- update(weight, dW)    bias <- update(bias, sum of s)

Only the chunk's s and dW are in memory between them. For any number of texts and features. For GPUs of capability 9.0.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from xmc_trainer.kernels import cuda_source, dense_step, tile_math, topk
from xmc_trainer.kernels.cuda_source import TEXTS
from xmc_trainer.kernels.pairs import PairBits
from xmc_trainer.kernels.reference import HeadTensors

_LABELS = 64  # a tile
_MOST_FEATURES = 768  # whose logits a launch makes
# Of the weight gradient: so many tiles of texts a launch, and the features of a block that leave room for them.
_FEATURES_BY_TEXT_TILES = {1: 256, 2: 192, 4: 128, 8: 64}
_MOST_OF_BLOCK = 256  # features of the feature gradient
_TEXT_TILES_TOGETHER = 4  # of the feature gradient
_ROWS = 1 << 16  # of the index at a time
# A chunk's workspace: bytes, or this share of the head's weights and index if that is more.
_WORKSPACE, _SHARE = 128 << 20, 0.2


class _Arguments(ctypes.Structure):
    """`Arguments` of densify.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "weight", "index", "bias", "first_slots", "x", "slopes", "bits", "bias_gradient", "loss", "partial_in", "partial_out",
            "dx", "gradient")),
        ("labels_pitch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (
            "first_label", "last_label", "texts", "columns", "first_text_tile", "text_tiles", "first_feature", "fan_in",
            "columns_of_64", "add")),
        ("group_factor", ctypes.c_uint32),
        ("group_shift", ctypes.c_uint32),
    ]  # fmt: skip


class Kernel:
    """A source, compiled for a head, and how many of its blocks a device holds."""

    def __init__(self, source: str, head: HeadTensors, device: torch.device, **defines: int | str) -> None:
        types = {"WEIGHT": head.weight_LF.dtype, "INDEX": head.index_RF.dtype}
        words = {name: cuda_source.TYPES[dtype] for name, dtype in types.items()} | {
            "CHUNK": math.gcd(head.weight_LF.shape[1], 4), "GROUPED": int(head.group_size > 1)
        }  # fmt: skip
        capability = torch.cuda.get_device_capability(device)
        self._library = cuda_source.compiled(source, capability, tuple(f"{k}={v}" for k, v in (words | defines).items()))
        if self._library.arguments_size() != ctypes.sizeof(_Arguments):
            raise RuntimeError(f"{source} and {__name__} lay their arguments out differently")
        self._device = device
        self.blocks = cuda_source.checked(self._library.launch_blocks())

    def __call__(self, blocks: int, arguments: dict[str, Any]) -> None:
        """On the current stream; tensors by their addresses."""
        plain = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        cuda_source.checked(-self._library.launch(ctypes.byref(_Arguments(**plain)), blocks, cuda_source.stream(self._device)))


class Slice(NamedTuple):
    """Features whose logits a launch makes."""

    first: int
    x: Tensor  # bfloat16 [columns, features of a launch]


def slices(rows: Tensor) -> list[Slice]:
    """rows: bfloat16 [columns, d]. Each slice has as many features, a multiple of 64; zeros beyond the last one."""
    d = rows.shape[1]
    count = -(-d // _MOST_FEATURES)
    size = -(-d // (64 * count)) * 64
    return [Slice(first, pad(part := rows[:, first : first + size], (0, size - part.shape[1]))) for first in range(0, d, size)]


def first_slots(index_RF: Tensor, d: int) -> Tensor:
    """int16 [R, ceil(d / 64)]: how many of a row's features come before those of the i-th 64. `index_RF`: ascending rows."""
    bounds = torch.arange(0, d, 64, device=index_RF.device).to(index_RF.dtype)
    found = torch.empty(index_RF.shape[0], len(bounds), dtype=torch.int16, device=index_RF.device)
    for start in range(0, index_RF.shape[0], _ROWS):
        rows = index_RF[start : start + _ROWS]
        found[start : start + _ROWS] = torch.searchsorted(rows, bounds.expand(len(rows), -1).contiguous())
    return found


def features_of_block(d: int, most: int) -> int:
    """A multiple of 64 and at most `most`, such that blocks cover little more than d features, and are few."""
    return min(range(64, most + 1, 64), key=lambda size: (-(-d // size) * size, -size))


def takes(head: HeadTensors, feat_Bd: Tensor) -> bool:
    """Whether this head and these features are taken here."""
    if head.index_RF is None or feat_Bd.dtype == torch.float32 or not cuda_source.can_compile(feat_Bd.device):
        return False
    return torch.cuda.get_device_capability(feat_Bd.device) == cuda_source.HOPPER


class _Logits:
    """logits.cu, slice after slice.

    Args: labels: of a launch, at most.
    """

    def __init__(self, head: HeadTensors, rows: Tensor, texts: int, labels: int, loss: int, best: bool) -> None:
        self.slices = slices(rows)
        self.text_tiles = rows.shape[0] // TEXTS
        fan_in, features = head.weight_LF.shape[1], self.slices[0].x.shape[1]
        self.kernel = Kernel(
            "logits.cu", head, rows.device, FEATURES=features, FAN_IN=fan_in, LOSS=loss, BEST=int(best), SLICED=int(len(self.slices) > 1)
        )
        self.lanes = max(1, min(self.kernel.blocks // self.text_tiles, -(-labels // topk.BLOCK)))
        tiles = -(-labels // _LABELS)
        self.partial = [torch.empty(tiles * _LABELS * rows.shape[0], device=rows.device) for _ in self.slices[:2][1:]]

    def __call__(self, labels: int, arguments: dict[str, Any]) -> None:
        lanes = min(self.lanes, -(-labels // topk.BLOCK))
        for number, part in enumerate(self.slices):
            partial = {} if number == 0 else {"partial_in": self.partial[0]}
            if number + 1 < len(self.slices):
                partial |= {"partial_out": self.partial[0]}
            self.kernel(lanes * self.text_tiles, arguments | partial | dict(
                x=part.x, first_feature=part.first, first_text_tile=0, text_tiles=self.text_tiles
            ))  # fmt: skip


def _common(head: HeadTensors, rows: Tensor, texts: int) -> dict[str, Any]:
    factor, shift = cuda_source.quotient(head.group_size)
    return dict(
        weight=head.weight_LF, index=head.index_RF, bias=head.bias_L, texts=texts, columns=rows.shape[0], fan_in=head.weight_LF.shape[1],
        columns_of_64=-(-rows.shape[1] // 64), group_factor=factor, group_shift=shift,
    )  # fmt: skip


def step(
    head: HeadTensors,
    rows: Tensor,
    texts: int,
    label_P: Tensor,
    row_P: Tensor,
    *,
    finite: Tensor,
    text_weight: float,
    update: bool,
    rule: dict[str, Any],
    decay: dict[str, Any],
    loss: int,
) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d]).

    Args:
        rows: bfloat16 [columns, d], columns a multiple of TEXTS; those from `texts` on are no texts.
        label_P, row_P: int64 pairs (local label, text).
        finite: int32 scalar; nothing is updated where it is 0.
        text_weight, update, rule, decay, loss: as in `triton_head.Step`.
    """
    (labels, fan_in), (columns, d), device = head.weight_LF.shape, rows.shape, rows.device
    text_tiles, at_a_time = columns // TEXTS, max(_FEATURES_BY_TEXT_TILES)
    several = text_tiles > at_a_time  # the weight gradient is a sum of launches
    gradient_dtype = torch.float32 if several else torch.bfloat16
    bias_update = update and head.bias_L is not None
    bytes_a_label = columns * 2 + columns // 8 + columns // 4 + fan_in * gradient_dtype.itemsize + (columns * 4 if d > _MOST_FEATURES else 0)
    head_bytes = head.weight_LF.nbytes + head.index_RF.nbytes
    unit = topk.BLOCK * max(1, _multiprocessors(device) // text_tiles)  # a tile for each block
    chunk = max(1, int(max(_WORKSPACE, _SHARE * head_bytes)) // bytes_a_label // unit) * unit
    chunk = min(chunk, -(-labels // topk.BLOCK) * topk.BLOCK)

    logits = _Logits(head, rows, texts, chunk, loss, best=False)
    pairs = PairBits(chunk, columns, topk.BLOCK, topk.BLOCK, device)
    slopes = torch.empty(chunk * columns, dtype=torch.bfloat16, device=device)
    losses = torch.zeros(logits.lanes, columns, device=device)
    common = _common(head, rows, texts) | dict(
        first_slots=head.of_index(first_slots, d), slopes=slopes, bits=pairs.bits, loss=losses, labels_pitch=chunk
    )  # fmt: skip
    if bias_update:
        common |= dict(bias_gradient=torch.empty(columns // 16, chunk, device=device))

    features = features_of_block(d, _MOST_OF_BLOCK)
    feature_gradient = Kernel("feature_gradient.cu", head, device, FEATURES=features)
    blocks = -(-d // features)
    together = max(1, min(_TEXT_TILES_TOGETHER, text_tiles, feature_gradient.blocks // blocks))
    lanes = max(1, min(feature_gradient.blocks // (together * blocks), -(-chunk // _LABELS)))
    dx = torch.zeros(lanes, columns, blocks * features, device=device)

    if update:
        tiles = min(at_a_time, 1 << (text_tiles - 1).bit_length())
        weight_features = features_of_block(d, _FEATURES_BY_TEXT_TILES[tiles])
        weight_gradient = Kernel(
            "weight_gradient.cu", head, device, FEATURES=weight_features, TEXT_TILES=tiles, GRADIENT=cuda_source.TYPES[gradient_dtype]
        )
        weight_blocks = -(-d // weight_features)
        weight_lanes = max(1, min(weight_gradient.blocks // weight_blocks, -(-chunk // _LABELS)))
        padded = pad(rows, (0, weight_blocks * weight_features - d))
        gradient = torch.empty(chunk, fan_in, dtype=gradient_dtype, device=device)
        states = [*head.weight_state, head.weight_LF, head.weight_LF][:2]
        by_label = rule["RULE"] == tile_math.ROWWISE.value
        f_tile = triton.next_power_of_2(fan_in)
        f_tile = f_tile if by_label else min(1024, f_tile)
        rows_tile = max(1, 2048 // f_tile)

    for first in range(0, labels, chunk):
        last = min(first + chunk, labels)
        pairs.mark(label_P, row_P, first)
        arguments = common | dict(first_label=first, last_label=last)
        logits(last - first, arguments)
        for tile in range(0, text_tiles, together):
            count = min(together, text_tiles - tile)
            feature_gradient(lanes * count * blocks, arguments | dict(dx=dx, first_text_tile=tile, text_tiles=count))
        if not update:
            continue
        for tile in range(0, text_tiles, at_a_time):
            weight_gradient(weight_lanes * weight_blocks, arguments | dict(
                x=padded, gradient=gradient, first_text_tile=tile, text_tiles=min(at_a_time, text_tiles - tile), add=int(tile > 0)
            ))  # fmt: skip
        dense_step.gather_kernel[(triton.cdiv(last - first, rows_tile),)](
            head.weight_LF, *states, gradient, gradient, finite, first_label=first, last_label=last, label_start=head.label_start,
            d=fan_in, text_weight=text_weight, F=fan_in, G=1, T=rows_tile, F_TILE=f_tile, SPARSE=False, **rule, **decay,
        )  # fmt: skip
        if bias_update:
            dense_step.update_bias_kernel[(triton.cdiv(last - first, 256),)](
                head.bias_L, *[*head.bias_state, head.bias_L, head.bias_L][:2], common["bias_gradient"], finite, first_label=first,
                last_label=last, pitch=chunk, text_weight=text_weight, PARTS=columns // 16, T=256, **rule,
            )  # fmt: skip
    return losses.sum(0), dx.sum(0)[:, :d] * text_weight


def best(
    head: HeadTensors, rows: Tensor, first_label: int, last_label: int, found: Tensor, skip: Tensor | None
) -> None:
    """The largest logits of every `topk.BLOCK` labels of first_label..last_label, on the current stream.

    Args:
        rows: bfloat16 [columns, d], columns a multiple of TEXTS.
        first_label: a multiple of `topk.BLOCK`.
        found: out: float32 [blocks of these labels, columns].
        skip: `bits` of `PairBits` for these labels, or None.
    """
    logits = _Logits(head, rows, rows.shape[0], last_label - first_label, loss=0, best=True)
    arguments = _common(head, rows, rows.shape[0]) | dict(first_label=first_label, last_label=last_label, loss=found)
    logits(last_label - first_label, arguments | ({} if skip is None else dict(bits=skip)))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
