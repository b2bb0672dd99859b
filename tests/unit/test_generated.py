"""Generated data sets do not depend on the number of processes, have the requested shape, and can be learned."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest

from xmc_trainer.commands import cli
from xmc_trainer.commands.bench import data as bench_data
from xmc_trainer.data.generated import PUBLISHED, TEXTS_A_BLOCK, Shape, block, made_up_words
from xmc_trainer.data.sources import raw_source

SMALL = Shape(TEXTS_A_BLOCK + 903, 300, 2003, labels_a_text=6.0, words_a_text=30.0, vocabulary=5000)


def blocks_of(shape, split="train", seed=1):
    return [block(shape, split, number, seed) for number in range(shape.blocks(split))]


def counts_of(shape):
    return np.bincount(np.concatenate([made.labels.ids for made in blocks_of(shape)]), minlength=shape.labels)


def test_files_do_not_depend_on_the_workers(tmp_path):
    words = made_up_words(SMALL.vocabulary)
    for workers in (1, 3):
        bench_data.write(tmp_path / str(workers), SMALL, words, seed=5, workers=workers)
    bench_data.write(tmp_path / "other", SMALL, words, seed=6, workers=1)
    for name in bench_data._FILES:
        one, three, other = ((tmp_path / folder / name).read_bytes() for folder in ("1", "3", "other"))
        assert one == three != other
    contents = raw_source(tmp_path / "1").read()
    assert len(contents.labels) == SMALL.labels
    train, test = list(contents.train()), list(contents.test())
    assert (len(train), len(test)) == (SMALL.train_texts, SMALL.test_texts)
    assert sum(len(row.labels) for row in train) == sum(len(made.labels.ids) for made in blocks_of(SMALL, seed=5))
    assert all(row.labels and row.text for row in [*train, *test]) and not contents.notes


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_means_are_the_published_ones(name):
    shape = PUBLISHED[name].scaled(0.01)
    made = blocks_of(shape)
    counts = counts_of(shape)
    assert counts.min() >= 1
    assert counts.sum() / shape.train_texts == pytest.approx(shape.labels_a_text, rel=0.04)
    words = sum(len(each.words.ids) for each in made) / shape.train_texts
    assert words == pytest.approx(shape.words_a_text, rel=0.1 if shape.train_texts < 1000 else 0.03)
    for each in [*made, *blocks_of(shape, "test")]:
        assert each.words.ids.min() >= 0 and each.words.ids.max() < shape.vocabulary
        steps = np.diff(each.labels.ids)
        starts = each.labels.offsets[1:-1]
        assert (np.delete(steps, starts - 1) > 0).all()  # ascending, without repeats, in each text


def test_the_tail_is_like_sid_gnd_en():
    """SID-GND-EN: 83 % of the labels have at most five texts (docs/results.md)."""
    counts = counts_of(Shape(41_333, 1, 22_625, labels_a_text=2.745, words_a_text=5.0))
    assert (counts <= 5).mean() == pytest.approx(0.83, abs=0.02)


def test_frequent_labels_are_spread_over_the_ids():
    """Ranks own ranges of ids, so each range must have its share of positives."""
    counts = counts_of(Shape(20_000, 1, 10_000, labels_a_text=20.0, words_a_text=2.0))
    quarters = counts.reshape(4, -1).sum(1) / counts.sum()
    assert quarters == pytest.approx([0.25] * 4, abs=0.02) and np.sort(counts)[-100:].sum() > 0.1 * counts.sum()


def test_words_predict_the_labels():
    """Naive Bayes on the words of frequent labels beats predicting the most frequent label by far."""
    shape = Shape(6000, 500, 300, labels_a_text=3.0, words_a_text=40.0, vocabulary=3000)
    score = np.ones((shape.labels, shape.vocabulary))
    for made in blocks_of(shape):
        for text in range(len(made.labels.offsets) - 1):
            words = made.words.ids[made.words.offsets[text] : made.words.offsets[text + 1]]
            for label in made.labels.ids[made.labels.offsets[text] : made.labels.offsets[text + 1]]:
                np.add.at(score[label], words, 1)
    log = np.log(score / score.sum(1, keepdims=True))
    (test,) = blocks_of(shape, "test")
    hits = popular = 0
    most = counts_of(shape).argmax()
    for text in range(shape.test_texts):
        words = test.words.ids[test.words.offsets[text] : test.words.offsets[text + 1]]
        labels = test.labels.ids[test.labels.offsets[text] : test.labels.offsets[text + 1]]
        hits += log[:, words].sum(1).argmax() in labels
        popular += most in labels
    assert hits > 0.6 * shape.test_texts > 3 * popular


def test_made_up_words_are_distinct():
    words = made_up_words(30_000)
    assert len(set(words)) == 30_000 and all(word.isalpha() for word in words) and len(words[0]) == 4


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["xmc-trainer", "bench", "data", *map(str, words)])
    cli.main()


def test_the_command_writes_data_and_refuses_invalid_arguments(tmp_path, monkeypatch, capsys):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\nprinter\n##ing\nof\nkettle\n")
    options = ["--like", "amazon3m", "--scale", "0.0001", "--workers", "1", "--vocabulary", vocabulary]
    command(monkeypatch, tmp_path / "made", *options, "--csv", tmp_path / "data.csv")
    assert "172 training and 74 test texts, 281 labels" in capsys.readouterr().out
    assert set((tmp_path / "made/test_raw_texts.txt").read_text().split()) == {"printer", "kettle"}
    (row,) = csv.DictReader((tmp_path / "data.csv").open(newline=""))
    assert float(row["seconds"]) > 0 and int(row["peak_mib"]) > 0
    for words, said in (
        ([tmp_path / "made", *options], "train_raw_texts.txt: exists; name another folder"),
        ([tmp_path / "x", "--texts", "5"], "--test-texts: is missing"),
        ([tmp_path / "x", *options, "--skew", "1"], "--skew=1.0: must be between 0 and 0.95"),
        ([tmp_path / "x", *options[:-1], tmp_path / "none"], "--vocabulary="),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, *words)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
