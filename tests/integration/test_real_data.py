"""Trainings with many options on slices of real data, which a small encoder learns in seconds.

Reads SID-GND-EN and LF-YSO-25K; skipped where they are absent (see `tests.data_helpers.real_data`).
"""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.data_helpers import real_data, write_lf, write_raw
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.commands import clusters
from xmc_trainer.config import load_config
from xmc_trainer.evaluation import most_popular
from xmc_trainer.model import XMCModel

pytestmark = pytest.mark.slow

TRAIN, TEST = 900, 200


def save_encoder(folder, texts):
    """Make a small BERT with random weights and a vocabulary of the 4000 most frequent words."""
    counts = collections.Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for word, _ in counts.most_common(4000))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, max_position_embeddings=40
    )
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.1, **size)).save_pretrained(folder)


def frequent_only(rows, labels_of, names=60):
    """Select rows with one of the most frequent labels, which few texts can teach."""
    counts = collections.Counter(label for row in rows for label in labels_of(row))
    kept = {label for label, _ in counts.most_common(names)}
    return [row for row in rows if kept.intersection(labels_of(row))]


SETTINGS = """
data: {{dataset: {name}, max_len: 32, num_workers: 0, batch_size: 64, is_lf_data: {lf}}}
model:
  encoder: {{encoder_model: {encoder}, embed_dropout: 0.1}}
  ffi: {{fan_in: 24, rewire_interval: 20, rewire_threshold: 0.02}}
training:
  optimization: {{xmc_optimizer: adamw, encoder_lr: 3.0e-3, lr: 2.0e-2, epochs: 12, warmup_steps: 10}}
"""


def settings_for(root, name, lf):
    (root / f"{name}.yaml").write_text(SETTINGS.format(name=name, encoder=root / "encoder", lf=str(lf).lower()))
    return [f"dataset={root / name}.yaml", f"dataset_path={root}", f"data.cache_dir={root / 'cache'}"]


@pytest.fixture(scope="module")
def sid(tmp_path_factory):
    """Return settings for SID-GND-EN: titles and abstracts with subject headings, raw layout."""
    source, root = real_data("SID-GND-EN"), tmp_path_factory.mktemp("sid")

    def read(split):
        texts, labels = ((source / f"{split}_{kind}.txt").read_text().splitlines() for kind in ("raw_texts", "labels"))
        return list(zip(texts, labels))

    train, test = read("train"), read("test")
    train = frequent_only(train, lambda row: row[1].split())[:TRAIN]
    known = {label for _, labels in train for label in labels.split()}
    test = [(text, " ".join(label for label in labels.split() if label in known)) for text, labels in test]
    test = frequent_only([row for row in test if row[1]], lambda row: row[1].split())[:TEST]
    write_raw(root / "sid", train, test)
    save_encoder(root / "encoder", [text for text, _ in train])
    return settings_for(root, "sid", lf=False)


@pytest.fixture(scope="module")
def yso(tmp_path_factory):
    """Return settings for LF-YSO-25K: library records with concepts, label-feature layout, label texts and filter pairs."""
    source, root = real_data("LF-YSO-25K") / "raw_text", tmp_path_factory.mktemp("yso")

    def read(name, count):
        with gzip.open(source / f"{name}.json.gz", "rt") as file:
            return [json.loads(line) for line in itertools.islice(file, count)]

    train = frequent_only(read("trn", 20000), lambda row: row["target_ind"])[:TRAIN]
    counts = collections.Counter(label for row in train for label in row["target_ind"])
    names = {label: new for new, label in enumerate(sorted(label for label, _ in counts.most_common(400)))}
    texts = read("lbl", None)

    def own(row):
        return row | {"target_ind": [names[label] for label in row["target_ind"] if label in names]}

    train = [own(row) for row in train]
    test = [row for row in map(own, read("tst", 4000)) if row["target_ind"]]
    test = frequent_only(test, lambda row: row["target_ind"])[:TEST]
    folder = write_lf(root / "yso", train, test, [texts[label] for label in names])
    # Exclude the first label of text 0, like the reciprocal pairs of real data sets.
    (folder.parent / "filter_labels_test.txt").write_text(f"0 {test[0]['target_ind'][0]}\n")
    save_encoder(root / "encoder", [row["title"] for row in train])
    return settings_for(root, "yso", lf=True)


def learns(settings, tmp_path, *more):
    """Train; check that the metrics are far above the floor and that the saved model has the same. Returns the log."""
    trainer = build_trainer(load_config([*settings, f"output_dir={tmp_path}", *more]))
    metrics = trainer.train()
    floor = most_popular(trainer.corpus, trainer.new_metrics())
    assert metrics["P@1"] > 2 * floor["P@1"] and metrics["PSP@1"] > 2 * floor["PSP@1"]
    assert XMCModel.load(trainer.run_folder / "model").predict([trainer.corpus.labels["id"][0]], k=3)[0][2].score
    return trainer, metrics, [json.loads(line) for line in (trainer.run_folder / "log.jsonl").read_text().splitlines()]


