"""The head step and top-k on a GPU: the same two functions as `reference`, by the Triton kernels.

bfloat16 and float16 features are multiplied as bfloat16, float32 ones to float32's accuracy; all sums are float32.
Weights are read and updated in their own precision. Two ways lead through a step:

    group    gathers features: for labels that share an index row
    dense    spreads rows out: for every index, dense heads, and wherever results must be the same bit for bit
             (torch.use_deterministic_algorithms)

The first is there twice: in CUDA (`group_pass`), where that can be compiled and takes the head, and in Triton (`group_step`).
The first step of a large head tries what takes it, and the choice is kept on disk (`tuning`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xmc_trainer.kernels import dense_step, group_pass, group_step, tile_math, topk
from xmc_trainer.kernels.counter_rng import Stream, make_key
from xmc_trainer.kernels.pairs import PairBits, feature_bits
from xmc_trainer.kernels.reference import HeadTensors, LossFn, Update, candidate_ids, pack_candidates
from xmc_trainer.kernels.tuning import fastest

__all__ = ["feature_bits", "head_step", "head_topk"]

# From this many labels a row on, gathering is likely to be the faster way (H100, d = 768, F = 128, B = 128).
_SHARED = 16
# Heads of fewer labels do not wait for their step long enough to be tuned; larger ones are by so many of their labels.
_TUNED_LABELS = 1 << 16
# A chunk's workspaces take this many bytes; the dense way's, whose chunks take more launches, this share of the head's
# weights and index if that is more.
_WORKSPACE, _DENSE_SHARE = 48 << 20, 0.2

_LOSSES = {"bce": tile_math.BCE.value, "squared_hinge": tile_math.SQUARED_HINGE.value}
_RULES = {"sgd": tile_math.SGD.value, "momentum": tile_math.MOMENTUM.value, "adamw": tile_math.ADAMW.value}


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
        tile = min(128, max(least, triton.next_power_of_2(texts)))
        columns = max(1, triton.cdiv(texts, tile)) * tile
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
    finite: Tensor  # int32 scalar
    update: bool
    rule: dict[str, Any]  # of the bias's update
    decay: dict[str, Any]  # and what the weights' takes besides

    @classmethod
    def of(cls, loss_fn: LossFn, text_weight: float, finite: Tensor, update: Update | None) -> Step:
        rule = dict(lr=0.0, beta0=0.0, beta1=0.0, eps=0.0, correct0=1.0, correct1=1.0, RULE=_RULES["sgd"])
        decay: dict[str, Any] = {}
        if update is not None:
            chosen = update.rule
            rule |= dict(lr=update.lr, RULE=_RULES[chosen.name])
            if chosen.name == "momentum":
                rule["beta0"] = chosen.momentum
            elif chosen.name == "adamw":
                rule |= dict(beta0=chosen.beta1, beta1=chosen.beta2, eps=chosen.eps)
                rule |= dict(correct0=1 / (1 - chosen.beta1**update.step), correct1=1 / (1 - chosen.beta2**update.step))
            keys = [
                key - (1 << 32) if key >> 31 else key
                for stream in (Stream.ROUND_WEIGHT, Stream.ROUND_STATE, Stream.ROUND_STATE + 1)
                for key in make_key(update.seed, update.step, stream)
            ]
            decay = dict(weight_decay=update.weight_decay) | {f"key{i}": key for i, key in enumerate(keys)}
        return cls(_LOSSES[loss_fn.__name__], text_weight, finite.to(torch.int32), update is not None, rule, decay)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.head_step`. `tile_labels` does not apply: the kernels' tiles are their own."""
    finite = torch.isfinite(feat_Bd).all()
    step = Step.of(loss_fn, text_weight, finite, update)
    with _current(feat_Bd.device):
        way = _choose(head, feat_Bd, label_P, row_P, step)
        loss, grad = way.run(head, Batch.of(feat_Bd, way.texts), label_P, row_P, step)
    texts = feat_Bd.shape[0]
    return loss[grad_start:texts], grad[grad_start:texts], finite


class Way(NamedTuple):
    """A way through the step."""

    run: Callable[[HeadTensors, Batch, Tensor, Tensor, Step], tuple[Tensor, Tensor]]
    texts: int = 32  # texts a tile, at least


