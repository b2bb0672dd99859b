"""What every reader of texts shares: training files, evaluation, and the input of predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from xmc_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Longer texts are cut, so that memory is bounded: at 95 bytes a character 48 MiB.
MOST_CHARACTERS = 1 << 19
_CHARACTERS_A_CALL = 1 << 18
_CHARACTERS_A_TOKEN = 6  # more than most texts have
_MARGIN = 256  # tokens


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


def without_marks(text: str) -> str:
    """A text without what belongs to a file: a byte order mark before it, a line end behind it."""
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def readable(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What is read of a text at most: its first 524,288 characters, or its last where the tokenizer cuts off the left."""
    text = without_marks(text)
    return text[-MOST_CHARACTERS:] if tokenizer.truncation_side == "left" else text[:MOST_CHARACTERS]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut to `max_len` and not padded.

    An empty text has its special tokens. Where a tokenizer gives no token at all, one stands in (unknown, padding, or id
    0): a mean over no tokens would be undefined.

    The ids are those of the whole `readable` text, but a long one is tokenised only as far as needed. Tokenisers hold some
    95 bytes for each character that they are given, so a call is given at most 262,144 characters, or one text.
    """
    parts = _long_enough(tokenizer, [readable(tokenizer, text) for text in texts], max_len)
    stand_in = next((i for i in (tokenizer.unk_token_id, tokenizer.pad_token_id) if i is not None), 0)
    return [ids or [stand_in] for ids in _tokenise(tokenizer, parts, max_len)]


def _long_enough(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> list[str]:
    """A prefix of each text that has the same first `max_len` tokens.

    Where a prefix has `_MARGIN` tokens more than are kept, those kept do not depend on where it ends: what follows can
    change the last word, and no word that a tokenizer splits has more tokens than that.
    """
    size = (max_len + _MARGIN) * _CHARACTERS_A_TOKEN
    if tokenizer.truncation_side == "left":
        return texts  # a token may depend on the text to its left, as far as there is any
    prefixes = [text[:size] for text in texts]
    short = [row for row, text in enumerate(texts) if len(text) > size]
    while short:
        tokens = _tokenise(tokenizer, [prefixes[row] for row in short], max_len + _MARGIN)
        short = [row for row, ids in zip(short, tokens) if len(ids) < max_len + _MARGIN]
        size *= 4
        for row in short:
            prefixes[row] = texts[row][:size]
        short = [row for row in short if len(texts[row]) > size]
    return prefixes


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> list[list[int]]:
    """Ids of each text cut to `max_len`, by calls of bounded size."""
    ids: list[list[int]] = []
    start = size = 0
    for end, text in enumerate([*texts, None]):
        if end > start and (text is None or size + len(text) > _CHARACTERS_A_CALL):
            encoded = tokenizer(
                texts[start:end],
                truncation=True,
                max_length=max_len,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            ids += encoded["input_ids"]
            start, size = end, 0
        size += len(text or "")
    return ids