def test_fixed_fan_in_with_rewiring(sid, tmp_path):
    _, _, log = learns(sid, tmp_path)
    moved = [record["moved"] for record in log if record["event"] == "rewire"]
    assert len(moved) >= 5 and moved[0] > 0


def test_clusters_groups_meta_branch_and_frequent_labels(sid, tmp_path, monkeypatch):
    sid = [*sid, "model.ffi.group_size=4"]
    monkeypatch.setattr(sys, "argv", ["clusters", *sid])
    clusters.main()
    sid += ["model.ffi.semantic_groups=true", "model.ffi.head_ratio=0.1", "model.auxiliary.use_meta_branch=true"]
    trainer, _, log = learns(sid, tmp_path, "model.auxiliary.meta_cutoff_epoch=2")
    assert trainer.head.frequent.num_labels == round(0.1 * trainer.corpus.num_labels)
    weights = [record["meta_weight"] for record in log if record["event"] == "step"]
    assert weights[0] == 0.4 and weights[-1] == 0


def test_dense_start_milestones_adam_and_the_best_model(sid, tmp_path):
    optimization = {"dense_epochs": 2, "encoder_optimizer": "adam", "lr_scheduler": "MultiStepLR",
                    "lr_scheduler_xmc": "MultiStepLR", "lr_milestones": "[6,9]"}  # fmt: skip
    more = [f"training.optimization.{name}={value}" for name, value in optimization.items()]
    more += ["training.use_checkpoint=true", "training.evaluation.train_evaluate=true",
             "training.evaluation.train_evaluate_every=6"]  # fmt: skip
    trainer, _, log = learns(sid, tmp_path, *more)
    assert trainer.head.fan_in == 24
    rates = {record["epoch"]: record["lr"] for record in log if record["event"] == "step"}
    assert [round(rates[epoch] / rates[3], 6) for epoch in (6, 9)] == [0.1, 0.01]
    on_train = [record["P@1"] for record in log if record["event"] == "evaluate" and record["split"] == "train"]
    on_test = [record["P@1"] for record in log if record["event"] == "evaluate" and record["split"] == "test"]
    assert len(on_train) == 2 and on_train[1] > on_train[0] and on_train[1] > on_test[-1]
    saved = [record["step"] for record in log if record["event"] == "save" and record["folder"].endswith("best")]
    steps = [record["step"] for record in log if record["event"] == "evaluate" and record["split"] == "test"]
    assert saved[-1] == steps[on_test.index(max(on_test))]


def test_label_texts_filter_plateau_and_early_stopping(yso, tmp_path):
    more = ["data.augment_label_data=true", "data.use_filter_eval=true", "training.optimization.loss_fn=squared_hinge",
            "training.optimization.lr_scheduler=ReduceLROnPlateau", "training.optimization.lr_patience=0",
            "training.evaluation.early_stop_patience=3", "training.optimization.epochs=30"]  # fmt: skip
    trainer, _, log = learns(yso, tmp_path, *more)
    assert len(trainer.corpus.train) == TRAIN + trainer.corpus.num_labels
    assert trainer.corpus.filter_pairs is not None
    epochs = [record["epoch"] for record in log if record["event"] == "step"]
    assert trainer.state.stopped and epochs[-1] < 29
    rates = [record["encoder_lr"] for record in log if record["event"] == "step"]
    assert rates[-1] < max(rates)


def test_pretrained_weights_start_better(yso, tmp_path):
    def first_epoch(*more):
        trainer = build_trainer(
            load_config(
                [*yso, f"output_dir={tmp_path}", f"log_fname=first{len(more)}", "training.optimization.epochs=1", *more]
            )
        )
        return trainer, trainer.train()["P@1"]

    teacher, _, _ = learns(yso, tmp_path)
    state = {f"encoder.{name}": value for name, value in teacher.encoder_module.backbone.state_dict().items()}
    torch.save(state | {"head.weight": torch.zeros(3)}, tmp_path / "ngame.pt")
    ngame = ["model.encoder.use_ngame_encoder_weights=true", f"model.encoder.ngame_checkpoint={tmp_path / 'ngame.pt'}",
             "model.encoder.ngame_key_prefix=encoder."]  # fmt: skip
    assert first_epoch(*ngame)[1] > first_epoch()[1] + 0.1


def test_torch_sparse_trains_as_the_reference(sid, tmp_path):
    pytest.importorskip("torch_sparse", reason="the torch_sparse backend needs PyG's torch_sparse")
    losses = []
    for backend in ("reference", "torch_sparse"):
        more = [f"model.ffi.backend={backend}", "model.ffi.head_ratio=0.1", f"log_fname={backend}"]
        _, _, log = learns(sid, tmp_path, *more)
        losses.append([record["loss"] for record in log if record["event"] == "step"])
    assert losses[1][:30] == pytest.approx(losses[0][:30], rel=1e-4)
