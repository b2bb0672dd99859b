"""Launches logits.cu, feature_gradient.cu and weight_gradient.cu: the step and the rankings of sparse heads, on capability 9.0.

Weights are sparse in device memory; the kernels make them dense in shared memory. Each product has a kernel, which loops over a chunk
of labels and keeps one operand on chip:

    logits.cu              z = X W^T + bias    loss += sum loss(z, y)    s = dloss/dz      keeps 128 texts of X
    feature_gradient.cu    dX += s W                                                       keeps a part of dX
    weight_gradient.cu     dW = (s^T X)[index]                                             keeps a part of X
    triton.dense           weight <- update(weight, dW)    bias <- update(bias, sum of s)

Between them only the chunk's s and dW are in device memory. The numbers of texts and features are not limited.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xmc_trainer.kernels.arguments import (
    BLOCK,
    DENSIFY,
    TEXTS,
    WORKSPACE,
    Batch,
    Step,
    chunk_labels,
    multiprocessors,
    step_workspace,
)  # fmt: skip
from xmc_trainer.kernels.cuda.source import TYPES, Kernel
from xmc_trainer.kernels.interface import HeadTensors
from xmc_trainer.kernels.triton import dense
from xmc_trainer.kernels.triton.bitmap import PairBitmap

_LABELS = 64  # in a tile
_MOST_FEATURES = 768  # in a launch of logits.cu
# weight_gradient.cu: tiles of texts in a launch -> most features in a block, limited by shared memory.
_FEATURES_BY_TEXT_TILES = {1: 256, 2: 192, 4: 128}
_MOST_OF_BLOCK = 256  # features in a block of feature_gradient.cu
_LEAST_OF_BLOCK = 192  # features; smaller blocks take as long, see `features_of_block`
_TEXT_TILES_TOGETHER = 4  # in a launch of feature_gradient.cu
_ROWS = 1 << 16  # index rows that `first_slots` takes at a time


def _kernel(file: str, head: HeadTensors, device: torch.device, **defines: int | str) -> Kernel:
    chunk = math.gcd(head.weight_LF.shape[1], 4)
    return Kernel(file, DENSIFY, head, device, CHUNK=chunk, GROUP=head.group_size, **defines)


class Slice(NamedTuple):
    """The features that one launch of logits.cu takes."""

    first: int
    x: Tensor  # bfloat16 [columns, features of the launch]


def slices(feat_Bd: Tensor) -> list[Slice]:
    """Cut features, bfloat16 [columns, d], into slices of equal size, a multiple of 64. The last is padded with zeros."""
    d = feat_Bd.shape[1]
    count = -(-d // _MOST_FEATURES)
    size = -(-d // (64 * count)) * 64
    return [
        Slice(first, pad(part := feat_Bd[:, first : first + size], (0, size - part.shape[1])))
        for first in range(0, d, size)
    ]


def first_slots(index_RF: Tensor, d: int) -> Tensor:
    """Return a row's first slot with a feature of 64 i or more: int16 [R, ceil(d / 64)]. index_RF: int16 or int32, rows ascending."""
    bounds = torch.arange(0, d, 64, device=index_RF.device).to(index_RF.dtype)
    found = torch.empty(index_RF.shape[0], len(bounds), dtype=torch.int16, device=index_RF.device)
    for start in range(0, index_RF.shape[0], _ROWS):
        rows = index_RF[start : start + _ROWS]
        found[start : start + _ROWS] = torch.searchsorted(rows, bounds.expand(len(rows), -1).contiguous())
    return found


