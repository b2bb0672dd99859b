"""The commands evaluate, calibrate and predict on one trained model whose test set has labels that training lacks."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from accelerate.state import AcceleratorState

from tests.saved_folders import forge
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.calibration import FILE
from xmc_trainer.checkpoint.saved_model import replace_model
from xmc_trainer.commands import adjust, calibrate, evaluate, predict
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.model import XMCModel

COMMANDS = {"evaluate": evaluate, "calibrate": calibrate, "predict": predict, "adjust": adjust}


@pytest.fixture
def command(monkeypatch, capsys):
    def call(name, *words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        COMMANDS[name].main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def trained(toy_data, toy_settings_in, tmp_path_factory):
    """Return two runs' models, the folder of the data, and the first run's metrics."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(toy_data / "toy", root / "toy")
    file = root / "toy" / "test_labels.txt"
    lines = file.read_text().splitlines()
    lines[3] += " new1"
    lines[5] = "new2 new1"
    file.write_text("\n".join(lines) + "\n")
    models = []
    for name, epochs in (("one", 3), ("two", 1)):
        words = [
            f"dataset_path={root}",
            f"log_fname={name}",
            "environment.device=cpu",
            f"training.optimization.epochs={epochs}",
        ]
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = build_trainer(load_config([*toy_settings_in(root), *words]))
        trainer.train()
        trainer.close()
        models.append((trainer.run_folder / "model", trainer.metrics["test"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return models[0][0], models[1][0], root / "toy", models[0][1]


def gold_of(folder) -> list[set[str]]:
    return [set(line.split()) for line in (folder / "test_labels.txt").read_text().splitlines()]


def texts_of(folder) -> list[str]:
    return (folder / "test_raw_texts.txt").read_text().splitlines()


def test_labels_that_training_lacks_count_or_not(trained, command):
    folder, _, data, logged = trained
    found = {
        gold: json.loads(command("evaluate", folder, "--json", f"--gold={gold}", "--samples=0"))
        for gold in ("all", "seen")
    }
    assert {name: found["seen"][name] for name in logged} == pytest.approx(logged, abs=1e-6)
    gold = gold_of(data)
    best = [{label.id for label in row} for row in XMCModel.load(folder, "cpu").predict(texts_of(data), k=5)]
    hits = sum(len(one & two) for one, two in zip(best, gold))
    assert found["all"]["P@5"] == pytest.approx(hits / 5 / len(gold))
    assert found["all"]["micro-F1@5"] == pytest.approx(2 * hits / (5 * len(gold) + sum(map(len, gold))))
    labels = set().union(*gold)
    covered = {label for one, two in zip(best, gold) for label in one & two}
    assert found["all"]["coverage@5"] == pytest.approx(len(covered) / len(labels))
    assert found["all"]["coverage@5"] < found["seen"]["coverage@5"]
    assert found["all"]["P@5"] < found["seen"]["P@5"] and found["all"]["R@5"] < found["seen"]["R@5"]


def test_tables_intervals_and_the_file_of_labels(trained, command, tmp_path):
    folder, _, data, _ = trained
    words = [folder, "--samples=50", "--threshold=0.1"]
    said = command("evaluate", *words, "--labels", tmp_path / "labels.csv")
    assert (
        "101 texts, 41 labels, per cent; 3 relevant labels (2 different ones) that training lacks count as missed"
        in said
    )
    for word in ("most popular labels", "95 % from", "@threshold to", "sample-F1", "head, ", "tail, "):
        assert word in said
    found = json.loads(command("evaluate", *words, "--json"))
    low, high = found["intervals"]["micro-F1@threshold"]
    assert low < found["micro-F1@threshold"] < high
    rows = {row["label"]: row for row in csv.DictReader(open(tmp_path / "labels.csv", newline=""))}
    gold = gold_of(data)
    predicted = [
        {label.id for label in row} for row in XMCModel.load(folder, "cpu").predict(texts_of(data), k=20, threshold=0.1)
    ]
    for label, row in rows.items():
        tp, p, g = (
            sum(label in one for one in sets)
            for sets in ([one & two for one, two in zip(gold, predicted)], predicted, gold)
        )
        assert [int(row[name]) for name in ("correct@threshold", "predicted@threshold", "relevant")] == [tp, p, g]
        assert float(row["F1@threshold"]) == pytest.approx(2 * tp / (p + g) if p + g else 0, abs=1e-6)
        assert row["text"] == f"name of {int(label[3:])}" and row["bucket"] in ("head", "middle", "tail")
    few = json.loads(command("evaluate", folder, "--samples=0", "--threshold=0", "-k3", "--json"))
    assert few["micro-F1@threshold"] == few["micro-F1@3"]  # every label scores at least 0
    tp, p = (sum(int(row[f"{name}@threshold"]) for row in rows.values()) for name in ("correct", "predicted"))
    assert found["micro-F1@threshold"] == pytest.approx(2 * tp / (p + sum(map(len, gold))))


def test_two_models_are_compared(trained, command, tmp_path):
    one, two, data, _ = trained
    found = json.loads(command("evaluate", two, one, "--samples=99", "--json"))
    alone = [json.loads(command("evaluate", folder, "--samples=0", "--json")) for folder in (two, one)]
    assert len(found) > 60
    for name, row in found.items():
        assert [row["first"], row["second"]] == pytest.approx([each[name] for each in alone])
        assert row["difference"] == pytest.approx(row["second"] - row["first"])
    assert found["P@1"]["low"] > 0 and found["P@1"]["p"] == pytest.approx(0.02)  # three epochs are better than one
    said = command("evaluate", one, two, "--samples=20")
    assert "95 % interval" in said and "head macro-F1@5" in said
    other = shutil.copytree(data, tmp_path / data.parent.name / "toy")
    lines = (other / "test_labels.txt").read_text().splitlines()
    (other / "test_labels.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    # The settings hold for both models, so only a run's own data and metrics can differ.
    moved = shutil.copytree(one.parent, tmp_path / "run")
    (moved / "model/config.yaml").write_text((one / "config.yaml").read_text().replace("A: 0.55", "A: 0.6"))
    forge(moved / "model")
    with pytest.raises(
        UserError, match="differ in training.evaluation.A, training.evaluation.B or data.use_filter_eval"
    ):
        command("evaluate", one, moved / "model")
    shutil.copytree(one, moved / "model", dirs_exist_ok=True)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(data.parent), str(other.parent)))
    with pytest.raises(UserError, match="their test sets differ in texts or labels"):
        command("evaluate", one, moved / "model", "--samples=20")


@pytest.mark.parametrize(
    "words", [["--method=isotonic", "--thresholds=label", "--average=macro", "--fewest=2"], []]
)  # the second one replaces the first
def test_calibrated_models_predict_by_their_thresholds(trained, command, tmp_path, words):
    original, _, data, _ = trained
    run = shutil.copytree(original.parent, tmp_path / "run")
    folder = run / "model"
    with pytest.raises(UserError, match="has no fitted thresholds; run xmc-trainer calibrate"):
        command("predict", folder, data / "test_raw_texts.txt", "--threshold=fitted")
    said = command("calibrate", folder, "-k", "15", *words)
    assert "101 texts, 15 best labels of each" in said and "calibration error (ECE)" in said
    saved = XMCModel.load(folder, "cpu").saved
    before = XMCModel.load(original, "cpu")
    command(
        "predict",
        folder,
        data / "test_raw_texts.txt",
        "-k",
        "15",
        "--threshold=fitted",
        "--output",
        tmp_path / "out.npz",
    )
    matrix = sp.load_npz(tmp_path / "out.npz")
    scores, labels = before.topk(texts_of(data), 15)
    logits = np.log(scores.astype(np.float64)) - np.log1p(-scores.astype(np.float64))
    scores = saved.calibration.scores(logits.astype(np.float32))
    thresholds = np.broadcast_to(saved.calibration.thresholds, 41)
    expected = np.zeros((101, 41))
    for row in range(101):
        for label, score in zip(labels[row], scores[row]):
            if score >= thresholds[label]:
                expected[row, label] = score
    clear = np.abs(scores - thresholds[labels]).min() > 1e-6  # otherwise rounding may decide
    assert clear and matrix.nnz == (expected > 0).sum()
    np.testing.assert_allclose(matrix.toarray(), expected, atol=1e-5)
    # Evaluation uses the fitted thresholds, too, and they are better than the best k.
    found = json.loads(command("evaluate", folder, "--json", "--samples=0", "-k", "15"))
    average = "macro" if words else "micro"
    assert found[f"{average}-F1@threshold"] > max(found[f"{average}-F1@{k}"] for k in (1, 3, 5))
    assert found["P@5"] == pytest.approx(json.loads(command("evaluate", original, "--json", "--samples=0"))["P@5"])
    every = json.loads(command("evaluate", folder, "--json", "--samples=0", "-k", "15", "--threshold=0"))
    assert every["micro-R@threshold"] == pytest.approx(
        sum(len(gold & {f"tag{n:02d}" for n in row}) for gold, row in zip(gold_of(data), labels))
        / sum(map(len, gold_of(data)))
    )
    said = command("adjust", folder, "--keep", "0.1")
    assert "its calibration is removed, run xmc-trainer calibrate again" in said and not (folder / FILE).exists()
    assert XMCModel.load(folder, "cpu").saved.calibration is None
    with pytest.raises(UserError, match="was replaced while this command ran; run it again"):
        replace_model(saved, lambda copy, manifest: {})  # `saved` has the biases before


def test_wrong_arguments(trained, command):
    one, two, *_ = trained
    for words in (
        ["--threshold=x"],
        ["--samples=-1"],
        [two, one],
        [two, "--samples=0"],
        [two, "--labels=x.csv"],
        ["-k0"],
    ):
        with pytest.raises(SystemExit):
            command("evaluate", one, *words)
    for words in (["--thresholds=label", "--fewest=0"], ["-k", "0"], ["--method=none"]):
        with pytest.raises(SystemExit):
            command("calibrate", one, *words)
    with pytest.raises(SystemExit):
        command("predict", one, "--threshold=nan")
