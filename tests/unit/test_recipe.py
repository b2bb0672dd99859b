"""What a recipe chooses, and that every stated setting wins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.data_helpers import write_raw
from xmc_trainer.builders.recipe import Facts, configured, rules
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config, shipped_configs, to_yaml
from xmc_trainer.errors import UserError

SID = Facts(41_333, 22_625, 4.5, 180, label_texts=True, features=384, positions=512, gpu=True)
YSO = Facts(588_241, 25_018, 58.0, 12, label_texts=True, features=384, positions=512, gpu=True)
WORDNET = Facts(104_916, 108_940, 2.0, 38, label_texts=True, features=384, positions=512, gpu=True)
FFI, OPT = "model.ffi", "training.optimization"


def chosen(facts: Facts, *words: str) -> dict[str, object]:
    stated = {word.partition("=")[0] for word in words}
    return {name: choice.value for name, choice in rules(facts, load_config(["data.source=x", *words]), stated).items()}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # The shipped files' settings, but for the fan-in where labels have many texts.
        (SID, {f"{FFI}.fan_in": 64, "data.max_len": 128, f"{OPT}.epochs": 20, f"{OPT}.lr": 2e-3}),
        (WORDNET, {f"{FFI}.fan_in": 64, "data.max_len": 64, f"{OPT}.epochs": 17, f"{OPT}.lr": 2e-3}),
        (YSO, {f"{FFI}.fan_in": 192, "data.max_len": 32, f"{OPT}.epochs": 6, f"{FFI}.logit_adjustment": 0.3}),
        # 4,000 texts: 63 steps of 64 in each of 20 epochs, so 2e-3 * 6000 / 1260.
        (
            replace(SID, texts=4_000, label_texts=False),
            {"data.batch_size": 64, f"{OPT}.epochs": 20, f"{OPT}.lr": 9.5e-3, "data.augment_label_data": False},
        ),
        # 30 texts: 2 steps of 16 in each of 20 epochs.
        (
            replace(SID, texts=30, label_texts=False, positions=60),
            {"data.batch_size": 16, f"{OPT}.lr": 1e-2, f"{FFI}.logit_adjustment": 0.0, "data.max_len": 60},
        ),
        # Twice the width: a sixth of it, and a quarter of the encoder's rate.
        (replace(SID, features=768), {f"{FFI}.fan_in": 128, f"{OPT}.encoder_lr": 5e-5}),
        # A CPU: 120,000 of the 613,259 texts and label texts, in 938 steps of 128.
        (
            replace(YSO, gpu=False),
            {f"{OPT}.epochs": 1, f"{OPT}.max_steps": 938, "training.amp.enabled": False, f"{OPT}.lr": 1e-2},
        ),
        (replace(SID, gpu=False), {f"{OPT}.epochs": 1, f"{OPT}.max_steps": None, "data.max_len": 64}),
    ],
)
def test_rules(facts, expected):
    found = chosen(facts)
    assert {name: found[name] for name in expected} == expected


def test_later_choices_follow_what_the_user_states():
    # 41,333 texts and 22,625 label texts fill 64 batches of 1,000 an epoch: 640 steps.
    found = chosen(SID, "data.batch_size=1000", f"{OPT}.epochs=10")
    assert f"{OPT}.epochs" not in found and "data.batch_size" not in found
    assert found[f"{OPT}.lr"] == 1e-2 and found[f"{FFI}.logit_adjustment"] == 0.0
    assert chosen(replace(SID, features=768), "model.encoder.lora_rank=8")[f"{OPT}.encoder_lr"] == 2e-4
    # Choices that contradict a stated setting are left out.
    assert f"{OPT}.xmc_optimizer" not in chosen(SID, f"{OPT}.xmc_momentum=0.5")
    assert f"{OPT}.lr" not in chosen(SID, f"{OPT}.xmc_optimizer=sgd")
    assert not {f"{FFI}.index_init", f"{FFI}.weight_init"} & set(chosen(SID, f"{OPT}.dense_epochs=1"))


@pytest.fixture
def words(tiny_encoder, tmp_path):
    data = write_raw(tmp_path / "data", [(f"w{n} w{n + 1}", f"l{n % 7}") for n in range(40)], [("w1 w2", "l1")] * 5)
    return [f"data.source={data}", f"model.encoder.encoder_model={tiny_encoder}", "environment.device=cpu",
            f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'out'}", "data.num_workers=0", "recipe=auto"]  # fmt: skip


def test_precedence(words, tmp_path):
    config, lines = configured([*words, "model.ffi.fan_in=5"])
    assert config.recipe == "none" and config.model.ffi.fan_in == 5 and config.model.ffi.index_init == "discriminant"
    assert "training.optimization.lr=0.01: 60 optimizer steps" in lines and not any("fan_in" in line for line in lines)
    # A file wins over the recipe, and the command line over the file.
    file = tmp_path / "mine.yaml"
    file.write_text("{recipe: auto, model: {ffi: {index_init: informed, fan_in: 6}}}")
    plain = words[:-1]
    config, _ = configured([*plain, f"dataset={file}", "model.ffi.fan_in=7"])
    ffi = config.model.ffi
    assert (ffi.index_init, ffi.fan_in, ffi.weight_init, ffi.rewire_interval) == ("informed", 7, "zero", 0)
    assert configured(plain) == (load_config(plain), [])
    assert configured([*plain, "recipe=spartex"])[0].training.optimization.loss_fn == "squared_hinge"
    with pytest.raises(UserError, match="choose one of auto, spartex, none"):
        configured([*plain, "recipe=best"])
    with pytest.raises(UserError, match="recipe=auto: only train, prepare, clusters and XMCClassifier apply a recipe"):
        build_trainer(load_config(words))


def test_shipped_files_take_no_recipe():
    for name in shipped_configs():
        assert configured([f"dataset={name}"]) == (load_config([f"dataset={name}"]), [])


def test_a_resumed_training_keeps_the_choices(words):
    words.append("training.checkpoint_interval=5")
    config, _ = configured(words)
    trainer = build_trainer(config)
    trainer.train()
    trainer.close()
    saved = config.run_folder / "config.yaml"
    assert yaml.safe_load(saved.read_text())["model"]["ffi"]["fan_in"] == config.model.ffi.fan_in == 16
    assert saved.read_text() == to_yaml(config)
    # More data would change batch size and rates; the run keeps its own.
    source = Path(words[0].partition("=")[2])
    write_raw(source, [(f"w{n} w{n + 1}", f"l{n % 7}") for n in range(4000)], [("w1 w2", "l1")])
    other, _ = configured(words)
    assert other.data.batch_size == 64 != config.data.batch_size
    resumed, lines = configured([*words, "training.resume=true"])
    resumed.training.resume = False
    assert resumed == config and all(line.endswith("as before") for line in lines)
    assert load_config([f"dataset={saved}"]).model == config.model
    assert json.loads((config.run_folder / "log.jsonl").read_text().splitlines()[0])
