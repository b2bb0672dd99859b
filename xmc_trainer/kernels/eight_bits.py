"""8-bit optimizer states: floating-point numbers with two mantissa bits, rounded stochastically.

State 1 (the first moment) has a sign and five exponent bits. It is the upper half of a float16, torch.float8_e5m2, that holds the
state times 2^7. State 2 (the mean square) has no sign and six exponent bits, because squares span twice as many powers of two. It
stores the lowest six exponent bits and the highest two mantissa bits of the float32 2^-17 x + 2^-63. In both, byte 0 is zero. Steps
near zero and largest values:

    state    smallest step    largest
    1        1.2e-7           448
    2        3.6e-15          2.3e5      (gradients of 6e-8 and 479)

Larger values are stored as the largest. Most 8-bit optimizers scale blocks of values (Dettmers et al., "8-bit optimizers via
block-wise quantization", ICLR 2022). Block scales would make a state depend on its neighbours, and so on tiles and rewiring; here it
depends on its own value and draw alone. Rounding to nearest would freeze state 2, which a step changes by a thousandth: stochastic
rounding keeps it right on average. State 1 is first rounded to the nearest float16, an error of at most half a percent from 5e-7 on
and of at most 5e-9 below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_trainer.rng import element_bits

_SCALE, _LARGEST = 2.0**7, 57344.0  # state 1: its scale; its largest value as float16
_SQUARES_SCALE, _FIRST, _FIRST_BITS = (
    2.0**-17,
    2.0**-63,
    64 << 23,
)  # state 2: its scale; the offset, and the offset's bits as float32


def decoded(byte: Tensor, state: int) -> Tensor:
    """Convert uint8 states of any shape to float32. state: 1 or 2."""
    if state == 1:
        return (byte.to(torch.int16) << 8).view(torch.float16).to(torch.float32) / _SCALE
    return (((byte.to(torch.int32) << 21) + _FIRST_BITS).view(torch.float32) - _FIRST) / _SQUARES_SCALE


def encoded(value: Tensor, key: tuple[int, int], row: Tensor, column: Tensor, state: int) -> Tensor:
    """Round to uint8 states that decode to `value` on average over keys.

    Args:
        value: float32, finite; not negative for state 2.
        row, column: int, as in `rng.random_bits`; they broadcast to the shape of `value`.
        state: 1 or 2.
    """
    draw = element_bits(
        key, row, column, 1
    )  # one draw for both states: state 2 uses bits 11 to 31, state 1 bits 8 to 15
    if state == 1:
        half = (value * _SCALE).to(torch.float16).clamp(-_LARGEST, _LARGEST)
        return ((half.view(torch.int16).to(torch.int32) + ((draw >> 8) & 0xFF)) >> 8).to(torch.uint8)
    bits = (value * _SQUARES_SCALE + _FIRST).view(torch.int32) - _FIRST_BITS
    return ((bits + ((draw >> 11) & 0x1FFFFF)) >> 21).clamp_max(0xFF).to(torch.uint8)
