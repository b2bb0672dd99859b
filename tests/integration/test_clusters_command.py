"""The command xmc-trainer clusters follows the training's settings, and finds errors before it computes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from transformers import BertModel

from tests.data_helpers import write_lf
from xmc_trainer.builders.encoder import in_precision_of
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.commands import clusters, label_clusters
from xmc_trainer.config import load_config
from xmc_trainer.data import sample_rows
from xmc_trainer.errors import UserError
from xmc_trainer.labels.clusters import LabelClusters

LABELS = 41


@pytest.fixture
def command(toy_settings, monkeypatch, fresh_accelerator):
    """Return a function that runs the command with the toy data's settings and more words."""

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["clusters", *toy_settings, *more])
        clusters.main()

    return call


def by_hand(model, text):
    ids = [2, *(4 + int(word.removeprefix("w")) for word in text.split()), 3]
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].mean(0)


def test_clusters_are_computed_from_the_encoder_and_texts_of_the_training(
    command, toy_data, tiny_encoder, tmp_path, monkeypatch
):
    model = BertModel.from_pretrained(tiny_encoder).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save({f"e.{name}": value for name, value in model.state_dict().items()}, tmp_path / "w.pt")
    seen = {}
    whole = label_clusters.balanced_order

    def watch(rows_of, labels, **more):
        seen["vectors"] = rows_of(np.arange(labels))
        return whole(rows_of, labels, **more)

    monkeypatch.setattr(label_clusters, "balanced_order", watch)
    ngame = ["model.encoder.use_ngame_encoder_weights=true", f"model.encoder.ngame_checkpoint={tmp_path / 'w.pt'}"]
    ngame += ["model.encoder.ngame_key_prefix=e.", "model.encoder.embed_dropout=0.5", "data.train_sample=70"]
    output = ["--output", str(tmp_path / "made.safetensors")]
    command(*ngame, *output, "model.penultimate.use_penultimate_layer=true", "model.penultimate.penultimate_size=12")
    texts = (toy_data / "toy" / "train_raw_texts.txt").read_text().splitlines()
    names = (toy_data / "toy" / "train_labels.txt").read_text().splitlines()
    chosen = sample_rows(len(texts), 70, 42)
    expected = torch.zeros(LABELS, 32)
    for label in range(LABELS):
        rows = [by_hand(model, texts[row]) for row in chosen if f"tag{label:02d}" in names[row].split()]
        if rows:
            expected[label] = torch.stack(rows).mean(0)
    torch.testing.assert_close(seen["vectors"].cpu(), expected, rtol=5e-3, atol=5e-3)

    command(*ngame, *output, "--features", "labels")  # "name of 3": three words unknown to this tokenizer
    with torch.no_grad():
        expected = model(torch.tensor([[2, 1, 1, 1, 3]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(seen["vectors"].cpu(), expected.expand(LABELS, 32), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_precision_is_that_of_the_training(toy_settings, dtype):
    config = load_config([*toy_settings, "training.amp.enabled=true", f"training.amp.dtype={dtype}"])
    layer, inside = torch.nn.Linear(3, 3), []
    out = in_precision_of(config, lambda ids, mask: inside.append(layer(ids)) or inside[0], torch.device("cpu"))(
        torch.ones(2, 3), torch.ones(2, 3)
    )
    assert inside[0].dtype == getattr(torch, dtype) and out.dtype == torch.float32


@pytest.mark.parametrize(
    "words, said",
    [
        pytest.param(["environment.device=cuda"], "environment.device=cuda: there is no usable GPU",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")),
        (["environment.device=cpu", "training.amp.enabled=true"], "training.amp.dtype=float16: needs a GPU"),
        (["model.encoder.pool_mode=last_nhidden_conlast", "model.encoder.feature_layers=3"], "feature_layers=3: the encoder has only 2 layers"),
        (["data.max_len=25"], "data.max_len=25: the encoder reads at most 24"),
        (["data.train_sample=612"], "data.train_sample=612"),
        (["--clusters", "42"], "--clusters=42"),
        (["--npy-order", "ours"], "--npy-order: has no effect without --import-npy"),
        (["--import-npy", "g.npy", "--clusters", "4"], "cannot be combined with --clusters or --features"),
        (["--features", "labels", "data.label_text_file=null"], "these labels have no texts"),
    ],
)  # fmt: skip
def test_errors_of_a_training_are_errors_here(command, words, said):
    with pytest.raises(UserError, match=said):
        command(*words)


def test_an_unwritable_output_is_an_error_before_the_work(command, tmp_path, monkeypatch):
    def nothing_else(*arguments):
        raise AssertionError("work was done")

    monkeypatch.setattr(label_clusters, "compute", nothing_else)
    monkeypatch.setattr(label_clusters, "imported", nothing_else)
    for words, said in [
        (["--output", str(tmp_path / "none" / "c.safetensors")], "none: no such folder; create it"),
        (["--output", str(tmp_path)], "is a folder; name a file with --output"),
        (["data.folder=elsewhere"], "elsewhere: no such folder; set dataset_path"),
        (["data.folder=elsewhere", "--import-npy", "g.npy"], "elsewhere: no such folder; set dataset_path"),
    ]:
        with pytest.raises(UserError, match=said):
            command(*words)
    (tmp_path / "file").touch()
    for words, said in [
        (["--output", str(tmp_path / "file" / "c.safetensors")], "no such folder"),
        (
            ["data.source=somewhere", "data.label_text_file=null", f"dataset_path={tmp_path / 'file'}"],
            "cannot be written",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            command(*words)


def test_a_hugging_face_source_gets_a_folder_for_its_clusters(command, toy_settings, tmp_path):
    for split, rows in {"train": ["w0 w1", "w2 w3", "w4"], "test": ["w1"]}.items():
        lines = (json.dumps({"text": text, "labels": text.split()}) for text in rows)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    hf = [
        f"data.source={tmp_path}",
        f"dataset_path={tmp_path / 'new'}",
        "data.label_text_file=null",
        "data.num_labels=null",
    ]
    command(*hf, "--clusters", "2", "model.auxiliary.group_y_group=3")
    path = tmp_path / "new" / "toy" / "label_group3.safetensors"
    made = LabelClusters.load(path, [f"w{n}" for n in range(5)])
    assert sorted(made.order) == list(range(5)) and len(made.offsets) == 3
    # A training finds the file there.
    trainer = build_trainer(
        load_config([*toy_settings, *hf, "model.auxiliary.use_meta_branch=true", "model.auxiliary.group_y_group=3"])
    )
    assert trainer.meta_branch.clusters(torch.arange(5)).tolist() == made.cluster_of.tolist()


def test_names_are_imported_by_the_command(command, tmp_path, capsys):
    groups = np.empty(2, dtype=object)
    groups[:] = [[f"tag{n:02d}" for n in range(20, 41)], [f"tag{n:02d}" for n in range(20)]]
    np.save(tmp_path / "label_group0.npy", groups, allow_pickle=True)
    command("--import-npy", str(tmp_path / "label_group0.npy"), "--output", str(tmp_path / "c.safetensors"))
    assert '"read_as": "names"' in capsys.readouterr().out
    made = LabelClusters.load(tmp_path / "c.safetensors", [f"tag{n:02d}" for n in range(LABELS)])
    assert made.cluster_of.tolist() == [1] * 20 + [0] * 21


def test_numbers_count_the_lines_of_label_feature_data(command, tmp_path, capsys):
    labels = [{"uid": name, "title": "w1", "content": ""} for name in ("c", "a", "b")]
    write_lf(tmp_path / "toy", labels=labels)
    np.save(tmp_path / "g.npy", np.array([[2], [0], [1]]))
    lf = [f"dataset_path={tmp_path}", "data.is_lf_data=true", "data.label_text_file=null", "data.num_labels=null"]
    for order, expected in (([], [2, 0, 1]), (["--npy-order", "sorted"], [0, 1, 2])):
        command(*lf, "--import-npy", str(tmp_path / "g.npy"), *order)
        assert f'"read_as": "{"sorted" if order else "ours"}"' in capsys.readouterr().out
        made = LabelClusters.load(tmp_path / "toy" / "label_group0.safetensors", ["c", "a", "b"])
        assert made.order.tolist() == expected
