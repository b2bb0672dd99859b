"""Prediction from Python: scores depend only on the text, any iterable is accepted, and errors."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tests.data_helpers import UNK, tiny_tokenizer, write_raw
from tests.encoders import READ, WORDS, save_untrained
from tests.fuzz import examples
from xmc_trainer.builders.saved_model import evaluate_saved
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.data import TextBatches, batch_of_texts, load_corpus, open_source, plan_eval
from xmc_trainer.data.texts import encode_texts
from xmc_trainer.errors import UserError
from xmc_trainer.model import XMCModel

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> XMCModel:
    return XMCModel.load(save_untrained("bert", tmp_path_factory.mktemp("untrained")), "cpu")


def scores_of(predictions) -> np.ndarray:
    """Return scores [texts, labels], in label order."""
    return np.array([[label.score for label in sorted(labels)] for labels in predictions])


# A score depends on its text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_mode", ["last_hidden_avg", "last_nhidden_conlast"])
@pytest.mark.parametrize("name, side", [("bert", "right"), *((name, "left") for name in READ)])
def test_a_score_depends_on_its_text_alone(name, side, pool_mode, tmp_path):
    model = XMCModel.load(save_untrained(name, tmp_path, pool_mode=pool_mode, padding_side=side), "cpu")
    drawn = np.random.default_rng(0)
    texts = [
        " ".join(f"w{word}" for word in drawn.integers(WORDS, size=size)) for size in (0, 1, 2, 3, 5, 8, 13, 18, 30)
    ]
    alone = scores_of([model.predict([text], k=7)[0] for text in texts])
    assert np.ptp(alone, axis=0).min() > 1e-3  # texts have different scores
    for batch_size in (2, 3, len(texts)):
        order = drawn.permutation(len(texts))
        together = scores_of(model.predict([texts[row] for row in order], k=7, batch_size=batch_size))
        assert together == pytest.approx(alone[order], abs=1e-5)

    # Evaluation of the same texts from a corpus.
    write_raw(tmp_path / "d", [(text, "a") for text in texts], [("w1", "a")])
    corpus = load_corpus(
        open_source(None, tmp_path / "d"),
        model.saved.tokenizer,
        max_len=20,
        cache_dir=tmp_path / "c",
        progress=False,
    )
    plan = plan_eval(corpus.lengths("train"), batch_size=4, world_size=1)
    batches = TextBatches(corpus.train, plan, rank=0, pad_token_id=model.saved.tokenizer.pad_token_id)
    for batch in (batches[number] for number in range(len(batches))):
        found, labels = model.saved.head.topk(model.encode(batch["input_ids"], batch["attention_mask"]), 7)
        in_order = torch.empty_like(found).scatter_(1, labels, found.sigmoid())
        assert in_order.numpy() == pytest.approx(alone[batch["rows"].numpy()], abs=1e-5)


def test_tokenizers_without_a_padding_token_or_any_token(tmp_path):
    model = XMCModel.load(save_untrained("bert", tmp_path, pad_token=None), "cpu")
    assert model.saved.tokenizer.pad_token_id is None
    together = scores_of(model.predict(["w1 w2 w3", "w4"], k=7))
    assert together == pytest.approx(
        scores_of([model.predict([text], k=7)[0] for text in ("w1 w2 w3", "w4")]), abs=1e-5
    )
    bare = tiny_tokenizer(WORDS)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert encode_texts(bare, ["", "w0 w1"], 8) == [[UNK], [4, 5]]
    batch = batch_of_texts(bare, ["", "w0 w1"], 8)
    assert batch["attention_mask"].tolist() == [[1] + [0] * 7, [1, 1] + [0] * 6]
    assert torch.isfinite(model.encode(**batch)).all()


# Iterables of texts --------------------------------------------------------------------------------------------------

TEXTS = ["w1 w2", "", "w3", "w4 w5 w6"]


@pytest.mark.parametrize(
    "container",
    [
        tuple,
        iter,
        np.array,
        lambda texts: (text for text in texts),
        lambda texts: np.array(texts, dtype=object),
        lambda texts: pd.Series(texts, index=[2, 0, 3, 1]),
        lambda texts: pd.Series(["gone", *texts, "gone"])[lambda series: series != "gone"],
        lambda texts: pd.Series(texts, dtype="string"),
        lambda texts: pd.Index(texts),
        lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
        lambda texts: datasets.Dataset.from_dict({"text": texts}).with_format("arrow")["text"],
        lambda texts: dict(enumerate(texts)).values(),
    ],
)
def test_any_iterable_of_texts_in_its_order(model, container):
    found = model.predict(container(TEXTS), k=7)
    assert found == model.predict(TEXTS, k=7)
    assert scores_of(found) == pytest.approx(scores_of([model.predict([text], k=7)[0] for text in TEXTS]), abs=1e-5)


def test_no_texts_give_no_predictions(model):
    assert model.predict([]) == [] == model.predict(iter(()))


@pytest.mark.parametrize(
    "texts, message",
    [
        ("kettle", "texts: must be a list or another iterable of strings.*not str"),
        (b"kettle", "texts: must be .* not bytes"),
        (None, "texts: must be .* not NoneType"),
        (7, "texts: must be .* not int"),
        (np.array("kettle"), "texts: must be .* not ndarray"),
        ({"w1": 1}, "texts: must be .* not dict"),
        ({"w1", "w2"}, "texts: must be .* not set"),
        (pd.DataFrame({"text": ["w1"]}), "texts: must be .* not DataFrame"),
        (["w1", None], "text 2 is None, not a string"),
        (["w1", b"w2"], "text 2 is of type bytes, not a string"),
        (pd.Series(["w1", "w2", np.nan]), "text 3 is nan, not a string"),
        (np.array([["w1", "w2"]]), "text 1 is of type ndarray, not a string"),
        (datasets.Dataset.from_dict({"text": ["w1"]}), "text 1 is of type dict, not a string"),
        (["w1", "w2 \ud83d"], "text 2: holds half of a surrogate pair"),
    ],
)
def test_items_that_are_not_texts_are_refused_by_position(model, texts, message):
    with pytest.raises(UserError, match=message):
        model.predict(texts)


@pytest.mark.parametrize(
    "value",
    [0, -1, True, 2.0, "2", None, float("nan"), np.bool_(True), -(10**5000)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["k", "batch_size"])
def test_counts_are_whole_numbers(model, name, value):
    with pytest.raises(UserError, match=f"{name}=.*: must be a whole number, "):
        model.predict(["w1"], **{name: value})


def test_counts_may_be_numpy_integers_and_k_is_bounded(model):
    assert model.predict(["w1"], k=np.int64(7), batch_size=np.uint8(9)) == model.predict(["w1"], k=7)
    with pytest.raises(UserError, match="k=8: must be a whole number, 1 to 7, the number of labels"):
        model.predict(["w1"], k=8)


@pytest.mark.parametrize("device", ["gpu", "cuda:-1", "meta", "cuda:x", "cuda:99", 1.5])
def test_devices_are_cpu_or_cuda(model, device):
    with pytest.raises(UserError, match="device .*: (is not valid; choose cpu, cuda, or|there )"):
        XMCModel.load(model.saved.folder, device)


def test_non_finite_scores_are_an_error(tmp_path):
    model = XMCModel.load(save_untrained("bert", tmp_path), "cpu")
    model.saved.head.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match="model: gives scores that are not finite"):
        model.predict(["w1"])
    write_raw(tmp_path / "d", [("w1", f"tag{n}") for n in range(7)], [("w1", "tag1"), ("w2 w3", "tag3")])
    words = [
        "data.is_lf_data=false",
        f"dataset_path={tmp_path}",
        "data.folder=d",
        "data.max_len=20",
        f"data.cache_dir={tmp_path}",
    ]
    with pytest.raises(UserError, match="evaluation: 2 of 2 texts have features or scores that are not finite"):
        evaluate_saved(model.saved, config_of_model(model.saved.folder, words), model.device)


# Fuzz -----------------------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["", " ", "\0", "\ufeff", "w1", "w1 \x1b[2J", "w" * 5000]
)
_ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | _TEXT | st.lists(_TEXT, max_size=2)


@settings(max_examples=examples(150), **QUICK)
@given(
    texts=st.lists(_TEXT, max_size=5) | st.lists(_ANYTHING, max_size=4) | _ANYTHING,
    k=st.integers(1, 7) | _ANYTHING,
    batch_size=st.integers(1, 4) | _ANYTHING,
)
def test_fuzzed_arguments_are_predicted_or_refused(model, texts, k, batch_size):
    try:
        found = model.predict(texts, k, batch_size)
    except UserError as error:
        assert str(error).isprintable() or any(not c.isprintable() for c in str((texts, k, batch_size)))
        return
    assert len(found) == len(texts) and all(len(labels) == k for labels in found)
    scores = np.array([[label.score for label in labels] for labels in found])
    assert np.isfinite(scores).all() and (np.diff(scores) <= 0).all()
