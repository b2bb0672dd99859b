"""The configuration: Spartex's layout as it stands, overrides, and refusals that name the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from xmc_trainer.config import Config, describe, load_config, shipped_configs, to_yaml
from xmc_trainer.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
SPARTEX = ASSETS / "spartex_lfamazontitles131k.yaml"


def test_the_complete_spartex_layout_loads_and_means_the_same():
    config = load_config([f"dataset={SPARTEX}", "dataset_path=./data"])
    raw = OmegaConf.to_container(OmegaConf.create(SPARTEX.read_text()), resolve=False)

    def compare(tree, section, path):
        for key, value in tree.items():
            got = getattr(section, key)
            if isinstance(value, dict):
                compare(value, got, f"{path}{key}.")
            elif isinstance(value, str) and value.startswith("${"):
                assert got == config.model.encoder.encoder_model
            elif isinstance(value, str) and "${" in value:
                assert got == "./NGAME_ENCODERS/lfamazontitles131k/state_dict.pt"
            else:
                assert got == value, f"{path}{key}"

    compare(raw, config, "")
    assert config.data_folder == Path("data/LF-AmazonTitles-131K")
    assert config.run_folder == Path("outputs/log_amazontitles131k")
    assert config.training.amp.mixed_precision == "no"
    assert config.training.optimization.text_reduction == "sum"


def test_command_line_of_the_seed():
    config = load_config(
        [
            "dataset=amazon670k",
            "dataset_path=./data",
            "log_fname=log_A670K",
            "model.ffi.fan_in=64",
            "training.amp.enabled=true",
        ]
    )
    assert config.data_folder == Path("data/Amazon-670K") and config.data.num_labels == 670091
    assert config.run_folder == Path("outputs/log_A670K") and config.model.ffi.fan_in == 64
    assert config.training.amp.mixed_precision == "fp16"
    assert config.training.optimization.text_reduction == "mean"  # squared hinge


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_loads_and_prints_itself(name, tmp_path):
    config = load_config([f"dataset={name}", "dataset_path=/data"])
    assert config.data.dataset == name and config.data.num_labels
    printed = tmp_path / "config.yaml"
    printed.write_text(to_yaml(config))
    again = load_config([f"dataset={printed}"])
    again.dataset = name
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_environment_stands_in_for_dataset_path():
    words = ["dataset=wordnet", "environment.env2path.cluster=/scratch", "environment.running_env=cluster"]
    assert load_config(words).data_folder == Path("/scratch/wordnet")
    assert load_config([*words, "dataset_path=/elsewhere"]).data_folder == Path("/elsewhere/wordnet")
    with pytest.raises(UserError, match="env2path"):
        load_config(["dataset=wordnet", "environment.running_env=moon"])


REFUSED = [
    ("model.ffi.fanin=64", "fanin"),
    ("model.ffi.fan_in=many", "model.ffi.fan_in"),
    ("training.optimization.lr=fast", "training.optimization.lr"),
    ("model.ffi.fan_in=0", "model.ffi.fan_in"),
    ("model.ffi.fan_in=500", "model.ffi.fan_in=500"),
    ("model.ffi.prune_mode=magic", "model.ffi.prune_mode"),
    ("model.ffi.growth_mode=gradient", "model.ffi.growth_mode"),
    ("model.ffi.weight_dtype=float16", "model.ffi.weight_dtype"),
    ("model.ffi.backend=cuda", "model.ffi.backend"),
    ("model.ffi.input_features=100", "model.ffi.input_features"),
    ("model.ffi.output_features=7", "model.ffi.output_features"),
    ("model.ffi.rewire_fraction=1.5", "model.ffi.rewire_fraction"),
    ("model.encoder.pool_mode=max", "model.encoder.pool_mode"),
    ("model.encoder.feature_layers=2", "model.encoder.feature_layers"),
    ("model.encoder.use_torch_compile=true", "model.encoder.use_torch_compile"),
    ("model.encoder.use_ngame_encoder_weights=true", "use_ngame_encoder_weights"),
    ("model.auxiliary.use_meta_branch=true", "use_meta_branch"),
    ("training.optimization.loss_fn=focal", "training.optimization.loss_fn"),
    ("training.optimization.xmc_optimizer=momentum", "xmc_momentum"),
    ("training.optimization.dense_epochs=3", "dense_epochs"),
    ("training.optimization.training_steps=100", "max_steps"),
    ("training.optimization.grad_accum_step=0", "grad_accum_step"),
    ("training.optimization.lr_scheduler=Step", "lr_scheduler"),
    ("training.amp.dtype=int8", "training.amp.dtype"),
    ("training.verbose.log_fname=../up", "log_fname"),
    ("training.checkpoint_file=model", "checkpoint_file"),
    ("data.batch_size=0", "data.batch_size"),
    ("data.hf_source=ag_news", "data.hf_source"),
    ("environment.device=tpu", "environment.device"),
    ("fan_in", "key=value"),
]


@pytest.mark.parametrize("word, named", REFUSED)
def test_refusals_name_the_field(word, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")) as error:
        load_config(["dataset=wordnet", word])
    assert "\n" not in str(error.value)


def test_unknown_data_sets_are_refused_with_the_known_ones():
    for words in (["dataset=wordnett"], [], ["data.max_len=3"]):
        with pytest.raises(UserError, match="amazon670k"):
            load_config(words)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(["dataset=nowhere.yaml"])


def test_filter_and_augmentation_need_label_features():
    for name in ("augment_label_data", "use_filter_eval"):
        with pytest.raises(UserError, match=name):
            load_config(["dataset=sidgnd", f"data.{name}=true"])


def test_every_option_is_described():
    lines = describe(Config)
    names = [line.split(" = ")[0] for line in lines]
    assert "model.ffi.fan_in" in names and "training.amp.dtype" in names and "dataset" in names
    assert all(len(line.split("\n    ")[1]) > 5 for line in lines)

    def leaves(tree):
        return sum(leaves(v) if isinstance(v, dict) and k != "env2path" else 1 for k, v in tree.items())

    assert len(names) == leaves(dataclasses.asdict(load_config(["dataset=wordnet"])))