def _ways(head: HeadTensors, feat_Bd: Tensor) -> dict[str, Way]:
    """The ways that take a head, by name: the one that is likely to be the fastest first."""
    dense = {"dense": Way(_dense_step)}
    # A gathered tile of more features does not fit on the chip.
    fits = head.index_RF is not None and head.weight_LF.shape[1] <= (128 if feat_Bd.dtype == torch.float32 else 256)
    if torch.are_deterministic_algorithms_enabled() or not fits or head.group_size < _SHARED // 2:
        return dense
    group = {"group": Way(_group_step)}
    if group_pass.takes(head, feat_Bd):
        group = {
            f"group pass {' '.join(map(str, blocks))}": Way(functools.partial(_group_pass, blocks=blocks), group_pass.TEXTS)
            for blocks in group_pass.choices(head, feat_Bd.device)
        }
    return group | dense if head.group_size >= _SHARED else dense | group


def _choose(head: HeadTensors, feat_Bd: Tensor, label_P: Tensor, row_P: Tensor, step: Step) -> Way:
    """The fastest way, found by trying them on a part of a large head; the likely one for a small head."""
    ways = _ways(head, feat_Bd)
    labels = head.weight_LF.shape[0]
    if len(ways) == 1 or labels < _TUNED_LABELS or not feat_Bd.is_cuda:
        return next(iter(ways.values()))
    texts = triton.cdiv(feat_Bd.shape[0], 128) * 128
    question = (
        f"texts {texts}, features {feat_Bd.shape[1]} {feat_Bd.dtype}, fan-in {head.weight_LF.shape[1]}, group {head.group_size}, "
        f"{head.weight_LF.dtype}, rule {step.rule['RULE']}, update {step.update}"
    )

    def trial(name: str) -> Callable[[], object]:
        way, part = ways[name], _first_labels(head, _TUNED_LABELS // head.group_size * head.group_size, feat_Bd.shape[1])
        return lambda: way.run(part, Batch.of(feat_Bd, way.texts), label_P, row_P, step)

    return ways[fastest(question, list(ways), trial, feat_Bd.device)]


def _first_labels(head: HeadTensors, labels: int, d: int) -> HeadTensors:
    """A copy of the first labels of a head that reads d features, whole groups of them."""
    part = HeadTensors(
        head.weight_LF[:labels].clone(), head.index_RF[: labels // head.group_size],
        None if head.bias_L is None else head.bias_L[:labels].clone(), head.group_size, head.label_start,
        [state[:labels].clone() for state in head.weight_state], [state[:labels].clone() for state in head.bias_state],
    )  # fmt: skip
    part.feature_bits = functools.cache(lambda: feature_bits(part.index_RF, d))
    return part


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _states(state: list[Tensor], missing: Tensor) -> list[Tensor]:
    """Two tensors, whatever the optimizer has: the kernels do not read what their rule does not use."""
    return [*state, missing, missing][:2]


def _chunk_labels(labels: int, workspace: float, bytes_a_label: int, unit: int) -> int:
    """How many labels to take at a time, a multiple of `unit`."""
    return min(max(1, int(workspace) // bytes_a_label // unit), triton.cdiv(labels, unit)) * unit


def _group_pass(
    head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step, *, blocks: group_pass.Blocks
) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    group, rows, device = head.group_size, head.index_RF.shape[0], batch.rows.device
    loss = torch.zeros(batch.columns, device=device)
    dx = torch.zeros_like(batch.transposed, dtype=torch.float32)
    tile = group_pass.tile_labels(group, blocks)
    chunk = _chunk_labels(rows * group, _WORKSPACE, batch.columns // 8, group) // group
    pairs = PairBits(chunk * group, batch.columns, group, tile, device)
    for first in range(0, rows, chunk):
        pairs.mark(label_P, row_P, first * group)
        group_pass.launch(
            head, first, min(first + chunk, rows), blocks, x_dB=batch.transposed, texts=batch.texts, dx_dB=dx, loss_B=loss,
            positive=pairs.bits, any_positive=pairs.any, **step._asdict(),
        )  # fmt: skip
    return loss, dx.T * step.text_weight


def _group_step(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    (labels, fan_in), group, rows = head.weight_LF.shape, head.group_size, head.index_RF.shape[0]
    columns, device, d = batch.columns, batch.rows.device, batch.rows.shape[1]
    # Tiles of labels and texts: the fastest of those tried on an H200 at d = 768, F = 128, B = 128.
    whole = max(16, triton.next_power_of_2(group))
    tile, update_tile, texts_tile = min(32, whole), min(64, whole), min(64, batch.tile)
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count if batch.rows.is_cuda else 4
    chunk = _chunk_labels(labels, _WORKSPACE, columns * (batch.rows.element_size() + 1), group) // group
    pairs = PairBits(chunk * group, columns, group, tile, device)
    slope = torch.empty(chunk * group, columns, dtype=batch.rows.dtype, device=device)
    loss = torch.zeros(programs, columns, device=device)
    dx = torch.zeros(d, columns, device=device)
    bias = [loss] * 3 if head.bias_L is None else [head.bias_L, *_states(head.bias_state, loss)]
    shape = dict(
        labels=labels, columns=columns, text_weight=step.text_weight, F=fan_in, G=group,
        F_TILE=max(16, triton.next_power_of_2(fan_in)), BF16=batch.bf16, HAS_BIAS=head.bias_L is not None,
    )  # fmt: skip
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        pairs.mark(label_P, row_P, first * group)
        group_step.slopes_kernel[(min(programs, last - first), columns // texts_tile)](
            head.weight_LF, head.index_RF, bias[0], batch.transposed, dx, pairs.bits, pairs.any, slope, loss,
            first_row=first, last_row=last, texts=batch.texts, G_TILE=tile, B_TILE=texts_tile,
            ALL_TEXTS=batch.texts == columns, LOSS=step.loss, KEEP_SLOPES=step.update, num_warps=4, **shape,
        )  # fmt: skip
        if step.update:
            group_step.update_kernel[((last - first) * triton.cdiv(group, update_tile),)](
                head.weight_LF, *_states(head.weight_state, head.weight_LF), head.index_RF, *bias, batch.transposed, slope,
                step.finite, first_row=first, last_row=last, label_start=head.label_start, G_TILE=update_tile,
                B_TILE=batch.tile, B_TILES=columns // batch.tile, num_warps=8, **shape, **step.rule, **step.decay,
            )  # fmt: skip
    return loss.sum(0), dx.T


class _DenseChunks:
    """The head's rows as dense ones, a chunk of labels after another."""

    def __init__(self, head: HeadTensors, batch: Batch, unit: int) -> None:
        self.head, self.d, self.dtype = head, batch.rows.shape[1], batch.rows.dtype
        size = self.dtype.itemsize
        # A row of weights, of logits and of slopes.
        a_label = self.d * size + batch.columns * (4 + size)
        head_bytes = head.weight_LF.nbytes + (0 if head.index_RF is None else head.index_RF.nbytes)
        self.size = _chunk_labels(head.weight_LF.shape[0], max(_WORKSPACE, _DENSE_SHARE * head_bytes), a_label, unit)
        self.workspace = torch.empty(self.size, self.d, dtype=self.dtype, device=batch.rows.device)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first label, last label, rows [size, d]); the rows past the last label are zero."""
        head, rows = self.head, self.workspace
        labels, fan_in = head.weight_LF.shape
        for first in range(0, labels, self.size):
            last = min(first + self.size, labels)
            if head.index_RF is not None:
                dense_step.spread_kernel[(triton.cdiv(self.size, 32),)](
                    head.weight_LF, head.feature_bits(), rows, first, last, first + self.size, self.d,
                    triton.cdiv(self.d, 32), F=fan_in, G=head.group_size, T=32,
                )  # fmt: skip
            elif head.weight_LF.dtype == self.dtype and last - first == self.size:
                yield first, last, head.weight_LF[first:last]
                continue
            else:
                rows[: last - first] = head.weight_LF[first:last]
                rows[last - first :] = 0
            yield first, last, rows


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of the batch's dtype, as float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _dense_step(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    fan_in, columns, d, device = head.weight_LF.shape[1], batch.columns, batch.rows.shape[1], batch.rows.device
    tile = 32
    chunks = _DenseChunks(head, batch, tile)
    pairs = PairBits(chunks.size, columns, tile, tile, device)
    slope = torch.empty(chunks.size, columns, dtype=batch.rows.dtype, device=device)
    loss = torch.zeros(chunks.size // tile, columns, device=device)
    dx = torch.zeros(columns, d, device=device)
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    bias = [head.bias_L, *_states(head.bias_state, loss)] if has_bias else [loss] * 3
    # Rows of 2048 elements in all for each program of the gather.
    f_tile = min(1024, triton.next_power_of_2(fan_in))
    rows_tile = max(1, 2048 // f_tile)
    for first, last, rows in chunks:
        pairs.mark(label_P, row_P, first)
        dense_step.slopes_kernel[(chunks.size // tile,)](
            _product(rows, batch.transposed), *bias, pairs.bits, pairs.any, slope, loss, step.finite,
            first_label=first, last_label=last, texts=batch.texts, columns=columns, text_weight=step.text_weight,
            T=tile, B_TILE=batch.tile, B_TILES=columns // batch.tile, ALL_TEXTS=batch.texts == columns, LOSS=step.loss,
            HAS_BIAS=has_bias, UPDATE=step.update, **step.rule,
        )  # fmt: skip
        dx += _product(slope.T, rows)
        if step.update:
            # The gradient takes the place of rows that were spread out.
            grad = torch.mm(slope, batch.rows, out=chunks.workspace)
            dense_step.gather_kernel[(triton.cdiv(last - first, rows_tile),)](
                head.weight_LF, *_states(head.weight_state, head.weight_LF), head.index_RF if sparse else grad, grad,
                step.finite, first_label=first, last_label=last, label_start=head.label_start, d=d,
                text_weight=step.text_weight, F=fan_in, G=head.group_size, T=rows_tile, F_TILE=f_tile, SPARSE=sparse,
                **step.rule, **step.decay,
            )  # fmt: skip
    return loss.sum(0), dx * step.text_weight


def head_topk(
    head: HeadTensors, feat_Bd: Tensor, k: int, skip_label_P: Tensor, skip_row_P: Tensor, *, tile_labels: int
) -> Tensor:
    """See `reference.head_topk`. `tile_labels` does not apply."""
    with _current(feat_Bd.device):
        return _topk(head, feat_Bd, k, skip_label_P, skip_row_P)


def _topk(head: HeadTensors, feat_Bd: Tensor, k: int, skip_label_P: Tensor, skip_row_P: Tensor) -> Tensor:
    labels, fan_in = head.weight_LF.shape
    texts, d = feat_Bd.shape
    device = feat_Bd.device
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    batch = Batch.of(feat_Bd)
    chunks = _DenseChunks(head, batch, topk.BLOCK)
    pairs = PairBits(chunks.size, batch.columns, topk.BLOCK, topk.BLOCK, device)
    blocks = triton.cdiv(labels, topk.BLOCK)
    best = torch.empty(blocks, batch.columns, device=device)
    for first, last, rows in chunks:
        pairs.mark(skip_label_P, skip_row_P, first)
        topk.block_max_kernel[(triton.cdiv(last - first, topk.BLOCK), batch.columns // batch.tile)](
            _product(rows, batch.transposed), head.bias_L if has_bias else best, pairs.bits, pairs.any, best,
            first, last, first // topk.BLOCK, batch.columns, BLOCK=topk.BLOCK, B_TILE=batch.tile, HAS_BIAS=has_bias,
        )  # fmt: skip
    wanted = min(k, blocks)
    # Equal maxima go to the earlier block, by the same packing as labels.
    key = pack_candidates(best[:, :texts], torch.arange(blocks, device=device)[:, None])
    chosen = candidate_ids(key.topk(wanted, dim=0).values).T.contiguous()
    score = torch.empty(texts, wanted, topk.BLOCK, device=device)
    if texts:
        topk.rescore_kernel[(texts, wanted)](
            head.weight_LF, head.index_RF if sparse else best, head.bias_L if has_bias else best, batch.rows, chosen,
            score, labels, d, wanted, F=fan_in, G=head.group_size, F_TILE=min(64, triton.next_power_of_2(fan_in)),
            BLOCK=topk.BLOCK, SPARSE=sparse, HAS_BIAS=has_bias, BF16=batch.bf16,
        )  # fmt: skip
    score = score.flatten(1)
    label = (chosen[:, :, None] * topk.BLOCK + torch.arange(topk.BLOCK, device=device)).flatten(1)
    if skip_label_P.numel():
        # Candidates meet the pairs to skip by binary search: (text, label) as one number.
        skip = (skip_row_P * (labels + 1) + skip_label_P.clamp(-1, labels)).sort().values
        candidate = torch.arange(texts, device=device)[:, None] * (labels + 1) + label
        place = torch.searchsorted(skip, candidate).clamp_max(skip.shape[0] - 1)
        score = score.masked_fill(skip[place] == candidate, -torch.inf)
    key = pack_candidates(score, label + head.label_start)
    if key.shape[1] < k:
        key = torch.nn.functional.pad(key, (0, k - key.shape[1]), value=int(pack_candidates(*_NOTHING)))
    return key.topk(k, dim=1).values


_NOTHING = torch.tensor(-torch.inf), torch.tensor(0)
