"""8-bit states: the formats against exact fractions, unbiased rounding, and moving averages that must follow float32's."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from xmc_trainer.kernels.eight_bits import decoded, encoded
from xmc_trainer.rng import Stream, element_bits, make_key

KEY = make_key(1, 2, Stream.ROUND)
BYTES = {1: [byte for byte in range(256) if byte % 128 < 124], 2: list(range(256))}  # without infinities and NaN


def number_of(byte: int, state: int) -> float:
    """Decode a byte by its exponent and mantissa, four numbers to each power of two, and round to float32."""
    if state == 1:  # 128 times the state: a sign, five exponent bits (0 means subnormal), two mantissa bits
        exponent, mantissa = byte % 128 // 4, byte % 4
        size = Fraction(mantissa + 4 * (exponent > 0), 4) * Fraction(2) ** (max(exponent, 1) - 15) / 128
        return float(-size if byte > 127 else size)
    value = Fraction(4 + byte % 4, 4) * Fraction(2) ** (byte // 4 - 46) - Fraction(1, 2**46)
    return torch.tensor(float(value)).item()


@pytest.mark.parametrize("state", [1, 2])
def test_every_byte_is_its_number_and_goes_back_to_itself(state):
    byte = torch.tensor(BYTES[state], dtype=torch.uint8)
    value = decoded(byte, state)
    assert value.tolist() == [number_of(n, state) for n in BYTES[state]]
    for column in range(50):  # for any draw
        row = torch.zeros(len(byte), dtype=torch.int64)
        assert torch.equal(encoded(value, KEY, row, torch.tensor(column), state), byte)
    assert decoded(torch.zeros(3, dtype=torch.uint8), state).tolist() == [
        0,
        0,
        0,
    ]  # the state of a new head and of a rewired weight


@pytest.mark.parametrize("state, value", [
    *((1, sign * value) for sign in (1, -1) for value in (3e-9, 1e-7, 7.3e-4, 0.3, 100.0, 430.0)),
    *((2, value) for value in (2e-16, 3e-13, 7.3e-8, 1e-3, 0.9, 2e5)),
])  # fmt: skip
def test_rounding_is_unbiased_and_stays_between_neighbours(state, value):
    numbers = sorted(number_of(byte, state) for byte in BYTES[state])
    below, above = max(x for x in numbers if x <= value), min(x for x in numbers if x >= value)
    draws = encoded(torch.full((4000, 100), value), KEY, torch.arange(4000)[:, None], torch.arange(100), state)
    rounded = decoded(draws, state).double()
    assert set(rounded.unique().tolist()) <= {below, above}
    # State 1 is first rounded to the nearest float16, which has steps of 2^-24 below 2^-14.
    nearest = abs(value) * 2**-11 + 2**-25 / 128 if state == 1 else abs(value) * 1e-6
    assert abs(rounded.mean().item() - value) <= 5 * (above - below) / 2 / 400_000**0.5 + nearest


@pytest.mark.parametrize("state", [1, 2])
def test_what_is_too_large_is_the_largest(state):
    largest = max(number_of(byte, state) for byte in BYTES[state])
    row = column = torch.zeros(3, dtype=torch.int64)
    got = decoded(encoded(torch.tensor([largest * 1.01, 1e9, 3e38]), KEY, row, column, state), state)
    assert got.tolist() == [largest] * 3
    if state == 1:
        assert decoded(encoded(torch.tensor([-1e9]), KEY, row[:1], column[:1], state), state).item() == -largest


@pytest.mark.parametrize(
    "state, decay, start, end", [(1, 0.9, -0.3, 2e-3), (2, 0.999, 1e-4, 1e-6), (2, 0.999, 0.0, 3e-9)]
)
def test_a_moving_average_in_a_byte_converges_as_in_float32(state, decay, start, end):
    # A step changes an average by less than a byte can express. With rounding to nearest, state 2 would never move.
    row, column = torch.arange(1000)[:, None], torch.arange(64)
    byte = encoded(torch.full((1000, 64), start), KEY, row, column, state)
    exact = start
    for step in range(600):
        exact = decay * exact + (1 - decay) * end
        average = decay * decoded(byte, state) + (1 - decay) * end
        byte = encoded(average, make_key(1, step, Stream.ROUND), row, column, state)
        if step in (5, 40, 599):
            values = decoded(byte, state).double()
            # Each step may round to the nearest float16 (state 1) or float32. `left` bounds the sum of the averages so far.
            left = (step + 1) * abs(start) * decay ** (step + 1) + end / (1 - decay)
            nearest = left * (2**-11 if state == 1 else 2**-23)
            assert values.mean().item() == pytest.approx(exact, abs=5 * values.std().item() / 64_000**0.5 + nearest)


def test_draws_of_the_two_states_are_uniform_together():
    rows, columns, cells = 20_000, 128, 32
    product = element_bits(
        make_key(4, 9, Stream.ROUND), torch.arange(rows)[:, None] + 2**21, torch.arange(columns), 1
    ).flatten()
    first, second = (product >> 8) & 0xFF, (product >> 11) & 0x1FFFFF
    counts = torch.bincount((first >> 3) * cells + (second >> 16), minlength=cells**2).double()
    expected = rows * columns / cells**2
    assert ((counts - expected) ** 2 / expected).sum().item() < 1250  # chi squared, 1,023 degrees of freedom: p < 1e-6
    for shift in (1, 2, columns):  # the next columns, the next row
        for one, other in ((first, first), (first, second), (second, first)):
            assert abs(torch.corrcoef(torch.stack([one[:-shift], other[shift:]]).float())[0, 1].item()) < 0.005, shift
