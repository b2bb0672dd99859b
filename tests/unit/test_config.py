"""The configuration: Spartex's files, overrides, and errors that name the setting."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import xmc_trainer
from xmc_trainer.config import Config, load_config, portable_yaml, shipped_configs, to_yaml
from xmc_trainer.config.describe import settings_page
from xmc_trainer.config.fields import settings_of
from xmc_trainer.errors import UserError
from xmc_trainer.head.losses import LOSSES, best_constant
from xmc_trainer.head.optimizers import optimizer_named
from xmc_trainer.run_folder import differences

ASSETS = Path(__file__).parents[1] / "assets"
DOCS = Path(__file__).parents[2] / "docs"
SPARTEX = ASSETS / "spartex_lfamazontitles131k.yaml"


def test_a_complete_spartex_file_loads_with_the_same_values():
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
                # A text setting, because it has a third value.
                assert got == (str(value).lower() if key == "use_torch_compile" else value), f"{path}{key}"

    compare(raw, config, "")
    assert config.data_folder == Path("data/LF-AmazonTitles-131K")
    assert config.run_folder == Path("outputs/log_amazontitles131k")
    assert config.training.amp.mixed_precision == "no"
    assert config.training.optimization.text_reduction == "sum"


def test_the_spartex_page_names_every_option():
    page = (DOCS / "spartex.md").read_text(encoding="utf-8")
    section, named = "", set()
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3:
            section = cells[0].strip("`") or section
            named |= {f"{section}.{option}" for option in re.findall("`([^`]+)`", cells[1])}
    names = set()

    def leaves(tree, prefix):
        for key, value in tree.items():
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else names.add(prefix + key)

    leaves(OmegaConf.to_container(OmegaConf.create(SPARTEX.read_text()), resolve=False), "")
    assert len(names) > 60 and named == names


def test_command_line_of_spartex():
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


ERRORS = [
    ("model.ffi.discriminant_ridge=0", "discriminant_ridge"),
    ("model.ffi.fanin=64", "fanin"),
    ("model.ffi.fan_in=many", "model.ffi.fan_in"),
    ("training.optimization.lr=fast", "training.optimization.lr"),
    ("model.ffi.fan_in=0", "model.ffi.fan_in"),
    ("model.ffi.fan_in=500", "model.ffi.fan_in=500"),
    ("model.ffi.prune_mode=magic", "model.ffi.prune_mode"),
    ("model.ffi.growth_mode=rigl", "model.ffi.growth_mode"),
    ("model.ffi.weight_dtype=float16", "model.ffi.weight_dtype"),
    ("model.ffi.backend=cuda", "model.ffi.backend"),
    ("model.ffi.input_features=100", "model.ffi.input_features"),
    ("model.ffi.output_features=7", "model.ffi.output_features"),
    ("model.ffi.rewire_fraction=1.5", "model.ffi.rewire_fraction"),
    ("model.encoder.pool_mode=max", "model.encoder.pool_mode"),
    ("model.encoder.feature_layers=2", "model.encoder.feature_layers"),
    ("model.encoder.use_ngame_encoder_weights=true", "ngame_checkpoint"),
    ("model.auxiliary.auxloss_scaling=1.0", "auxloss_scaling"),
    ("model.auxiliary.meta_cutoff_epoch=0", "meta_cutoff_epoch"),
    ("model.ffi.semantic_groups=true", "group_size"),
    ("model.ffi.head_ratio=1.0", "head_ratio"),
    ("model.ffi.growth_mode=gradient", "has no effect with model.ffi.rewire_interval=0"),  # wordnet's
    ("model.ffi.centroid_scale=0.25", "centroid_scale=0.25: has no effect without model.ffi.weight_init=centroid"),
    ("model.ffi.head_fan_in=0", "head_fan_in=0: must be in [1, 65536]"),
    ("model.ffi.head_fan_in=100", "has no effect with model.ffi.head_ratio=0"),
    ("training.optimization.loss_fn=focal", "training.optimization.loss_fn"),
    ("training.optimization.xmc_optimizer=momentum", "xmc_momentum"),
    ("training.optimization.dense_epochs=300", "dense_epochs"),
    ("training.optimization.training_steps=100", "max_steps"),
    ("training.optimization.grad_accum_step=0", "grad_accum_step"),
    ("training.optimization.lr_scheduler=Step", "lr_scheduler"),
    ("training.optimization.lr_scheduler_xmc=MultiStepLR", "lr_milestones"),
    ("training.optimization.lr_milestones=[3]", "lr_milestones: has no effect without MultiStepLR"),
    (
        "training.optimization.xmc_momentum=0.5",
        "xmc_momentum=0.5: has no effect without xmc_optimizer=sgd",
    ),  # wordnet's is adamw
    ("training.evaluation.early_stop_metric=P@2", "early_stop_metric"),
    ("training.evaluation.early_stop_delta=-1", "early_stop_delta"),
    ("training.amp.dtype=int8", "training.amp.dtype"),
    ("training.verbose.log_fname=../up", "log_fname"),
    ("training.checkpoint_file=model", "checkpoint_file"),
    ("training.checkpoint_file=log.jsonl", "checkpoint_file"),
    ("training.checkpoint_file=config.yaml", "checkpoint_file"),
    ("data.batch_size=0", "data.batch_size"),
    ("data.test_share=0.1", "data.test_share"),
    ("environment.device=tpu", "environment.device"),
    ("fan_in", "key=value"),
    ("weight_init=zero", "; write model.ffi.weight_init"),
    ("training.lr=1", "; write training.optimization.lr"),
    ("dataset.model.ffi.fan_in=64", ": write model.ffi.fan_in=64"),
    ("+model.ffi.fan_in=64", ": write model.ffi.fan_in=64"),
    ("++dataset.model.ffi.fan_in=64", ": write model.ffi.fan_in=64"),
    ("~model.ffi.tile_labels", "write model.ffi.tile_labels=null"),
    ("~model.ffi.tile_labels=4", "write model.ffi.tile_labels=null"),
]


@pytest.mark.parametrize("word, named", ERRORS)
def test_errors_name_the_setting(word, named):
    with pytest.raises(UserError, match=re.escape(named)) as error:
        load_config(["dataset=wordnet", word])
    assert "\n" not in str(error.value)


def test_settings_without_effect_on_a_dense_head_are_errors():
    dense = ["dataset=wordnet", "model.ffi.use_sparse_layer=false"]
    for setting in ("model.ffi.group_size=4", "model.ffi.head_ratio=0.1"):
        with pytest.raises(UserError, match=setting.split("=")[0]):
            load_config([*dense, setting])
    # Spartex's files set these with a dense head, and so do shipped files with use_sparse_layer=false.
    ffi = load_config(
        [*dense, "model.ffi.fan_in=64", "model.ffi.prune_mode=fraction", "model.ffi.index_init=informed"]
    ).model.ffi
    assert ffi.fan_in == 64 and not ffi.index_from_texts


def test_head_fan_in_cannot_exceed_the_features():
    with pytest.raises(UserError, match=r"model\.ffi\.head_fan_in=500: there are only 384"):
        load_config(["dataset=wordnet", "model.ffi.head_ratio=0.1", "model.ffi.head_fan_in=500"])


def test_an_unknown_data_set_lists_the_known_ones():
    for words in (["dataset=wordnett"], [], ["data.max_len=3"]):
        with pytest.raises(UserError, match="amazon670k"):
            load_config(words)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(["dataset=nowhere.yaml"])


def test_settings_of_another_layout_are_errors():
    for words in (["dataset=sidgnd", "data.use_filter_eval=true"], ["dataset=wiki31k", "data.augment_label_data=true"],
                  ["dataset=lfyso", "data.test_split=dev"]):  # fmt: skip
        with pytest.raises(UserError, match=words[1].split("=")[0]):
            load_config(words)
    data = load_config(["dataset=sidgnd", "data.augment_label_data=true", "data.test_split=dev"]).data
    assert data.test_split == "dev"


def test_a_source_of_data_needs_no_settings_file():
    config = load_config(["data.source=/somewhere/tickets.csv", "data.max_len=32"])
    assert (config.dataset, config.data.dataset, config.data.max_len) == ("tickets", "tickets", 32)
    assert load_config(["data.source=someone/set"]).data.dataset == "set"
    with pytest.raises(UserError, match="data.test_share: applies to data.source only"):
        load_config(["dataset=wordnet", "data.test_share=0.2"])
    with pytest.raises(UserError, match="data.test_split: is not read if data.test_share is set"):
        load_config(["data.source=a", "data.test_share=0.2", "data.test_split=valid"])


def test_former_names_of_settings_still_work(tmp_path, capsys):
    # As an earlier version wrote a run's config.yaml: with every setting.
    data = "data: {dataset: d, hf_source: rows, hf_train_split: fit, hf_test_split: valid, test_split: test}\n"
    (tmp_path / "rows.yaml").write_text(data)
    (tmp_path / "raw.yaml").write_text(
        "data: {dataset: d, hf_source: null, hf_train_split: train, hf_test_split: test, test_split: dev}\n"
    )
    rows, raw = (load_config([f"dataset={tmp_path / name}", "dataset_path=x"]) for name in ("rows.yaml", "raw.yaml"))
    assert (rows.data.source, rows.data.train_split, rows.data.test_split) == ("rows", "fit", "valid")
    assert (raw.data.source, raw.data.test_split) == (None, "dev")
    assert (
        load_config([f"dataset={tmp_path / 'rows.yaml'}", "data.hf_source=null", "dataset_path=x"]).data.source is None
    )
    words = load_config(["data.hf_source=a/b.csv", "data.hf_test_split=valid"])
    assert (words.data.source, words.data.test_split, words.dataset) == ("a/b.csv", "valid", "b")
    assert capsys.readouterr().err.count("data.hf_source is called data.source now") <= 1  # once in a process
    # A run of an earlier version resumes with the new names.
    saved = (
        to_yaml(words)
        .replace("  source:", "  hf_source:")
        .replace("  test_split: valid", "  test_split: test\n  hf_test_split: valid")
    )
    (tmp_path / "config.yaml").write_text(saved)
    assert "hf_source" in saved and differences(words, tmp_path / "config.yaml") == []


def test_every_option_is_described():
    names = list(settings_of(Config))
    assert "model.ffi.fan_in" in names and "training.amp.dtype" in names and "dataset" in names
    assert all(len(setting.help) > 5 for setting in settings_of(Config).values())
    # Update the page with: xmc-trainer settings --markdown > docs/settings.md
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == settings_page() + "\n"

    def leaves(tree):
        return sum(leaves(v) if isinstance(v, dict) and k != "env2path" else 1 for k, v in tree.items())

    assert len(names) == leaves(dataclasses.asdict(load_config(["dataset=wordnet"])))


def test_every_option_is_read_somewhere():
    """Accesses in the configuration's own checks do not count."""
    package, read = Path(xmc_trainer.__file__).parent, set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
        skipped = {id(node) for check in checks for node in ast.walk(check)}
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in skipped}
    unread = {name for name in settings_of(Config) if name.split(".")[-1] not in read}
    # It is computed at run time, as in Spartex; any other value is an error.
    assert unread == {"training.optimization.training_steps"}


