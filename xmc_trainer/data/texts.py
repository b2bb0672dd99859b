"""Decode, check and tokenise texts. Shared by training, evaluation and prediction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from xmc_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Longer texts are cut. Tokenizers hold about 95 bytes per character, so this bounds their memory to 48 MiB.
MOST_CHARACTERS = 1 << 19
_CHARACTERS_PER_CALL = 1 << 18
_CHARACTERS_PER_TOKEN = 6  # above the average of most texts
_MARGIN = 256  # tokens
_INSTRUCTION = "instruction"  # entry of tokenizer_config.json


def decoded_lines(lines: Iterable[bytes], name: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """Yield (number, text without its line end) of each line of a UTF-8 file opened in binary mode, from line `first` on.

    Lines end in "\\n" or "\\r\\n". Other characters at which str.splitlines would split are part of the text. A byte
    order mark before the first line is removed. Raises UserError, with file `name` and line, for invalid UTF-8.
    """
    for number, raw in enumerate(lines, start=first):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        if text:  # empty for a file that holds only a byte order mark
            yield number, text.removesuffix("\n").removesuffix("\r")


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError, which begins with `where`, for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
        why = getattr(error, "msg", None) or str(error)
        raise UserError(f"{where}: not valid JSON ({why}); write one JSON object per line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object; write one JSON object per line")
    return record


def check_unicode(text: str, where: str) -> None:
    """Raise UserError for a lone surrogate: JSON can escape one, but UTF-8 files and tokenizers cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: holds half of a surrogate pair, which is not a character; correct the text"
        ) from None


def without_marks(text: str) -> str:
    """Remove a leading byte order mark and a trailing line end."""
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Cut a text to its first 524,288 characters, or to its last if the tokenizer truncates on the left."""
    text = without_marks(text)
    if len(text) <= MOST_CHARACTERS:
        return text
    return text[-MOST_CHARACTERS:] if tokenizer.truncation_side == "left" else text[:MOST_CHARACTERS]


def instruction_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that `encode_texts` puts before every text; "" for none."""
    return tokenizer.init_kwargs.get(_INSTRUCTION, "")


def set_instruction(tokenizer: PreTrainedTokenizerBase, instruction: str) -> None:
    """Put a text before every text that is tokenised from now on. The tokenizer's `save_pretrained` stores it."""
    tokenizer.init_kwargs.pop(_INSTRUCTION, None)
    if instruction:
        tokenizer.init_kwargs[_INSTRUCTION] = instruction


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> list[list[int]]:
    """Return the token ids of each text, with instruction and special tokens, truncated to `max_len` and not padded.

    Every text has at least one token, because a mean over no tokens is undefined: where the tokenizer gives none, the
    unknown token, the padding token or id 0 takes its place.

    The ids equal those of the whole text after `cut_text`, but only as much of a long text is tokenised as is needed.
    To bound memory, one call of the tokenizer gets at most 262,144 characters or one text.
    """
    instruction = instruction_of(tokenizer)
    prefixes = _sufficient_prefixes(
        tokenizer, [cut_text(tokenizer, instruction + without_marks(text)) for text in texts], max_len
    )
    fallback = next((i for i in (tokenizer.unk_token_id, tokenizer.pad_token_id) if i is not None), 0)
    return [ids or [fallback] for ids in _tokenise(tokenizer, prefixes, max_len)]


def _sufficient_prefixes(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int) -> list[str]:
    """Return a prefix of each text that has the same first `max_len` tokens as the text.

    A prefix is long enough with `max_len + _MARGIN` tokens: the rest of the text can change only the tokens of the
    prefix's last word, and no word that a tokenizer splits has more than `_MARGIN` tokens.
    """
    size = (max_len + _MARGIN) * _CHARACTERS_PER_TOKEN
    if tokenizer.truncation_side == "left":
        return texts  # a token may depend on all of the text to its left
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
    """Return the ids of each text, truncated to `max_len`, with calls of bounded size."""
    ids: list[list[int]] = []
    start = size = 0
    for end, text in enumerate([*texts, None]):
        if end > start and (text is None or size + len(text) > _CHARACTERS_PER_CALL):
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
