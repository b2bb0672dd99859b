"""Plan which texts go into which batch, and make the batches.

The plan of an epoch is a pure function of lengths, seed and epoch. Every rank computes the same plan and reads only its own
rows. The texts of an optimizer step do not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xmc_trainer.data.corpus import flatten_lists
from xmc_trainer.data.sources import Ragged
from xmc_trainer.data.texts import encode_texts
from xmc_trainer.errors import UserError

_LENGTH_STEP = 8
# Texts are sorted by length within blocks of this many steps: enough for little padding, few enough that each epoch
# combines other texts in a step.
_STEPS_A_BLOCK = 50


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass: one int64 array per rank, which may be empty."""

    rows: tuple[np.ndarray, ...]
    rows_in_step: int  # texts of the whole optimizer step, over all ranks


def sample_rows(total: int, size: int | None, seed: int) -> np.ndarray | None:
    """Draw `size` distinct rows out of `total`, int64, ascending. Returns None, which means all, for size None."""
    if size is None:
        return None
    if size > total:
        raise UserError(f"`size`={size}: there are only {total} training texts; lower or remove it")
    return np.sort(np.random.Generator(np.random.Philox(seed)).choice(total, size, replace=False))


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_size: int,
    accumulation: int,
    world_size: int,
    seed: int,
    epoch: int,
    length_grouped: bool,
    rows: np.ndarray | None = None,
) -> list[list[MicroBatch]]:
    """Plan an epoch. Returns its optimizer steps, each a list of `accumulation` micro-batches.

    Every row occurs once. One step may have fewer rows, spread evenly over its micro-batches and ranks.

    Args:
        lengths: tokens of every text of the data set, int [texts].
        batch_size: texts per micro-batch over all ranks.
        length_grouped: put texts of similar length into one step. The order of the steps stays random.
        rows: rows of the data set to train on; None for all.
    Raises UserError if batch_size is not divisible by world_size.
    """
    if batch_size % world_size:
        raise UserError(
            f"`batch_size`={batch_size}: is not divisible by the {world_size} processes; change one of them"
        )
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(np.arange(len(lengths)) if rows is None else rows)
    step_size = batch_size * accumulation
    if length_grouped:
        block = step_size * _STEPS_A_BLOCK
        # A stable sort keeps texts of equal length in random order.
        parts = [order[at : at + block] for at in range(0, len(order), block)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    steps = [order[at : at + step_size] for at in range(0, len(order), step_size)]
    if length_grouped:
        steps = [steps[number] for number in rng.permutation(len(steps))]
    return [
        [
            MicroBatch(tuple(np.array_split(micro, world_size)), len(step))
            for micro in np.array_split(step, accumulation)
        ]
        for step in steps
    ]


def plan_eval(
    lengths: np.ndarray, *, batch_size: int, world_size: int, rows: np.ndarray | None = None
) -> list[MicroBatch]:
    """Plan an evaluation: every row, or those of `rows`, once.

    Longest texts come first, so a batch that is too large fails at once, and there is little padding. The ranks share each batch
    as evenly as possible; a rank may get no row of a small one.
    """
    chosen = np.arange(len(lengths)) if rows is None else rows
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    parts = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return [MicroBatch(tuple(np.array_split(part, world_size)), len(part)) for part in parts]


def padded_width(longest_text: int, longest: int) -> int:
    """Return the width to pad a batch to: `longest_text` rounded up to a multiple of 8, at most `longest`."""
    # Few different widths: for each new one a GPU's libraries spend milliseconds per layer on planning.
    return min(-(-longest_text // _LENGTH_STEP) * _LENGTH_STEP, longest)


def padded(tokens: Ragged, *, longest: int, pad_token_id: int | None, least_rows: int = 1) -> dict[str, Tensor]:
    """Pad texts to the encoder's input: {"input_ids", "attention_mask"}, int64 [b, T]. Makes every batch of the package.

    Padding goes on the right, whatever the tokenizer's padding side. For T see `padded_width`.

    Args:
        longest: maximal T.
        pad_token_id: None for 0; the mask hides padding.
        least_rows: append texts of one padding token until there are this many rows.
    """
    texts = len(tokens.offsets) - 1
    lengths = np.ones(max(texts, least_rows), dtype=np.int64)
    lengths[:texts] = np.diff(tokens.offsets)
    width = padded_width(int(lengths.max()), longest)
    mask = np.arange(width) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_token_id or 0, dtype=np.int64)
    input_ids[:texts][mask[:texts]] = tokens.ids
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def batch_of_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> dict[str, Tensor]:
    """Tokenise, truncate to `max_len` tokens and pad one or more texts outside a corpus; see `padded`."""
    return padded_texts(encode_texts(tokenizer, texts, max_len), tokenizer, max_len)


def padded_texts(tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase, max_len: int) -> dict[str, Tensor]:
    """Pad one or more texts that `encode_texts` has tokenised; see `padded`."""
    ragged = Ragged(np.concatenate(tokens), np.cumsum([0, *map(len, tokens)]))
    return padded(ragged, longest=max_len, pad_token_id=tokenizer.pad_token_id)


def _list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in dataset.data.column(column).chunks])


