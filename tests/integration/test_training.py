"""The trainer in this process: learning, logging, saving, and refused settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import RobertaConfig, RobertaModel

from xmc_trainer.builders.encoder import capture_passes
from xmc_trainer.builders.saved_model import evaluate_saved
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.checkpoint.saved_model import load_model
from xmc_trainer.config import load_config
from xmc_trainer.data.split import Split
from xmc_trainer.encoder import compiling
from xmc_trainer.encoder.captured import CannotCapture
from xmc_trainer.encoder.flat import FlatEncoder
from xmc_trainer.errors import UserError
from xmc_trainer.evaluation import most_popular
from xmc_trainer.hooks import Hook
from xmc_trainer.hooks.evaluate import BestModelHook
from xmc_trainer.model import XMCModel
from xmc_trainer.parallel import Ranks
from xmc_trainer.run_folder import SPLIT

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def train(settings, *more, hooks=None):
    trainer = build_trainer(load_config([*settings, *more]), hooks=hooks)
    return trainer, trainer.train()


# Fields of the log that differ between two runs of one training: when losses were read, and the speed.
BY_THE_CLOCK = ("seconds", "head_skipped", "texts_per_s", "encoder_ms", "head_ms", "waiting", "gib", "ms")


def log_of(trainer, event):
    lines = (trainer.run_folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_a_run_learns_logs_saves_and_loads(toy_settings):
    trainer, metrics = train(toy_settings)
    floor = most_popular(trainer.corpus, trainer.new_metrics())
    assert metrics["P@1"] > 0.9 and metrics["PSP@1"] > 0.8 > 0.3 > floor["P@1"]

    assert log_of(trainer, "start")[0]["kernels"][0].startswith("head: ")
    steps = log_of(trainer, "step")
    assert [record["step"] for record in steps] == list(range(1, 8 * 20 + 1))  # 611 texts fill 20 batches of 32
    assert all(np.isfinite(record["loss"]) and not record["encoder_skipped"] for record in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] / 3 and steps[-1]["head_skipped"] == 0
    assert len(list(trainer.encoder.parameters())) == 2  # with and without weight decay: the engine sees only these two
    told = [record for record in steps if "texts_per_s" in record]
    assert told[-1] == steps[-1] and all(
        0 <= record["waiting"] <= 1 and record["head_ms"] > 0 < record["encoder_ms"] for record in told
    )
    # Each record covers the steps since the previous one. No step may take longer than the whole training.
    assert all(32 / record["texts_per_s"] < log_of(trainer, "end")[0]["seconds"] for record in told)
    evaluations = log_of(trainer, "evaluate")
    assert len(evaluations) == 8 and evaluations[-1]["P@1"] == metrics["P@1"]
    timed = log_of(trainer, "evaluation_time")
    assert len(timed) == 8 and all(record["split"] == "test" for record in timed)
    assert all(record["data_s"] + record["encoder_s"] + record["ranking_s"] <= record["took_s"] for record in timed)
    start = log_of(trainer, "start")[0]
    assert {"encoder and data", "head", "engine"} <= start["start_s"].keys() and start["host_gib"] > 0

    folder = trainer.run_folder / "model"
    assert not list(folder.parent.glob("model.*"))
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".yaml", ".safetensors", ".parquet", ".md"}  # no pickles
    again = config_of_model(folder, [])
    model = XMCModel.load(folder)
    found, _ = evaluate_saved(model.saved, again, model.device)
    assert found == pytest.approx(metrics, abs=1e-6)

    labels = model.predict(["w3 w60 w61", "w7 w12"], k=2)
    assert (labels[0][0].id, labels[0][0].text) == ("tag03", "name of 3") and 0.5 < labels[0][0].score < 1
    assert {label.id for label in labels[1]} == {"tag07", "tag12"}
    # The model holds no path of this machine. Next to its run's folder it can be evaluated all the same.
    for path in folder.rglob("*"):
        assert path.is_dir() or str(trainer.run_folder.parents[1]).encode() not in path.read_bytes(), path
    alone = shutil.copytree(folder, folder.parents[1] / "alone")
    assert config_of_model(alone, []).dataset_path == Path(again.dataset_path).name
    assert config_of_model(alone, ["dataset_path=/elsewhere"]).dataset_path == "/elsewhere"


def test_rewiring_happens_at_its_steps_and_ends(toy_settings):
    class Watch(Hook):
        def __init__(self):
            self.indices = {}

        def on_step_end(self, trainer):
            self.indices[trainer.state.step] = trainer.head.index.clone()

    watch = Watch()
    trainer, _ = train(
        toy_settings, "training.optimization.max_steps=20", "model.ffi.rewire_end_epoch=0.5", hooks=[watch]
    )
    events = log_of(trainer, "rewire")
    assert [record["step"] for record in events] == [5, 10]
    assert all(record["ms"] > 0 for record in events)
    assert events[0]["moved"] > 0 and events[0]["moved"] + events[0]["survivors"] == 41 * 12
    changed = [s for s in range(2, 21) if not torch.equal(watch.indices[s], watch.indices[s - 1])]
    assert changed == [record["step"] for record in events if record["moved"]]
    amounts = [record["amount"] for record in events]
    assert amounts == pytest.approx([1e-4 + (0.05 - 1e-4) / 2, 1e-4])


def test_hooks_are_called_in_order(toy_settings):
    class Record(Hook):
        def __init__(self):
            self.calls = []

    def recorder(event):
        def method(self, trainer, *arguments):
            self.calls.append((event, trainer.state.step))

        return method

    events = [name for name in vars(Hook) if name.startswith("on_")]
    for name in events:
        setattr(Record, name, recorder(name))
    record = Record()
    train(
        toy_settings,
        "training.optimization.max_steps=6",
        "training.evaluation.train_evaluate=true",
        "model.ffi.rewire_end_epoch=1.0",
        hooks=[record],
    )
    order = [name for name, _ in record.calls]
    assert set(order) == set(events) - {"on_interrupt"}  # on_rewire is called at step 5 of 6
    assert order[0] == "on_train_start" and order[-2:] == ["on_save", "on_train_end"]
    ends = [step for name, step in record.calls if name == "on_step_end"]
    assert ends == list(range(1, 7)) and order.count("on_evaluate") == 2
    assert record.calls.index(("on_step_begin", 4)) < record.calls.index(("on_step_end", 5))


VARIANTS = {
    "dense": ["model.ffi.use_sparse_layer=false"],
    "groups, states in a byte": [
        "model.ffi.group_size=4",
        "model.ffi.prune_mode=fraction",
        "model.ffi.growth_init_mode=random",
        "training.optimization.xmc_optimizer=adamw_8bit",
    ],
    "bfloat16": ["model.ffi.weight_dtype=bfloat16", "training.amp.enabled=true", "training.amp.dtype=bfloat16"],
    "penultimate": [
        "model.penultimate.use_penultimate_layer=true",
        "model.penultimate.penultimate_size=48",
        "training.optimization.penultimate_lr=2e-3",
    ],
    "cls": ["model.encoder.pool_mode=last_nhidden_conlast", "model.encoder.feature_layers=2"],
    "hinge": ["training.optimization.loss_fn=squared_hinge"],
    "sgd": ["training.optimization.xmc_optimizer=sgd", "training.optimization.lr=0.02"],
    "rowwise, from zero, rare labels raised": [
        "training.optimization.xmc_optimizer=rowwise_rmsprop",
        "model.ffi.weight_init=zero",
        "model.ffi.logit_adjustment=0.2",
        "model.ffi.head_ratio=0.2",
    ],
    "clipped": ["training.optimization.max_grad_norm=0.5", "data.length_grouped=false"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_and_survives_saving(toy_settings, name):
    trainer, metrics = train(toy_settings, *VARIANTS[name], "training.evaluation.test_evaluate_every=8")
    assert metrics["P@1"] > 0.7, metrics
    folder = trainer.run_folder / "model"
    model = XMCModel.load(folder)
    found, _ = evaluate_saved(model.saved, config_of_model(folder, []), model.device)
    if name == "dense":  # AdamW: weights and two states, biases too; a counter of skipped steps
        assert log_of(trainer, "start")[0]["head_bytes"] == 12 * 41 * 33 + 8
    # Mixed precision trains and evaluates in bfloat16, a loaded model computes in float32.
    assert found == pytest.approx(metrics, abs=0.03 if name == "bfloat16" else 1e-6)


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_accumulation_trains_as_one_batch(toy_settings, loss):
    settings = [*toy_settings, "training.optimization.max_steps=25", f"training.optimization.loss_fn={loss}"]
    curves = []
    for batch, accumulate in ((32, 1), (8, 4)):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer, _ = train(
            settings,
            f"data.batch_size={batch}",
            f"training.optimization.grad_accum_step={accumulate}",
            f"data.micro_batches={accumulate}",
            f"log_fname=a{batch}",
        )
        curves.append([record["loss"] for record in log_of(trainer, "step")])
    assert curves[1] == pytest.approx(curves[0], rel=2e-5)


def test_best_model_is_kept(toy_settings):
    trainer, _ = train(
        toy_settings, "training.use_checkpoint=true", "training.checkpoint_file=top", "training.best_p1=0.1"
    )
    best = max(log_of(trainer, "evaluate"), key=lambda record: record["P@1"])
    manifest = json.loads((trainer.run_folder / "top" / "manifest.json").read_text())
    assert manifest["step"] == best["step"]


def test_label_features_augmentation_and_filter(toy_settings, tmp_path):
    folder = tmp_path / "lf" / "toy" / "raw_text"
    folder.mkdir(parents=True)
    rows = [{"uid": f"i{n}", "title": f"w{n % 41}", "content": "w50", "target_ind": [n % 41]} for n in range(123)]
    for name in ("trn", "tst"):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lbl.json").write_text(
        "".join(json.dumps({"uid": f"l{n}", "title": f"w{n} w{n}"}) + "\n" for n in range(41))
    )
    # Each test row's only label is filtered, so no prediction is correct.
    (folder / "filter_labels_test.txt").write_text("".join(f"{n} {n % 41}\n" for n in range(123)))
    lf = [*toy_settings, f"dataset_path={tmp_path / 'lf'}", "data.is_lf_data=true", "data.label_text_file=null"]
    lf += ["data.augment_label_data=true", "training.evaluation.test_evaluate_every=100"]
    trainer, metrics = train(lf)
    assert len(trainer.corpus.train) == 123 + 41 and metrics["P@1"] > 0.9
    AcceleratorState._reset_state(reset_partial_state=True)
    _, filtered = train(lf, "data.use_filter_eval=true", "training.optimization.max_steps=3")
    assert filtered["P@5"] == 0


def test_a_file_is_divided_and_the_run_keeps_how(toy_settings, toy_data, tmp_path, capsys):
    texts = (toy_data / "toy" / "train_raw_texts.txt").read_text().splitlines()
    labels = (toy_data / "toy" / "train_labels.txt").read_text().splitlines()
    rows = [json.dumps({"body": text, "tags": tags.split()}) + "\n" for text, tags in zip(texts, labels)]
    (tmp_path / "toy.jsonl").write_text("".join(rows))
    trainer, metrics = train(
        toy_settings, f"data.source={tmp_path / 'toy.jsonl'}", "data.text_column=body", "data.label_column=tags",
        "data.test_share=0.2", "data.dev_share=0.1", "data.stratify=true", "data.label_text_file=null",
    )  # fmt: skip
    assert metrics["P@1"] > 0.6 and trainer.corpus.labels[3] == {"id": "tag03", "text": "tag03"}
    held_out, sizes = trainer.corpus.test["input_ids"][:], np.bincount(Split.load(trainer.run_folder / SPLIT).parts)
    assert len(held_out) == sizes[1] and sum(sizes) == 611 and abs(sizes[1] - 122) < 12 and abs(sizes[2] - 61) < 12
    block = re.search(
        r"^data .*\nlabels .*\nmodel .*\nkernels .*\nmemory .*\nengine .*$", capsys.readouterr().out, re.MULTILINE
    )
    assert block is not None and all(
        part in block[0]
        for part in (
            f"{sizes[0]:,} training texts, {sizes[1]} test texts (held out)", "41, ", "32 features", "without DeepSpeed, 1 process"
        )
    )  # fmt: skip
    # Evaluation holds the same texts out, even when the file has changed since.
    saved = load_model(trainer.run_folder / "model")
    (tmp_path / "toy.jsonl").write_text(
        "".join([json.dumps({"body": f"w50 w{n}", "tags": "tag00"}) + "\n" for n in range(90)] + rows[::-1])
    )
    for split, size in (("test", sizes[1]), ("dev", sizes[2])):
        config = config_of_model(trainer.run_folder / "model", [f"data.test_split={split}"])
        again, corpus = evaluate_saved(saved, config, torch.device("cpu"))
        assert len(corpus.test) == size and again["P@1"] > 0.6
        assert (sorted(corpus.test["input_ids"][:]) == sorted(held_out)) == (split == "test")


def test_sample_keeps_every_label(toy_settings):
    trainer, _ = train(toy_settings, "data.train_sample=64", "training.optimization.epochs=1")
    assert trainer.state.step == 2 and trainer.head.num_labels == 41


def test_wandb_offline(toy_settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer, _ = train(toy_settings, "training.verbose.use_wandb=true", "training.optimization.max_steps=3")
    (log,) = (trainer.run_folder / "wandb").glob("offline-run-*/*.wandb")
    for folder in (trainer.run_folder, trainer.config.dataset_path, Path(__file__).parent):
        assert str(folder).encode() not in log.read_bytes()  # no paths of this machine leave it


def test_tensorboard(toy_settings, monkeypatch):
    trainer, _ = train(toy_settings, "training.verbose.tracker=tensorboard", "training.optimization.epochs=1")
    events = EventAccumulator(str(trainer.run_folder / "tensorboard")).Reload()
    losses, logged = events.Scalars("train/loss"), log_of(trainer, "step")
    assert [event.step for event in losses] == [record["step"] for record in logged]
    assert [event.value for event in losses] == pytest.approx([record["loss"] for record in logged])
    assert events.Scalars("test/P@1")[-1].value == pytest.approx(trainer.metrics["test"]["P@1"])
    (settings,) = (trainer.run_folder / "tensorboard").glob("*/hparams.yml")
    assert "data.dataset: toy" in settings.read_text() and str(trainer.run_folder) not in settings.read_text()

    def refused(*_, **more):
        raise RuntimeError("no disk\nis there")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", refused)
    with pytest.raises(UserError, match=r"tracker=tensorboard: cannot be started \(no disk\); correct that"):
        train(toy_settings, "training.verbose.tracker=tensorboard")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"tracker=mlflow: is not installed; run pip install 'xmc_trainer\[mlflow\]'"):
        train(toy_settings, "training.verbose.tracker=mlflow")
    with pytest.raises(UserError, match="use_wandb=true: contradicts tracker=mlflow"):
        train(toy_settings, "training.verbose.tracker=mlflow", "training.verbose.use_wandb=true")


def test_printed_metrics_name_the_split(toy_settings, toy_data, tmp_path, capsys):
    shutil.copytree(toy_data / "toy", tmp_path / "toy")
    for name in ("raw_texts", "labels"):
        (tmp_path / "toy" / f"test_{name}.txt").rename(tmp_path / "toy" / f"dev_{name}.txt")
    train(toy_settings, f"dataset_path={tmp_path}", "data.test_split=dev", "training.optimization.epochs=1")
    printed = capsys.readouterr()
    assert "\ndev set, per cent" in printed.out and "epoch 1 dev" in printed.out + printed.err
    assert "test set" not in printed.out


def test_iterations_are_printed_on_request(toy_settings, capsys):
    train(
        toy_settings, "training.verbose.show_iter=true", "training.verbose.print_iter=4",
        "training.verbose.logging=false", "training.optimization.max_steps=9",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "step 4: loss" in printed and "step 8: loss" in printed and "step 5: loss" not in printed
    assert not (Path(load_config(toy_settings).output_dir) / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "setting, named",
    [
        ("model.encoder.encoder_ftr_dim=64", "encoder_ftr_dim=64: the encoder has a hidden size of 32"),
        ("data.max_len=25", "data.max_len=25"),
        ("data.num_labels=40", "data.num_labels=40: the data have 41"),
        ("model.ffi.fan_in=33", "model.ffi.fan_in=33"),
        ("model.ffi.input_features=64", "model.ffi.input_features=64"),
        ("model.ffi.output_features=64", "model.ffi.output_features=64"),
        ("data.train_sample=612", "data.train_sample=612"),
        ("model.encoder.encoder_model=/nowhere/model", "model.encoder.encoder_"),
        ("model.encoder.encoder_model=nobody/no-such-model", "model.encoder.encoder_"),
        ("data.folder=missing", "missing: no such folder"),
    ],
)
def test_contradictions_are_refused_before_training(toy_settings, setting, named, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "encoder_model" in setting:
        toy_settings = [*toy_settings, "model.encoder.encoder_tokenizer=${model.encoder.encoder_model}"]
    with pytest.raises(UserError, match=named) as error:
        build_trainer(load_config([*toy_settings, setting]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["data.max_len=25", "model.ffi.fan_in=33", "model.ffi.input_features=64"])
def test_settings_that_contradict_the_encoder_are_refused_before_tokenising(toy_settings, setting, tmp_path):
    with pytest.raises(UserError, match=setting):
        build_trainer(load_config([*toy_settings, setting, f"data.cache_dir={tmp_path / 'cache'}"]))
    assert not (tmp_path / "cache").exists()


def test_roberta_takes_fewer_tokens_than_it_has_positions(toy_settings, tiny_encoder, tmp_path):
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=94)
    RobertaModel(RobertaConfig(max_position_embeddings=14, pad_token_id=1, **size)).save_pretrained(
        tmp_path / "roberta"
    )
    roberta = [f"model.encoder.encoder_model={tmp_path / 'roberta'}", f"model.encoder.encoder_tokenizer={tiny_encoder}"]
    with pytest.raises(UserError, match="data.max_len=13: the encoder reads at most 12 tokens"):
        build_trainer(load_config([*toy_settings, *roberta, "data.max_len=13"]))
    train(toy_settings, *roberta, "data.max_len=12", "training.optimization.max_steps=1")


def test_a_run_leaves_no_model_of_an_earlier_one(toy_settings):
    short = [*toy_settings, "training.optimization.max_steps=1", "training.use_checkpoint=true"]
    first, _ = train(short, "log_fname=again")
    assert (first.run_folder / "best").is_dir()
    (first.run_folder / "notes").mkdir()
    train(short, "log_fname=again", "training.best_p1=1.0")
    assert {path.name for path in first.run_folder.iterdir()} == {".lock", "config.yaml", "log.jsonl", "model", "notes"}


def test_a_diverging_run_stops_and_names_the_settings_to_change(toy_settings):
    with pytest.raises(UserError, match=r"loss is not finite at step \d+; lower training.optimization.encoder_lr"):
        train(toy_settings, "training.optimization.encoder_lr=1e30")


def test_damaged_models_are_refused(toy_settings, tmp_path):
    trainer, _ = train(toy_settings, "training.optimization.max_steps=1")
    folder = trainer.run_folder / "model"
    shard = folder / "head-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="head-00000-of-00001.safetensors: is damaged"):
        XMCModel.load(folder)
    shard.unlink()
    with pytest.raises(UserError, match="head-00000-of-00001.safetensors: is missing"):
        XMCModel.load(folder)
    with pytest.raises(UserError, match="manifest.json"):
        XMCModel.load(tmp_path)


@pytest.fixture
def clusters(toy_settings, toy_data, monkeypatch):
    """Make the cluster file of the toy data with the command. Returns its path."""
    from xmc_trainer.commands.clusters import main

    path = toy_data / "toy" / "label_group0.safetensors"
    monkeypatch.setattr(sys, "argv", ["clusters", *toy_settings, "--clusters", "8", "model.ffi.group_size=4"])
    main()
    assert path.is_file()
    yield path
    path.unlink()


def test_the_meta_branch_adds_to_the_loss_and_decays(toy_settings, clusters):
    def run(*more):
        trainer, metrics = train(toy_settings, "model.auxiliary.use_meta_branch=true", *more)
        return trainer, metrics, log_of(trainer, "step")

    trainer, metrics, steps = run("model.auxiliary.meta_cutoff_epoch=2")
    assert metrics["P@1"] > 0.9 and trainer.meta_branch.head.num_labels == 8
    weights = [record["meta_weight"] for record in steps]
    assert weights[0] == 0.4 and weights[20] == pytest.approx(0.2) and weights == sorted(weights, reverse=True)
    assert weights[39] > 0 and set(weights[40:]) == {0.0}
    assert trainer.meta_branch.head.steps == 40 and trainer.head.steps == 160
    # With weight 0 it has no effect.
    _, _, without = run("model.auxiliary.auxloss_scaling=0.0", "training.optimization.max_steps=5")
    plain = log_of(train(toy_settings, "training.optimization.max_steps=5", "log_fname=plain")[0], "step")
    assert [record["loss"] for record in without] == [record["loss"] for record in plain]


class FirstOfTen(Ranks):
    """Rank 0 of ten, for everything that happens before communication."""

    def __init__(self, timeout: timedelta) -> None:
        self.rank, self.size = 0, 10

    def one_a_machine_first(self):
        return nullcontext()

    def together(self):
        return nullcontext()

    def broadcast(self, value):
        return value


@pytest.mark.parametrize(
    "more, message",
    [
        (["model.ffi.group_size=5"], "model.ffi.group_size=5: leaves fewer groups of labels than processes"),
        (["model.ffi.head_ratio=0.2"], "model.ffi.head_ratio=0.2: means 8 labels, fewer than processes"),
        (
            ["model.auxiliary.use_meta_branch=true"],
            r"label_group0.safetensors: has fewer clusters \(8\) than there are processes",
        ),
    ],
)
def test_more_processes_than_parts_are_refused(toy_settings, clusters, monkeypatch, more, message):
    monkeypatch.setattr("xmc_trainer.builders.training.Ranks", FirstOfTen)
    with pytest.raises(UserError, match=message):
        build_trainer(load_config([*toy_settings, *more]))


def test_the_mixed_loss_equals_two_heads_by_hand(toy_settings, clusters):
    """The first step's loss is computed in float64 from features, weights and clusters."""
    trainer = build_trainer(
        load_config([*toy_settings, "model.auxiliary.use_meta_branch=true", "training.optimization.max_steps=1"])
    )
    branch, head = trainer.meta_branch, trainer.head
    kept = []
    micro_step = trainer._micro_step

    def watch(batch, batches, end_of_step):
        with torch.no_grad():
            features = trainer.encoder(batch["input_ids"], batch["attention_mask"]).double()
        expected = 0.0
        names = trainer.corpus.labels["id"]
        groups = [set(part) for part in np.split(*_clusters_of(clusters))]
        for part, weight in ((head, 0.6), (branch.head, 0.4)):
            dense = torch.zeros(part.num_labels, 32, dtype=torch.float64)
            index = torch.arange(32).expand(part.num_labels, 32) if part.index is None else part.index.long()
            dense.scatter_(1, index, part.weight.double())
            logits = features @ dense.T + part.bias.double()
            target = torch.zeros_like(logits)
            at = 0
            for row, count in enumerate(batch["label_counts"].tolist()):
                for label in batch["label_ids"][at : at + count].tolist():
                    where = label if part is head else next(n for n, group in enumerate(groups) if label in group)
                    target[row, where] = 1
                at += count
            expected += (
                weight * torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum").item()
            )
        loss, following = micro_step(batch, batches, end_of_step)
        kept.append((loss.item(), expected))
        assert len(names) == 41
        return loss, following

    trainer._micro_step = watch
    trainer.train()
    assert kept[0][0] == pytest.approx(kept[0][1], rel=1e-5)


