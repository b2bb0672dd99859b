"""CSV and TSV files, and test texts held out of a single file."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from tests.unit.test_sources import message_of, read_all, read_with_notes
from xmc_trainer.data.rows import rows_source
from xmc_trainer.data.tables import table_records


def opened(path, **options):
    names = {"train_split": "train", "test_split": "test", "text_column": "text", "label_column": "labels"}
    return rows_source(str(path), **(names | options))


def labels_in(path: Path, separator: str = ";") -> list[list[str]]:
    return [record["labels"] for _, record in table_records(path, "labels", separator)]


def test_a_folder_of_csv_files(tmp_path):
    (tmp_path / "train.csv").write_text('id,labels,text\n1,b; a,"one, two\nthree ""four"""\n\n2,,five\n')
    (tmp_path / "test.csv").write_text("text,labels\nsix,a;c\n")
    labels, train, test, notes = read_with_notes(opened(tmp_path))
    assert labels == [("a", "a"), ("b", "b")]
    assert train == [('one, two\nthree "four"', [0, 1]), ("five", [])] and test == [("six", [0, 2])]
    assert "1 labels are never seen in training" in notes


@pytest.mark.parametrize(
    "cell, names",
    [
        ("a", ["a"]),
        ("a; b c ;", ["a", "b c"]),
        (" ", []),
        ('["x;y", "z"]', ["x;y", "z"]),
        ("[3, 4]", [3, 4]),
        ("[draft];a", ["[draft]", "a"]),
    ],
)
def test_labels_in_a_cell(tmp_path, cell, names):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "labels"], ["x", cell]])
    assert labels_in(tmp_path / "t.csv") == [names]


