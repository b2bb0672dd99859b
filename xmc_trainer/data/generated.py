"""Generate data sets of a given shape: text lengths, label frequencies, and words that depend on labels.

`block` draws 4,096 texts from shape, seed and block number alone. So any number of processes makes the same data set, and memory
does not grow with its size. `xmc-trainer bench data` writes the blocks to files. `bench train` trains on them if the data set
is missing.

The model, for N texts, L labels and n labels per text:

    label frequency     a text's topic is a label rank r with density r^-skew, and its labels are near r in rank. In training,
                        label l also belongs to text l mod N, so every label occurs. This occurrence counts towards n: the mean
                        number of texts per label is the published one.
    labels per text     Poisson with mean n
    label ids           a fixed permutation of the ranks: neighbours in rank are not neighbours in id, and every range of ids has
                        its share of frequent labels
    words per text      lognormal with the published mean
    words               40 % are keywords of one of the text's labels: half of these belong to the label alone, half are shared
                        by 7 labels of neighbouring rank. The rest is noise; word w has the density w^(-2/3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from xmc_trainer.data.sources import Ragged

TEXTS_A_BLOCK = 4096
_SIGNAL = 0.4  # share of words that depend on labels
_KEYWORDS = 8  # per label; the first half is shared with its neighbours
_NEIGHBOURS = 7  # labels that share keywords
_MOST_STEP = 3  # most ranks between a text's neighbouring labels


@dataclass(frozen=True)
class Shape:
    """Size and distributions of a generated data set.

    Attributes:
        train_texts, test_texts, labels: numbers of texts and labels.
        labels_a_text, words_a_text: means per text. With more labels than labels_a_text * train_texts, texts have more labels
            on average, because every label occurs in training.
        skew: label frequency falls as rank^-skew; from 0 (uniform) to below 1.
        deviation: standard deviation of the logarithm of the number of words.
        bounds: minimal and maximal words per text.
        vocabulary: number of distinct words.
    """

    train_texts: int
    test_texts: int
    labels: int
    labels_a_text: float
    words_a_text: float
    skew: float = 0.75
    deviation: float = 0.5
    bounds: tuple[int, int] = (1, 100_000)
    vocabulary: int = 29_995

    def scaled(self, scale: float) -> Shape:
        """Scale the numbers of texts and labels; labels per text and texts per label stay the same."""
        names = ("train_texts", "test_texts", "labels")
        return replace(self, **{name: max(1, round(scale * getattr(self, name))) for name in names})

    def texts(self, split: str) -> int:
        """Return the number of texts of "train" or "test"."""
        return self.train_texts if split == "train" else self.test_texts

    def blocks(self, split: str) -> int:
        return -(-self.texts(split) // TEXTS_A_BLOCK)


# Shapes of published data sets, by the name of their settings.
#
# train_texts, labels, labels_a_text: the table of data sets in PECOS (amzn/pecos, examples/spmm/README.md: N, L and nnz(Y) / N).
# test_texts, words_a_text: You et al., AttentionXML (NeurIPS 2019), Table 1 (N_test and mean words of a training text);
#     quoted from memory, to be checked against the paper.
# skew: the default reproduces SID-GND-EN's share of labels with at most five texts (83 %, docs/results.md); no figure was found for
#     these data sets.
# deviation: assumed.
PUBLISHED = {
    "eurlex4k": Shape(15_449, 3_865, 3_956, 82_265 / 15_449, 1248.58),
    "wiki31k": Shape(14_146, 6_616, 30_938, 263_705 / 14_146, 2484.30),
    "amazon670k": Shape(490_449, 153_025, 670_091, 2_674_356 / 490_449, 247.33),
    "wiki500k": Shape(1_779_881, 769_421, 501_070, 8_446_236 / 1_779_881, 808.66),
    "amazon3m": Shape(1_717_899, 742_507, 2_812_281, 61_916_857 / 1_717_899, 104.08),
}


class Block(NamedTuple):
    """Consecutive texts: word numbers from 0, int64; distinct label ids, int32, ascending within a text."""

    words: Ragged
    labels: Ragged


def block(shape: Shape, split: str, number: int, seed: int) -> Block:
    """Draw texts number * TEXTS_A_BLOCK and following of "train" or "test". `seed`: 0 to 2^32 - 1."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2 * number + (split == "test")]))
    first = number * TEXTS_A_BLOCK
    last = min(first + TEXTS_A_BLOCK, shape.texts(split))
    labels, ranks = _labels(shape, split, first, last, rng)
    return Block(_words(shape, labels.offsets, ranks, rng), labels)


