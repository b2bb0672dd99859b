"""Fixtures: a tiny encoder and a tiny learnable data set, made once per session."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, which must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from accelerate.state import AcceleratorState
from transformers import BertConfig, BertModel

from tests.data_helpers import tiny_tokenizer, write_raw

LABELS, WORDS = 41, 90  # 41 is prime, so it is not divisible by any rank count or tile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights and no dropout, and a tokenizer of the words w0, w1, ..."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer(WORDS).save_pretrained(folder)
    return folder


def _texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Make (text, labels) rows: each label is a word of the text; the other words are noise."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        labels = rng.sample(range(LABELS), rng.randint(1, 3)) if number >= LABELS else [number]
        noise = [rng.randrange(LABELS, WORDS) for _ in range(rng.randint(0, 9))]
        words = [*labels, *noise]
        rng.shuffle(words)
        rows.append((" ".join(f"w{word}" for word in words), " ".join(f"tag{label:02d}" for label in labels)))
    return rows


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds the data set `toy` in raw layout: 611 training and 101 test texts."""
    root = tmp_path_factory.mktemp("data")
    write_raw(root / "toy", train=_texts(611, seed=1), test=_texts(101, seed=2))
    (root / "toy" / "names.tsv").write_text("".join(f"tag{n:02d}\tname of {n}\n" for n in range(LABELS)))
    return root


@pytest.fixture(scope="session")
def toy_settings_in(
    toy_data: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], list[str]]:
    """Return a function of an output folder: settings that train on `toy` in seconds. Later settings override earlier ones."""

    def write(folder: Path) -> list[str]:
        yaml = folder / "toy.yaml"
        yaml.write_text(
            f"""
data: {{dataset: toy, num_labels: {LABELS}, max_len: 16, num_workers: 0, batch_size: 32, label_text_file: names.tsv}}
model:
  encoder: {{encoder_model: {tiny_encoder}, embed_dropout: 0.0}}
  ffi: {{fan_in: 12, tile_labels: 16, rewire_interval: 5, rewire_threshold: 0.05}}
training:
  overwrite: true
  optimization: {{xmc_optimizer: adamw, encoder_lr: 2.0e-3, lr: 2.0e-2, epochs: 8, warmup_steps: 5}}
"""
        )
        cache = tmp_path_factory.getbasetemp() / "cache"
        return [
            f"dataset={yaml}",
            f"dataset_path={toy_data}",
            f"output_dir={folder / 'out'}",
            f"data.cache_dir={cache}",
            "environment.device=auto",
        ]

    return write


@pytest.fixture
def toy_settings(toy_settings_in: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    return toy_settings_in(tmp_path)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Reset accelerate's state, which it keeps per process, because the tests train many models in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