def features_of_block(d: int, most: int) -> int:
    """Choose a block's features: a multiple of 64, at most `most`, such that the blocks cover little more than d features.

    Each block reads all slopes. With fewer than _LEAST_OF_BLOCK features these reads, not the products, take the time.
    """

    def cost(size: int) -> tuple[int, int, int]:
        blocks = -(-d // size)
        return blocks * max(size, _LEAST_OF_BLOCK), blocks * size, -size

    return min(range(64, most + 1, 64), key=cost)


class _Logits:
    """Launches logits.cu for one slice of features after another.

    Args: labels: most labels in a launch.
    """

    def __init__(self, head: HeadTensors, feat_Bd: Tensor, labels: int, loss: int, best: bool) -> None:
        self.slices = slices(feat_Bd)
        self.text_tiles = feat_Bd.shape[0] // TEXTS
        fan_in, features = head.weight_LF.shape[1], self.slices[0].x.shape[1]
        sliced = int(len(self.slices) > 1)
        self.kernel = _kernel(
            "logits.cu",
            head,
            feat_Bd.device,
            FEATURES=features,
            FAN_IN=fan_in,
            LOSS=loss,
            BEST=int(best),
            SLICED=sliced,
        )
        self.lanes = max(1, min(self.kernel.blocks // self.text_tiles, -(-labels // BLOCK)))
        tiles = -(-labels // _LABELS)
        self.partial = [
            torch.empty(tiles * _LABELS * feat_Bd.shape[0], device=feat_Bd.device) for _ in self.slices[:2][1:]
        ]

    def __call__(self, labels: int, arguments: dict[str, Any]) -> None:
        lanes = min(self.lanes, -(-labels // BLOCK))
        for number, part in enumerate(self.slices):
            partial = {} if number == 0 else {"partial_in": self.partial[0]}
            if number + 1 < len(self.slices):
                partial |= {"partial_out": self.partial[0]}
            self.kernel(lanes * self.text_tiles, arguments | partial | dict(
                x=part.x, first_feature=part.first, first_text_tile=0, text_tiles=self.text_tiles
            ))  # fmt: skip


def _common(head: HeadTensors, feat_Bd: Tensor, texts: int) -> dict[str, Any]:
    return dict(
        weight=head.weight_LF, index=head.index_RF, bias=head.bias_L, texts=texts, columns=feat_Bd.shape[0], fan_in=head.weight_LF.shape[1],
        columns_of_64=-(-feat_Bd.shape[1] // 64),
    )  # fmt: skip


def run(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Run the step. Return the loss, float32 [columns], and the feature gradient, float32 [columns, d].

    batch: padded to whole tiles of TEXTS texts.
    """
    rows, texts = batch.rows, batch.texts
    (labels, fan_in), (columns, d), device = head.weight_LF.shape, rows.shape, rows.device
    text_tiles, at_a_time = columns // TEXTS, max(_FEATURES_BY_TEXT_TILES)
    several = text_tiles > at_a_time  # several launches add to the weight gradient
    gradient_dtype = torch.float32 if several else torch.bfloat16
    bias_update = step.update and head.bias_L is not None
    bytes_a_label = (
        columns * 2
        + columns // 8
        + columns // 4
        + fan_in * gradient_dtype.itemsize
        + (columns * 4 if d > _MOST_FEATURES else 0)
    )
    unit = BLOCK * max(1, multiprocessors(device) // text_tiles)  # the same work for each thread block
    chunk = max(1, int(step_workspace(head)) // bytes_a_label // unit) * unit
    chunk = min(chunk, -(-labels // BLOCK) * BLOCK)

    logits = _Logits(head, rows, chunk, step.loss, best=False)
    pairs = PairBitmap(chunk, columns, BLOCK, BLOCK, device)
    slopes = torch.empty(chunk * columns, dtype=torch.bfloat16, device=device)
    losses = torch.zeros(logits.lanes, columns, device=device)
    assert head.of_index is not None  # the layer sets it
    common: dict[str, Any] = _common(head, rows, texts) | dict(
        first_slots=head.of_index(first_slots, d), slopes=slopes, bits=pairs.bits, loss=losses, labels_pitch=chunk
    )  # fmt: skip
    if bias_update:
        common |= dict(bias_gradient=torch.empty(columns // 16, chunk, device=device))

    features = features_of_block(d, _MOST_OF_BLOCK)
    feature_gradient = _kernel("feature_gradient.cu", head, device, FEATURES=features)
    blocks = -(-d // features)
    together = max(1, min(_TEXT_TILES_TOGETHER, text_tiles, feature_gradient.blocks // blocks))
    lanes = max(1, min(feature_gradient.blocks // (together * blocks), -(-chunk // _LABELS)))
    dx = torch.zeros(lanes, columns, blocks * features, device=device)

    if step.update:
        tiles = min(at_a_time, 1 << (text_tiles - 1).bit_length())
        weight_features = features_of_block(d, _FEATURES_BY_TEXT_TILES[tiles])
        weight_gradient = _kernel(
            "weight_gradient.cu",
            head,
            device,
            FEATURES=weight_features,
            TEXT_TILES=tiles,
            GRADIENT=TYPES[gradient_dtype],
        )
        weight_blocks = -(-d // weight_features)
        weight_lanes = max(1, min(weight_gradient.blocks // weight_blocks, -(-chunk // _LABELS)))
        padded = pad(rows, (0, weight_blocks * weight_features - d))
        gradient = torch.empty(chunk, fan_in, dtype=gradient_dtype, device=device)

    for first in range(0, labels, chunk):
        last = min(first + chunk, labels)
        pairs.mark(label_P, row_P, first)
        arguments = common | dict(first_label=first, last_label=last)
        logits(last - first, arguments)
        for tile in range(0, text_tiles, together):
            count = min(together, text_tiles - tile)
            feature_gradient(lanes * count * blocks, arguments | dict(dx=dx, first_text_tile=tile, text_tiles=count))
        if not step.update:
            continue
        for tile in range(0, text_tiles, at_a_time):
            weight_gradient(weight_lanes * weight_blocks, arguments | dict(
                x=padded, gradient=gradient, first_text_tile=tile, text_tiles=min(at_a_time, text_tiles - tile), add=int(tile > 0)
            ))  # fmt: skip
        dense.update_from(head, gradient[: last - first], first, last, step, None)
        if bias_update:
            dense.update_biases_from(head, common["bias_gradient"], first, last, step)
    return losses.sum(0), dx.sum(0)[:, :d] * step.text_weight


def find_best(head: HeadTensors, batch: Batch, best_KB: Tensor, skip_label_P: Tensor, skip_row_P: Tensor) -> None:
    """Find each block's largest logit, see `triton.topk.Find`. batch: padded to whole tiles of TEXTS texts."""
    labels, rows, columns = head.weight_LF.shape[0], batch.rows, batch.columns
    skips = skip_label_P.numel() > 0
    sliced = rows.shape[1] > _MOST_FEATURES
    chunk = (
        chunk_labels(labels, WORKSPACE, columns * (4 if sliced else 0) + columns // 8, BLOCK)
        if skips or sliced
        else labels
    )
    pairs = PairBitmap(chunk, columns, BLOCK, BLOCK, rows.device) if skips else None
    logits = _Logits(head, rows, chunk, loss=0, best=True)
    arguments = _common(head, rows, batch.texts) | ({} if pairs is None else dict(bits=pairs.bits))
    for first in range(0, labels, chunk):
        last = min(first + chunk, labels)
        if pairs:
            pairs.mark(skip_label_P, skip_row_P, first)
        logits(last - first, arguments | dict(first_label=first, last_label=last, loss=best_KB[first // BLOCK :]))
