"""Initialise a head from its labels' training texts: the first index and weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xmc_trainer.head.rewire import group_mean, largest
from xmc_trainer.kernels.interface import HeadTensors, index_rows

_SUMS_BYTES = 256 << 20


def start_from_texts(
    head: HeadTensors,
    labels: range,
    d: int,
    tile_labels: int,
    texts_of: Callable[[range], tuple[Tensor, Tensor]],
    *,
    index: bool,
    whitener_dd: Tensor | None,
    centroid_scale: float,
    mean_d: Tensor | None,
    deviation_d: Tensor | None,
) -> None:
    """Set index, weights and biases in place; see `Head.start_from_texts`.

    Args:
        labels: global ids of the labels in `head`.
        d: number of features.
        tile_labels: maximal number of labels processed at a time.
    """
    group = head.group_size
    step = max(1, min(tile_labels, _SUMS_BYTES // (4 * d)) // group) * group
    for start in range(0, len(labels), step):
        stop = min(start + step, len(labels))
        sums, counts = texts_of(labels[start:stop])
        if index and head.index_RF is not None:
            rows = slice(start // group, -(-stop // group))
            # The mean of signed sums: what the labels of a group have in common.
            strength = group_mean(sums, group)
            if whitener_dd is not None:
                # float64: the rounding of float32 sums depends on the tile's shape and could change which features are chosen.
                strength = strength.double() @ whitener_dd
            chosen = largest(strength.abs(), head.index_RF.shape[1]).sort(dim=1).values.to(head.index_RF.dtype)
            known = group_mean((counts > 0).float()[:, None], group) > 0
            head.index_RF[rows] = torch.where(known, chosen, head.index_RF[rows])
        if centroid_scale:
            assert mean_d is not None and deviation_d is not None  # a scale comes with the moments
            z = sums / counts.clamp_min(1)[:, None]
            inverse = torch.where(deviation_d > 0, 1 / deviation_d, 0.0).expand_as(z)
            mean = mean_d.expand_as(z)
            if head.index_RF is not None:
                read = index_rows(head, start, stop)
                z, inverse, mean = (x.gather(1, read) for x in (z, inverse, mean))
            weight = centroid_scale * inverse * torch.nn.functional.normalize(z, dim=1)
            known = counts > 0
            part = head.weight_LF[start:stop]
            part.copy_(torch.where(known[:, None], weight, part))
            if head.bias_L is not None:
                head.bias_L[start:stop] -= torch.where(known, (weight * mean).sum(1), 0.0)