# The published settings of Spartex, one column per data set.
PUBLISHED = """
                                             wiki31k          amazon670k       wiki500k         amazon3m         lfamazontitles131k lfwikiseealso320k
data.folder                                  Wiki10-31K       Amazon-670K      Wiki-500K        Amazon-3M        LF-AmazonTitles-131K LF-WikiSeeAlso-320K
data.num_labels                              30938            670091           501070           2812281          131073             312330
data.max_len                                 128              128              128              128              32                 32
data.batch_size                              32               64               128              128              512                128
training.optimization.grad_accum_step        1                1                1                2                1                  1
model.encoder.encoder_model                  bert-base-uncased bert-base-uncased bert-base-uncased bert-base-uncased sentence-transformers/msmarco-distilbert-base-v4 sentence-transformers/paraphrase-distilroberta-base-v2
model.encoder.pool_mode                      last_hidden_avg  last_nhidden_conlast last_hidden_avg last_nhidden_conlast last_hidden_avg last_hidden_avg
model.encoder.embed_dropout                  0.6              0.6              0.5              0.35             0.7                0.55
model.penultimate.use_penultimate_layer      True             False            False            False            False              False
model.ffi.fan_in                             64               128              128              128              128                128
model.ffi.prune_mode                         threshold        threshold        threshold        fraction         fraction           threshold
model.ffi.rewire_interval                    300              800              600              1500             1000               800
model.auxiliary.use_meta_branch              False            True             True             False            True               False
training.optimization.loss_fn                squared_hinge    squared_hinge    squared_hinge    squared_hinge    bce                squared_hinge
training.optimization.xmc_optimizer          adamw            adamw            adamw            adamw            sgd                adamw
training.optimization.encoder_optimizer      adamw            adamw            adamw            adamw            adam               adamw
training.optimization.encoder_lr             1e-05            1e-05            5e-05            5e-05            1e-05              0.0002
training.optimization.wd_encoder             0.01             0.01             0.01             0.01             0.01               0.001
training.optimization.lr                     0.01             0.01             0.05             0.05             0.08               0.01
training.optimization.wd                     0.0001           0.0001           0.0001           0.0001           0.0001             0.0001
training.optimization.epochs                 100              110              50               51               100                101
training.optimization.warmup_steps           1000             1000             1000             10000            5000               5000
training.evaluation.A                        0.5              0.6              0.5              0.6              0.6                0.5
training.evaluation.B                        0.4              2.6              0.4              2.6              2.6                0.4
data.augment_label_data                      False            False            False            False            True               True
data.use_filter_eval                         False            False            False            False            True               True
training.evaluation.early_stop_patience      25               25               25               25               25                 25
training.evaluation.early_stop_delta         5e-05            5e-05            5e-05            5e-05            5e-05              5e-05
model.ffi.rewire_end_epoch                   0.66             0.66             0.66             0.66             0.66               0.66
training.amp.dtype                           float16          float16          float16          float16          float16            float16
"""
# Published with the same value for all data sets.
PUBLISHED_FOR_ALL = """
training.amp.enabled                         True
training.optimization.lr_scheduler           CosineScheduleWithWarmup
training.optimization.lr_scheduler_xmc       CosineScheduleWithWarmup
training.optimization.meta_lr                0.0005
training.optimization.xmc_momentum           0.9
training.optimization.dense_epochs           0
training.optimization.loss_reduction         auto
training.evaluation.early_stop_metric        P@3
model.encoder.feature_layers                 1
model.ffi.use_sparse_layer                   True
model.ffi.group_size                         1
model.ffi.growth_mode                        random
model.ffi.growth_init_mode                   zero
model.ffi.index_init                         random
model.ffi.use_rewire_scheduling              True
model.ffi.rewire_end_threshold               0.0001
"""


