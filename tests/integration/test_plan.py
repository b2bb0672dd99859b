"""A training has the sizes that were planned: head, flat parameters, files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.integration.test_launchers import run_here
from tests.integration.test_training import train
from xmc_trainer import plan
from xmc_trainer.data.generated import Shape
from xmc_trainer.hooks import Hook
from xmc_trainer.run_folder import checkpoints
from xmc_trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def size_of(folder: Path, *patterns: str) -> int:
    return sum(
        path.stat().st_size for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()
    )


class Watch(Hook):
    """Records the size of the checkpoint on disk."""

    def on_step_end(self, trainer) -> None:
        if trainer.state.step == 12:
            (folder,) = checkpoints(trainer.run_folder)
            self.checkpoint = size_of(folder, "*.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        ["training.optimization.xmc_optimizer=adamw"],
        ["training.optimization.xmc_optimizer=rowwise_rmsprop", "model.ffi.group_size=4", "model.ffi.weight_dtype=bfloat16"],
        ["training.optimization.xmc_optimizer=sgd", "model.ffi.head_ratio=0.2", "model.ffi.growth_mode=gradient",
         "model.ffi.growth_batches=3", "model.ffi.logit_adjustment=0.3"],
    ],
    ids=["adamw", "groups", "split"],
)  # fmt: skip
def test_a_training_has_what_was_planned(toy_settings, tmp_path, more):
    cache, watch = tmp_path / "cache", Watch()
    trainer, _ = train(
        [*toy_settings, f"data.cache_dir={cache}", *more], "training.checkpoint_interval=10", "training.optimization.max_steps=14",
        hooks=[watch],
    )  # fmt: skip
    config, corpus = trainer.config, trainer.corpus
    tokens, labels = corpus.lengths("train").mean(), len(corpus.train_labels().ids) / len(corpus.train)
    facts = plan.Facts.of(config, Shape(len(corpus.train), len(corpus.test), corpus.num_labels, labels, tokens))
    facts = plan.replace(facts, tokens=tokens, name_bytes=8)  # tag03, name of 3
    encoder = plan.EncoderPlan.of(config)
    assert [each.numel() for each in trainer.encoder.parameters()] == list(encoder.groups)
    heads = plan.heads_of(config, encoder.features, corpus.num_labels, 1)
    assert plan.head_bytes(heads) == sum(buffer.nbytes for buffer in trainer.head.buffers())
    assert plan.checkpoint_bytes(config, encoder, facts) == pytest.approx(watch.checkpoint, rel=0.1)
    model = trainer.run_folder / "model"
    kept = size_of(model, "*.safetensors")
    assert plan.model_bytes(config, encoder, facts, None) == pytest.approx(kept, rel=0.1)
    assert plan.token_cache_bytes(facts) == pytest.approx(size_of(cache, "*.arrow"), rel=0.1)


def test_out_of_memory_ends_with_a_line(toy_settings, monkeypatch):
    """If the GPU is too small, train.py ends like other user errors: one line, status 2."""

    def train(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=80 << 30))
    done = run_here("launchers/train.py", *toy_settings, "data.micro_batches=4")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: out of GPU memory (80.0 GiB): 1 GPU, no DeepSpeed, 4 micro-batches: 1.0 GiB planned; "
    )
    assert last.endswith("data.micro_batches=8 needs 1.0 GiB") and "Traceback" not in done.stderr
