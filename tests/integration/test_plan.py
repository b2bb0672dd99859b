"""What a training was planned to take is what it then has: head, flat parameters, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_training import train
from xmc_trainer import plan
from xmc_trainer.data.generated import Shape
from xmc_trainer.hooks import Hook
from xmc_trainer.run_folder import checkpoints

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def size_of(folder: Path, *patterns: str) -> int:
    return sum(
        path.stat().st_size for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()
    )


class Watch(Hook):
    """Notes the size of the checkpoint on the disk."""

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
