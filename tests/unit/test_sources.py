"""Reading every layout; errors name file, line and remedy."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_helpers import instance, json_lines, real_data, write_lf, write_raw
from xmc_trainer.data import sources
from xmc_trainer.data.rows import rows_source
from xmc_trainer.data.sources import Ragged, lf_source, raw_source, read_lines
from xmc_trainer.errors import UserError


def read_all(source):
    return read_with_notes(source)[:3]


def read_with_notes(source):
    contents = source.read()
    rows = [tuple(row) for row in contents.train()], [tuple(row) for row in contents.test()]
    return contents.labels, *rows, "\n".join(contents.notes.values())


def message_of(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Raw text -------------------------------------------------------------------------------------------------------------


def test_raw_rows_and_vocabulary(tmp_path):
    folder = write_raw(tmp_path, [("one", "b a b"), ("two", "c\ta")], [("three", "c")])
    labels, train, test = read_all(raw_source(folder))
    assert labels == [("a", "a"), ("b", "b"), ("c", "c")]
    assert train == [("one", [0, 1]), ("two", [0, 2])]
    assert test == [("three", [2])]


def test_raw_orders_numeric_names_as_numbers_and_mixed_ones_as_text(tmp_path):
    labels, _, _ = read_all(raw_source(write_raw(tmp_path / "n", [("t", "10 9 100")], [("t", "9")])))
    assert [name for name, _ in labels] == ["9", "10", "100"]
    labels, _, _ = read_all(raw_source(write_raw(tmp_path / "m", [("t", "10 9 x")], [("t", "9")])))
    assert [name for name, _ in labels] == ["10", "9", "x"]


def test_only_a_newline_ends_a_line(tmp_path):
    odd = "a\x85b\u2028c\x0bd\x1ce\rf"
    folder = write_raw(tmp_path, [(odd, "x"), ("crlf\r", "y\r")], [("t", "x")])
    labels, train, _ = read_all(raw_source(folder))
    assert [text for text, _ in train] == [odd, "crlf"]
    assert [name for name, _ in labels] == ["x", "y"]


def test_a_missing_last_newline_loses_no_line(tmp_path):
    folder = write_raw(tmp_path)
    (folder / "train_raw_texts.txt").write_text("w0\nw1")
    assert [text for text, _ in read_all(raw_source(folder))[1]] == ["w0", "w1"]


def test_raw_second_file_name_and_fresh_passes(tmp_path):
    folder = write_raw(tmp_path)
    (folder / "train_raw_texts.txt").rename(folder / "train_texts.txt")
    contents = raw_source(folder).read()
    assert list(contents.train()) == list(contents.train()) != []


def test_raw_numbers_unseen_test_labels_after_all_others(tmp_path):
    folder = write_raw(
        tmp_path, [("t", "a")], [("both", "a new"), ("only", "new other"), ("bare", ""), ("more", "other")]
    )
    _, _, test, notes = read_with_notes(raw_source(folder))
    assert test == [("both", [0, 1]), ("only", [1, 2]), ("more", [2])]
    assert "4 labels are never seen in training, and 2 texts have no other" in notes
    assert "dropped 1 texts without labels" in notes


def test_raw_keeps_training_texts_without_labels_and_counts_them(tmp_path):
    folder = write_raw(tmp_path, [("t", "a"), ("bare", ""), ("blank", " ")], [("t", "a")])
    _, train, _, notes = read_with_notes(raw_source(folder))
    assert train == [("t", [0]), ("bare", []), ("blank", [])]
    assert "2 texts have no label" in notes


def test_raw_label_texts_are_counted(tmp_path):
    folder = write_raw(tmp_path, [("t", "a b c")], [("t", "a")])
    (folder / "names.tsv").write_text("a\tAlpha\nb\t\nz\tunused\nC\tother case\na\tAlpha one\n")
    labels, _, _, notes = read_with_notes(raw_source(folder, "names.tsv"))
    assert labels == [("a", "Alpha one"), ("b", "b"), ("c", "c")]
    assert notes == (
        "names.tsv: 1 of 3 labels have a text; 2 have none, like 'b'; 2 names are not labels of the training set, "
        "like 'C'; 1 lines repeat a name, like 'a': the last text is used"
    )


@pytest.mark.parametrize(
    "table, said",
    [("Net\tN\nx \tX\n", "it has 'Net'"), ("x\tX\nnet \tN\n", "it has 'net '"), ("", "it is empty")],
)
def test_raw_label_texts_without_a_matching_name(tmp_path, table, said):
    folder = write_raw(tmp_path, [("t", "net web")], [("t", "net")])
    (folder / "names.tsv").write_text(table)
    message = message_of(lambda: raw_source(folder, "names.tsv").read())
    assert (
        f"{folder}/names.tsv: none of its {table.count(chr(10))} names is a label of the training set: {said}"
        in message
    )
    assert "correct the file, or remove `label_text_file`" in message
    if table:
        assert f"{folder}/train_labels.txt has 'net'" in message  # the similar name


def test_lf_label_texts_are_counted(tmp_path):
    write_lf(tmp_path, labels=[{"uid": "L0", "title": "w0"}, {"uid": "L1"}, {"uid": "L0", "title": "w2"}])
    assert read_with_notes(lf_source(tmp_path))[3].endswith("lbl.json: 2 of 3 labels have a text; 1 lines repeat a uid")
    write_lf(tmp_path, labels=[{"uid": f"L{n}", "name": "of another field"} for n in range(3)])
    assert "0 of 3 labels have a text" in read_with_notes(lf_source(tmp_path))[3]
    with pytest.raises(UserError, match="lbl.json: no label has a title or content, which `augment_label_data`=true"):
        lf_source(tmp_path, augment=True).read()


def test_raw_labels_are_split_at_spaces_and_tabs_alone(tmp_path):
    odd = ["no\u00a0break", "ideo\u3000graphic", "line\u2028feed", "x\x0by", "\x85", "z\x1c"]
    folder = write_raw(tmp_path, [("t", "  ".join(odd) + " \t a\tb ")], [("t", "a")])
    assert [name for name, _ in read_all(raw_source(folder))[0]] == sorted([*odd, "a", "b"])


@pytest.mark.parametrize(
    "line, warned", [("net, web", True), ("net; web", True), ("net;web", True), ("1,2-dichlor web", False)]
)
def test_raw_labels_that_look_comma_separated(tmp_path, line, warned):
    folder = write_raw(tmp_path, [("t", line)], [("t", line)])
    notes = read_with_notes(raw_source(folder))[3]
    names = line.split()
    said = f"train_labels.txt: 1 of {len(names)} labels end in a comma or semicolon, or contain one and are alone on their line, like {names[0]!r}"
    assert (said in notes and "separate labels by spaces only" in notes) == warned and bool(notes) == warned


def test_raw_augment_adds_the_texts_that_labels_have(tmp_path):
    write_raw(tmp_path)
    (tmp_path / "names.tsv").write_text("c\tw2 w9\na\tw0\nz\tunknown\n")
    plain, augmented = (read_all(raw_source(tmp_path, "names.tsv", augment=on))[1] for on in (False, True))
    assert augmented == plain + [("w0", [0]), ("w2 w9", [2])]
    assert raw_source(tmp_path, "names.tsv", augment=True).read().augmented == 2


def test_raw_evaluates_on_another_split(tmp_path):
    write_raw(tmp_path)
    (tmp_path / "dev_raw_texts.txt").write_text("w7\nw8\n")
    (tmp_path / "dev_labels.txt").write_text("b\nc a\n")
    assert read_all(raw_source(tmp_path, test_split="dev"))[2] == [("w7", [1]), ("w8", [0, 2])]
    assert raw_source(tmp_path, test_split="dev").identity != raw_source(tmp_path).identity
    with pytest.raises(UserError, match="val_raw_texts.txt"):
        raw_source(tmp_path, test_split="val")


def test_raw_line_counts_that_differ(tmp_path):
    folder = write_raw(tmp_path)
    with open(folder / "train_labels.txt", "a") as file:
        file.write("c\n")
    message = message_of(lambda: raw_source(folder).read())
    assert f"{folder}/train_raw_texts.txt has 2 lines" in message and f"{folder}/train_labels.txt has 3" in message
    assert "write one line of labels for each text" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_raw_label_file_with_no_labels(tmp_path, split):
    folder = write_raw(tmp_path, **{split: [("w0", ""), ("w1", " ")]})
    message = message_of(lambda: raw_source(folder).read())
    assert f"{folder}/{split}_labels.txt: has no labels; write" in message


# Texts without words, in each layout. All layouts keep such rows and their numbers.
EMPTY = {
    "raw": ("", " \t", "\u3000"),
    "lf": ("", " ", None),
    "saved": ("", " ", None),
    "parquet": ("", "\n", None),
    "jsonl": ("", "\u3000", None),
}


@pytest.mark.parametrize("layout, blank", [(layout, blank) for layout, blanks in EMPTY.items() for blank in blanks])
def test_empty_texts_stay_and_are_counted(tmp_path, layout, blank):
    train, test = [("w0", "a"), (blank, "b"), (blank, "b")], [("w1", "a"), (blank, "b")]
    if layout == "raw":
        source = raw_source(write_raw(tmp_path, train, test))
        where = "'train_raw_texts.txt, line 2'"
    elif layout == "lf":
        rows = [[instance(text, ["ab".index(label)]) for text, label in split] for split in (train, test)]
        write_lf(tmp_path, *rows)
        where = "'trn.json, line 2'"
        source = lf_source(tmp_path)
    else:
        columns = [
            {"text": [text for text, _ in split], "labels": [[label] for _, label in split]} for split in (train, test)
        ]
        source = rows_source(str(write_hf(tmp_path, layout, *columns)), "train", "test", "text", "labels")
        where = "'train"
    _, train, test, notes = read_with_notes(source)
    assert [labels for _, labels in train] == [[0], [1], [1]] and [labels for _, labels in test] == [[0], [1]]
    assert [text.strip() for text, _ in train] == ["w0", "", ""] and test[1][0].strip() == ""
    assert f"training set: 2 texts are empty, the first at {where}" in notes and "test set: 1 texts are empty" in notes


def test_raw_undecodable_bytes(tmp_path):
    folder = write_raw(tmp_path)
    (folder / "train_raw_texts.txt").write_bytes(b"w0\nM\xfcnchen\n")
    message = message_of(lambda: raw_source(folder).read())
    assert f"{folder}/train_raw_texts.txt, line 2: not UTF-8" in message and "convert" in message


def test_raw_label_files_in_parts_and_processes(tmp_path, monkeypatch):
    """Rows, names, notes and line numbers are those of the file as one part."""
    rng = random.Random(0)
    names = ["é", "x,", "n\u00a0b", *(f"l{n}" for n in range(30))]
    lines = [" ".join(rng.choices(names, k=rng.randrange(5))) for _ in range(301)]
    folder = write_raw(
        tmp_path, [(f"w{n}", line) for n, line in enumerate(lines)], [("t", "l1 new new"), ("u", "new"), ("v", "é")]
    )
    whole = read_with_notes(raw_source(folder))
    expected = sorted({name for line in lines for name in line.split(" ") if name})
    assert [name for name, _ in whole[0]] == expected
    assert whole[1] == [
        (f"w{n}", sorted({expected.index(name) for name in line.split(" ") if name})) for n, line in enumerate(lines)
    ]
    monkeypatch.setattr(sources, "_PART", 100)
    monkeypatch.setattr(sources, "_ROWS", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    assert read_with_notes(raw_source(folder)) == whole
    content = (folder / "train_labels.txt").read_bytes().split(b"\n")
    (folder / "train_labels.txt").write_bytes(b"\n".join([*content[:270], b"M\xfc", *content[271:]]))
    assert "train_labels.txt, line 271: not UTF-8" in message_of(lambda: raw_source(folder).read())


def test_raw_missing_folder_and_files(tmp_path):
    message = message_of(lambda: raw_source(tmp_path / "nowhere"))
    assert f"{tmp_path}/nowhere: no such folder; set `folder`" in message
    folder = write_raw(tmp_path)
    (folder / "test_labels.txt").unlink()
    message = message_of(lambda: raw_source(folder))
    assert "test_labels.txt is missing" in message and str(folder) in message and "set `folder`" in message
    assert "{train,test}_raw_texts.txt or {train,test}_texts.txt" in message
    (folder / "train_raw_texts.txt").unlink()
    assert "train_raw_texts.txt or train_texts.txt is missing" in message_of(lambda: raw_source(folder))


def test_raw_label_text_file_missing_or_without_tab(tmp_path):
    folder = write_raw(tmp_path)
    message = message_of(lambda: raw_source(folder, "names.tsv"))
    assert "names.tsv is missing" in message and "`label_text_file`" in message
    (folder / "names.tsv").write_text("a\tA\nb B\n")
    message = message_of(lambda: raw_source(folder, "names.tsv").read())
    assert f"{folder}/names.tsv, line 2: has no tab; write" in message


# Label features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inner", ["raw_text", "."])
def test_lf_rows(tmp_path, zipped, inner):
    train = [instance(" title ", [2, 0, 2], content=" content "), {"content": "only", "title": None, "target_ind": []}]
    names = [{"uid": 7, "title": "t0", "content": "c0"}, {"uid": "L1", "content": "c1"}, {"uid": "L2", "title": " "}]
    write_lf(tmp_path, train, [instance("x", [1]), instance("y", [])], names, zipped, inner)
    labels, train, test = read_all(lf_source(tmp_path))
    assert labels == [("7", "t0"), ("L1", "c1"), ("L2", "L2")]
    assert train == [("title content", [0, 2]), ("only", [])]
    assert test == [("x", [1]), ("y", [])]  # all rows are kept, because the filter file refers to them by number


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfw1 w2\nw3\n")
    assert list(read_lines(path)) == [(1, "w1 w2"), (2, "w3")]


def test_lf_augment_adds_a_text_a_label(tmp_path):
    write_lf(tmp_path, labels=[{"uid": "L0", "title": "w0"}, {"uid": "L1"}, {"uid": "L2", "title": "w2"}])
    plain, augmented = (read_all(lf_source(tmp_path, augment=on))[1] for on in (False, True))
    assert augmented == plain + [("w0", [0]), ("w2", [2])]


@pytest.mark.parametrize("outside", [False, True])
def test_lf_filter_pairs(tmp_path, outside):
    inside = write_lf(tmp_path, test=[instance("w3", [0])] * 3)
    (tmp_path if outside else inside).joinpath("filter_labels_test.txt").write_text("2 1\n0 2\n2 0\n2\t1\n")
    pairs = lf_source(tmp_path, with_filter=True).read().filter_pairs
    assert (pairs.ids.dtype, pairs.offsets.dtype) == (np.int32, np.int64)
    assert pairs.offsets.tolist() == [0, 1, 1, 3] and pairs.ids.tolist() == [2, 0, 1]
    assert lf_source(tmp_path).read().filter_pairs is None


def test_lf_empty_filter_file(tmp_path):
    (write_lf(tmp_path) / "filter_labels_test.txt").write_text("")
    assert lf_source(tmp_path, with_filter=True).read().filter_pairs.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "line, said",
    [
        ("2 0", ["row 2 is out of range", "2 test rows"]),
        ("0 3", ["label 3 is out of range", "3 labels"]),
        ("0", ["two whole numbers"]),
        ("0 -1", ["two whole numbers"]),
        ("0 1 2", ["two whole numbers"]),
    ],
)
def test_lf_bad_filter_line(tmp_path, line, said):
    file = write_lf(tmp_path) / "filter_labels_test.txt"
    file.write_text(f"0 0\n{line}\n")
    message = message_of(lambda: lf_source(tmp_path, with_filter=True).read())
    assert f"{file}, line 2: " in message and all(part in message for part in said)


def test_lf_missing_files(tmp_path):
    inside = write_lf(tmp_path)
    message = message_of(lambda: lf_source(tmp_path, with_filter=True))
    assert "filter_labels_test.txt is missing" in message and "`use_filter_eval`=false" in message
    (inside / "lbl.json").unlink()
    message = message_of(lambda: lf_source(tmp_path))
    assert "lbl.json or lbl.json.gz is missing" in message and f"{inside} and in {tmp_path}" in message
    assert "trn.json, tst.json and lbl.json" in message and "`layout`" in message
    assert f"{tmp_path}/no: no such folder" in message_of(lambda: lf_source(tmp_path / "no"))


@pytest.mark.parametrize("label", [3, -1, 10**30])
def test_lf_label_out_of_range(tmp_path, label):
    inside = write_lf(tmp_path, train=[instance("w0", [0]), instance("w1", [1, label])])
    message = message_of(lambda: list(lf_source(tmp_path).read().train()))
    assert f"{inside}/trn.json, line 2: label {label} is out of range" in message
    assert f"{inside}/lbl.json has 3 labels; correct target_ind" in message


@pytest.mark.parametrize("target", [None, 1, "0", ["0"], [0.0], [True], {"0": 1}])
def test_lf_wrong_type_of_labels(tmp_path, target):
    inside = write_lf(tmp_path, test=[instance("w0", target)])
    message = message_of(lambda: list(lf_source(tmp_path).read().test()))
    assert f"{inside}/tst.json, line 1: target_ind must be a list of whole numbers; write []" in message


def test_lf_wrong_type_of_text_and_half_surrogates(tmp_path):
    inside = write_lf(tmp_path, train=[instance(["w0"], [0])], test=[instance("\ud83d", [0])])
    contents = lf_source(tmp_path).read()
    message = message_of(lambda: list(contents.train()))
    assert f"{inside}/trn.json, line 1: title must be a string, not list" in message
    message = message_of(lambda: list(contents.test()))
    assert f"{inside}/tst.json, line 1: title: holds half of a surrogate pair" in message and "correct" in message


@pytest.mark.parametrize("line", ["{", "", "[" * 100_000, '{"title": 1' + "0" * 5000 + "}", "nonsense"])
def test_lf_bad_json(tmp_path, line):
    inside = write_lf(tmp_path)
    (inside / "trn.json").write_bytes(json_lines([instance("w0", [0])]) + line.encode() + b"\n")
    message = message_of(lambda: list(lf_source(tmp_path).read().train()))
    assert f"{inside}/trn.json, line 2: not valid JSON" in message and "write one JSON object per line" in message


@pytest.mark.parametrize("line", ["[1]", "3", "null", '"text"'])
def test_lf_json_that_is_no_object(tmp_path, line):
    inside = write_lf(tmp_path)
    (inside / "lbl.json").write_text(line + "\n")
    message = message_of(lambda: lf_source(tmp_path).read())
    assert f"{inside}/lbl.json, line 1: not a JSON object; write" in message


def test_lf_no_labels(tmp_path):
    inside = write_lf(tmp_path, labels=[])
    message = message_of(lambda: lf_source(tmp_path).read())
    assert f"{inside}/lbl.json: has no labels; write" in message


def test_lf_undecodable_bytes(tmp_path):
    inside = write_lf(tmp_path)
    (inside / "trn.json").write_bytes(json_lines([instance("w0", [0])]) + b'{"title": "\xff"}\n')
    message = message_of(lambda: list(lf_source(tmp_path).read().train()))
    assert f"{inside}/trn.json, line 2: not UTF-8" in message


def damaged(content: bytes, how: str) -> bytes:
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "flipped":
        return content[:-8] + bytes(byte ^ 255 for byte in content[-8:])  # checksum and length
    return b"not gzip at all"


@pytest.mark.parametrize("how", ["truncated", "flipped", "replaced"])
def test_lf_damaged_gzip(tmp_path, how):
    rows = [instance(f"w{n}", [n % 3], uid=str(n * 7919)) for n in range(1000)]
    file = write_lf(tmp_path, rows, zipped=True) / "trn.json.gz"
    file.write_bytes(damaged(file.read_bytes(), how))
    message = message_of(lambda: list(lf_source(tmp_path).read().train()))
    assert f"{file}, after line " in message
    assert "damaged or truncated gzip file" in message and "copy it again" in message


def test_a_file_that_cannot_be_read(tmp_path):
    assert f"{tmp_path}/no: cannot be read (No such file" in message_of(lambda: list(read_lines(tmp_path / "no")))


# Hugging Face datasets ------------------------------------------------------------------------------------------------

TRAIN = {"text": ["one", "two"], "labels": [["b", "a", "b"], ["c"]]}
TEST = {"text": ["three", "four"], "labels": [["c", "new"], ["new"]]}
EXPECTED = ([(n, n) for n in "abc"], [("one", [0, 1]), ("two", [2])], [("three", [2, 3]), ("four", [3])])


def read_hf(folder, **options):
    names = {"train_split": "train", "test_split": "test", "text_column": "text", "label_column": "labels"}
    return read_all(rows_source(str(folder), **(names | options)))


def write_hf(folder, kind, train=TRAIN, test=TEST):
    folder.mkdir(exist_ok=True)
    both = {"train": train, "test": test}
    if kind == "saved":
        datasets.DatasetDict({k: datasets.Dataset.from_dict(v) for k, v in both.items()}).save_to_disk(folder)
    for split, columns in both.items():
        if kind == "parquet":
            pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        if kind == "jsonl":
            rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
            (folder / f"{split}.jsonl").write_bytes(json_lines(rows))
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl"])
def test_hf_kinds_of_folder(tmp_path, kind):
    assert read_hf(write_hf(tmp_path / "d", kind)) == EXPECTED


@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl"])
def test_hf_integers_are_names_in_numerical_order(tmp_path, kind):
    write_hf(tmp_path, kind, {"t": ["one", "two"], "y": [[10, 9], [100]]}, {"t": ["three"], "y": [[100, 7]]})
    labels, train, test = read_hf(tmp_path, text_column="t", label_column="y")
    assert labels == [("9", "9"), ("10", "10"), ("100", "100")]
    assert train == [("one", [0, 1]), ("two", [2])] and test == [("three", [2, 3])]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_hf_class_labels_give_the_table(tmp_path, kind):
    names = ["zeta", "alpha", "unused"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=names))}
    )
    train = datasets.Dataset.from_dict({"text": ["one"], "labels": [[1, 0]]}, features=features)
    test = datasets.Dataset.from_dict({"text": ["two", "bare"], "labels": [[2], []]}, features=features)
    if kind == "saved":
        datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path)
    else:
        train.to_parquet(tmp_path / "train.parquet"), test.to_parquet(tmp_path / "test.parquet")
    assert read_hf(tmp_path) == ([(n, n) for n in names], [("one", [0, 1])], [("two", [2])])


def test_hf_class_label_out_of_range(tmp_path):
    # The library itself refuses numbers that are too large, but not -1, which marks a missing label.
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    )
    data = datasets.Dataset.from_dict({"text": ["one", "two"], "labels": [[0], [-1]]}, features=features)
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path)
    message = message_of(lambda: read_hf(tmp_path))
    assert "row 2" in message and "label -1 is out of range: there are 2 class labels; correct" in message


def test_hf_saved_splits_of_one_folder_and_other_names(tmp_path):
    for name, columns in (("fit", TRAIN), ("dev", TEST)):
        data = datasets.Dataset.from_dict({"body": columns["text"], "tags": columns["labels"]})
        data.with_format("numpy").save_to_disk(tmp_path / name)
    options = {"train_split": "fit", "test_split": "dev", "text_column": "body", "label_column": "tags"}
    assert read_hf(tmp_path, **options) == EXPECTED


@pytest.mark.parametrize(
    "kind, file", [("saved", "train"), ("parquet", "train.parquet"), ("jsonl", "train.jsonl, line 1")]
)
def test_hf_missing_column(tmp_path, kind, file):
    message = message_of(lambda: read_hf(write_hf(tmp_path / "d", kind), label_column="tags"))
    assert f"{tmp_path}/d/{file}" in message
    assert message.endswith("has no column 'tags', only text, labels; set `label_column`")
    both = {"text_column": "body", "label_column": "tags"}
    assert message_of(lambda: read_hf(tmp_path / "d", **both)).endswith(
        "has no column 'body' and no column 'tags', only text, labels; set `text_column` and `label_column`"
    )


@pytest.mark.parametrize("kind, row", [("saved", "row 2"), ("parquet", "row 2"), ("jsonl", "line 2")])
@pytest.mark.parametrize(
    "text, labels, said",
    [
        ([["x"], ["y"]], [["a"], ["a"]], "column 'text' must hold strings; set `text_column`"),
        (
            ["x", "y"],
            [None, [1.5]],
            "column 'labels' must hold a name, a whole number or a list of them, not float in a list",
        ),
        (
            ["x", "y"],
            [None, 0.5],
            "column 'labels' must hold a name, a whole number or a list of them, not float;",
        ),
        (["x", "y"], [None, [True]], "not bool in a list; for multi-hot, write the whole numbers 0 and 1"),
        (["x", "y"], [["a"], ["a", None]], "a list of them, not null in a list"),
        (["x", "y"], [[], [["a"]]], "a list of them, not list in a list"),
        (["x", "y"], [["a"], ["b", " "]], "holds an empty label name; remove it"),
    ],
)
def test_hf_bad_row(tmp_path, kind, row, text, labels, said):
    message = message_of(lambda: read_hf(write_hf(tmp_path / "d", kind, {"text": text, "labels": labels})))
    row = row.replace("2", "1") if text == [["x"], ["y"]] else row
    assert f"{tmp_path}/d/train" in message and f"{row}: " in message and said in message


@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl"])
@pytest.mark.parametrize("labels", [["b x", "a"], [2, 1]])
def test_hf_one_label_a_row_is_a_list_of_one(tmp_path, kind, labels):
    train = {"text": ["one", "two"], "labels": labels}
    names, rows, _ = read_hf(write_hf(tmp_path / "d", kind, train, train))
    assert [name for name, _ in names] == sorted(map(str, labels)) and rows == [("one", [1]), ("two", [0])]


def class_labels(tmp_path, kind, feature, labels):
    features = datasets.Features({"text": datasets.Value("string"), "labels": feature})
    data = datasets.Dataset.from_dict(
        {"text": [f"w{n}" for n in range(len(labels))], "labels": labels}, features=features
    )
    if kind == "saved":
        datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path)
    else:
        data.to_parquet(tmp_path / "train.parquet"), data.to_parquet(tmp_path / "test.parquet")
    names, rows, _ = read_hf(tmp_path)
    return [name for name, _ in names], [row[1] for row in rows]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_hf_one_class_label_a_row(tmp_path, kind):
    names = datasets.ClassLabel(names=["zeta", "alpha", "unused"])
    assert class_labels(tmp_path, kind, names, [1, 0]) == (["zeta", "alpha", "unused"], [[1], [0]])


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_hf_multi_hot_class_labels(tmp_path, kind):
    feature = datasets.List(datasets.ClassLabel(names=["zeta", "alpha", "unused"]))
    assert class_labels(tmp_path, kind, feature, [[1, 1, 0], [0, 0, 0]]) == (["zeta", "alpha", "unused"], [[0, 1], []])
    with pytest.raises(
        UserError, match="lists of 4 numbers 0 or 1, but there are 3 class labels; write one number per"
    ):
        class_labels(tmp_path / "four", kind, feature, [[1, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    "labels, names, rows",
    [
        ([[0, 1, 0], [1, 0, 1]], ["0", "1", "2"], [[1], [0, 2]]),  # multi-hot: three numbers, two values
        ([[0, 1], [1, 1]], ["0", "1"], [[1], [0, 1]]),  # a list of labels would not repeat one
        ([[0, 1, 0], None], ["0", "1", "2"], [[1], []]),
        ([[0], [1]], ["0", "1"], [[0], [1]]),  # one label a row
        ([[0, 1], [1]], ["0", "1"], [[0, 1], [1]]),  # lists of labels
        ([[0, 1], [1, 2]], ["0", "1", "2"], [[0, 1], [1, 2]]),
    ],
)
def test_hf_lists_of_whole_numbers(tmp_path, labels, names, rows):
    data = {"text": ["one", "two"], "labels": labels}
    found, train, _ = read_hf(write_hf(tmp_path, "parquet", data, data))
    assert [name for name, _ in found] == names and [row[1] for row in train] == rows


@pytest.mark.parametrize(
    "train, test, said",
    [
        ([[0, 1]], [[1, 0]], r"holds \[0, 1\] or \[1, 0\] in every row, which may be .* write label names"),
        ([[0, 1, 0]], [[1, 0]], "lists of 0 and 1 with different lengths; write one number per class"),
    ],
)
def test_hf_ambiguous_whole_numbers(tmp_path, train, test, said):
    folder = write_hf(tmp_path, "jsonl", *({"text": ["x"], "labels": labels} for labels in (train, test)))
    with pytest.raises(UserError, match=said):
        read_hf(folder)


def test_hf_strings_that_look_like_lists(tmp_path):
    data = {"text": ["x", "y"], "labels": ["net,web", "net"]}
    folder = write_hf(tmp_path, "jsonl", data, data)
    labels, _, _, notes = read_with_notes(rows_source(str(folder), "train", "test", "text", "labels"))
    assert [name for name, _ in labels] == ["net", "net,web"]
    assert (
        "2 of 4 rows are one string with a comma, semicolon or bar, like 'net,web'" in notes
        and "as a list of strings" in notes
    )


def test_hf_no_labels_at_all(tmp_path):
    message = message_of(lambda: read_hf(write_hf(tmp_path / "d", "jsonl", {"text": ["x"], "labels": [[]]})))
    assert f"{tmp_path}/d: train has no labels in 'labels'; set `label_column`" in message


def test_hf_damaged_files(tmp_path):
    folder = write_hf(tmp_path / "p", "parquet")
    (folder / "test.parquet").write_bytes((folder / "test.parquet").read_bytes()[:100])
    message = message_of(lambda: read_hf(folder))
    assert f"{folder}/test.parquet: cannot be read" in message and "write it again" in message
    folder = write_hf(tmp_path / "j", "jsonl")
    (folder / "train.jsonl").write_text(json.dumps({"text": "x", "labels": ["a"]}) + "\n{\n")
    assert f"{folder}/train.jsonl, line 2: not valid JSON" in message_of(lambda: read_hf(folder))
    folder = write_hf(tmp_path / "s", "saved")
    (folder / "train" / "state.json").write_text("{")
    message = message_of(lambda: read_hf(folder))
    assert f"{folder}/train: the datasets library cannot load" in message and message.endswith("with at least one row")


def write_parts(folder, names):
    """Write one row per file, numbered in the order of `names`. Returns the expected rows."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {"text": [f"row {number}"], "labels": [["a"]]}
        if path.suffix == ".parquet":
            pq.write_table(pa.table(rows), path)
        else:
            content = json_lines([{"text": f"row {number}", "labels": ["a"]}])
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return [(f"row {number}", [0]) for number in range(len(names))]