def word_lengths(shape: Shape, texts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the number of words of each text, int64 [texts]."""
    # The mean of a lognormal distribution is exp(mu + deviation^2 / 2).
    mu = math.log(shape.words_a_text) - shape.deviation**2 / 2
    return np.clip(np.rint(rng.lognormal(mu, shape.deviation, texts)), *shape.bounds).astype(np.int64)


def _labels(shape: Shape, split: str, first: int, last: int, rng: np.random.Generator) -> tuple[Ragged, np.ndarray]:
    """Draw the labels of texts first..last-1. Returns label ids, and the rank of each, int64."""
    labels, texts = shape.labels, np.arange(first, last)
    own_text, own_rank = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if split == "train":
        rounds = np.arange(-(-labels // shape.train_texts))
        own_rank = (texts[:, None] + rounds * shape.train_texts).reshape(-1)
        own_text = np.repeat(texts - first, len(rounds))[own_rank < labels]
        own_rank = own_rank[own_rank < labels]
    own = np.bincount(own_text, minlength=len(texts))
    forced = labels / shape.train_texts if split == "train" else 0.0
    drawn = rng.poisson(max(0.0, shape.labels_a_text - forced), len(texts))
    drawn = np.minimum(np.maximum(drawn, 1 - np.minimum(own, 1)), labels)
    topic = (labels * rng.random(len(texts)) ** (1 / (1 - shape.skew))).astype(np.int64)
    steps = np.cumsum(rng.integers(1, _MOST_STEP + 1, drawn.sum()))
    ends = np.cumsum(drawn)
    before = np.concatenate([[0], steps])[ends - drawn]
    text = np.concatenate([np.repeat(np.arange(len(texts)), drawn), own_text])
    rank = np.concatenate([(np.repeat(topic - before, drawn) + steps) % labels, own_rank])
    factor = _coprime(labels)
    # Sort each text's labels by id and drop repeats.
    keys = np.unique(text * labels + rank * factor % labels)
    text, ids = keys // labels, keys % labels
    offsets = np.concatenate([[0], np.cumsum(np.bincount(text, minlength=len(texts)))])
    return Ragged(ids.astype(np.int32), offsets), ids * pow(factor, -1, labels) % labels


def _coprime(labels: int) -> int:
    """Find a number near labels / golden ratio that is coprime to `labels`."""
    factor = max(1, round(0.618 * labels))
    while math.gcd(factor, labels) != 1:
        factor += 1
    return factor


def _words(shape: Shape, label_offsets: np.ndarray, ranks: np.ndarray, rng: np.random.Generator) -> Ragged:
    lengths = word_lengths(shape, len(label_offsets) - 1, rng)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    text = np.repeat(np.arange(len(lengths)), lengths)
    words = (shape.vocabulary * rng.random(len(text)) ** 3).astype(np.int64)
    signal = np.flatnonzero(rng.random(len(text)) < _SIGNAL)
    of_text = text[signal]
    label = label_offsets[of_text] + (rng.random(len(signal)) * np.diff(label_offsets)[of_text]).astype(np.int64)
    keyword = rng.integers(0, _KEYWORDS, len(signal))
    owner = np.where(keyword < _KEYWORDS // 2, ranks[label] // _NEIGHBOURS, ranks[label])
    mixed = (owner * _KEYWORDS + keyword).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words[signal] = (mixed >> np.uint64(33)).astype(np.int64) % shape.vocabulary
    return Ragged(words, offsets)


def made_up_words(count: int) -> list[str]:
    """Make `count` distinct words of two or more syllables. The first, most frequent words are the shortest."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
    base = len(syllables)
    words = []
    for number in range(base, base + count):
        word = ""
        while number:
            number, digit = divmod(number, base)
            word = syllables[digit] + word
        words.append(word)
    return words
