"""One setting for every layout: each is recognised, gives the same rows, and refuses what does not fit it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from scipy.sparse import csr_matrix, save_npz

from tests.data_helpers import instance, write_lf, write_raw
from tests.unit.test_sources import message_of, read_all, read_with_notes
from xmc_trainer.data.layouts import layout_of, open_source

TRAIN = [("w0 w1", [2, 0]), ("w2", []), ("w3, w4", [1])]
TEST = [("w5", [1]), ("w6", [0, 2])]
NAMES = ["0", "1", "2"]


def opened(path: Path | str, **options):
    return open_source(str(path), Path("nowhere"), **options)


def matrix(rows: list[tuple[str, list[int]]], columns: int = 3) -> csr_matrix:
    row_of = [row for row, (_, labels) in enumerate(rows) for _ in labels]
    ids = [label for _, labels in rows for label in labels]
    return csr_matrix((np.ones(len(ids)), (row_of, ids)), (len(rows), columns))


def text_file(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row[0]}\n" for row in rows), encoding="utf-8")


def renee(folder: Path) -> None:
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        text_file(folder / f"{name}_X.txt", rows)
        lines = [" ".join(f"{label}:1.00000" for label in labels) for _, labels in rows]
        (folder / f"{name}_X_Y.txt").write_text("\n".join([f"{len(rows)} 3", *lines]) + "\n")
    (folder / "Y.txt").write_text("zero\none\ntwo\n")
    (folder / "tst_filter_labels.txt").write_text("1 2\n")


def dexml(folder: Path) -> None:
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        text_file(folder / "raw" / f"{name}_X.txt", rows)
        save_npz(folder / f"Y.{name}.npz", matrix(rows))
    (folder / "raw" / "Y.txt").write_text("zero\none\ntwo\n")
    (folder / "filter_labels_test.txt").write_text("1 2\n")


def pecos(folder: Path) -> None:
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        text_file(folder / f"X.{name}.txt", rows)
        labels = matrix([(text, [*labels, 1]) for text, labels in rows]).tocoo()  # any sparse format
        labels.data[[label not in rows[row][1] for row, label in zip(labels.row, labels.col)]] = (
            0.0  # a stored zero is no label
        )
        save_npz(folder / f"Y.{name}.npz", labels)
    (folder / "output-labels.txt").write_text("zero\none\ntwo\n")


@pytest.mark.parametrize("write", [renee, dexml, pecos])
def test_sparse_label_files_beside_texts(tmp_path, write):
    write(tmp_path)
    assert layout_of(tmp_path) == "sparse"
    labels, train, test, notes = read_with_notes(opened(tmp_path, augment_label_data=True))
    assert labels == [("0", "zero"), ("1", "one"), ("2", "two")]
    assert train == [("w0 w1", [0, 2]), ("w2", []), ("w3, w4", [1]), ("zero", [0]), ("one", [1]), ("two", [2])]
    assert test == TEST and "training set: 1 texts have no label" in notes
    if write is not pecos:
        pairs = opened(tmp_path, use_filter_eval=True).read().filter_pairs
        assert pairs.ids.tolist() == [2] and pairs.offsets.tolist() == [0, 0, 1]


def test_every_layout_is_recognised_and_gives_the_same_rows(tmp_path):
    records = {"train": TRAIN, "test": TEST}
    dicts = {split: [{"text": t, "labels": [str(n) for n in ls]} for t, ls in rows] for split, rows in records.items()}
    for kind in ("csv", "tsv.gz", "jsonl", "parquet"):
        for split, rows in dicts.items():
            path = tmp_path / kind / f"{split}.{kind}"
            path.parent.mkdir(exist_ok=True)
            if kind == "csv":
                cells = [f'"{row["text"]}",{";".join(row["labels"])}' for row in rows]
                path.write_text("text,labels\n" + "".join(f"{cell}\n" for cell in cells))
            elif kind == "tsv.gz":
                cells = ["{}\t{}".format(json.dumps(row["labels"]).replace('"', "'"), row["text"]) for row in rows]
                cells = [cell.replace("'", "") for cell in cells]  # a JSON list of numbers
                path.write_bytes(gzip.compress(("labels\ttext\n" + "".join(f"{cell}\n" for cell in cells)).encode()))
            elif kind == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                pq.write_table(pa.Table.from_pylist(rows), path)
    DatasetDict({split: Dataset.from_list(rows) for split, rows in dicts.items()}).save_to_disk(tmp_path / "saved")
    raw = [[(text, " ".join(map(str, labels))) for text, labels in rows] for rows in (TRAIN, TEST)]
    write_raw(tmp_path / "raw", *raw)
    lf = [[instance(text, labels) for text, labels in rows] for rows in (TRAIN, TEST)]
    write_lf(tmp_path / "lf", *lf, labels=[{"uid": name, "title": ""} for name in NAMES], zipped=True)
    dexml(tmp_path / "sparse")
    (tmp_path / "sparse" / "raw" / "Y.txt").unlink()
    layouts = dict.fromkeys(("csv", "tsv.gz", "jsonl", "parquet", "saved"), "rows") | {
        "raw": "raw", "lf": "lf", "sparse": "sparse"
    }  # fmt: skip
    for name, layout in layouts.items():
        assert layout_of(tmp_path / name) == layout
        labels, train, test = read_all(opened(tmp_path / name))
        assert (labels, train, test) == ([(n, n) for n in NAMES], [(t, sorted(ls)) for t, ls in TRAIN], TEST), name
    # A data set without splits is divided, as a single file is.
    Dataset.from_list([{"text": f"t{n}", "labels": ["a"]} for n in range(20)]).save_to_disk(tmp_path / "one")
    assert [len(rows) for rows in read_all(opened(tmp_path / "one"))[1:]] == [18, 2]


def test_values_that_repeat_and_sum_to_zero_are_labels(tmp_path):
    dexml(tmp_path)
    values, columns, starts = np.array([100, 100, 56, 1], np.int8), np.array([2, 2, 2, 0]), np.array([0, 3, 3, 4])
    save_npz(tmp_path / "Y.trn.npz", csr_matrix((values, columns, starts), (3, 3)))
    assert [labels for _, labels in read_all(opened(tmp_path))[1]] == [[2], [], [0]]


@pytest.mark.parametrize("break_it, said", [
    (lambda d: (d / "trn_X_Y.txt").write_text("3\n0:1\n\n1:1\n"), "trn_X_Y.txt, line 1: must be the numbers of texts and of labels, not '3'"),
    (lambda d: (d / "trn_X_Y.txt").write_text("3 3\n0:1\n\n3:1\n"), "trn_X_Y.txt, line 4: label 3 is out of range: line 1 says 3 labels"),
    (lambda d: (d / "trn_X_Y.txt").write_text("3 3\n0:1\n-1:1\n2:1\n"), "trn_X_Y.txt, line 3: label -1 is out of range"),
    (lambda d: (d / "trn_X_Y.txt").write_text("3 3\n0,1\n\n2:1\n"), "trn_X_Y.txt, line 2: must hold label:value words"),
    (lambda d: (d / "trn_X_Y.txt").write_text("4 3\n0:1\n\n2:1\n"), "trn_X_Y.txt: line 1 says 4 texts, but 3 lines follow"),
    (lambda d: (d / "tst_X_Y.txt").write_text("2 4\n0:1\n3:1\n"), "tst_X_Y.txt: has 4 labels,"),
    (lambda d: (d / "trn_X.txt").write_text("a\n"), "trn_X.txt has 1 lines,"),
    (lambda d: (d / "Y.txt").write_text("a\n"), "Y.txt: has 1 lines, but there are 3 labels"),
    (lambda d: (d / "Y.trn.npz").write_bytes(b"PK"), "Y.trn.npz: is not a sparse matrix of scipy"),
    (lambda d: np.savez(d / "Y.trn.npz", a=np.array([{}], dtype=object)), "Y.trn.npz: is not a sparse matrix of scipy"),
    (lambda d: (d / "tst_X.txt").unlink(), "tst_X.txt or X.tst.txt or tst_X.tst.txt or test.raw.txt or test_raw_texts.txt is missing"),
])  # fmt: skip
def test_what_is_wrong_with_sparse_files(tmp_path, break_it, said):
    renee(tmp_path)
    break_it(tmp_path)
    assert said in message_of(lambda: read_all(opened(tmp_path)))


@pytest.mark.parametrize("write, options, said", [
    (renee, {"test_share": 0.1}, "`test_share`: applies to rows with columns (CSV"), (renee, {"test_split": "dev"}, "`test_split`: applies to"),
    (renee, {"label_text_file": "x"}, "`label_text_file`: applies to the raw layout"), (write_raw, {"augment_label_data": True}, "set `label_text_file`"),
    (write_raw, {"is_lf_data": True}, "set `is_lf_data`=false"), (write_raw, {"train_split": "dev"}, "`train_split`: applies to rows"),
    (write_raw, {"text_column": "title"}, "`text_column`: applies to rows"), (renee, {"label_column": "y"}, "`label_column`: applies to rows"),
    (pecos, {"label_separator": "|"}, "`label_separator`: applies to rows"),
    (pecos, {"use_filter_eval": True}, "filter_labels_test.txt or tst_filter_labels.txt is missing"),
    (lambda folder: write_raw(folder / "inner"), {}, "/inner; name that folder"),
])  # fmt: skip
def test_options_without_meaning_are_refused(tmp_path, write, options, said):
    write(tmp_path)
    assert said in message_of(lambda: opened(tmp_path, **options))