@pytest.mark.parametrize(
    "train, test",
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "test-00000-of-00001.parquet"),
        (
            ["data/train-00000-of-00002-0a1b.parquet", "data/train-00001-of-00002-2c3d.parquet"],
            "data/test-00000-of-00001-ff.parquet",
        ),
        (["train_2.jsonl", "train_10.jsonl"], "test.jsonl.gz"),
        (["train-0.jsonl.gz", "train-1.jsonl.gz"], "test-0.jsonl"),
        (["train/a.jsonl", "train/b.jsonl"], "test/anything.parquet"),
        (["data/train/a.parquet", "data/train/b.parquet"], "data/test.parquet"),
        (["train.parquet/part-0.parquet", "train.parquet/part-1.parquet"], "default/test-00000-of-00001.parquet"),
    ],
)
def test_hf_parts_as_the_hub_stores_them(tmp_path, train, test):
    expected = write_parts(tmp_path, train)
    write_parts(tmp_path, [test])
    # Files of neither split.
    write_parts(
        tmp_path,
        [".cache/train.jsonl", "training.jsonl", "train_small.jsonl", "deep/er/and/train.jsonl", "data/test2.parquet"],
    )
    labels, rows, _ = read_hf(tmp_path)
    assert rows == expected and labels == [("a", "a")]


