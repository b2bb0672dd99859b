"""The head step in plain torch, on any device: the CPU backend, and the oracle that tests compare other backends to.

The step takes one tile of labels at a time. D_Td holds the tile's weights as dense rows: row l has weight[l] at the features
index[l // G] and zeros elsewhere. Shapes are those of `interface`.

    z_BT  = x_Bd D_Td^T + bias_T        loss_B += sum_T loss(z, y)         g_BT = text_weight * dloss/dz
    dx_Bd += g_BT D_Td                  dW_TF = (g_BT^T x_Bd)[:, index]     weight_TF <- update(weight_TF, dW_TF)

So neither the B x L logits nor the L x F gradient is ever in memory. On a CPU, dense rows and matrix products are many times
faster than gathered features, and simpler. Their cost is that each product covers all d features; GPU kernels avoid that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from xmc_trainer.kernels import eight_bits
from xmc_trainer.kernels.interface import ID_MAX, HeadTensors, LossFn, Update, index_rows, pack_candidates
from xmc_trainer.rng import Stream, make_key, round_to_bfloat16


class Tile(Protocol):
    """The products of labels start..stop with a batch's features. Call `logits` first."""

    def logits(self) -> Tensor:
        """Return the logits without bias, float32 [B, T]."""

    def feature_grad(self, dlogit_BT: Tensor, grad_start: int) -> Tensor:
        """Return the feature gradient of texts grad_start..B-1, float32 [B - grad_start, d]."""

    def weight_grad(self, dlogit_BT: Tensor) -> Tensor:
        """Return the weight gradient, float32 [T, F]."""


class DenseTile:
    """A tile whose weights are scattered into a dense matrix."""

    def __init__(self, head: HeadTensors, start: int, stop: int, feat_Bd: Tensor) -> None:
        self.feat_Bd, self.index_TF = feat_Bd, None
        self.dense_Td = head.weight_LF[start:stop].to(torch.float32)
        if head.index_RF is not None:
            self.index_TF = index_rows(head, start, stop)
            zeros_Td = self.dense_Td.new_zeros(stop - start, feat_Bd.shape[1])
            self.dense_Td = zeros_Td.scatter_(1, self.index_TF, self.dense_Td)

    def logits(self) -> Tensor:
        return self.feat_Bd @ self.dense_Td.T

    def feature_grad(self, dlogit_BT: Tensor, grad_start: int) -> Tensor:
        return dlogit_BT[grad_start:] @ self.dense_Td

    def weight_grad(self, dlogit_BT: Tensor) -> Tensor:
        grad_Td = dlogit_BT.T @ self.feat_Bd
        return grad_Td if self.index_TF is None else grad_Td.gather(1, self.index_TF)


def pair_mask(label_P: Tensor, row_P: Tensor, start: int, stop: int, rows: int) -> Tensor:
    """Mark the (text, label) pairs of labels start..stop: bool [rows, T]. Pairs may repeat.

    label_P, row_P: int64 local labels and texts. rows: number of texts.
    """
    tile = stop - start
    local = label_P - start
    # Pairs of other tiles go to one extra column. Selecting pairs instead would make a size depend on data and wait for the GPU.
    column = torch.where((local >= 0) & (local < tile), local, tile)
    mask = torch.zeros(rows, tile + 1, dtype=torch.bool, device=label_P.device)
    mask[row_P, column] = True
    return mask[:, :tile]


