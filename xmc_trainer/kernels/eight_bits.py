"""Optimizer states in a byte each: floating point numbers with two bits of mantissa, rounded stochastically.

The first state has a sign and five bits of exponent: the upper half of a float16, torch.float8_e5m2, of 2^7 times the state. The
second, a mean of squares, has no sign and six bits, for squares span twice as many powers of two. x is stored as 2^-17 x + 2^-63: as
float32, the lowest six bits of the exponent and the highest two of the mantissa. So byte 0 is zero for both, and steps become no
narrower than these near it:

    state    narrowest step    largest
    1        1.2e-7            448
    2        3.6e-15           2.3e5      (of gradients of 6e-8 and 479)

What is larger is stored as the largest. Block-wise scales, which 8-bit optimizers mostly have (Dettmers et al., "8-bit optimizers
via block-wise quantization", ICLR 2022), would make an element's state depend on its neighbours', and so on tiles and on rewiring;
here a state is a function of its own value and draw. Rounding to the nearest would stop an average of which a step changes a
thousandth: the draw lets it move on average as it should. (The first state, of which a step changes a tenth, is rounded to the
nearest float16 before that, which puts it off by half a percent at most from 5e-7 on, by 5e-9 below.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_trainer.rng import element_bits

_SCALE, _LARGEST = 2.0**7, 57344.0  # of the first state, and as float16
_SQUARES_SCALE, _FIRST, _FIRST_BITS = (
    2.0**-17,
    2.0**-63,
    64 << 23,
)  # of the second; what is added to it, also as a float32's bits


def decoded(byte: Tensor, state: int) -> Tensor:
    """uint8, of any shape -> float32. state: 1 or 2."""
    if state == 1:
        return (byte.to(torch.int16) << 8).view(torch.float16).to(torch.float32) / _SCALE
    return (((byte.to(torch.int32) << 21) + _FIRST_BITS).view(torch.float32) - _FIRST) / _SQUARES_SCALE


def encoded(value: Tensor, key: tuple[int, int], row: Tensor, column: Tensor, state: int) -> Tensor:
    """uint8 of the shape of `value`, which decode to it on average over keys.

    Args:
        value: float32, finite; of state 2 not negative.
        row, column: int, as of `rng.random_bits`; they broadcast to the shape of `value`.
        state: 1 or 2.
    """
    draw = element_bits(
        key, row, column, 1
    )  # of both: the second's bits are the upper 21, the first's are lower but for five
    if state == 1:
        half = (value * _SCALE).to(torch.float16).clamp(-_LARGEST, _LARGEST)
        return ((half.view(torch.int16).to(torch.int32) + ((draw >> 8) & 0xFF)) >> 8).to(torch.uint8)
    bits = (value * _SQUARES_SCALE + _FIRST).view(torch.int32) - _FIRST_BITS
    return ((bits + ((draw >> 11) & 0x1FFFFF)) >> 21).clamp_max(0xFF).to(torch.uint8)
