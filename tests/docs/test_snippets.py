"""The code blocks of README and the beginners' pages run as printed, with a tiny encoder and small data."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.data_helpers import instance, tiny_tokenizer, write_lf, write_raw
from tests.docs.preloaded import write_clients
from tests.docs.snippets import Snippet, snippets_of
from tests.integration.test_launchers import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# The blocks of a page run one after another, in a folder of that page.
PAGES = ("README.md", "docs/getting-started.md", "docs/data.md", "docs/api.md", "docs/notebooks/first-steps.ipynb")
EVERY_PAGE = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the encoder that the pages call data/minilm: one layer with random weights and MiniLM's number of features."""
    folder = tmp_path_factory.mktemp("minilm")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=104,
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder to put in front of PATH."""
    folder = tmp_path_factory.mktemp("bin")
    address = folder / "socket"
    write_clients(folder, address)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests/docs/preloaded.py", address], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout.readline() == "ready\n"
    yield folder
    server.kill()
    server.wait()


def repository(folder: Path, encoder: Path, mine: bool) -> Path:
    """Make `folder` look like a checkout after README's quick start and, with `mine`, its own data, with smaller data."""
    for name in ("launchers", "ds_configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "data" / "minilm").symlink_to(encoder)
    draw = random.Random(0)
    labels = [{"uid": f"L{number}", "title": f"w{number}", "content": ""} for number in range(8)]
    texts = [instance(f"w{number % 8} w{draw.randrange(8, 90)}", [number % 8]) for number in range(64)]
    inside = write_lf(folder / "data" / "wordnet", train=texts, test=texts[:8], labels=labels)
    (inside / "filter_labels_test.txt").write_text("")
    if not mine:
        return folder
    write_raw(
        folder / "data" / "mine",
        train=[(f"w{number}", f"tag{number % 3}") for number in range(9)],
        test=[("w1", "tag1")],
    )
    (folder / "mine.yaml").write_text(
        "{data: {dataset: mine, batch_size: 3}, model: {encoder: {encoder_model: data/minilm}}, training: {optimization: {epochs: 2}}}"
    )
    return folder


def on_own_ports(code: str) -> str:
    """Add free ports to launch commands, because other tests may use the default ones."""
    for launcher, option in {
        "accelerate launch": "--main_process_port",
        "deepspeed --": "--master_port",
        "torchrun": "--master_port",
    }.items():
        name = launcher.removesuffix(" --")
        code = code.replace(launcher, f"{name} {option} {free_port()}{launcher.removeprefix(name)}")
    return code


def script_of(snippets: list[Snippet], folder: Path) -> str:
    """Join a page's blocks into one bash script, which prints each block's place and stops at the first failure."""
    lines = ["set -euo pipefail"]
    for number, snippet in enumerate(snippets):
        lines.append(f"echo '=== {snippet.where}' >&2")
        if snippet.language == "python":
            (folder / f"block_{number}.py").write_text(snippet.code)
            lines.append(f"python block_{number}.py")
        else:
            lines.append(on_own_ports(snippet.code))
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_one_after_another(page, encoder, clients, tmp_path):
    folder = repository(tmp_path, encoder, mine=page != "README.md")
    snippets = [snippet for snippet in snippets_of(ROOT / page) if snippet.skipped is None]
    assert snippets
    if page == "README.md":
        # The quick start takes minutes, so run its settings with fewer steps.
        before = "python launchers/train.py dataset=wordnet data.num_labels=8 dataset_path=./data log_fname=quickstart \
            model.encoder.encoder_model=data/minilm training.optimization.epochs=1 data.num_workers=0"
        snippets.insert(0, Snippet("the quick start", "bash", before, None))
    environment = os.environ | {
        "PATH": f"{clients}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        ["bash", "-c", script_of(snippets, folder)],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if page == "README.md":
        predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert [record["text"] for record in predictions] == [
            "how do I continue an interrupted run?",
            "which kernels run on an H100?",
        ]
        assert all(len(record["labels"]) == 2 for record in predictions)


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_every_block_is_at_least_well_formed(page):
    for snippet in snippets_of(page):
        if snippet.language == "python":
            compile(snippet.code, snippet.where, "exec")
            continue
        done = subprocess.run(["bash", "-n", "-c", snippet.code], text=True, capture_output=True)
        assert done.returncode == 0, f"{snippet.where}: {done.stderr}"
        for word in snippet.code.split():
            if word.startswith(("launchers/", "ds_configs/", "tests/")):
                assert (ROOT / word.split("::")[0]).exists(), f"{snippet.where}: there is no {word}"