class TextBatches(torch.utils.data.Dataset):
    """One rank's batches of a plan; for `DataLoader(TextBatches(...), batch_size=None)`.

    An item is a dict:
        input_ids, attention_mask: int64 [max(b, least_rows), T] from `padded`; T is at most the data set's longest text.
        label_counts: int32 [b]; label_ids: int32 [sum of label_counts].
        filter_counts, filter_ids: likewise for the filter pairs, if there are any.
        rows: int64 [b], rows of the data set.
        rows_in_step: int, texts of the whole optimizer step.
        rank_sizes: (texts, labels) of every rank's part of the micro-batch, two lists of int.

    Label numbers from `labels` on are left out. Batches of fewer than `least_rows` texts (default 1) are filled up with texts of one padding token; use features[:b]. So
    the encoder can run on a rank without rows (b = 0), and a compiled encoder sees a constant number of rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: list[MicroBatch],
        *,
        rank: int,
        pad_token_id: int | None,
        labels: int | None = None,
        places: np.ndarray | None = None,
        filter_pairs: Ragged | None = None,
        least_rows: int = 1,
    ) -> None:
        self._least_rows = least_rows
        self._dataset = dataset.with_format("arrow")
        self._plan, self._rank = plan, rank
        self._labels = labels
        every = flatten_lists(dataset.data.column("labels"))
        self._label_lengths = np.diff((every if labels is None else every.below(labels)).offsets)
        self._longest = int(_list_lengths(dataset, "input_ids").max(initial=1))
        self._pad_token_id, self._places, self._filter_pairs = pad_token_id, places, filter_pairs

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> dict[str, Any]:
        micro = self._plan[number]
        rows = micro.rows[self._rank]
        if len(rows):
            table = self._dataset[rows]
            tokens, labels = flatten_lists(table.column("input_ids")), flatten_lists(table.column("labels"))
        else:
            tokens = Ragged(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
            labels = Ragged(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64))
        if self._labels is not None:
            labels = labels.below(self._labels)
        if self._places is not None:
            labels = Ragged(self._places[labels.ids], labels.offsets)
        batch = padded(tokens, longest=self._longest, pad_token_id=self._pad_token_id, least_rows=self._least_rows) | {
            "rows": torch.from_numpy(rows.copy()),  # a copy: callers must not change the plan
            "rows_in_step": micro.rows_in_step,
            # Every rank knows the plan, so ranks need not exchange these sizes.
            "rank_sizes": (
                [len(part) for part in micro.rows],
                [int(self._label_lengths[part].sum()) for part in micro.rows],
            ),
        }
        ragged = {"label": labels}
        if self._filter_pairs is not None:
            ragged["filter"] = self._filter_pairs.rows(rows)
        for name, value in ragged.items():
            batch[f"{name}_ids"] = torch.from_numpy(value.ids.astype(np.int32))
            batch[f"{name}_counts"] = torch.from_numpy(np.diff(value.offsets).astype(np.int32))
        return batch
