"""XMCClassifier: fit on lists, predict, save, and scikit-learn's conventions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xmc_trainer import XMCClassifier, XMCModel
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
    "environment.device": "cpu",
}


def rows(count: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Texts whose words name their labels."""
    rng = random.Random(seed)
    labels = [rng.sample(range(8), rng.choice([1, 2])) for _ in range(count)]
    return [" ".join(f"w{n} w{n + 10}" for n in row) for row in labels], [[f"label {n}" for n in row] for row in labels]


@pytest.fixture(scope="module")
def fitted(tiny_encoder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    model = XMCClassifier(str(tiny_encoder), fan_in=16, settings=SETTINGS | {"data.cache_dir": cache})
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


def test_texts_are_held_out_without_an_eval_set(tiny_encoder, tmp_path):
    settings = SETTINGS | {"data.cache_dir": tmp_path, "training.optimization.epochs": 1}
    texts, labels = rows(60)
    one = [names[0] for names in labels]  # a single name for each text
    model = XMCClassifier(str(tiny_encoder), fan_in=16, settings=settings, output_dir=tmp_path / "out")
    assert model.fit(texts, np.array(one, dtype=object)).model_.saved.head.num_labels == len(set(one))
    assert (tmp_path / "out/run/model").is_dir() and 0 <= model.metrics_["P@1"] <= 1


def test_files_of_others_are_left_alone(tiny_encoder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("mine")
    settings = SETTINGS | {"data.cache_dir": tmp_path / "c", "training.optimization.epochs": 1, "data.num_labels": None}
    model = XMCClassifier(str(tiny_encoder), fan_in=16, settings=settings, output_dir=tmp_path).fit(*rows(60))
    assert (tmp_path / "data/train.jsonl").read_text() == "mine"
    with pytest.raises(UserError, match="training.overwrite"):
        model.fit(*rows(60, seed=1))
    assert len(model.predict(["w1"], k=1)) == 1  # the model of before
    with pytest.raises(UserError, match="give only one of them"):
        model.set_params(settings=settings | {"data.test_share": 0.5}).fit(*rows(60), eval_set=rows(5))


def test_parameters_follow_scikit_learn():
    model = XMCClassifier(fan_in=32)
    assert model.get_params() == {"encoder": model.encoder, "fan_in": 32, "settings": None, "output_dir": None}
    assert model.set_params(fan_in=8) is model and model.fan_in == 8
    with pytest.raises(ValueError, match="fanin: is not a parameter"):
        model.set_params(fanin=8)


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
