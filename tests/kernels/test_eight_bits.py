"""States in a byte: against the format worked out in Python's numbers, and as averages that must not stand still."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from xmc_trainer.kernels.counter_rng import Stream, make_key
from xmc_trainer.kernels.eight_bits import decoded, encoded

KEY = make_key(1, 2, Stream.ROUND)
FIRST = {1: Fraction(1, 2**22), 2: Fraction(1, 2**46)}


def number_of(byte: int, state: int) -> float:
    """Sign, exponent and mantissa by hand: four numbers to each power of two, C taken off; as float32 has it."""
    size = byte % 128 if state == 1 else byte
    value = FIRST[state] * 2 ** (size // 4) * (4 + size % 4) / 4 - FIRST[state]
    return torch.tensor(float(-value if state == 1 and byte > 127 else value)).item()


@pytest.mark.parametrize("state", [1, 2])
def test_every_byte_is_its_number_and_goes_back_to_itself(state):
    byte = torch.arange(256, dtype=torch.uint8)
    value = decoded(byte, state)
    assert value.tolist() == [number_of(n, state) for n in range(256)]
    # Where C is not lost in float32: elsewhere a draw may tip what is a last digit off.
    near = value.abs() < 2**20 * float(FIRST[state])
    for column in range(50):  # whatever the draw
        again = encoded(value, KEY, torch.zeros(256, dtype=torch.int64), torch.tensor(column), state)
        assert torch.equal(again[near], byte[near]) and torch.allclose(decoded(again, state), value, rtol=0.26)
    assert decoded(torch.zeros(3, dtype=torch.uint8), state).tolist() == [0, 0, 0]  # what a head starts with and rewiring writes


@pytest.mark.parametrize("state, value", [
    *((1, sign * value) for sign in (1, -1) for value in (3e-9, 1e-7, 7.3e-4, 0.3, 100.0, 850.0)),
    *((2, value) for value in (2e-16, 3e-13, 7.3e-8, 1e-3, 0.9, 2e5)),
])  # fmt: skip
def test_rounding_is_unbiased_and_stays_between_neighbours(state, value):
    numbers = sorted(number_of(byte, state) for byte in range(256))
    below, above = max(x for x in numbers if x <= value), min(x for x in numbers if x >= value)
    draws = encoded(torch.full((4000, 100), value), KEY, torch.arange(4000)[:, None], torch.arange(100), state)
    rounded = decoded(draws, state).double()
    assert set(rounded.unique().tolist()) == {below, above}
    assert abs(rounded.mean().item() - value) <= 5 * (above - below) / 2 / 400_000**0.5 + abs(value) * 1e-6


@pytest.mark.parametrize("state", [1, 2])
def test_what_is_too_large_is_the_largest(state):
    largest = max(number_of(byte, state) for byte in range(256))
    row = column = torch.zeros(3, dtype=torch.int64)
    got = decoded(encoded(torch.tensor([largest * 1.01, 1e9, 3e38]), KEY, row, column, state), state)
    assert got.tolist() == [largest] * 3
    if state == 1:
        assert decoded(encoded(torch.tensor([-1e9]), KEY, row[:1], column[:1], state), state).item() == -largest


@pytest.mark.parametrize("state, decay, start, end", [(1, 0.9, -0.3, 2e-3), (2, 0.999, 1e-4, 1e-6), (2, 0.999, 0.0, 3e-9)])
def test_an_average_goes_where_float32_s_does(state, decay, start, end):
    # A step changes an average by less than a byte can say: to the nearest, the second would stay where it is for ever.
    row, column = torch.arange(1000)[:, None], torch.arange(64)
    byte = encoded(torch.full((1000, 64), start), KEY, row, column, state)
    exact = start
    for step in range(600):
        exact = decay * exact + (1 - decay) * end
        average = decay * decoded(byte, state) + (1 - decay) * end
        byte = encoded(average, make_key(1, step, Stream.ROUND), row, column, state)
        if step in (5, 40, 599):
            values = decoded(byte, state).double()
            assert values.mean().item() == pytest.approx(exact, abs=5 * values.std().item() / 64_000**0.5 + 1e-6 * abs(exact))
