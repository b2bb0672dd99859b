"""Counter-based random numbers: a pure function of (seed, step, stream, row, column).

With a stateful generator, an element's draw would depend on tiling, device and world size. Here every draw is a hash of
its coordinates (row: a global label id or index row; column: a slot or feature). Sharding, tiling and resuming
therefore do not change the numbers.

The hash is two rounds of the 32-bit finaliser `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018) in
wrapping int32 arithmetic, in which torch and Triton agree on every device.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_M1, _M2 = 0x7FEB352D, 0x846CA68B
_ROUNDING = (_M1, _M2, 0x85EBCA6B)  # odd multipliers for weights, their first state and their second state
_LOW32 = 0xFFFFFFFF


class Stream(IntEnum):
    """The purpose of a draw. Draws of different streams are independent."""

    INIT_INDEX = 1
    INIT_WEIGHT = 2
    GROW_INDEX = 3
    GROW_WEIGHT = 4
    ROUND = 5  # rounding of weights and their states, see `rounding_bits`
    CLUSTER = 16


def _signed(value: int) -> int:
    value &= _LOW32
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix_int(x: int) -> int:
    x &= _LOW32
    x = ((x ^ (x >> 16)) * _M1) & _LOW32
    x = ((x ^ (x >> 15)) * _M2) & _LOW32
    return x ^ (x >> 16)


def _mix(x: Tensor) -> Tensor:
    # int32 right shifts are arithmetic; the masks make them logical.
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(_M1)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(_M2)
    return x ^ ((x >> 16) & 0xFFFF)


def make_key(seed: int, step: int, stream: int) -> tuple[int, int]:
    """Return the two 32-bit keys for `random_bits`."""
    first = _mix_int(_mix_int(seed) ^ _mix_int((seed >> 32) + 0x9E3779B9) ^ (stream * 0x85EBCA6B))
    second = _mix_int(first ^ _mix_int(step + 0x27D4EB2F))
    return first, second


def random_bits(key: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """Draw 32 random bits for each (row, column).

    Args:
        key: the result of `make_key`.
        row, column: int, 0 to 2^31 - 1, with shapes that broadcast. Each element of `row` is hashed once.
    Returns: int32 of the broadcast shape.
    """
    x = _mix(row.to(torch.int32) ^ _signed(key[0]))
    return _mix(x + column.to(torch.int32) * _signed(0x9E3779B1) ^ _signed(key[1]))


def uniform(key: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """Draw float32 numbers in [0, 1) with 24 random bits each; see `random_bits`."""
    return ((random_bits(key, row, column) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def element_bits(key: tuple[int, int], row: Tensor, column: Tensor, tensor: int) -> Tensor:
    """Draw 32 random bits for each (row, column), as int32. Like `random_bits`, but with a cheaper second half.

    The GPU kernels make one draw per weight and state in every step, and rounding only needs uniform draws. Draws are
    uniform, because a row's hash is uniform and the second half is a bijection. The draws of one element for several
    tensors are products of one hash (multiply-shift hashing). Their upper bits are the better ones, and pairwise nearly
    independent.

    Args:
        tensor: 0 for weights, 1 and 2 for their states.
    """
    x = _mix(row.to(torch.int32) ^ _signed(key[0]))
    x = x + column.to(torch.int32) * _signed(0x9E3779B1) ^ _signed(key[1])
    return (x ^ ((x >> 16) & 0xFFFF)) * _signed(_ROUNDING[tensor])


def rounding_bits(key: tuple[int, int], row: Tensor, column: Tensor, tensor: int = 0) -> Tensor:
    """Draw the upper 16 bits of `element_bits`, as int32."""
    return (element_bits(key, row, column, tensor) >> 16) & 0xFFFF


def round_to_bfloat16(value: Tensor, key: tuple[int, int], row: Tensor, column: Tensor, tensor: int = 0) -> Tensor:
    """Round stochastically to bfloat16: the expectation of the result over keys is `value`.

    Args:
        value: float32, finite.
        row, column: see `random_bits`; they broadcast to the shape of `value`.
        tensor: see `element_bits`.
    """
    # bfloat16 is the upper half of float32. Adding 16 random bits to the lower half carries into the upper half with a
    # probability equal to the fraction that truncation would lose.
    bits = value.contiguous().view(torch.int32) + rounding_bits(key, row, column, tensor)
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def random_order(key: tuple[int, int], row: Tensor, d: int) -> Tensor:
    """Draw sort keys that give a random permutation of 0..d-1 for each row.

    Args:
        row: int64 [R], global row ids.
        d: at most 65,536.
    Returns: int64 [R, d], distinct keys within a row; their argsort is a uniformly random permutation.
    """
    feature = torch.arange(d, device=row.device)
    bits = random_bits(key, row[:, None], feature).to(torch.int64)
    return (bits << 16) | feature  # the feature number breaks ties, so that all devices agree