def test_shipped_settings_are_the_published_ones():
    names, *rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    configs = [load_config([f"dataset={name}", "dataset_path=/data"]) for name in names]
    rows += [[field, *[value] * len(names)] for field, value in map(str.split, PUBLISHED_FOR_ALL.strip().splitlines())]
    for field, *values in rows:
        for name, config, value in zip(names, configs, values, strict=True):
            found = config
            for part in field.split("."):
                found = getattr(found, part)
            assert str(found) == value, f"{name}: {field}"
    by_name = dict(zip(names, configs))
    auxiliary = {
        n: (c.model.auxiliary.auxloss_scaling, c.model.auxiliary.meta_cutoff_epoch)
        for n, c in by_name.items()
        if c.model.auxiliary.use_meta_branch
    }
    assert auxiliary == {"amazon670k": (0.4, 15), "wiki500k": (0.4, 8), "lfamazontitles131k": (0.4, 12)}
    prune = {
        n: c.model.ffi.rewire_threshold if c.model.ffi.prune_mode == "threshold" else c.model.ffi.rewire_fraction
        for n, c in by_name.items()
    }
    assert list(prune.values()) == [0.01, 0.01, 0.05, 0.25, 0.15, 0.02]
    wiki = by_name["wiki31k"]
    assert (wiki.model.penultimate.penultimate_size, wiki.training.optimization.penultimate_lr) == (4096, 0.01)


