"""xmc-trainer predict: files of texts in, files of predictions out, all with the same content."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from tests.encoders import save_untrained
from xmc_trainer.commands import predict
from xmc_trainer.commands.prediction_files import read_texts
from xmc_trainer.errors import UserError
from xmc_trainer.model import XMCModel

# A tab, quotes and a line break must survive in every format.
TEXTS = ["w1 w2", "", 'a "quoted"\tcell', "two\nlines", "w7"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> XMCModel:
    return XMCModel.load(save_untrained("bert", tmp_path_factory.mktemp("untrained")), "cpu")


@pytest.fixture
def written(model, tmp_path, monkeypatch):
    """Return a function that runs the command on TEXTS as JSON lines, and gives the path of its output."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"title": text}) + "\n" for text in TEXTS))
    monkeypatch.setattr(XMCModel, "load", lambda *_: model)
    monkeypatch.setattr(predict, "_CHUNK", 2)  # several chunks

    def call(name, *words):
        out = tmp_path / name
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "predict",
                str(model.saved.folder),
                str(source),
                "-k",
                "3",
                "--text-column=title",
                f"--output={out}",
                *words,
            ],
        )
        predict.main()
        return out

    return call


def test_all_formats_hold_the_same_predictions(model, written):
    lines = [json.loads(line) for line in written("out.jsonl").read_text().splitlines()]
    expected = [[tuple(label.values()) for label in record["labels"]] for record in lines]
    assert [record["text"] for record in lines] == TEXTS
    for row, found in zip(expected, model.predict(TEXTS, 3)):
        assert [label[:2] for label in row] == [label[:2] for label in found]
        assert [label[2] for label in row] == pytest.approx([label.score for label in found])
    assert pq.read_table(written("out.parquet")).to_pylist() == [
        {"text": text, "labels": [{"id": i, "text": t, "score": pytest.approx(s)} for i, t, s in row]}
        for text, row in zip(TEXTS, expected)
    ]
    for name, dialect in (("out.tsv", "excel-tab"), ("out.csv", "excel"), ("table.txt", "excel")):
        content = written(name, *(["--format=csv"] if name == "table.txt" else [])).read_bytes().decode()
        rows = list(csv.reader(io.StringIO(content, newline=""), dialect))
        assert rows[0] == ["row", "rank", "label", "label_text", "score", "text"]
        assert rows[1:] == [
            [str(row), str(rank), label, name, str(score), text]
            for row, (text, labels) in enumerate(zip(TEXTS, expected), 1)
            for rank, (label, name, score) in enumerate(labels, 1)
        ]
    matrix = sp.load_npz(written("out.npz"))
    ids = model.saved.label_ids.to_pylist()
    dense = np.zeros((5, 7), np.float32)
    for row, labels in enumerate(expected):
        for label, _, score in labels:
            dense[row, ids.index(label)] = score
    assert sp.isspmatrix_csr(matrix) and matrix.dtype == np.float32 and matrix.nnz == 15
    assert matrix.has_canonical_format
    np.testing.assert_array_equal(matrix.toarray(), dense)


def test_without_texts_the_files_are_empty_but_readable(written, tmp_path):
    written("out.npz")
    (tmp_path / "in.jsonl").write_text("")
    assert sp.load_npz(written("out.npz")).shape == (0, 7)
    assert pq.read_table(written("out.parquet")).num_rows == 0
    assert written("out.jsonl").read_text() == "" and written("out.tsv").read_text().count("\n") == 1


def test_a_failed_prediction_leaves_the_old_file(model, written, tmp_path, monkeypatch):
    old = {name: written(name).read_bytes() for name in ("a.npz", "a.parquet", "a.csv", "a.jsonl")}
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("[]\n")
    for name, content in old.items():
        with pytest.raises(UserError, match="in.jsonl, line 6: not a JSON object"):
            written(name)
        assert (tmp_path / name).read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", *old}


def test_tables_and_parquet_files_are_read_by_column(tmp_path):
    rows = [{"id": f"n{n}", "title": text, "text": "no"} for n, text in enumerate(TEXTS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    for name, dialect in (("in.csv", "excel"), ("in.tsv", "excel-tab")):
        with open(tmp_path / name, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0], dialect=dialect)
            table.writeheader()
            table.writerows(rows)
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress((tmp_path / "in.csv").read_bytes()))
    for name in ("in.parquet", "in.csv", "in.tsv", "in.csv.gz"):
        assert list(read_texts(str(tmp_path / name), "title")) == TEXTS
        with pytest.raises(UserError, match=f"{name}.*: has no column 'body', only id, title, text; name one with"):
            list(read_texts(str(tmp_path / name), "body"))
    pq.write_table(pa.table({"title": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(UserError, match="null.parquet, row 2: column 'title' must hold strings"):
        list(read_texts(str(tmp_path / "null.parquet"), "title"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for name in ("bad.parquet", "missing.parquet"):
        with pytest.raises(UserError, match=f"{name}, after row 0: cannot be read"):
            list(read_texts(str(tmp_path / name), "title"))
