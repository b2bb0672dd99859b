"""Optimizer states in a byte each: floating point numbers with two bits of mantissa, rounded stochastically.

A first state has a sign and five bits of exponent; a second one, a mean of squares, none and six: squares span twice as many
powers of two. |x| is stored as |x| + C, which is at least C: seven (eight) bits of that float32's exponent and mantissa, counted
from C's own. So byte 0 is zero, and below C steps are C / 4 wide, where they would else become ever narrower.

    state    C        steps below C    largest
    1        2^-22    6e-8             896
    2        2^-46    3.6e-15          2.3e5     (of gradients of 6e-8 and 479)

What is larger is stored as the largest. Block-wise scales, which 8-bit optimizers mostly have (Dettmers et al., "8-bit optimizers
via block-wise quantization", ICLR 2022), would make an element's state depend on its neighbours', and so on tiles and on rewiring;
here a state is a function of its own value and draw. Rounding to the nearest would stop an average of which a step changes a
thousandth: the draw lets it move on average as it should.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_trainer.kernels.counter_rng import rounding_bits

_DROPPED = 21  # bits of a float32's mantissa


def _first_bits(tensor: int) -> int:
    """Those of C as float32, by the number of the state, 1 or 2."""
    return (127 - (22, 46)[tensor - 1]) << 23


def _first(tensor: int) -> float:
    return 2.0 ** -(22, 46)[tensor - 1]


def decoded(byte: Tensor, tensor: int) -> Tensor:
    """uint8 -> float32. tensor: the number of the state, 1 or 2."""
    number = byte.to(torch.int32)
    bits = (number & (0x7F if tensor == 1 else 0xFF)) << _DROPPED
    size = (bits + _first_bits(tensor)).view(torch.float32) - _first(tensor)
    return torch.where(number > 0x7F, -size, size) if tensor == 1 else size


def encoded(value: Tensor, key: tuple[int, int], row: Tensor, column: Tensor, tensor: int) -> Tensor:
    """The bytes of float32 numbers: on average over keys they decode to `value`. See `counter_rng.round_to_bfloat16`.

    Args: tensor: the number of the state, 1 or 2; of the second no number is negative.
    """
    bits = (value.abs() + _first(tensor)).view(torch.int32) - _first_bits(tensor)
    bits = (bits + rounding_bits(key, row, column, tensor, _DROPPED)) >> _DROPPED
    if tensor == 2:
        return bits.clamp_max(0xFF).to(torch.uint8)
    return (bits.clamp_max(0x7F) | torch.where(value.signbit(), 0x80, 0)).to(torch.uint8)