def _clusters_of(path):
    from safetensors.numpy import load_file

    tensors = load_file(path)
    return tensors["order"], tensors["offsets"][1:-1]


def test_semantic_groups_keep_label_names(toy_settings, clusters):
    trainer, metrics = train(
        toy_settings, "model.ffi.group_size=4", "model.ffi.semantic_groups=true", "model.ffi.fan_in=20"
    )
    order, _ = _clusters_of(clusters)
    assert trainer.corpus.labels["id"] == [f"tag{n:02d}" for n in order] != sorted(trainer.corpus.labels["id"])
    assert metrics["P@1"] > 0.9
    again = config_of_model(trainer.run_folder / "model", [])
    model = XMCModel.load(trainer.run_folder / "model")
    found, corpus = evaluate_saved(model.saved, again, model.device)
    assert found == pytest.approx(metrics, abs=1e-6)
    best = model.predict(["w3 w60 w61"], k=1)[0][0]
    assert (best.id, best.text) == ("tag03", "name of 3")
    # Counts are reordered with the labels.
    plain = trainer.corpus.label_counts()
    assert sorted(plain) == sorted(corpus.label_counts()) and plain.sum() == len(corpus.train_labels().ids)
    by_hand = np.bincount(corpus.train_labels().ids, minlength=41)
    assert np.array_equal(corpus.label_counts(), by_hand)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["model.ffi.group_size=4", "model.ffi.semantic_groups=true"],
        ["model.ffi.head_fan_in=20", "model.ffi.index_init=informed"],
    ],
)
def test_frequent_labels_read_more(toy_settings, clusters, more):
    trainer, metrics = train(toy_settings, "model.ffi.head_ratio=0.2", *more)
    read = 20 if "model.ffi.head_fan_in=20" in more else 32
    assert trainer.head.frequent.weight.shape == (8, read) and trainer.head.tail.weight.shape == (33, 12)
    counts = trainer.corpus.label_counts()
    assert counts[:8].min() >= counts[8:].max() and list(counts[:8]) == sorted(counts, reverse=True)[:8]
    if "model.ffi.semantic_groups=true" in more:
        order, _ = _clusters_of(clusters)
        tail = [int(name.removeprefix("tag")) for name in trainer.corpus.labels["id"][8:]]
        assert tail == [label for label in order if label in set(tail)]
    assert metrics["P@1"] > 0.9 and log_of(trainer, "rewire")
    again = config_of_model(trainer.run_folder / "model", [])
    model = XMCModel.load(trainer.run_folder / "model")
    found, _ = evaluate_saved(model.saved, again, model.device)
    assert found == pytest.approx(metrics, abs=1e-6)
    assert model.predict(["w3 w60 w61"], k=1)[0][0].id == "tag03"