def head_step(
    head: HeadTensors,
    feat_Bd: Tensor,
    label_P: Tensor,
    row_P: Tensor,
    *,
    loss_fn: LossFn,
    text_weight: float,
    grad_start: int,
    update: Update | None,
    tile_labels: int,
    tile_type: Callable[[HeadTensors, int, int, Tensor], Tile] = DenseTile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss and feature gradient over this rank's labels; with `update`, update the weights.

    Args:
        head: edited in place if `update` is given.
        feat_Bd: features, any float dtype; the arithmetic is float32.
        label_P, row_P: int64 positives (local label, text); labels outside 0..L-1 are ignored.
        loss_fn: (logits, positive) -> (loss, dloss/dlogit), element-wise.
        text_weight: factor on every text's loss in both gradients.
        grad_start: the first text of this micro-batch. Earlier texts only contribute to the weight update.
        tile_labels: labels in a tile.
        tile_type: computes a tile's products.
    Returns:
        loss_b: float32 [B - grad_start], each text's loss summed over this rank's labels, without text_weight.
        grad_bd: float32 [B - grad_start, d].
        finite: bool scalar on the device. False if any feature is not finite; then nothing was updated.
    """
    feat = feat_Bd.to(torch.float32)
    rows, d = feat.shape
    labels = head.weight_LF.shape[0]
    finite = torch.isfinite(feat).all()
    loss_b = feat.new_zeros(rows - grad_start)
    grad_bd = feat.new_zeros(rows - grad_start, d)
    for start in range(0, labels, tile_labels):
        stop = min(start + tile_labels, labels)
        tile = tile_type(head, start, stop, feat)
        logit_BT = tile.logits()
        if head.bias_L is not None:
            logit_BT += head.bias_L[start:stop]
        loss_BT, dlogit_BT = loss_fn(logit_BT, pair_mask(label_P, row_P, start, stop, rows))
        loss_b += loss_BT[grad_start:].sum(1)
        dlogit_BT *= text_weight
        grad_bd += tile.feature_grad(dlogit_BT, grad_start)
        if update is not None:
            _update_tile(head, start, stop, tile.weight_grad(dlogit_BT), dlogit_BT, update, finite)
    return loss_b, grad_bd, finite


def dense_weight_grad(
    head: HeadTensors, start: int, stop: int, feat_Bd: Tensor, label_P: Tensor, row_P: Tensor, loss_fn: LossFn
) -> Tensor:
    """Return the weight gradient of labels start..stop for all d features, whether they read them or not: float32 [T, d]."""
    feat = feat_Bd.to(torch.float32)
    logit_BT = DenseTile(head, start, stop, feat).logits()
    if head.bias_L is not None:
        logit_BT += head.bias_L[start:stop]
    dlogit_BT = loss_fn(logit_BT, pair_mask(label_P, row_P, start, stop, feat.shape[0]))[1]
    return dlogit_BT.T @ feat


def _update_tile(
    head: HeadTensors, start: int, stop: int, grad_TF: Tensor, dlogit_BT: Tensor, update: Update, finite: Tensor
) -> None:
    rows = slice(start, stop)
    weight = head.weight_LF[rows]
    state = [tensor[rows] for tensor in head.weight_state]
    wide = [eight_bits.decoded(s, number) if s.dtype == torch.uint8 else s.float() for number, s in enumerate(state, 1)]
    new = update.rule.update(weight.float(), grad_TF, wide, update.lr, update.weight_decay, update.step)
    first_label = head.label_start + start
    for number, (old, value) in enumerate(zip([weight, *state], [new[0], *new[1]])):
        _store(old, value, finite, update, number, first_label)
    if head.bias_L is not None:
        bias = head.bias_L[rows]
        state = [tensor[rows] for tensor in head.bias_state]
        new = update.rule.update(bias, dlogit_BT.sum(0), state, update.lr, 0.0, update.step)
        for old, value in zip([bias, *state], [new[0], *new[1]]):
            old.copy_(torch.where(finite, value, old))


def _store(old: Tensor, value: Tensor, finite: Tensor, update: Update, number: int, first_label: int) -> None:
    """Write float32 values into a tile of the weights (number 0) or a state (1, 2), if `finite`. Narrower dtypes round stochastically."""
    if old.dtype != torch.float32:
        label = torch.arange(first_label, first_label + old.shape[0], device=old.device)[:, None]
        slot = torch.arange(old.shape[1], device=old.device)
        rounded = round_to_bfloat16 if old.dtype == torch.bfloat16 else eight_bits.encoded
        value = rounded(value, make_key(update.seed, update.step, Stream.ROUND), label, slot, number)
    old.copy_(torch.where(finite, value, old))


def head_topk(
    head: HeadTensors,
    feat_Bd: Tensor,
    k: int,
    skip_label_P: Tensor,
    skip_row_P: Tensor,
    *,
    tile_labels: int,
    tile_type: Callable[[HeadTensors, int, int, Tensor], Tile] = DenseTile,
) -> Tensor:
    """Return the best k labels of this rank for each text, as packed candidates (see `unpack_candidates`).

    Args:
        skip_label_P, skip_row_P: int64 pairs (local label, text) to leave out.
    Returns: int64 [B, k], best first. A text with fewer than k labels left gets candidates of score -inf at the end.
    """
    feat = feat_Bd.to(torch.float32)
    rows = feat.shape[0]
    nothing = pack_candidates(torch.full((1,), -torch.inf), torch.tensor([ID_MAX])).to(feat.device)
    best = nothing.expand(rows, k)
    for start in range(0, head.weight_LF.shape[0], tile_labels):
        stop = min(start + tile_labels, head.weight_LF.shape[0])
        score_BT = tile_type(head, start, stop, feat).logits()
        if head.bias_L is not None:
            score_BT += head.bias_L[start:stop]
        if skip_label_P.numel():
            score_BT.masked_fill_(pair_mask(skip_label_P, skip_row_P, start, stop, rows), -torch.inf)
        label = (torch.arange(start, stop, device=feat.device) + head.label_start).expand_as(score_BT)
        if k < stop - start:
            # Pack the k best alone: packing all takes as long as the products. topk orders ties at random, so it may choose
            # only if the k-th is better than the next.
            top, column = score_BT.topk(k + 1, dim=1)
            if not (top[:, k - 1] == top[:, k]).any():
                score_BT, label = top[:, :k], label.gather(1, column[:, :k])
        best = torch.cat([best, pack_candidates(score_BT, label)], 1).topk(k, dim=1).values
    return best
