"""Non-finite numbers: a training starts from finite ones, and never overwrites good weights with others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.data_helpers import write_raw
from xmc_trainer.builders.head import first_bias
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.checkpoint import resume
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.hooks import Hook

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("loss, init", [("bce", "prior"), ("bce", "frequency"), ("squared_hinge", "prior")])
def test_labels_of_every_text_can_be_trained(loss, init, toy_settings, tmp_path):
    write_raw(tmp_path / "toy", train=[(f"w{n} w{n + 1}", "a b") for n in range(12)], test=[("w3", "a b")])
    words = ["data.num_labels=2", "data.label_text_file=null", "data.batch_size=4", "training.optimization.epochs=1"]
    words += [f"dataset_path={tmp_path}", f"training.optimization.loss_fn={loss}", f"model.ffi.bias_init={init}"]
    trainer = build_trainer(load_config([*toy_settings, *words]))
    assert trainer.head.bias.isfinite().all() and (trainer.head.bias > 0).all()
    # The meta branch may have clusters that occur in every text.
    assert first_bias(trainer.config, np.array([12, 12, 12]), texts=12).isfinite().all()
    assert trainer.train()["P@1"] == 1
    records = [json.loads(line) for line in (trainer.run_folder / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert len(losses) == 3 and np.isfinite(losses).all()


def test_non_finite_weights_are_not_saved(toy_settings):
    class Spoil(Hook):
        tried = 0

        def on_step_end(self, trainer):
            """After the second step, save a good checkpoint and model, then make weights non-finite."""
            if trainer.state.step != 2:
                return
            model = trainer.run_folder / "model"
            resume.save(trainer, kept=1)
            trainer.save(model)
            good = {path: path.read_bytes() for path in trainer.run_folder.rglob("*.*") if path.name != "log.jsonl"}
            backbone = next(trainer.encoder_module.parameters())
            for name, tensor, value in (
                ("head weight", trainer.head.weight, torch.nan),
                ("backbone", backbone, torch.inf),
            ):
                kept = tensor.detach().clone()
                tensor.detach().view(-1)[3] = value
                for save in (lambda: resume.save(trainer, kept=1), lambda: trainer.save(model)):
                    said = f"not written at step 2, because weights are no longer finite .*{name}.*encoder_lr"
                    with pytest.raises(UserError, match=said):
                        save()
                    assert all(path.read_bytes() == content for path, content in good.items())
                    self.tried += 1
                tensor.detach().copy_(kept)

    hook = Spoil()
    trainer = build_trainer(load_config([*toy_settings, "training.optimization.max_steps=3"]), hooks=[hook])
    trainer.train()
    assert hook.tried == 4 and (trainer.run_folder / "model" / "manifest.json").is_file()


def test_a_step_has_no_more_micro_batches_than_the_texts_fill(toy_settings):
    # 611 texts fill 20 micro-batches of 32.
    with pytest.raises(
        UserError,
        match="grad_accum_step=99999: the 611 training texts fill only 20 batches .* set it to 20 at most",
    ):
        build_trainer(load_config([*toy_settings, "training.optimization.grad_accum_step=99999"]))
    assert (
        build_trainer(load_config([*toy_settings, "training.optimization.grad_accum_step=20"])).state.steps_per_epoch
        == 1
    )