def test_clusters_are_needed_and_checked(toy_settings, toy_data):
    for setting in ("model.auxiliary.use_meta_branch=true", "model.ffi.semantic_groups=true"):
        with pytest.raises(UserError, match="label_group0.safetensors: no such label clusters"):
            build_trainer(load_config([*toy_settings, setting, "model.ffi.group_size=2"]))


def test_a_dense_start_becomes_sparse(toy_settings):
    class Watch(Hook):
        def __init__(self):
            self.before = self.after = None

        def on_epoch_end(self, trainer):  # after ours
            if trainer.state.epoch == 1:
                self.after = trainer.head

        def on_step_end(self, trainer):
            if trainer.state.step == 40:
                self.before = {name: value.clone() for name, value in trainer.head.named_buffers()}

    watch = Watch()
    more = ["training.optimization.dense_epochs=2", "model.ffi.group_size=4", "training.optimization.epochs=5"]
    trainer, metrics = train(toy_settings, *more, "model.ffi.rewire_interval=0", hooks=[watch])
    head = trainer.head
    assert head is watch.after and head.fan_in == 12 and head.index.shape == (11, 12) and head.weight.shape == (41, 12)
    assert head.weight_exp_avg.shape == (41, 12) and metrics["P@1"] > 0.5
    magnitude = watch.before["weight"].abs().numpy()
    for row in range(11):
        expected = np.sort(np.argsort(-magnitude[4 * row : 4 * row + 4].mean(0), kind="stable")[:12])
        assert np.array_equal(head.index[row].numpy(), expected)
    assert XMCModel.load(trainer.run_folder / "model").saved.head.fan_in == 12
    rewired, _ = train(toy_settings, *more, "log_fname=rewired")
    assert [record["step"] for record in log_of(rewired, "rewire")] == [45, 50, 55, 60, 65]