def test_tsv_gzip_byte_order_mark_and_another_separator(tmp_path):
    with gzip.open(tmp_path / "t.tsv.gz", "wt", encoding="utf-8-sig", newline="") as file:
        file.write("labels\ttext\r\na|b;c\t\u00e9, \u4e2d\r\n")
    ((where, record),) = table_records(tmp_path / "t.tsv.gz", "labels", "|")
    assert where == f"{tmp_path}/t.tsv.gz, row 1" and record == {"labels": ["a", "b;c"], "text": "\u00e9, \u4e2d"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"text,labels\nx,y\na, b,c\n", "row 2: has 3 cells, but the first line names 2 columns; put cells that contain a comma"),
        (b'text,labels\n"x,y\n', "after row 0: cannot be read (unexpected end of data); correct the file"),
        (b"text,labels\nx,y\n\xff,z\n", "not UTF-8"),
        (b"text,text\nx,y\n", "two columns are named 'text'"),
        (b"body,labels\nx,y\n", "row 1: has no column 'text', only body, labels; set `text_column`"),
        (b"text,labels\nx,\"['y', 'z']\"\n", "row 1: the labels are a list as Python prints it, ['y', 'z']; write it as JSON"),
        (b"text,labels\n", "train has no rows"),
        (b"", "train has no rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    assert message in message_of(lambda: read_all(opened(tmp_path / "t.csv")))


def test_options_that_a_single_file_ignores_are_refused(tmp_path):
    file = write_lines(tmp_path / "t.jsonl", records(20))
    assert "`train_split`=fit: " in message_of(lambda: opened(file, train_split="fit"))
    assert "`label_separator`=|: applies to .csv and .tsv" in message_of(lambda: opened(file, label_separator="|"))


def test_damaged_gzip(tmp_path):
    packed = gzip.compress(b"text,labels\n" + b"x,y\n" * 1000)
    (tmp_path / "t.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "after row 0: cannot be read" in message_of(lambda: read_all(opened(tmp_path / "t.csv.gz")))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    assert "t.xlsx: cannot be read; convert it to one of .parquet, .jsonl, .jsonl.gz, .csv" in message_of(
        lambda: opened(tmp_path / "t.xlsx")
    )


def records(count: int, copies: int = 1) -> list[dict]:
    rng = random.Random(0)
    return [{"text": f"text {n}", "labels": rng.sample("abcdefgh", 2)} for n in range(count) for _ in range(copies)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_file_is_split_by_text(tmp_path):
    rows = records(200, copies=2)
    labels, train, test, notes = read_with_notes(opened(write_lines(tmp_path / "t.jsonl", rows), test_share=0.25))
    assert len(labels) == 8 and "held out of 400 texts: 100 texts as test set" in notes
    assert (len(train), len(test)) == (300, 100)
    assert not {text for text, _ in train} & {text for text, _ in test}  # copies stay together
    random.Random(1).shuffle(rows)
    again = read_all(opened(write_lines(tmp_path / "u.jsonl", rows), test_share=0.25))
    assert sorted(again[2]) == sorted(test)  # the order of the rows does not matter
    assert len(read_all(opened(tmp_path / "t.jsonl"))[2]) == 40  # a tenth


def test_every_label_keeps_a_training_text(tmp_path):
    rows = [{"text": f"text {n}", "labels": [f"label {n // 2}"]} for n in range(200)]
    labels, train, test = read_all(opened(write_lines(tmp_path / "t.jsonl", rows), test_share=0.5))
    assert len(labels) == 100 and {label for _, labels in train for label in labels} == set(range(100))
    assert len(train) + len(test) == 200 and 50 <= len(test) <= 100


def test_a_file_from_which_no_text_can_be_held_out(tmp_path):
    rows = [{"text": f"text {n}", "labels": [f"label {n}"]} for n in range(20)]
    message = message_of(lambda: read_all(opened(write_lines(tmp_path / "t.jsonl", rows))))
    assert "no text can be held out as test set, because each is needed for training; add texts" in message


def test_a_share_of_a_training_split(tmp_path):
    write_lines(tmp_path / "train.jsonl", records(100))
    write_lines(tmp_path / "test.jsonl", [{"text": "other", "labels": ["a"]}])
    assert read_all(opened(tmp_path))[2] == [("other", [0])]
    held = read_all(opened(tmp_path, test_share=0.2))[2]
    assert len(held) == 20 and "other" not in dict(held)


def test_options_that_change_what_is_read_change_the_identity(tmp_path):
    write_lines(tmp_path / "train.jsonl", records(10))
    write_lines(tmp_path / "test.jsonl", records(10))
    (tmp_path / "t.csv").write_text("text,labels\nx,a\n")

    def identities(path):
        return [opened(path, **o).identity for o in options]

    options: list[dict] = [{}, {"test_share": 0.2}]
    plain, held_out = identities(tmp_path)
    assert plain != held_out
    assert json.loads(plain) == [None, "train", "test", "text", "labels", None]  # as earlier versions wrote it
    options.append({"label_separator": "|"})
    assert len(set(identities(tmp_path / "t.csv"))) == 3
    # The same files in the same order, but the second one is in another split.
    for name in ("a/train/1", "a/train/2", "a/test/3", "b/train/1", "b/test/2", "b/test/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", records(1))
    assert opened(tmp_path / "a").identity != opened(tmp_path / "b").identity


def test_every_class_of_a_multi_hot_column_keeps_a_training_text(tmp_path):
    for rare in range(20):  # among them the text that is held out first
        rows = [{"text": f"text {n}", "labels": [1, n % 2, int(n % 3 == 0), int(n == rare)]} for n in range(20)]
        _, train, _ = read_all(opened(write_lines(tmp_path / f"{rare}.jsonl", rows), test_share=0.3))
        assert {label for _, labels in train for label in labels} == {0, 1, 2, 3}


def test_another_separator_than_the_cells_have_is_noted(tmp_path):
    rows = "".join(f"text {n},a|b\n" for n in range(20))
    (tmp_path / "t.2024.csv").write_text("text,labels\n" + rows)
    assert "like 'a|b'; each is read as one label" in read_with_notes(opened(tmp_path / "t.2024.csv"))[3]
    assert "each is read" not in read_with_notes(opened(tmp_path / "t.2024.csv", label_separator="|"))[3]


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`source`=tickets.csv: no such file" in message_of(lambda: opened("tickets.csv"))
