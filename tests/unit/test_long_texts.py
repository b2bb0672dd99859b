"""Only the needed part of a long text is tokenised: the ids equal those of the whole text, and memory is bounded."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data_helpers import real_data
from xmc_trainer.data.texts import MOST_CHARACTERS, encode_texts

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def trained(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of each common kind on `texts`."""
    if kind == "wordpiece":  # as BERT's
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=1200, special_tokens=SPECIALS, show_progress=False)
    elif kind == "bpe":  # as RoBERTa's
        backend = Tokenizer(models.BPE(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    else:  # as XLM-R's
        backend = Tokenizer(models.Unigram())
        backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=1200, special_tokens=SPECIALS, unk_token="[UNK]", show_progress=False
        )
    backend.train_from_iterator(texts, trainer)
    places = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=places)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def whole(tokenizer, texts, max_len):
    return [tokenizer(text, truncation=True, max_length=max_len)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def words() -> list[str]:
    rng = random.Random(0)
    syllables = ["ka", "to", "mi", "rê", "un", "ß", "zu", "字", "漢", "1", "22", "-", "'s"]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(1000)]


@pytest.mark.parametrize(
    "kind, side", [("wordpiece", "right"), ("bpe", "right"), ("unigram", "right"), ("bpe", "left")]
)
def test_ids_of_long_texts_are_those_of_the_whole_text(words, kind, side):
    rng = random.Random(1)
    tokenizer = trained(kind, [" ".join(words[at : at + 20]) for at in range(0, len(words), 20)])
    tokenizer.truncation_side = side
    prose = [" ".join(rng.choices(words, k=1000)) for _ in range(3)]
    odd = [
        "",
        "a" * 4000,  # one word of repeated characters
        "".join(rng.choices("abcdefghij", k=4000)),
        "".join(words),  # no blanks
        "".join(rng.choices("字漢", k=4000)),
        "7" * 4000,
        " " * 4000 + prose[0],  # the first prefix has no tokens
        "x" * 4000 + " " + prose[1],
        "\t\n\u200b" * 1500 + "end",
        ". " * 4000,
        "e\u0301" * 4000,
    ]
    # Shift the words so that prefixes end at each position within them.
    shifted = ["b" * n + " " + prose[2] for n in range(16)]
    texts = [*prose, *odd, *shifted]
    for max_len in (3, 60):
        assert encode_texts(tokenizer, texts, max_len) == whole(tokenizer, texts, max_len)


def test_ids_of_real_texts(words):
    folder = real_data("SID-GND-EN")
    with open(folder / "train_raw_texts.txt", encoding="utf-8") as file:
        texts = [line.rstrip("\n") for _, line in zip(range(4_000), file)]
    tokenizer = trained("wordpiece", texts[:100])
    cut = [text for text in texts if len(text) > (32 + 256) * 6]  # shorter texts are tokenised completely anyway
    assert len(cut) > 400
    assert encode_texts(tokenizer, cut, 32) == whole(tokenizer, cut, 32)


def test_memory_is_bounded_at_any_length():
    code = """
from tests.data_helpers import tiny_tokenizer
from xmc_trainer.data.sources import Row
from xmc_trainer.data.texts import encode_texts
from xmc_trainer.data.tokenise import _batches, _encoded

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

tokenizer = tiny_tokenizer()
encode_texts(tokenizer, ["w0"], 16)
texts = {"documents": ["w1 " * 17_000] * 400, "one word": ["x" * 5_000_000], "blanks": [" " * 5_000_000]}
for name, case in texts.items():
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    for batch, _ in _batches((Row(text, [0]) for text in case), tokenizer):
        _encoded(tokenizer, 16, batch)
    print(name, status("VmHWM") - before, sep=";")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = {name: float(grown) for name, grown in (line.split(";") for line in done.stdout.splitlines())}
    assert len(grown) == 3 and max(grown.values()) < 100, grown


def test_a_text_is_read_up_to_a_limit():
    tokenizer = trained("wordpiece", ["a b"])
    limit = " " * MOST_CHARACTERS
    assert encode_texts(tokenizer, [limit[1:] + "a", limit + "a"], 8) == [
        tokenizer("a")["input_ids"],
        tokenizer("")["input_ids"],
    ]
