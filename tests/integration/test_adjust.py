"""The command xmc-trainer adjust gives the same model as a training with that strength."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from xmc_trainer.builders.saved_model import evaluate_saved
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.commands import adjust
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.model import XMCModel


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["adjust", *map(str, words)])
        adjust.main()
        return capsys.readouterr().out

    return call


# A split head orders its labels by frequency.
@pytest.mark.parametrize("head_ratio", [0.0, 0.2])
def test_a_kept_strength_equals_training_with_it(toy_settings, command, head_ratio, fresh_accelerator, tmp_path):
    words = ["environment.device=cpu", "training.optimization.epochs=3", f"model.ffi.head_ratio={head_ratio}"]
    folders, found = {}, {}
    for strength in (0.0, 2.0):
        settings = [*toy_settings, *words, f"model.ffi.logit_adjustment={strength}", f"log_fname=at{strength:g}"]
        trainer = build_trainer(load_config(settings))
        trainer.train()
        folders[strength] = trainer.run_folder / "model"
        found[strength], _ = evaluate_saved(
            XMCModel.load(folders[strength], "cpu").saved, trainer.config, torch.device("cpu")
        )
    assert found[0.0]["P@1"] != found[2.0]["P@1"]
    for strength, folder in folders.items():  # both models give the same metrics
        said = json.loads(command(folder, "--strengths", "0,2,0", "--json"))
        for other, metrics in found.items():
            assert said[str(other)] == pytest.approx(metrics), (strength, other)

    link, notes = tmp_path / "link", folders[0.0] / "notes.txt"
    link.symlink_to(folders[0.0])
    notes.write_text("must not become part of the model")
    with pytest.raises(UserError, match="notes.txt: does not belong to the model"):
        command(link, "--keep", "2")
    notes.unlink()
    assert "## Metrics" in (link / "README.md").read_text()
    assert "logit_adjustment 0 -> 2" in command(link, "--keep", "2")
    card = (link / "README.md").read_text()
    assert (
        card.endswith("- `xmc-trainer adjust` changed `model.ffi.logit_adjustment` from 0 to 2.\n")
        and "## Metrics" not in card
    )
    assert link.readlink() == folders[0.0] and {path.name for path in link.parent.iterdir()} == {
        "link",
        "out",
        "toy.yaml",
    }
    kept, trained = (XMCModel.load(folder, "cpu").saved.head for folder in folders.values())
    for name, tensor in trained.state_dict().items():
        np.testing.assert_allclose(kept.state_dict()[name], tensor, atol=1e-5, err_msg=name)
    assert "the model's own strength is 2\n" in command(folders[0.0])


def test_models_that_cannot_be_adjusted_are_errors(tmp_path, command):
    with pytest.raises(UserError, match="manifest.json: No such file or directory; name the folder of a saved model"):
        command(tmp_path)
    with pytest.raises(UserError, match="model.ffi.logit_adjustment=2: cannot be changed for a saved model"):
        command(tmp_path, "model.ffi.logit_adjustment=2")
    for wrong in (
        ["--strengths", "0,x"],
        ["--strengths", "0", "--keep", "1"],
        ["--strengths", "-1"],
        ["--keep", "inf"],
    ):
        with pytest.raises(SystemExit):
            command(tmp_path, *wrong)
