"""XMCClassifier: fit on lists, predict, save, and scikit-learn's conventions."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
import torch
from huggingface_hub import HfApi
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

from xmc_trainer import XMCClassifier, XMCModel
from xmc_trainer.commands import extend
from xmc_trainer.errors import UserError

SETTINGS = {
    "training.optimization.epochs": 30,
    "training.optimization.warmup_steps": 1,
    "training.optimization.encoder_lr": 1e-3,
    "training.optimization.lr": 0.05,
    "data.max_len": 16,
    "data.batch_size": 16,
    "data.num_workers": 0,
    "training.amp.enabled": "false",
}


def rows(count: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Texts whose words name their labels."""
    rng = random.Random(seed)
    labels = [rng.sample(range(8), rng.choice([1, 2])) for _ in range(count)]
    return [" ".join(f"w{n} w{n + 10}" for n in row) for row in labels], [[f"label {n}" for n in row] for row in labels]


@pytest.fixture(scope="module")
def fitted(tiny_encoder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    model = XMCClassifier(str(tiny_encoder), fan_in=16, settings=SETTINGS | {"data.cache_dir": cache}, device="cpu")
    return model.fit(*rows(160), eval_set=rows(40, seed=1))


def test_it_learns_and_predicts(fitted):
    texts, labels = rows(40, seed=2)
    assert fitted.metrics_["P@1"] > 0.9 and fitted.score(texts, labels) > 0.9
    assert fitted.classes_.tolist() == [f"label {n}" for n in range(8)]
    best = fitted.predict(texts, k=3)
    assert all(len(found) == 3 for found in best) and len(fitted.predict(texts[:1], k=99)[0]) == 8
    scores = fitted.predict_scores(texts, k=3)
    assert scores.shape == (40, 8) and scores.nnz == 120
    assert [fitted.classes_[row] for row in scores.toarray().argmax(1)] == [found[0] for found in best]
    with pytest.raises(UserError, match="has no fitted thresholds"):
        fitted.predict(texts, threshold="fitted")
    with_threshold = fitted.predict(texts, k=8, threshold=0.5)
    dense = fitted.predict_scores(texts, k=8).toarray()
    assert [len(found) for found in with_threshold] == (dense >= 0.5).sum(1).tolist()


def test_a_saved_model_predicts_the_same(fitted, tmp_path):
    texts = rows(10, seed=3)[0]
    fitted.save_pretrained(tmp_path / "model")
    again = XMCClassifier.from_pretrained(tmp_path / "model", device="cpu")
    assert again.predict(texts) == fitted.predict(texts)
    assert [
        [x.id for x in found] for found in XMCModel.load(tmp_path / "model", "cpu").predict(texts)
    ] == again.predict(texts)
    with pytest.raises(UserError, match="exists already"):
        fitted.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="manifest.json/model: cannot be written"):
        fitted.save_pretrained(tmp_path / "model/manifest.json/model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for k in ("3", None, 0):
        with pytest.raises(UserError, match=f"k={k!r}: must be a whole number, 1 to 8"):
            again.predict(texts, k=k)
    for threshold in (float("nan"), "0.5", [0.5]):
        with pytest.raises(UserError, match="must be a number or 'fitted'"):
            again.predict(texts, threshold=threshold)


def test_it_is_tuned_as_the_last_step_of_a_pipeline(tiny_encoder, tmp_path):
    """Without an eval_set, so texts are held out. Each text has a single label name."""
    settings = SETTINGS | {"data.cache_dir": tmp_path, "training.optimization.epochs": 1}
    texts, labels = rows(60)
    one = np.array([names[0] for names in labels], dtype=object)
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    model = XMCClassifier(str(tiny_encoder), settings=settings, output_dir=tmp_path / "out", device="cpu")
    search = GridSearchCV(
        make_pipeline(lower, model), {"xmcclassifier__fan_in": [8]}, cv=ShuffleSplit(1, random_state=0), refit=False
    )
    search.fit([text.upper() for text in texts], one)
    assert 0 <= search.best_score_ <= 1 and not hasattr(model, "model_")
    saved = XMCModel.load(tmp_path / "out/run/model", "cpu").saved
    assert saved.head.fan_in == 8 and set(saved.label_ids.to_pylist()) == set(one)


def test_files_of_others_are_left_alone(tiny_encoder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("mine")
    settings = SETTINGS | {"data.cache_dir": tmp_path / "c", "training.optimization.epochs": 1, "data.num_labels": None}
    model = XMCClassifier(str(tiny_encoder), fan_in=16, settings=settings, output_dir=tmp_path).fit(*rows(60))
    assert (tmp_path / "data/train.jsonl").read_text() == "mine"
    with pytest.raises(UserError, match="training.overwrite"):
        model.fit(*rows(60, seed=1))
    assert len(model.predict(["w1"], k=1)) == 1  # the model of before
    with pytest.raises(UserError, match="text 1 is None"):  # an eval_set may be pairs
        model.fit(*rows(60), eval_set=[(None, "label 1")])
    for name in ("data.source", "model.ffi.fan_in", "output_dir"):
        with pytest.raises(UserError, match=f"settings: {name} comes from the arguments of XMCClassifier"):
            model.set_params(settings=settings | {name: 8}).fit(*rows(60))
    with pytest.raises(UserError, match="give only one of them"):
        model.set_params(settings=settings | {"data.test_share": 0.5}).fit(*rows(60), eval_set=rows(5))


def test_parameters_follow_scikit_learn():
    model = XMCClassifier(fan_in=32)
    others = {"settings": None, "output_dir": None, "device": None}
    assert model.get_params() == {"encoder": model.encoder, "fan_in": 32} | others
    assert model.set_params(fan_in=8) is model and model.fan_in == 8
    with pytest.raises(ValueError, match="fanin: is not a parameter"):
        model.set_params(fanin=8)
    assert repr(model) == "XMCClassifier(fan_in=8)"


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_mixin_order,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_set_params,
        estimator_checks.check_valid_tag_types,
    ],
    ids=lambda check: check.__name__,
)
def test_checks_of_scikit_learn(check):
    """These apply to every estimator. All others fit it on arrays of numbers, which are not texts."""
    check("XMCClassifier", XMCClassifier())


