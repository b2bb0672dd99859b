"""Write small data sets, make a tokenizer without a network, and find real data sets."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, UNK, CLS, SEP = range(4)


def tiny_tokenizer(words: int = 100) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows "w0", "w1", ... as ids 4, 5, ... and puts [CLS] and [SEP] around a text."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *(f"w{n}" for n in range(words))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def write_raw(
    folder: Path,
    train: Iterable[tuple[str, str]] = (("w0 w1", "b a"), ("w2", "c")),
    test: Iterable[tuple[str, str]] = (("w3", "a"),),
) -> Path:
    """Write the raw layout from (text, line of labels) pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        for kind, column in (("raw_texts", 0), ("labels", 1)):
            (folder / f"{split}_{kind}.txt").write_bytes("".join(row[column] + "\n" for row in rows).encode())
    return folder


def json_lines(records: Iterable[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def instance(text: Any, labels: Any, **more: Any) -> dict[str, Any]:
    return {"uid": "x", "title": text, "content": "", "target_ind": labels} | more


LF_TRAIN = (instance("w0 w1", [1, 0]), instance("w2", [2]))
LF_TEST = (instance("w3", [0]), instance("w4", [1]))
LF_LABELS = tuple({"uid": f"L{n}", "title": f"w{n}", "content": ""} for n in range(3))


def write_lf(
    folder: Path,
    train: Iterable[dict[str, Any]] = LF_TRAIN,
    test: Iterable[dict[str, Any]] = LF_TEST,
    labels: Iterable[dict[str, Any]] = LF_LABELS,
    zipped: bool = False,
    inner: str = "raw_text",
) -> Path:
    """Write the label-feature layout. Returns the folder that holds the files."""
    inside = folder / inner
    inside.mkdir(parents=True, exist_ok=True)
    for name, records in (("trn", train), ("tst", test), ("lbl", labels)):
        content = json_lines(records)
        file = inside / f"{name}.json{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(content) if zipped else content)
    return inside


def real_data(name: str) -> Path:
    """Return the folder of a real data set; skip the test if it is absent. XMC_TEST_DATA overrides the root folder."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("XMC_TEST_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"no data in {folder} (XMC_TEST_DATA names the folder of the data sets)")
    return folder
