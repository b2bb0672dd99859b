"""Counter-based random numbers: a pure function of (seed, step, stream, row, column).

A generator with state would make the draw of an element depend on tiling, device and world size. Here every draw is a
hash of what it is for (row: a global label id or index row; column: a slot or feature), so a sharded, a retiled and a
resumed run draw the same numbers.

The hash is two rounds of the 32-bit finaliser `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018), in
int32 arithmetic that wraps, which torch and Triton compute alike on every device.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_M1, _M2 = 0x7FEB352D, 0x846CA68B
_ROUNDING = (_M1, _M2, 0x85EBCA6B)  # odd: of weights, their first state and their second
_LOW32 = 0xFFFFFFFF


class Stream(IntEnum):
    """What a draw is for: draws of different streams are independent."""

    INIT_INDEX = 1
    INIT_WEIGHT = 2
    GROW_INDEX = 3
    GROW_WEIGHT = 4
    ROUND = 5  # of weights and their states, see `rounding_bits`
    CLUSTER = 16  # beyond those


def _signed(value: int) -> int:
    value &= _LOW32
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix_int(x: int) -> int:
    x &= _LOW32
    x = ((x ^ (x >> 16)) * _M1) & _LOW32
    x = ((x ^ (x >> 15)) * _M2) & _LOW32
    return x ^ (x >> 16)


def _mix(x: Tensor) -> Tensor:
    # int32 shifts carry the sign down; the mask makes them logical.
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(_M1)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(_M2)
    return x ^ ((x >> 16) & 0xFFFF)


def make_key(seed: int, step: int, stream: int) -> tuple[int, int]:
    """Two 32-bit keys for `random_bits`."""
    first = _mix_int(_mix_int(seed) ^ _mix_int((seed >> 32) + 0x9E3779B9) ^ (stream * 0x85EBCA6B))
    second = _mix_int(first ^ _mix_int(step + 0x27D4EB2F))
    return first, second


def random_bits(key: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """32 random bits for each (row, column).

    Args:
        key: of `make_key`.
        row, column: int, from 0 to 2^31 - 1, shapes that broadcast. A row is hashed once, whatever its columns.
    Returns: int32 of the common shape.
    """
    x = _mix(row.to(torch.int32) ^ _signed(key[0]))
    return _mix(x + column.to(torch.int32) * _signed(0x9E3779B1) ^ _signed(key[1]))


def uniform(key: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """float32 in [0, 1), 24 random bits each; see `random_bits`."""
    return ((random_bits(key, row, column) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def element_bits(key: tuple[int, int], row: Tensor, column: Tensor, tensor: int) -> Tensor:
    """32 random bits for each (row, column), as int32: `random_bits` with a shorter second half.

    A row's hash is uniform and what follows is one-to-one, so every draw is uniform. That is all that rounding asks for,
    and the GPU kernels draw one for every weight and state in every step. Those of an element are products of one hash, of
    which the upper bits are the better ones: multiply-shift hashing, pairwise independent but for what 32 bits cannot hold.

    Args:
        tensor: 0 for weights, 1 and 2 for their states.
    """
    x = _mix(row.to(torch.int32) ^ _signed(key[0]))
    x = x + column.to(torch.int32) * _signed(0x9E3779B1) ^ _signed(key[1])
    return (x ^ ((x >> 16) & 0xFFFF)) * _signed(_ROUNDING[tensor])


def rounding_bits(key: tuple[int, int], row: Tensor, column: Tensor, tensor: int = 0) -> Tensor:
    """The upper 16 of `element_bits`, as int32."""
    return (element_bits(key, row, column, tensor) >> 16) & 0xFFFF


def round_to_bfloat16(value: Tensor, key: tuple[int, int], row: Tensor, column: Tensor, tensor: int = 0) -> Tensor:
    """Stochastic rounding: the expectation over keys of the bfloat16 result is `value`.

    Args:
        value: float32, finite.
        row, column: see `random_bits`; they broadcast to the shape of `value`.
        tensor: see `element_bits`.
    """
    # bfloat16 is the upper half of float32. Adding 16 random bits to the lower half carries over with a probability
    # equal to the part that truncation would lose.
    bits = value.contiguous().view(torch.int32) + rounding_bits(key, row, column, tensor)
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def random_order(key: tuple[int, int], row: Tensor, d: int) -> Tensor:
    """A random ranking of the numbers 0..d-1 for each row.

    Args:
        row: int64 [R], global row ids.
        d: at most 65,536.
    Returns: int64 [R, d] keys; sorted ascending they give a uniformly random permutation, and no two are equal.
    """
    feature = torch.arange(d, device=row.device)
    bits = random_bits(key, row[:, None], feature).to(torch.int64)
    return (bits << 16) | feature  # the feature number breaks ties, so that every device picks the same