def test_it_is_fitted_after_fit_alone(fitted):
    check_is_fitted(fitted)
    again = clone(fitted)
    assert again.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        check_is_fitted(again)


def test_frames_hold_texts_and_labels(fitted):
    texts, labels = rows(12, seed=4)
    expected = fitted.score(texts, labels)
    joined = [" ; ".join(names) for names in labels]
    for frame in (
        pd.DataFrame({"text": texts, "labels": labels}),
        pd.DataFrame({"text": texts, "labels": joined}),
        polars.DataFrame({"text": texts, "labels": labels}),
        datasets.Dataset.from_dict({"text": texts, "labels": labels}),
    ):
        assert fitted.score(frame) == expected
        assert fitted.predict(frame, k=2) == fitted.predict(texts, k=2)
    assert fitted.score(list(zip(texts, labels))) == expected
    assert fitted.score(polars.Series(texts), polars.Series(labels)) == expected
    assert fitted._texts_and_labels(pd.DataFrame({"text": ["a"] * 3, "labels": ["x", None, pd.NA]}), None)[1] == [
        ["x"],
        [],
        [],
    ]
    lists = polars.DataFrame({"text": ["a"] * 3, "labels": [["x", "y"], None, []]})
    assert fitted._texts_and_labels(lists, None)[1] == [["x", "y"], [], []]
    with pytest.raises(UserError, match=r"labels of text 1: must be .* not \['x', None\]"):
        fitted.score(polars.DataFrame({"text": ["a"], "labels": [["x", None]]}))
    with pytest.raises(UserError, match="text 2 is None, not a string"):
        fitted.predict(polars.Series(["a", None]))
    with pytest.raises(UserError, match="the frame is lazy"):
        fitted.predict(lists.lazy())
    with pytest.raises(UserError, match="no column 'text', only body; set data.text_column"):
        fitted.predict(pd.DataFrame({"body": texts}))
    with pytest.raises(UserError, match="labels: are missing"):
        fitted.score(texts)


def test_features_and_narrower_weights(fitted):
    texts = [*rows(9, seed=5)[0], ""]
    features = fitted.embed((text for text in texts), batch_size=4)
    assert features.shape == (10, 32) and features.dtype == np.float32
    assert features == pytest.approx(np.concatenate([fitted.embed([text]) for text in texts]), abs=1e-5)
    assert fitted.embed([]).shape == (0, 32)
    head = fitted.model_.saved.head
    scores = torch.sigmoid(torch.from_numpy(features) @ dense_rows(head).T + head.ranking_bias)
    assert fitted.predict_scores(texts, k=8).toarray() == pytest.approx(scores.numpy(), abs=1e-5)
    narrow = XMCClassifier.from_pretrained(fitted.model_.saved.folder, "cpu", dtype="bfloat16")
    assert narrow.embed(texts) == pytest.approx(features, abs=0.1)
    assert not np.array_equal(narrow.embed(texts), features)
    with pytest.raises(UserError, match="dtype int8: is not valid"):
        XMCClassifier.from_pretrained(fitted.model_.saved.folder, "cpu", dtype="int8")


def dense_rows(head) -> torch.Tensor:
    """Return the weights as a dense matrix [L, d]."""
    dense = torch.zeros(head.num_labels, head.in_features)
    for label in range(head.num_labels):
        for slot, feature in enumerate(head.index[label].tolist()):
            dense[label, feature] = head.weight[label, slot]
    return dense


