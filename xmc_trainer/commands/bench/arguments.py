"""Arguments of the benchmarks."""

from __future__ import annotations

import argparse

OPTIMIZERS = ("sgd", "momentum", "rowwise_rmsprop", "adamw", "adamw_8bit")  # of bench head


def count(word: str) -> int:
    """Parse a whole number of at least 1."""
    if not word.isdecimal() or len(word) > 15 or not 0 < int(word):
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number of at least 1")
    return int(word)


def counts(words: str) -> list[int]:
    """Parse whole numbers of at least 1, separated by commas."""
    return [count(word) for word in words.split(",")]
