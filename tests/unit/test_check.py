"""What `prepare --check` says is odd in a data set."""

from __future__ import annotations

import re

import numpy as np

from tests.data_helpers import instance, write_lf, write_raw
from xmc_trainer.data.check import page
from xmc_trainer.data.layouts import open_source


def numbers(text: str, words: str) -> list[int]:
    """Return the numbers in the one line that contains `words`."""
    (line,) = [line for line in text.splitlines() if words in line]
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_a_page_of_what_is_odd(tmp_path):
    train = [("a", "Cat"), ("a", "cat"), ("a", "Cat"), ("b", "dog cat"), ("c", ""), ("d", "fish")]
    test = [("b", "dog"), ("e", "fish bird"), ("e", "fish bird"), ("f", "owl")]
    write_raw(tmp_path, train, test)
    lengths = {"train": np.array([1, 3, 3, 8, 8, 2]), "test": np.array([1, 1, 1])}
    said = page(open_source(None, tmp_path).read(), lengths, max_len=8)
    assert said.startswith(
        "6 training texts, 4 test texts, 4 labels; 1.00 labels for a training text, 1.5 training texts"
    )
    assert numbers(said, "training texts repeat an earlier one") == [2, 1]
    assert numbers(said, "test texts repeat an earlier one") == [1, 0]
    assert numbers(said, "test texts are training texts, too") == [1] and "such as 'b'; remove them" in said
    assert numbers(said, "have no label") == [1, 0]
    assert numbers(said, "labels have a single training text") == [2, 0]
    assert numbers(said, "occur in the test set alone") == [2, 3]
    assert numbers(said, "only in case or spaces") == [1] and "such as 'Cat' and 'cat'" in said
    lines, labels = re.split(
        "Labels by number of training texts", said.split("Texts by length in tokens (training)")[1]
    )
    rows = [line.split("#")[0].split() for part in (lines, labels) for line in part.strip().splitlines()]
    assert rows == [
        ["1", "1", "16.7%"], ["2", "to", "3", "3", "50.0%"], ["4", "to", "7", "0", "0.0%"], ["8", "2", "33.3%"],
        ["1", "2", "50.0%"], ["2", "to", "3", "2", "50.0%"],
    ]  # fmt: skip
    assert "(the most that is read: some may be cut)" in lines


def test_labels_that_only_the_test_set_has(tmp_path):
    write_lf(tmp_path, [instance("w0", [0])], [instance("w1", [0, 2]), instance("w2", [2])])
    said = page(
        open_source(str(tmp_path), tmp_path).read(), {"train": np.array([1]), "test": np.array([1, 1])}, max_len=8
    )
    assert numbers(said, "occur in the test set alone") == [1, 2] and numbers(said, "single training text") == [1, 2]