def test_hf_incomplete_or_ambiguous_parts(tmp_path):
    write_parts(tmp_path / "gap", ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test.jsonl"])
    message = message_of(lambda: read_hf(tmp_path / "gap"))
    assert "train is incomplete, it has train-00000-of-00003.parquet, train-00002-of-00003.parquet; fetch" in message
    write_parts(tmp_path / "two", ["en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet"])
    message = message_of(lambda: read_hf(tmp_path / "two"))
    assert f"train may be {tmp_path}/two/de/*.parquet or {tmp_path}/two/en/*.parquet; name the folder of one" in message
    for name in ("train.jsonl", "train-00000-of-00001.parquet"):
        write_parts(tmp_path / name, ["train.parquet", name, "test.parquet"])
        message = message_of(lambda name=name: read_hf(tmp_path / name))
        assert f"train may be {tmp_path}/{name}/train.parquet or {tmp_path}/{name}/{name}; name" in message
    columns = pa.array(["a"]), pa.array([["b"]]), pa.array(["c"])
    pq.write_table(pa.Table.from_arrays(columns, ["text", "labels", "text"]), tmp_path / "twice.parquet")
    message = message_of(lambda: read_hf(tmp_path / "twice.parquet"))
    assert "twice.parquet: two columns are named 'text'; rename one" in message


def test_hf_reads_only_two_columns(tmp_path):
    """Other columns may have types and features that the library does not know."""
    odd = pa.array([b"\xff\xd8"], pa.binary()), pa.array([{"a": [1]}]), pa.array([12345], pa.duration("us"))
    table = pa.table({"image": odd[0], "text": ["one"], "meta": odd[1], "took": odd[2], "labels": [["a"]]})
    features = {
        "image": {"_type": "Hologram"},
        "labels": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    }
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert read_hf(tmp_path)[1] == [("one", [0])]
    images = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "labels": datasets.Value("string")}
    )
    data = datasets.Dataset.from_dict({"image": [None], "text": ["one"], "labels": ["a"]}, features=images)
    data = data.cast_column("image", datasets.Image())
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    assert read_hf(tmp_path / "saved")[1] == [("one", [0])]


