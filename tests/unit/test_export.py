"""Exported models give the scores of the model; a served one its predictions; labels added later leave the others alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet
import pytest
import scipy.sparse
import torch
from datasets import Dataset
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from tests import encoders
from tests.data_helpers import tiny_tokenizer
from tests.encoders import WORDS, save_encoder, save_untrained
from tests.head_helpers import dense_of
from tests.saved_folders import no_file_longer_than
from xmc_trainer import XMCModel
from xmc_trainer.checkpoint.saved_model import save_model
from xmc_trainer.commands import export, extend
from xmc_trainer.data import batch_of_texts
from xmc_trainer.data.texts import set_instruction
from xmc_trainer.encoder.loading import load_backbone
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError
from xmc_trainer.head import SGD, FixedFanInHead, SplitHead

ROOT = Path(__file__).parents[2]
DRAWN = np.random.default_rng(0)
TEXTS = ["", *(" ".join(f"w{word}" for word in DRAWN.integers(WORDS, size=1 + n % 19)) for n in range(60))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> XMCModel:
    """A split head, the tail in groups of 4 with a smaller last one, bfloat16 weights, and a penultimate layer."""
    folder = tmp_path_factory.mktemp("split")
    encoder = TextEncoder(
        load_backbone(str(save_encoder("bert", folder / "source"))), penultimate_size=12, penultimate_activation="tanh"
    )
    common = {"optimizer": SGD(), "weight_dtype": torch.bfloat16}
    head = SplitHead(
        FixedFanInHead(12, 3, fan_in=None, seed=1, **common),
        FixedFanInHead(12, 10, fan_in=5, group_size=4, seed=2, **common),
    )
    for _, part in head.parts():
        part.weight.normal_()
        part.bias.normal_()
    labels = [f"tag{n}" for n in range(13)]
    save_model(
        folder / "model",
        encoder=encoder,
        encoder_state=encoder.state_dict(),
        tokenizer=tiny_tokenizer(WORDS),
        head=head,
        labels=Dataset.from_dict({"id": labels, "text": labels}),
        max_len=7,
        step=0,
        config_yaml="dataset: toy\n",
    )
    return XMCModel.load(folder / "model", "cpu")


def run(monkeypatch, command, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["xmc-trainer", *map(str, words)])
    command.main()


def test_the_head_in_scipy_and_in_torch(model, tmp_path, monkeypatch):
    for name in ("scipy", "torch"):
        run(monkeypatch, export, model.saved.folder, tmp_path / name, "--format", name)
        assert pyarrow.parquet.read_table(tmp_path / name / "labels.parquet")["id"].to_pylist()[12] == "tag12"
    features, (scores, labels) = model.embed(TEXTS), model.topk(TEXTS, k=13)
    weight, bias = scipy.sparse.load_npz(tmp_path / "scipy/weight.npz"), np.load(tmp_path / "scipy/bias.npy")
    assert weight.shape == (13, 12) and weight.nnz == 3 * 12 + 10 * 5
    every = 1 / (1 + np.exp(-(features @ weight.T + bias)))
    assert np.take_along_axis(every, labels, 1) == pytest.approx(scores, abs=1e-5)

    spec = importlib.util.spec_from_file_location("head", tmp_path / "torch/head.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "xmc_trainer import" not in (tmp_path / "torch/head.py").read_text()
    found, numbers = module.Head(str(tmp_path / "torch/head.safetensors")).topk(torch.from_numpy(features), 5)
    assert np.array_equal(numbers.numpy(), labels[:, :5]) and found.numpy() == pytest.approx(scores[:, :5], abs=1e-5)
    with no_file_longer_than(500), pytest.raises(UserError, match="full: cannot be written"):
        run(monkeypatch, export, model.saved.folder, tmp_path / "full", "--format", "scipy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scipy", "torch"]
    with pytest.raises(UserError, match="torch: exists already"):
        run(monkeypatch, export, model.saved.folder, tmp_path / "torch", "--format", "torch")


def test_the_encoder_as_sentence_transformers_stores_one(model, tmp_path, monkeypatch):
    """The files as its documentation describes them, read with transformers alone."""
    out = tmp_path / "st"
    run(monkeypatch, export, model.saved.folder, out, "--format", "sentence-transformers")
    kinds = [each["type"].rpartition(".")[2] for each in json.loads((out / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense"]
    assert json.loads((out / "1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"] is True
    longest = json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(out)(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    dense = load_file(out / "2_Dense/model.safetensors")
    features = torch.tanh((hidden * mask).sum(1) / mask.sum(1) @ dense["linear.weight"].T + dense["linear.bias"])
    assert features.numpy() == pytest.approx(model.embed(TEXTS), abs=1e-5)


def test_a_decoder_as_sentence_transformers_stores_one(tmp_path, monkeypatch):
    told = tiny_tokenizer(WORDS)
    set_instruction(told, "w1 w2 ")
    monkeypatch.setattr(encoders, "tiny_tokenizer", lambda words: told)
    folder = save_untrained("llama", tmp_path, pool_mode="last_token")
    run(monkeypatch, export, folder, tmp_path / "st", "--format", "sentence-transformers")
    pooling = json.loads((tmp_path / "st/1_Pooling/config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_lasttoken"]
    prompts = json.loads((tmp_path / "st/config_sentence_transformers.json").read_text())
    assert prompts["prompts"][prompts["default_prompt_name"]] == "w1 w2 "
    model, config, arguments = encoders.DECODERS["llama"]
    monkeypatch.setitem(encoders.DECODERS, "llama", (model, config, arguments | {"is_causal": False}))
    both_ways = save_untrained("llama", tmp_path / "b")
    with pytest.raises(UserError, match="bidirectional attention, which sentence-transformers would not keep"):
        run(monkeypatch, export, both_ways, tmp_path / "other", "--format", "sentence-transformers")


def test_the_whole_in_onnx(model, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    run(monkeypatch, export, model.saved.folder, tmp_path / "onnx", "--format", "onnx", "-k", "5", "--int8")
    scores, labels = model.topk(TEXTS, k=5)
    for name, tolerance in (("model.onnx", 1e-4), ("model.int8.onnx", 0.2)):
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / name)
        for start, stop in ((0, 1), (1, 40), (40, 61)):
            batch = batch_of_texts(model.saved.tokenizer, TEXTS[start:stop], 7)
            found, numbers = session.run(None, {key: value.numpy() for key, value in batch.items()})
            assert found == pytest.approx(scores[start:stop], abs=tolerance)
            if name == "model.onnx":
                assert np.array_equal(numbers, labels[start:stop])
    with pytest.raises(UserError, match="-k=14: must be 1 to 13"):
        run(monkeypatch, export, model.saved.folder, tmp_path / "more", "--format", "onnx", "-k", "14")
    assert not (tmp_path / "more").exists()

    def cannot(*words, **options):
        raise torch.onnx.errors.OnnxExporterError("no operator") from ValueError("no such view")

    monkeypatch.setattr(torch.onnx, "export", cannot)
    with pytest.raises(UserError, match=r"cannot write its encoder, BertModel, as ONNX \(no such view\); use another"):
        run(monkeypatch, export, model.saved.folder, tmp_path / "more", "--format", "onnx")
    assert not (tmp_path / "more").exists()


def test_encoders_that_sentence_transformers_would_load_otherwise(tmp_path, monkeypatch):
    for name in ("bart", "big bird"):
        (tmp_path / name).mkdir()
    bart = save_untrained("bart", tmp_path / "bart")
    with pytest.raises(UserError, match="cannot load its encoder, BartEncoder, without a decoder; use --format onnx"):
        run(monkeypatch, export, bart, tmp_path / "out", "--format", "sentence-transformers")
    # BigBird's full attention in place of the sparse one of its config.json; and a tokenizer that cannot pad.
    model = XMCModel.load(save_untrained("big bird", tmp_path / "big bird", pad_token=None), "cpu")
    run(monkeypatch, export, model.saved.folder, tmp_path / "out", "--format", "sentence-transformers")
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        TEXTS[20:30], padding=True, truncation=True, max_length=20, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path / "out").eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    assert (hidden * mask).sum(1).div(mask.sum(1)).numpy() == pytest.approx(model.embed(TEXTS[20:30]), abs=1e-5)


@pytest.mark.parametrize("fan_in, group_size, dtype", [(5, 4, "float32"), (None, 1, "float32"), (5, 4, "bfloat16")])
def test_labels_added_later_score_as_known_ones_do(fan_in, group_size, dtype, tmp_path, monkeypatch):
    """The scores that the documentation promises, computed from dense matrices in float64."""
    folder = save_untrained("bert", tmp_path)
    loaded = XMCModel.load(folder, "cpu")
    more = {"optimizer": SGD(), "seed": 3, "weight_dtype": getattr(torch, dtype)}
    head = FixedFanInHead(16, 7, fan_in=fan_in, group_size=group_size, **more)
    head.bias.normal_()
    if dtype == "bfloat16":  # features far from 0, where rounded weights move a score most
        embed = loaded.embed
        monkeypatch.setattr(loaded, "embed", lambda texts, **options: embed(texts, **options) + np.float32(30))
    loaded.saved = dataclasses.replace(loaded.saved, head=head)
    new = extend.NewLabels(TEXTS[:30], [[row % 3] if row % 5 else [] for row in range(30)], ["x", "y", "z"])
    part = extend.extended_part(loaded, new, TEXTS[30:])
    assert torch.equal(part.weight[:7], head.weight) and torch.equal(part.bias[:7], head.bias)
    if fan_in:  # label 7 shares the group of the labels 4 to 6
        assert torch.equal(part.index[:2], head.index) and part.index.shape == (3, 5)
    background = loaded.embed(TEXTS[30:]).astype(np.float64)
    known = background @ dense_of(head)[0].numpy().T + head.bias.numpy()
    for number in range(3):
        own = loaded.embed([text for text, labels in zip(*new[:2]) if number in labels]).astype(np.float64)
        row, bias = dense_of(part)[0].numpy()[7 + number], float(part.bias[7 + number])
        assert (background @ row + bias).mean() == pytest.approx(known.mean(), abs=1e-3)
        assert (own @ row + bias).mean() == pytest.approx(known.max(1).mean(), abs=1e-3 if dtype == "float32" else 0.05)


def test_files_that_cannot_extend_a_model_are_refused(tmp_path, monkeypatch):
    folder, table = save_untrained("bert", tmp_path), tmp_path / "new.csv"
    for content, message in (
        ("text,labels\nw1,tag1\n", "no label that the model does not have"),
        ("text,labels\nw1,new\n", "the background has 1 texts; name at least 20"),
        ("body,labels\nw1,new\n", "row 1: has no column 'text'; name one with --text-column"),
        ("text,tags\nw1,new\n", "row 1: has no column 'labels'; name one with --label-column"),
    ):
        table.write_text(content)
        with pytest.raises(UserError, match=message):
            run(monkeypatch, extend, folder, table, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_served_model_predicts_and_refuses(model, monkeypatch):
    monkeypatch.setenv("XMC_MODEL", str(model.saved.folder))
    monkeypatch.syspath_prepend(str(ROOT / "launchers/examples"))
    app = importlib.import_module("serve_fastapi").app
    with TestClient(app) as client:
        assert client.get("/health").json() == {"labels": 13}
        answer = client.post("/predict", json={"texts": TEXTS[:3], "k": 2}).json()
        expected = [[label._asdict() for label in labels] for labels in model.predict(TEXTS[:3], k=2)]
        assert [[label["id"] for label in row] for row in answer] == [[x["id"] for x in row] for row in expected]
        assert answer[0][0]["score"] == pytest.approx(expected[0][0]["score"])
        refused = client.post("/predict", json={"texts": TEXTS[:3], "k": 14})
        assert refused.status_code == 422 and "k=14: must be" in refused.json()["detail"]
        assert client.post("/predict", json={"texts": []}).status_code == 422
