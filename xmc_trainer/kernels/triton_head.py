"""The head step and top-k on a GPU: the same two functions as `reference`, by the Triton kernels.

bfloat16 and float16 features are multiplied as bfloat16, float32 ones to float32's accuracy; all sums are float32.
Weights are read and updated in their own precision. Two ways lead through a step:

    group    gathers features: for labels that share an index row
    dense    spreads rows out: for every index, dense heads, and wherever results must be the same bit for bit
             (torch.use_deterministic_algorithms)

and the same two to the best labels (`topk`; or `best_pass`, which spreads rows on the chip). Of a step each is there twice: in
CUDA (`group_pass`; `cluster_pass`, which spreads rows on the chip), where that can be compiled and takes the head, and in
Triton (`group_step`, `dense_step`); and `hybrid_pass`, in CUDA alone, gathers for two of a step's products and spreads for one.
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

from xmc_trainer.kernels import (
    cluster_pass,
    cuda_source,
    dense_step,
    group_pass,
    group_step,
    hybrid_pass,
    tile_math,
    topk,
)
from xmc_trainer.kernels.cluster_pass import ClusterPass
from xmc_trainer.kernels.cuda import densify
from xmc_trainer.kernels.counter_rng import Stream, make_key
from xmc_trainer.kernels.hybrid_pass import HybridPass
from xmc_trainer.kernels.pairs import PairBits, feature_bits
from xmc_trainer.kernels.reference import HeadTensors, LossFn, Update, candidate_ids, pack_candidates
from xmc_trainer.kernels.tuning import fastest

__all__ = ["head_step", "head_topk"]

# From this many labels a row on, gathering is likely to be the faster way (H100, d = 768, F = 128, B = 128).
_SHARED = 16
# Heads of fewer labels do not wait for their step long enough to be tuned; larger ones are by so many of their labels at most: the
# first, of which caches keep little, if a copy of weights and states takes this share of the free memory at most, else the second.
_TUNED_LABELS, _TRIAL_LABELS, _TRIAL_SHARE = 1 << 16, (1 << 20, 1 << 18), 1 / 32
# A chunk's workspaces take this many bytes; the dense way's, whose chunks take more launches, this share of the head's
# weights and index if that is more: the first where rows are spread out, the second where there are slopes alone.
_WORKSPACE, _DENSE_SHARE, _SLOPES_SHARE = 48 << 20, 0.2, 0.05


class Tiles(NamedTuple):
    """How a kernel of the dense way cuts its work."""

    labels: int
    features: int
    warps: int
    stages: int  # of tiles on their way from memory


def _stages(d: int, features: int, stages: int) -> int:
    """Of a loop over tiles of features. A single tile leaves nothing to be on its way, and Triton 3.6 fails where it should be."""
    return stages if d > features else 1


# For bfloat16 features and for float32 ones.
_SLOPES_TILES, _SLOPES_TILES_32 = Tiles(128, 64, 16, 5), Tiles(64, 32, 8, 3)
_GRADIENTS_TILES, _GRADIENTS_TILES_32 = Tiles(64, 128, 16, 3), Tiles(64, 32, 8, 2)

_LOSSES = {"bce": tile_math.BCE.value, "squared_hinge": tile_math.SQUARED_HINGE.value}
_RULES = {
    "sgd": tile_math.SGD.value,
    "momentum": tile_math.MOMENTUM.value,
    "adamw": tile_math.ADAMW.value,
    "rowwise_rmsprop": tile_math.ROWWISE.value,
}


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
            elif chosen.name == "rowwise_rmsprop":
                rule |= dict(beta1=chosen.beta2, eps=chosen.eps, correct1=1 / (1 - chosen.beta2**update.step))
            keys = (key - (1 << 32) if key >> 31 else key for key in make_key(update.seed, update.step, Stream.ROUND))
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
        try:
            loss, grad = _step(head, feat_Bd, label_P, row_P, step)
        except cuda_source.CompilationFailed as error:  # before anything was launched
            cuda_source.give_up(error)
            loss, grad = _step(head, feat_Bd, label_P, row_P, step)
    texts = feat_Bd.shape[0]
    return loss[grad_start:texts], grad[grad_start:texts], finite


def _step(head: HeadTensors, feat_Bd: Tensor, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    way = _choose(head, feat_Bd, label_P, row_P, step)
    return way.run(head, Batch.of(feat_Bd, way.texts), label_P, row_P, step)


class Way(NamedTuple):
    """A way through the step."""

    run: Callable[[HeadTensors, Batch, Tensor, Tensor, Step], tuple[Tensor, Tensor]]
    texts: int = 32  # texts a tile, at least


def _ways(head: HeadTensors, feat_Bd: Tensor) -> dict[str, Way]:
    """The ways that take a head, by name: the one that is likely to be the fastest first."""
    dense = {"dense": Way(_dense_step)}
    if head.group_size < 2 * _SHARED and densify.takes(head, feat_Bd):
        return {"densify": Way(_densify, densify.TEXTS)}
    if head.group_size < 2 * _SHARED and cluster_pass.takes(head, feat_Bd):
        dense = {"cluster": Way(_cluster_pass, cluster_pass.TEXTS)} | dense
    # Both give the same results from run to run, but not as each other.
    if torch.are_deterministic_algorithms_enabled():
        return dict([next(iter(dense.items()))])
    # A gathered tile of more features does not fit on the chip.
    fits = head.index_RF is not None and head.weight_LF.shape[1] <= (128 if feat_Bd.dtype == torch.float32 else 256)
    if not fits or head.group_size < _SHARED // 2:
        return dense
    group = {"group": Way(_group_step)}
    if group_pass.takes(head, feat_Bd):
        group = {
            f"group pass {' '.join(map(str, blocks))}": Way(functools.partial(_group_pass, blocks=blocks), group_pass.TEXTS)
            for blocks in group_pass.choices(head, feat_Bd.device)
        }
    ways = group | dense if head.group_size >= _SHARED else dense | group
    if head.group_size <= _SHARED and hybrid_pass.takes(head, feat_Bd):
        ways = {"hybrid": Way(_hybrid_pass, cluster_pass.TEXTS)} | ways
    return ways


def _choose(head: HeadTensors, feat_Bd: Tensor, label_P: Tensor, row_P: Tensor, step: Step) -> Way:
    """The fastest way, found by trying them on a part of a large head; the likely one for a small head."""
    ways = _ways(head, feat_Bd)
    labels = head.weight_LF.shape[0]
    if len(ways) == 1 or labels < _TUNED_LABELS or not feat_Bd.is_cuda:
        return next(iter(ways.values()))
    texts = triton.cdiv(feat_Bd.shape[0], 128) * 128
    tried = _trial_labels(labels, sum(x.nbytes for x in (head.weight_LF, *head.weight_state)) // labels, feat_Bd.device)
    question = (
        f"texts {texts}, features {feat_Bd.shape[1]} {feat_Bd.dtype}, fan-in {head.weight_LF.shape[1]}, group {head.group_size}, "
        f"{'no index' if head.index_RF is None else 'index'}, "
        f"{head.weight_LF.dtype}, rule {step.rule['RULE']} {cuda_source.state_dtype(head)}, update {step.update}, {1 << (tried - 1).bit_length()} labels at most"
    )

    def trial(name: str) -> Callable[[], object]:
        way, part = ways[name], _first_labels(head, tried // head.group_size * head.group_size)
        return lambda: way.run(part, Batch.of(feat_Bd, way.texts), label_P, row_P, step)

    return ways[fastest(question, list(ways), trial, feat_Bd.device)]


@functools.cache  # memory that the training takes later changes nothing
def _trial_labels(labels: int, bytes_a_label: int, device: torch.device) -> int:
    """How many of a head's labels to try its ways on."""
    most, least = (min(labels, limit) for limit in _TRIAL_LABELS)
    free, _ = torch.cuda.mem_get_info(device)
    return most if most * bytes_a_label <= free * _TRIAL_SHARE else least


