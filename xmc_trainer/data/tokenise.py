"""Tokenise rows in batches, which are spread over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from xmc_trainer.data.processes import spread
from xmc_trainer.data.sources import Ragged, Row
from xmc_trainer.data.texts import cut_text, encode_texts

ROWS_PER_BATCH = 2000
_CHARACTERS_PER_BATCH = 1 << 20

Labels = list[list[int]]


def tokenised(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, max_len: int) -> Iterator[tuple[Ragged, Labels]]:
    """Yield (token ids of `encode_texts`, labels) of consecutive rows, at most 2,000 at a time.

    Memory does not grow with the length of texts: a batch has about 1,048,576 characters, and each process at most
    three batches.
    """
    with _one_thread():
        yield from spread(partial(_encoded, tokenizer, max_len), _batches(rows, tokenizer))


def _batches(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[str], Labels]]:
    texts: list[str] = []
    labels: Labels = []
    characters = 0
    for row in rows:
        texts.append(cut_text(tokenizer, row.text))
        labels.append(row.labels)
        characters += len(texts[-1])
        if len(texts) == ROWS_PER_BATCH or characters >= _CHARACTERS_PER_BATCH:
            yield texts, labels
            texts, labels, characters = [], [], 0
    if texts:
        yield texts, labels


def _encoded(tokenizer: PreTrainedTokenizerBase, max_len: int, texts: list[str]) -> Ragged:
    ids = encode_texts(tokenizer, texts, max_len)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Ragged(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep tokenizers from starting threads: each process has one core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
