"""What every reader of texts shares: training files, evaluation, and the input of predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from xmc_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decoded_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line end) of each line of a UTF-8 file that is open in binary mode.

    Only a newline ends a line, with or without a carriage return before it: texts may hold other characters that
    str.splitlines would split at. A byte order mark in front of the first line is no text. Raises UserError, which names
    file and line, for what is not UTF-8.
    """
    for number, raw in enumerate(lines, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        if text:  # the file may hold a byte order mark and nothing else
            yield number, text.removesuffix("\n").removesuffix("\r")


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON holds. UserError, which begins with `where`, for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError
        why = getattr(error, "msg", None) or str(error)
        raise UserError(f"{where}: not valid JSON ({why}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object; write one JSON object a line")
    return record


def check_unicode(text: str, where: str) -> None:
    """UserError for half of a surrogate pair, which JSON can spell and no UTF-8 file or tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character; correct the text") from None


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut to `max_len` and not padded.

    An empty text has its special tokens. Where a tokenizer gives no token at all, one stands in (unknown, padding, or id
    0): a mean over no tokens would be undefined.
    """
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_len,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    stand_in = next((i for i in (tokenizer.unk_token_id, tokenizer.pad_token_id) if i is not None), 0)
    return [ids or [stand_in] for ids in encoded["input_ids"]]