@pytest.mark.parametrize(
    "content, message", [("data: {dataset: mine\nx", "not valid YAML"), ("- a\n- b\n", "must contain sections")]
)
def test_files_without_a_configuration_are_errors(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_config([f"dataset={tmp_path / 'mine.yaml'}"])


def test_the_command_line_overrides_the_run_name(tmp_path):
    file = tmp_path / "printed.yaml"
    file.write_text(to_yaml(load_config(["dataset=wordnet", "log_fname=first"])))
    assert load_config([f"dataset={file}"]).run_folder.name == "first"
    for word in ("log_fname=second", "training.verbose.log_fname=second"):
        assert load_config([f"dataset={file}", word]).run_folder.name == "second"
    with pytest.raises(UserError, match="log_fname and training.verbose.log_fname: are two names of one setting"):
        load_config([f"dataset={file}", "log_fname=second", "training.verbose.log_fname=third"])


def test_a_saved_model_keeps_the_root_folder_as_data_folder(tmp_path):
    config = load_config(
        ["dataset=wordnet", "dataset_path=/", "environment.env2path.guest=/", "data.cache_dir=/home/me/cache"]
    )
    (tmp_path / "config.yaml").write_text(portable_yaml(config))
    again = load_config([f"dataset={tmp_path / 'config.yaml'}"])
    assert (again.dataset_path, again.environment.env2path, again.data.cache_dir) == (
        "/", {"guest": "/"}, "~/.cache/xmc_trainer",
    )  # fmt: skip


def test_the_settings_offer_what_the_head_has():
    offered = {}
    for setting in ("loss_fn", "xmc_optimizer"):
        with pytest.raises(UserError, match="choose one of (.*)") as caught:
            load_config(["dataset=wordnet", f"training.optimization.{setting}=none"])
        offered[setting] = str(caught.value).partition(": choose one of ")[2].split(", ")
    assert offered["loss_fn"] == [*LOSSES]
    for loss in LOSSES:
        assert best_constant(loss, torch.tensor(0.25)) < 0
    names = [optimizer_named(name).name for name in offered["xmc_optimizer"]]
    assert names == ["sgd", "adamw", "adamw", "rowwise_rmsprop"]