def test_dense_epochs_count_for_neither_early_stopping_nor_the_best_model(toy_settings):
    dense = [*toy_settings, "training.optimization.dense_epochs=2", "model.ffi.rewire_interval=0"]
    # 20 steps per epoch: the training would end with the dense epochs.
    with pytest.raises(UserError, match="max_steps=40: ends within the 2 dense epochs of 20 steps"):
        build_trainer(load_config([*dense, "training.optimization.max_steps=40"]))
    stop = ["training.evaluation.early_stop_patience=1", "training.evaluation.early_stop_delta=2.0"]
    trainer, _ = train(dense, *stop)
    # No later value is better by 200 points: epoch 3 is the first evaluation that counts, and the next one ends the training.
    assert [record["step"] for record in log_of(trainer, "evaluate")] == [20, 40, 60, 80]
    best, kept = BestModelHook("best", 0.1, dense_epochs=2), []
    for epoch, p1 in enumerate([0.5, 0.9, 0.4, 0.3, 0.6]):
        state = SimpleNamespace(epoch=epoch)
        best.on_evaluate(SimpleNamespace(state=state, run_folder=Path("run"), save=kept.append), "test", {"P@1": p1})
        kept += [epoch] * (len(kept) % 2)
    assert kept == [Path("run/best"), 2, Path("run/best"), 4]


