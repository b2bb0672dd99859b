"""The counter-based generator against an implementation in Python integers, and statistical tests of its numbers."""

from __future__ import annotations

import pytest
import torch

from xmc_trainer.rng import (
    Stream,
    make_key,
    random_bits,
    random_order,
    round_to_bfloat16,
    rounding_bits,
    uniform,
)


def lowbias32(x: int) -> int:
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_bits_equal_python_integers():
    key = make_key(42, 7, Stream.ROUND)
    rows, columns = [0, 1, 2, 12345, 2**24 + 1, 2**31 - 1], [0, 1, 767, 2**16, 2**31 - 1]
    got = random_bits(key, torch.tensor(rows)[:, None], torch.tensor(columns)).tolist()
    for row, line in zip(rows, got):
        for column, bits in zip(columns, line):
            expected = lowbias32((lowbias32(row ^ key[0]) + column * 0x9E3779B1) % 2**32 ^ key[1])
            assert bits % 2**32 == expected


def test_streams_steps_and_seeds_differ():
    keys = {make_key(seed, step, stream) for seed in (0, 1, 2**33) for step in range(50) for stream in Stream}
    assert len(keys) == 3 * 50 * len(Stream)
    a, b = (
        uniform(make_key(0, step, Stream.ROUND), torch.arange(1000)[:, None], torch.arange(100)).flatten()
        for step in (1, 2)
    )
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 0.015


def test_uniform_is_uniform():
    key = make_key(3, 1, Stream.INIT_WEIGHT)
    draws = uniform(key, torch.arange(10_000)[:, None] + 2**30, torch.arange(100)).flatten()
    assert 0 <= draws.min() and draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)
    assert ((counts - 10_000) ** 2 / 10_000).sum().item() < 160  # chi squared, 99 degrees of freedom: p < 1e-4
    for shift in (1, 100):  # the next column, the next row
        neighbours = torch.corrcoef(torch.stack([draws[:-shift], draws[shift:]]))[0, 1].item()
        assert abs(neighbours) < 0.005


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("value", [1.001, -0.3337, 1e-20, 3.1e8, 0.0, 1.0])
def test_stochastic_rounding_is_unbiased_and_stays_between_neighbours(value, number):
    values = torch.full((2000, 100), value)
    row, column = torch.arange(2000)[:, None], torch.arange(100)
    rounded = round_to_bfloat16(values, make_key(1, 2, Stream.ROUND), row, column, number).double()
    exact = float(values[0, 0])
    assert rounded.unique().numel() <= 2
    spacing = float((rounded.max() - rounded.min()).item())
    error = abs(rounded.mean().item() - exact)
    assert error <= 5 * spacing / 2 / 200_000**0.5 + abs(exact) * 1e-7


def test_draws_of_an_element_are_uniform_together():
    rows, columns, cells = 20_000, 128, 32
    key, row, column = make_key(4, 9, Stream.ROUND), torch.arange(rows)[:, None] + 2**21, torch.arange(columns)
    draws = [rounding_bits(key, row, column, number).flatten() for number in range(3)]
    expected = rows * columns / cells**2
    for first, second in ((0, 1), (0, 2), (1, 2)):
        counts = torch.bincount((draws[first] >> 11) * cells + (draws[second] >> 11), minlength=cells**2).double()
        squares = ((counts - expected) ** 2 / expected).sum().item()
        assert squares < 1250, (first, second)  # chi squared, 1,023 degrees of freedom: p < 1e-6
        for shift in (1, 2, columns):  # the next columns, the next row
            correlation = torch.corrcoef(torch.stack([draws[first][:-shift], draws[second][shift:]]).float())[
                0, 1
            ].item()
            assert abs(correlation) < 0.005, (first, second, shift)


def test_random_order_is_a_permutation_and_unbiased():
    rows, d = 30_000, 7
    order = random_order(make_key(5, 0, Stream.INIT_INDEX), torch.arange(rows), d).sort(1).values & 0xFFFF
    assert torch.equal(order.sort(1).values, torch.arange(d).expand(rows, d))
    first = torch.bincount(order[:, 0], minlength=d).double()
    assert (first - rows / d).abs().max() < 5 * (rows / d) ** 0.5