def test_hf_runs_no_code_of_a_data_set(tmp_path):
    """Loading scripts and pickles are not opened. Column names with terminal codes are escaped."""
    trap = f"open({str(tmp_path / 'caught')!r}, 'w')"
    folder = tmp_path / "hostile"
    (folder / "train").mkdir(parents=True)
    for name in ("hostile.py", "train.py", "train/train.py"):
        (folder / name).write_text(trap)
    for name in ("train.pkl", "train/data.pkl"):
        (folder / name).write_bytes(f"cbuiltins\neval\n(S{trap!r}\ntR.".encode())
    for name in (folder, folder / "hostile.py", folder / "train"):
        message_of(lambda name=name: read_hf(name))
    assert not (tmp_path / "caught").exists()
    assert int(datasets.__version__.split(".")[0]) >= 4  # versions without loading scripts
    write_hf(folder, "jsonl", {"text": ["x"], "\x1b[2J": [["a"]]})
    assert "\x1b" not in message_of(lambda: read_hf(folder))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_hf_flipped_bits_never_crash(tmp_path, kind):
    """A damaged offset in memory-mapped Arrow could crash the process, so use a separate one."""
    rows = {"text": [f"text {n}" for n in range(50)], "labels": [[f"l{n % 7}"] for n in range(50)]}
    folder = write_hf(tmp_path / "d", kind, rows, rows)
    file = next((folder / "train").glob("*.arrow")) if kind == "saved" else folder / "train.parquet"
    code = """
import pathlib, random, sys
from xmc_trainer.data.rows import rows_source
from xmc_trainer.errors import UserError
folder, file = sys.argv[1], pathlib.Path(sys.argv[2])
good, rng, refused = file.read_bytes(), random.Random(0), 0
for _ in range(150):
    bad = bytearray(good)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    file.unlink()  # what is mapped stays
    file.write_bytes(bad)
    try:
        contents = rows_source(folder, "train", "test", "text", "labels").read()
        assert len(list(contents.train())) <= 50
    except UserError:
        refused += 1
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", code, folder, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10


def test_hf_values_that_python_cannot_hold(tmp_path):
    table = pa.table({"text": ["x"], "labels": pa.array([2**62], pa.timestamp("us"))})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert f"{tmp_path}/train.parquet, after row 0: cannot be read" in message_of(lambda: read_hf(tmp_path))
    good = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(good.replace(b"labels", b"label\xff"))  # a column's name
    assert f"{tmp_path}/train.parquet: cannot be read" in message_of(lambda: read_hf(tmp_path))


@pytest.mark.parametrize(
    "files, said",
    [
        ([], "the folder has no files; write dev.jsonl there, or name another folder"),
        (
            ["train.jsonl", "test.jsonl"],
            "the folder has no dev.parquet, no dev.jsonl, no folder dev and no parts such as dev-00000-of-00002.parquet, only "
            "test.jsonl, train.jsonl; set `test_split`, rename the files, or name their folder",
        ),
        (["train.xlsx", "dev.xlsx"], "only files such as dev.xlsx; convert it to one of .parquet, .jsonl, .jsonl.gz, .csv"),
        (["raw/train_raw_texts.txt", "raw/train_labels.txt"], "/raw; name that folder"),
        (["raw_text/trn.json.gz"], "/raw_text; name that folder"),
        (["train.json"], "the folder has only files such as train.json; convert it to one of .parquet, .jsonl"),
    ],
    ids=["nothing", "other splits", "Excel", "raw text", "label features", "JSON"],
)  # fmt: skip
def test_hf_missing_split_says_what_is_there(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([{"text": "x", "labels": ["a"]}]))
    options = {"train_split": "train" if "train.jsonl" in files else "dev", "test_split": "dev"}
    parameter = "test_split" if "train.jsonl" in files else "train_split"
    message = message_of(lambda: read_hf(tmp_path, **options))
    assert message.startswith(f"`source`={tmp_path}: has no split 'dev': ")
    assert said.replace("test_split", parameter) in message


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hf_a_split_without_rows(tmp_path, kind):
    nothing = {"text": [], "labels": []}
    message = message_of(lambda: read_hf(write_hf(tmp_path, kind, nothing)))
    assert message == f"`source`={tmp_path}: train has no rows; write it again, or set `train_split`"
    message = message_of(lambda: read_hf(write_hf(tmp_path, kind, TRAIN, nothing)))
    assert message == f"`source`={tmp_path}: test has no rows; write it again, or set `test_split`"


def test_hf_neither_folder_nor_reachable(monkeypatch):
    def unreachable(name, split):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = message_of(lambda: read_hf("someone/nothing"))
    assert "`source`=someone/nothing: the datasets library cannot load split 'train'" in message
    assert "Couldn't reach 'someone/nothing' on the Hub); name an existing folder" in message


def test_hf_path_that_does_not_exist(tmp_path):
    for name in (tmp_path / "no", "./data/no", "~/no", "data/sets/no"):
        assert message_of(lambda name=name: read_hf(name)).startswith(
            f"`source`={name}: no such folder; name the folder"
        )


def test_hf_hub_dataset(monkeypatch, tmp_path):
    saved = write_hf(tmp_path / "hub", "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.load_from_disk(str(saved / split)))
    assert read_hf("someone/something") == EXPECTED


# Real data ------------------------------------------------------------------------------------------------------------


def test_real_raw_data():
    folder = real_data("SID-GND-EN")
    contents = raw_source(folder, "label_texts.tsv").read()
    stats = json.loads((folder / "stats.json").read_text())
    assert len(contents.labels) == stats["labels"] == 22_625
    assert dict(contents.labels)["4067486-1"] != "4067486-1"  # the label has a text
    sizes = [len(row.labels) for row in contents.train()]
    assert len(sizes) == 41_333 and round(np.mean(sizes), 3) == stats["avg_labels_per_train"]
    sizes = [len(row.labels) for row in contents.test()]
    assert len(sizes) == 9_220 and round(np.mean(sizes), 3) == stats["avg_labels_per_test"]


@pytest.mark.slow
def test_real_label_feature_data():
    folder = real_data("LF-YSO-25K")
    contents = lf_source(folder, with_filter=True).read()
    stats = json.loads((folder / "stats.json").read_text())
    assert len(contents.labels) == stats["labels"] == 25_018
    seen = np.zeros(25_018, dtype=np.int64)
    rows = 0
    for row in contents.train():
        rows += 1
        for label in row.labels:
            seen[label] += 1
    assert rows == 588_241 and round(seen.sum() / rows, 3) == stats["avg_labels_per_train"]
    assert (seen.min(), seen.max()) == (1, stats["max_train_per_label"])

    pairs = contents.filter_pairs
    lines = (folder / "raw_text" / "filter_labels_test.txt").read_text().split("\n")
    wanted = {tuple(map(int, line.split())) for line in lines if line}
    found = set(zip(np.repeat(np.arange(65_202), np.diff(pairs.offsets)).tolist(), pairs.ids.tolist()))
    assert found == wanted and len(pairs.offsets) == 65_203
    # Filtered texts are the label's own name, so row and label numbers agree with the reader's.
    test = list(contents.test())
    assert len(test) == 65_202
    assert all(test[row].text.lower() == contents.labels[label][1].lower() for row, label in wanted)


def test_gzip_and_plain_files_read_the_same(tmp_path):
    write_lf(tmp_path / "a")
    inside = write_lf(tmp_path / "b", zipped=True)
    assert gzip.decompress((inside / "trn.json.gz").read_bytes()) == (tmp_path / "a/raw_text/trn.json").read_bytes()
    assert read_all(lf_source(tmp_path / "a")) == read_all(lf_source(tmp_path / "b"))


def test_ragged_rows():
    lists = [[5, 1], [], [7], [2, 3, 4]]
    ragged = Ragged(np.array(sum(lists, []), np.int32), np.array([0, 2, 2, 3, 6]))
    for indices in ([3, 0, 0], [1], [], [0, 1, 2, 3]):
        chosen = ragged.rows(np.array(indices, dtype=np.int64))
        assert (chosen.ids.dtype, chosen.offsets.dtype) == (np.int32, np.int64)
        assert [part.tolist() for part in np.split(chosen.ids, chosen.offsets[1:-1])][: len(indices)] == [
            lists[index] for index in indices
        ]
        assert len(chosen.offsets) == len(indices) + 1