def test_schedules_and_early_stopping(toy_settings):
    settings = [
        *toy_settings,
        "training.optimization.lr_scheduler=MultiStepLR",
        "training.optimization.lr_milestones=[1,2]",
    ]
    settings += ["training.optimization.lr_scheduler_xmc=ReduceLROnPlateau", "training.optimization.lr_patience=0"]
    settings += ["training.evaluation.early_stop_patience=2", "training.evaluation.early_stop_metric=R@5"]
    trainer, _ = train(settings, "training.evaluation.early_stop_delta=2.0", "training.optimization.epochs=20")
    steps = log_of(trainer, "step")
    # No value is better by 200 points, so two evaluations after the first end the training.
    assert len(log_of(trainer, "evaluate")) == 3 and len(steps) == 60 and trainer.state.stopped
    rates = [record["encoder_lr"] for record in steps]
    assert (
        rates[5] == rates[19] == 2e-3
        and rates[20:40] == pytest.approx([2e-4] * 20)
        and rates[40:] == pytest.approx([2e-5] * 20)
    )
    p1 = [record["P@1"] for record in log_of(trainer, "evaluate")]
    reductions = np.cumsum([0, 0, p1[1] <= p1[0]])
    assert [steps[at]["lr"] for at in (19, 39, 59)] == pytest.approx([2e-2 * 0.1**n for n in reductions])