def _first_labels(head: HeadTensors, labels: int) -> HeadTensors:
    """A copy of the first labels of a head, whole groups of them."""
    part = HeadTensors(
        head.weight_LF[:labels].clone(), None if head.index_RF is None else head.index_RF[: labels // head.group_size],
        None if head.bias_L is None else head.bias_L[:labels].clone(), head.group_size, head.label_start,
        [state[:labels].clone() for state in head.weight_state], [state[:labels].clone() for state in head.bias_state],
    )  # fmt: skip
    index = part.index_RF  # `part` itself would hold itself, and its memory
    part.of_index = functools.cache(lambda make, argument: make(index, argument))
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


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


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


def _densify(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    return densify.step(head, batch.rows, batch.texts, label_P, row_P, **step._asdict())


def _cluster_pass(
    head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step, kernel: type[ClusterPass] = ClusterPass
) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    group, rows = head.group_size, (head.weight_LF if head.index_RF is None else head.index_RF).shape[0]
    chunk = _chunk_labels(rows * group, _WORKSPACE, batch.columns // 8, group) // group
    whole = kernel(head, batch.rows, batch.texts, chunk * group, **step._asdict())
    pairs = whole.pair_bits(chunk * group)
    for first in range(0, rows, chunk):
        pairs.mark(label_P, row_P, first * group)
        whole.launch(first, min(first + chunk, rows), pairs)
    loss, dx = whole.results()
    return loss, dx * step.text_weight


_hybrid_pass = functools.partial(_cluster_pass, kernel=HybridPass)


def _group_step(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    (labels, fan_in), group, rows = head.weight_LF.shape, head.group_size, head.index_RF.shape[0]
    columns, device, d = batch.columns, batch.rows.device, batch.rows.shape[1]
    # Tiles of labels and texts: the fastest of those tried on an H200 at d = 768, F = 128, B = 128.
    whole = max(16, triton.next_power_of_2(group))
    tile, update_tile, texts_tile = min(32, whole), min(64, whole), min(64, batch.tile)
    programs = 4 * _multiprocessors(device)
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
    """The head's rows as dense ones, a chunk of labels after another.

    Args:
        bytes_a_label: of what the caller keeps for a chunk.
        unit: labels a tile: a chunk is a multiple of it, of as many as there are multiprocessors if it is that large.
        copy: the caller writes on the rows, which must not be the weights themselves then.
    """

    def __init__(self, head: HeadTensors, batch: Batch, bytes_a_label: int, unit: int, copy: bool = False) -> None:
        self.head, self.d, dtype, device = head, batch.rows.shape[1], batch.rows.dtype, batch.rows.device
        labels, share, self.workspace = head.weight_LF.shape[0], _DENSE_SHARE, None
        as_they_are = head.index_RF is None and head.weight_LF.dtype == dtype and not copy
        if as_they_are:
            share = _SLOPES_SHARE
        else:
            bytes_a_label += self.d * dtype.itemsize
        head_bytes = head.weight_LF.nbytes + (0 if head.index_RF is None else head.index_RF.nbytes)
        size = _chunk_labels(labels, max(_WORKSPACE, share * head_bytes), max(1, bytes_a_label), unit)
        wave = unit * _multiprocessors(device)
        self.size = size if size >= labels else size // wave * wave or size
        if not as_they_are:
            self.workspace = torch.empty(self.size, self.d, dtype=dtype, device=device)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first label, last label, rows [last - first, d])."""
        head = self.head
        labels, fan_in = head.weight_LF.shape
        for first in range(0, labels, self.size):
            last = min(first + self.size, labels)
            if self.workspace is None:
                yield first, last, head.weight_LF[first:last]
                continue
            rows = self.workspace[: last - first]
            if head.index_RF is None:
                rows.copy_(head.weight_LF[first:last])
            else:
                dense_step.spread_kernel[(triton.cdiv(last - first, 16),)](
                    head.weight_LF, head.of_index(feature_bits, self.d), rows, first, last, self.d, triton.cdiv(self.d, 32), F=fan_in,
                    G=head.group_size, T=16, WORDS=8, num_warps=1,
                )  # fmt: skip
            yield first, last, rows


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of the batch's dtype, as float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _dense_step(head: HeadTensors, batch: Batch, label_P: Tensor, row_P: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(loss float32 [columns], feature gradient float32 [columns, d])."""
    (labels, fan_in), columns, device = head.weight_LF.shape, batch.columns, batch.rows.device
    d, size, programs = batch.rows.shape[1], batch.rows.element_size(), _multiprocessors(device)
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    # Tiles of labels and features, warps and stages.
    slopes, gradients = (_SLOPES_TILES, _GRADIENTS_TILES) if batch.bf16 else (_SLOPES_TILES_32, _GRADIENTS_TILES_32)
    by_label = step.update and step.rule["RULE"] == tile_math.ROWWISE.value
    gathered = sparse or by_label
    chunks = _DenseChunks(head, batch, columns * size + columns // 8, slopes.labels, copy=by_label)
    pairs = PairBits(chunks.size, columns, slopes.labels, slopes.labels, device)
    slope_CB = torch.empty(chunks.size, columns, dtype=batch.rows.dtype, device=device)
    loss = torch.empty(triton.cdiv(labels, slopes.labels), columns, device=device)
    bias = [head.bias_L, *_states(head.bias_state, loss)] if has_bias else [loss] * 3
    update_bias = step.finite * int(step.update and has_bias)
    # Weight and feature gradient are made together if each text is in one tile.
    together = step.update and columns == batch.tile
    feature_tiles = triton.cdiv(d, gradients.features)
    lanes = max(1, min(programs // feature_tiles, triton.cdiv(labels, gradients.labels)))
    dx = torch.zeros(lanes if together else 1, columns, d, device=device)
    texts = dict(B_TILE=batch.tile, B_TILES=columns // batch.tile, BF16=batch.bf16)
    # Rows of 2048 elements in all for each program of the gather.
    f_tile = triton.next_power_of_2(fan_in)
    f_tile = f_tile if by_label else min(1024, f_tile)
    rows_tile = max(1, 2048 // f_tile)
    for first, last, rows in chunks:
        pairs.mark(label_P, row_P, first)
        dense_step.slopes_kernel[(min(programs, triton.cdiv(last - first, slopes.labels)),)](
            rows, batch.rows, *bias, pairs.bits, pairs.any, slope_CB, loss, update_bias,
            first_label=first, last_label=last, texts=batch.texts, columns=columns, text_weight=step.text_weight,
            D=d, D_TILE=slopes.features, T=slopes.labels, ALL_TEXTS=batch.texts == columns, LOSS=step.loss,
            HAS_BIAS=has_bias, num_warps=slopes.warps, num_stages=_stages(d, slopes.features, slopes.stages), **texts,
            **step.rule,
        )  # fmt: skip
        if not together:
            dx[0] += _product(slope_CB[: last - first].T, rows)
        if not step.update:
            continue
        # In the workspace, the gradient takes the place of the rows.
        dense_step.gradients_kernel[(feature_tiles * lanes,)](
            rows if gathered else head.weight_LF, *_states(head.weight_state, head.weight_LF), batch.rows, slope_CB, dx,
            step.finite, first_label=first, last_label=last, label_start=head.label_start, columns=columns, lanes=lanes,
            text_weight=step.text_weight, D=d, D_TILE=gradients.features, T=gradients.labels, IN_WORKSPACE=gathered,
            num_warps=gradients.warps, num_stages=gradients.stages, **texts, **step.rule, **step.decay,
        )  # fmt: skip
        if gathered:
            dense_step.gather_kernel[(triton.cdiv(last - first, rows_tile),)](
                head.weight_LF, *_states(head.weight_state, head.weight_LF), head.index_RF if sparse else rows, rows, step.finite,
                first_label=first, last_label=last, label_start=head.label_start, d=d, text_weight=step.text_weight,
                F=fan_in, G=head.group_size, T=rows_tile, F_TILE=f_tile, SPARSE=sparse, **step.rule, **step.decay,
            )  # fmt: skip
    return loss.sum(0), dx.sum(0) * step.text_weight


def head_topk(
    head: HeadTensors, feat_Bd: Tensor, k: int, skip_label_P: Tensor, skip_row_P: Tensor, *, tile_labels: int
) -> Tensor:
    """See `reference.head_topk`. `tile_labels` does not apply."""
    with _current(feat_Bd.device):
        try:
            return _topk(head, feat_Bd, k, skip_label_P, skip_row_P)
        except cuda_source.CompilationFailed as error:  # before anything was launched
            cuda_source.give_up(error)
            return _topk(head, feat_Bd, k, skip_label_P, skip_row_P)


def _topk(head: HeadTensors, feat_Bd: Tensor, k: int, skip_label_P: Tensor, skip_row_P: Tensor) -> Tensor:
    (labels, fan_in), texts, device = head.weight_LF.shape, feat_Bd.shape[0], feat_Bd.device
    has_bias, sparse = head.bias_L is not None, head.index_RF is not None
    gathers = sparse and head.group_size >= _SHARED
    densifies = not gathers and densify.takes(head, feat_Bd)
    batch = Batch.of(feat_Bd, densify.TEXTS if densifies else 32)
    blocks = topk.Blocks.of(labels, head.group_size if gathers else 1)
    best = torch.empty(triton.cdiv(blocks.count, topk.BLOCK) * topk.BLOCK, batch.columns, device=device)
    best[blocks.count :] = -torch.inf
    find = _group_best if gathers else _spread_best if densifies else _dense_best
    find(head, batch, blocks, best, skip_label_P, skip_row_P)
    chosen = _best_blocks(best, texts, min(k + topk.SPARE, blocks.count))
    score = torch.empty(*chosen.shape, topk.BLOCK, device=device)
    if texts:
        topk.rescore_kernel[chosen.shape](
            head.weight_LF, head.index_RF if sparse else best, head.bias_L if has_bias else best, batch.rows, chosen,
            score, labels, batch.rows.shape[1], chosen.shape[1], F=fan_in, G=head.group_size,
            F_TILE=min(64, triton.next_power_of_2(fan_in)), BLOCK=topk.BLOCK, SPAN=blocks.span, TILES=blocks.tiles,
            SPARSE=sparse, HAS_BIAS=has_bias, BF16=batch.bf16,
        )  # fmt: skip
    score = score.flatten(1)
    start = chosen // blocks.tiles * blocks.span + chosen % blocks.tiles * topk.BLOCK
    label = (start[:, :, None] + torch.arange(topk.BLOCK, device=device)).flatten(1)
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


def _dense_best(
    head: HeadTensors, batch: Batch, blocks: topk.Blocks, best: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """Every block's largest logit, into `best` [blocks or more, columns]."""
    columns, device = batch.columns, batch.rows.device
    has_bias, has_skip = head.bias_L is not None, skip_label_P.numel() > 0
    # As many texts a tile as the chip holds, with the bits of those to skip: each tile of texts reads the rows once more.
    texts_tile = min(batch.tile, 128 if batch.bf16 else 64)
    if batch.bf16 and columns % 256 == 0 and not has_skip:
        texts_tile = 256
    features_tile = 64 if batch.bf16 else 32
    programs = (1 if texts_tile == 256 else 2) * _multiprocessors(device)
    chunks = _DenseChunks(head, batch, columns // 8 if has_skip else 0, topk.BLOCK)
    pairs = PairBits(chunks.size, columns, topk.BLOCK, topk.BLOCK, device) if has_skip else None
    for first, last, rows in chunks:
        if pairs:
            pairs.mark(skip_label_P, skip_row_P, first)
        tiles = triton.cdiv(last - first, topk.BLOCK) * (columns // texts_tile)
        topk.dense_best_kernel[(min(programs, tiles),)](
            rows, head.bias_L if has_bias else best, batch.rows, *_bits(pairs, best), best, first, last,
            first // topk.BLOCK, columns, D=chunks.d, D_TILE=features_tile, BLOCK=topk.BLOCK,
            B_TILE=texts_tile, HAS_BIAS=has_bias, HAS_SKIP=has_skip, BF16=batch.bf16, num_warps=8,
            num_stages=_stages(chunks.d, features_tile, 4 if texts_tile == 256 else 3),
        )  # fmt: skip


def _spread_best(
    head: HeadTensors, batch: Batch, blocks: topk.Blocks, best: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """The same, of rows that are spread out on the chip alone."""
    labels, columns = head.weight_LF.shape[0], batch.columns
    if not skip_label_P.numel():
        densify.best(head, batch.rows, 0, labels, best, None)
        return
    chunk = _chunk_labels(labels, _WORKSPACE, columns // 8, topk.BLOCK)
    pairs = PairBits(chunk, columns, topk.BLOCK, topk.BLOCK, batch.rows.device)
    for first in range(0, labels, chunk):
        pairs.mark(skip_label_P, skip_row_P, first)
        densify.best(head, batch.rows, first, min(first + chunk, labels), best[first // topk.BLOCK :], pairs.bits)


def _group_best(
    head: HeadTensors, batch: Batch, blocks: topk.Blocks, best: Tensor, skip_label_P: Tensor, skip_row_P: Tensor
) -> None:
    """The same for labels that share index rows."""
    (labels, fan_in), group, columns, device = head.weight_LF.shape, head.group_size, batch.columns, batch.rows.device
    has_bias, has_skip = head.bias_L is not None, skip_label_P.numel() > 0
    texts_tile = min(batch.tile, 128 if batch.bf16 else 64)
    span, tiles, chunk, pairs = blocks.span, blocks.tiles, blocks.count, None
    if has_skip:
        chunk = _chunk_labels(labels, _WORKSPACE, columns // 8, span) // span * tiles
        pairs = PairBits(chunk // tiles * span, columns, span, topk.BLOCK, device)
    for first in range(0, blocks.count, chunk):
        first_label = first // tiles * span
        if pairs:
            pairs.mark(skip_label_P, skip_row_P, first_label)
        topk.group_best_kernel[(min(chunk, blocks.count - first) * (columns // texts_tile),)](
            head.weight_LF, head.index_RF, head.bias_L if has_bias else best, batch.transposed, *_bits(pairs, best), best,
            first, first_label, labels, columns, F=fan_in, G=group,
            F_TILE=min(128 if batch.bf16 else 32, max(16, triton.next_power_of_2(fan_in))),
            G_TILE=max(16, triton.next_power_of_2(min(group, topk.BLOCK))), BLOCK=topk.BLOCK, ROWS=span // group,
            TILES=tiles, B_TILE=texts_tile, HAS_BIAS=has_bias, HAS_SKIP=has_skip, BF16=batch.bf16, num_warps=4, num_stages=2,
        )  # fmt: skip


def _bits(pairs: PairBits | None, missing: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' arguments for the pairs to skip; they do not read what is not there."""
    return (missing.view(torch.int32),) * 2 if pairs is None else (pairs.bits, pairs.any)


def _best_blocks(best: Tensor, texts: int, wanted: int) -> Tensor:
    """The `wanted` blocks of the largest maxima for each text, equal ones by number: int64 [texts, wanted].

    best: float32 [blocks, columns], blocks a multiple of BLOCK. Of many blocks, the best among those of the best BLOCKs.
    """
    device = best.device
    best = best[:, :texts]
    block = torch.arange(best.shape[0], device=device).expand(texts, -1)
    if best.shape[0] > wanted * topk.BLOCK:
        upper = best.unflatten(0, (-1, topk.BLOCK)).amax(1)
        chosen = _best_columns(upper.T, torch.arange(upper.shape[0], device=device), wanted)
        block = (chosen[:, :, None] * topk.BLOCK + torch.arange(topk.BLOCK, device=device)).flatten(1)
    return _best_columns(best.T.gather(1, block), block, wanted)


def _best_columns(score: Tensor, number: Tensor, wanted: int) -> Tensor:
    """The numbers of the `wanted` largest scores of each row, equal ones by number: by the same packing as labels."""
    return candidate_ids(pack_candidates(score, number).topk(wanted, dim=1).values)


_NOTHING = torch.tensor(-torch.inf), torch.tensor(0)