def test_labels_of_one_name_keep_their_own_columns(fitted):
    """Data sets may name two labels alike."""
    texts = rows(10, seed=6)[0]
    twin = XMCClassifier.from_pretrained(fitted.model_.saved.folder, "cpu")
    before = twin.predict_scores(texts, k=8).toarray()
    twin.classes_ = np.array(["same"] * 8, dtype=object)
    twin.model_ = XMCModel(
        dataclasses.replace(twin.model_.saved, label_ids=pa.array(["same"] * 8)), torch.device("cpu")
    )
    assert np.array_equal(twin.predict_scores(texts, k=8).toarray(), before)
    assert twin.predict(texts, k=2) == [["same", "same"]] * 10


def test_labels_added_later_are_predicted(fitted, tmp_path, monkeypatch):
    """Words that the training did not have name the new labels."""
    new = [(f"w{n} w{n + 10}", f"label {n}") for n in (20, 30, 40) for _ in range(8)]
    old_texts, old_labels = rows(60, seed=7)
    table, old = tmp_path / "new.csv", tmp_path / "old.csv"
    table.write_text("text,labels\n" + "".join(f"{text},{name};label 1\n" for text, name in new))
    old.write_text("text,labels\n" + "".join(f"{text},\n" for text in old_texts))
    words = [fitted.model_.saved.folder, table, "--output", tmp_path / "more", "--background", old]
    monkeypatch.setattr(sys, "argv", ["xmc-trainer extend", *map(str, words)])
    extend.main()
    more = XMCClassifier.from_pretrained(tmp_path / "more", "cpu")
    assert more.classes_.tolist() == [*fitted.classes_, "label 20", "label 30", "label 40"]
    before = fitted.predict_scores(old_texts, k=8).toarray()
    assert more.predict_scores(old_texts, k=11).toarray()[:, :8] == pytest.approx(before, rel=1e-5)
    assert more.score([text for text, _ in new], [name for _, name in new]) == 1.0
    assert more.score(old_texts, old_labels) > fitted.score(old_texts, old_labels) - 0.05
    card = (tmp_path / "more/README.md").read_text()
    assert card.endswith(
        "## Changes after training\n\n- `xmc-trainer extend` added 3 labels from 24 texts, 11 labels in all.\n"
    )
    assert "## Use" in card and "## Metrics" not in card  # those are of the model before


def test_progress_is_shown_on_request(fitted, capfd):
    fitted.predict(["w1"] * 3)
    assert "texts" not in capfd.readouterr().err
    fitted.predict(["w1"] * 3, show_progress=True)
    assert "3/3" in capfd.readouterr().err


def test_the_model_card_and_the_hub(fitted, tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **more: f"https://hub/{repo_id}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **arguments: calls.update(arguments))
    assert fitted.push_to_hub("me/it", private=True) == "https://hub/me/it"
    card = (Path(calls["folder_path"]) / "README.md").read_text()
    assert calls["repo_id"] == "me/it" and "Ranks 8 labels" in card and "160 texts" in card
    assert "| `model.ffi.fan_in` | `16` |" in card and f"| test | {100 * fitted.metrics_['P@1']:.2f} |" in card
    assert str(tmp_path.parent) not in card  # no paths of this machine
    # What the hub's cache holds: links to files elsewhere in it. People may have edited the card.
    snapshot = tmp_path / "models--me--it/snapshots/0123"
    for path in Path(calls["folder_path"]).rglob("*.*"):
        link = snapshot / path.relative_to(calls["folder_path"])
        blob = tmp_path / "models--me--it/blobs" / link.relative_to(snapshot).as_posix().replace("/", "+")
        for folder in (link.parent, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b"# mine" if path.name == "README.md" else path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **more: str(snapshot))
    assert XMCClassifier.from_pretrained("me/it", "cpu").predict(["w1"]) == fitted.predict(["w1"])
    monkeypatch.undo()
    with pytest.raises(UserError, match="me/it: is no folder, and not to be had from the Hugging Face hub"):
        XMCClassifier.from_pretrained("me/it")


@pytest.mark.parametrize(
    "texts, labels, message",
    [
        (["a", "b"], [["x"]], "labels: there are 1 for 2 texts"),
        (["a"], [[3]], "labels of text 1: must be a list of label names"),
        (["a", None], [["x"], ["y"]], "text 2 is None"),
    ],
)
def test_data_that_do_not_fit_are_refused(texts, labels, message, tiny_encoder, tmp_path):
    with pytest.raises(UserError, match=message):
        XMCClassifier(str(tiny_encoder), output_dir=tmp_path).fit(texts, labels)


def test_without_a_model():
    with pytest.raises(UserError, match="call fit or from_pretrained first"):
        XMCClassifier().predict(["a"])