def test_pretrained_weights_reach_the_encoder(toy_settings, tiny_encoder, tmp_path):
    from xmc_trainer.encoder.loading import load_backbone

    state = {f"e.{name}": value * 0 + 0.25 for name, value in load_backbone(str(tiny_encoder)).state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    more = ["model.encoder.use_ngame_encoder_weights=true", f"model.encoder.ngame_checkpoint={tmp_path / 'w.pt'}"]
    trainer = build_trainer(load_config([*toy_settings, *more, "model.encoder.ngame_key_prefix=e."]))
    assert all((value == 0.25).all() for value in trainer.encoder_module.backbone.parameters())


def test_an_encoder_that_cannot_be_compiled_trains_uncompiled(tiny_encoder, monkeypatch, capsys):
    from xmc_trainer.builders.encoder import compile_as_configured
    from xmc_trainer.encoder.loading import load_backbone
    from xmc_trainer.encoder.text_encoder import TextEncoder

    encoder = TextEncoder(load_backbone(str(tiny_encoder)))
    accelerator = SimpleNamespace(
        device=torch.device("cuda"),
        state=SimpleNamespace(deepspeed_plugin=None),
        autocast=nullcontext,
        is_main_process=True,
    )

    def fails(*arguments):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr("xmc_trainer.builders.encoder.warm_up", fails)

    def compiled(*words):
        config = load_config(["dataset=amazon3m", *words])
        return compile_as_configured(config, accelerator, encoder, rows=8, tokens=16)

    assert compiled() is False
    assert (
        "cannot be compiled and trains uncompiled, more slowly (RuntimeError: no compiler here)"
        in capsys.readouterr().out
    )
    assert all(module._compiled_call_impl is None and "forward" not in vars(module) for module in encoder.modules())
    with pytest.raises(
        UserError, match="use_torch_compile=true: the encoder cannot be compiled .*; set it to auto or false"
    ):
        compiled("model.encoder.use_torch_compile=true")
    assert compiled("model.encoder.use_torch_compile=False") is False


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_overflows_float16_is_repeated(toy_settings, accumulation, monkeypatch):
    """Repetitions draw the same dropout, and the head makes its update once. The result is as without overflow."""
    settings = [
        *toy_settings,
        f"data.micro_batches={accumulation}",
        "model.encoder.embed_dropout=0.3",
        "training.optimization.max_steps=5",
    ]
    trained, tries = [], []
    for overflows in ([], [False, False, True, True, True, False, True, True]):
        trainer = build_trainer(load_config([*settings, f"log_fname=overflows-{len(overflows)}"]))
        with monkeypatch.context() as patch:
            patch.setattr(trainer.encoder_step, "_fp16", True)
            step, left = trainer.optimizer.step, list(overflows)

            def updates(step=step, left=left, trainer=trainer):
                if trainer.accelerator.sync_gradients:
                    tries.append(trainer.state.step)
                    if left and not left[0]:
                        return
                step()

            patch.setattr(trainer.optimizer, "step", updates)
            patch.setattr(
                "xmc_trainer.encoder_step.step_was_applied", lambda *_, left=left: left.pop(0) if left else True
            )
            trainer.train()
        assert not any(record["encoder_skipped"] for record in log_of(trainer, "step"))
        trained.append(
            (
                [record["loss"] for record in log_of(trainer, "step")],
                trainer.head.state_dict(),
                trainer.encoder_module.state_dict(),
            )
        )
    assert tries == [0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 3, 3, 4]
    assert trained[0][0] == trained[1][0]
    for one, other in zip(trained[0][1:], trained[1][1:]):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_step_with_non_finite_features_changes_neither_encoder_nor_head(toy_settings, monkeypatch):
    trainer = build_trainer(load_config([*toy_settings, "training.optimization.max_steps=1"]))
    grad = torch.tensor([[1.0, torch.nan]])
    step = trainer.encoder_step
    step.begin(0)
    monkeypatch.setattr("xmc_trainer.encoder_step.step_was_applied", lambda *_: False)
    step._kept = [(torch.ones(1, 2), torch.ones(1, 2), grad)]
    assert not step.finish()
    # A step that overflows at every loss scale ends the training, because the head has already made its update.
    ids = torch.ones(1, 4, dtype=torch.int64)
    step._kept = [(ids, ids, torch.ones(1, trainer.encoder_module.out_features))]
    with pytest.raises(UserError, match="overflows float16 at step 1 at every loss scale; set `dtype`=bfloat16"):
        step.finish()


@pytest.mark.gpu
def test_float16_finds_its_loss_scale_without_losing_a_step(toy_settings, monkeypatch):
    amp = ["training.amp.enabled=true", "training.amp.dtype=float16", "training.optimization.max_steps=20"]
    plain, _ = train(toy_settings, *amp)
    monkeypatch.setattr("xmc_trainer.engine.accelerator._INITIAL_SCALE_POWER", 40)
    AcceleratorState._reset_state(reset_partial_state=True)
    high, _ = train(toy_settings, *amp, "log_fname=high")
    losses = [[record["loss"] for record in log_of(trainer, "step")] for trainer in (plain, high)]
    assert not any(record["encoder_skipped"] for record in log_of(high, "step"))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_passes_are_captured_for_the_widths_of_the_first_epoch(toy_settings, monkeypatch, capsys):
    trainer = build_trainer(load_config([*toy_settings, "data.micro_batches=2"]))
    flat, given = trainer.accelerator.unwrap_model(trainer.encoder), []
    monkeypatch.setattr(FlatEncoder, "capture", lambda self, shapes, used_up: given.append((shapes, used_up)))
    capture_passes(trainer.accelerator, flat, trainer.batches)
    ((shapes, used_up),) = given
    widths = [ids.shape[1] for ids, mask in shapes]
    rows = trainer.config.texts_a_step // 2
    assert not used_up and widths == sorted(widths, reverse=True) and len(set(widths)) == len(widths)
    assert all(ids.shape == mask.shape == (rows, width) for width, (ids, mask) in zip(widths, shapes))
    batches = trainer.batches.train(trainer.batches.plan(epoch=0))
    assert {batch["input_ids"].shape[1] for batch in batches} == set(widths)

    def fails(*arguments, **options):
        raise CannotCapture("operation not permitted")

    monkeypatch.setattr(FlatEncoder, "capture", fails)
    capsys.readouterr()
    capture_passes(trainer.accelerator, flat, trainer.batches)
    assert capsys.readouterr().out == (
        "the encoder's passes are not recorded as CUDA graphs and take longer (operation not permitted)\n"
    )
    assert flat.captured_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.gpu)])
def test_the_compiled_encoder_trains_like_the_uncompiled_one(toy_settings, accumulation, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # another test may have chosen its folder
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # g++ takes a minute of CPU time for these graphs. test_recompute compiles small ones.
        monkeypatch.setattr(compiling, "_DYNAMIC", {"dynamic": True, "backend": "aot_eager"})
    steps = 60 if on_gpu else 3
    more = [f"training.optimization.max_steps={steps}", f"data.micro_batches={accumulation}"]
    plain, _ = train(toy_settings, *more)
    compiled, _ = train(toy_settings, *more, "model.encoder.use_torch_compile=true", "log_fname=compiled")
    assert compiled.encoder_module.backbone._compiled_call_impl is not None
    kept = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert kept.name == "compiled" and (not on_gpu or any(kept.iterdir()))
    losses = [[record["loss"] for record in log_of(trainer, "step")] for trainer in (plain, compiled)]
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-4) and losses[1][-1] == pytest.approx(
        losses[0][-1], rel=0.1
    )
    assert XMCModel.load(compiled.run_folder / "model").predict(["w3"], k=1)
