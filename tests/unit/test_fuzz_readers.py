"""Any content of a data set's files gives all its rows or a UserError: no other exception, and no lost row."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data_helpers import write_lf, write_raw
from tests.fuzz import examples
from xmc_trainer.data.rows import rows_source
from xmc_trainer.data.sources import lf_source, raw_source
from xmc_trainer.errors import UserError

fuzz = settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck), database=None)

# Difficult texts: lone surrogates, zero bytes, unusual blanks, byte order marks, long numbers.
ODD = [
    "",
    " ",
    "\t",
    "\ud800",
    "\0",
    "\ufeff",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    "\r",
    "\r\n",
    "9" * 5000,
    "\x1b[2J",
    "../../x",
    ",",
]
texts = st.one_of(st.sampled_from(ODD), st.text(st.characters(), max_size=8), st.just("w1"))
numbers = st.one_of(st.integers(-2, 4), st.sampled_from([10**30, -(10**400), 2**63]), st.booleans(), st.floats())
scalars = st.one_of(st.none(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=2), max_leaves=6
)
deep = st.sampled_from(
    [b"[" * 10_000, b'{"title": ' * 10_000, b'{"text": "x", "labels": [' + b"[" * 10_000 + b"]" * 10_000 + b"]}"]
)
lists = st.one_of(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 1), min_size=3, max_size=3), values)


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def json_line(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries({}, optional=fields).map(lambda record: json.dumps(record).encode())


def lines(line: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    ends = st.sampled_from([b"\n", b"\n", b"\r\n", b""])
    joined = st.lists(st.tuples(line, ends), max_size=4).map(lambda parts: b"".join(map(b"".join, parts)))
    return st.one_of(
        joined, joined, joined.map(lambda content: b"\xef\xbb\xbf" + content), st.binary(max_size=40), deep
    )


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Flip some bits of the content, or truncate it."""
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, max(len(changed) * 8 - 1, 0)), max_size=3)):
        if changed:
            changed[place // 8] ^= 1 << place % 8
    return bytes(changed[: draw(st.integers(0, len(changed)))]) if draw(st.booleans()) else bytes(changed)


def check(make_source, folder: Path, train_rows: int | None = None) -> None:
    """Read everything. `train_rows`: the number of rows if it can be read."""
    try:
        source = make_source(folder)
        contents = source.read()
        train, test = list(contents.train()), list(contents.test())
    except UserError as error:
        assert str(error).isprintable() and 10 < len(str(error)) < 5000
        return
    for name, text in contents.labels:
        (name + text).encode()
    for row in train + test:
        row.text.encode()
        assert row.labels == sorted(set(row.labels)) and all(label >= 0 for label in row.labels)
    assert all(label < len(contents.labels) for row in train for label in row.labels)
    assert train_rows in (None, len(train) - contents.augmented)
    for note in contents.notes.values():
        assert note


def fresh() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz."))


def replaced(data, file: Path, content: st.SearchStrategy[bytes]) -> bytes | None:
    """Write other content to a file, or put a folder in its place (None)."""
    file.unlink(missing_ok=True)
    if data.draw(st.integers(0, 30)) == 7:
        file.mkdir()
        return None
    new = data.draw(content)
    if file.suffix == ".gz":
        new = data.draw(st.just(gzip.compress(new)) | damaged(gzip.compress(new)) | st.just(new))
    file.write_bytes(new)
    return new


@fuzz
@given(st.data())
def test_raw(data):
    folder = fresh()
    try:
        write_raw(folder)
        (folder / "names.tsv").write_text("a\tA\nb\tB\n")
        line = st.lists(texts, max_size=3).map(
            lambda words: encoded(data.draw(st.sampled_from([" ", "\t", ", "])).join(words))
        )
        chosen = data.draw(st.sets(st.sampled_from(sorted(folder.iterdir())), min_size=1))
        for file in sorted(chosen):
            replaced(data, file, lines(line))
        with_table, augment = data.draw(st.booleans()), data.draw(st.booleans())
        rows = None
        if (folder / "train_raw_texts.txt").is_file():
            content = (folder / "train_raw_texts.txt").read_bytes()
            rows = content.count(b"\n") + (not content.endswith(b"\n") and content not in (b"", b"\xef\xbb\xbf"))
        check(
            lambda folder: raw_source(folder, "names.tsv" if with_table else None, augment and with_table), folder, rows
        )
    finally:
        shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_label_features(data):
    folder = fresh()
    try:
        zipped = data.draw(st.booleans())
        inside = write_lf(folder, zipped=zipped)
        (inside / "filter_labels_test.txt").write_text("0 1\n")
        text = {name: st.one_of(texts, texts, values) for name in ("title", "content", "uid")}
        row = json_line(text | {"target_ind": lists})
        pair = st.lists(st.sampled_from(["0", "1", "9", "9" * 5000, "x", "-1", "²"]), max_size=3).map(
            lambda words: encoded(" ".join(words))
        )
        chosen = data.draw(st.sets(st.sampled_from(sorted(inside.iterdir())), min_size=1))
        for file in sorted(chosen):
            replaced(data, file, lines(pair if file.suffix == ".txt" else row))
        augment, filtered = data.draw(st.booleans()), data.draw(st.booleans())
        check(lambda folder: lf_source(folder, augment, filtered), folder)
    finally:
        shutil.rmtree(folder)


def read_hf(folder: Path):
    return rows_source(str(folder), "train", "test", "text", "labels")


@fuzz
@given(st.data())
def test_json_lines(data):
    folder = fresh()
    try:
        ending = data.draw(st.sampled_from(["", ".gz"]))
        row = json_line({"text": st.one_of(texts, texts, values), "labels": lists, "other": values})
        for split in ("train", "test"):
            replaced(data, folder / f"{split}.jsonl{ending}", lines(row))
        check(read_hf, folder)
    finally:
        shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_parquet(data):
    folder = fresh()
    try:
        for split in ("train", "test"):
            size = data.draw(st.integers(0, 4))
            columns = {}
            for name, value in (
                ("text", st.one_of(texts, values)),
                ("labels", st.one_of(lists, scalars)),
                ("other", values),
            ):
                column = data.draw(st.lists(value, min_size=size, max_size=size))
                try:
                    columns[name] = pa.array(column)
                except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
                    columns[name] = pa.array([["a"]] * size if name == "labels" else ["w"] * size)
            file = folder / f"{split}.parquet"
            try:
                pq.write_table(pa.table(columns), file)
            except (pa.ArrowException, UnicodeEncodeError):  # Parquet lacks some of Arrow's types
                pq.write_table(pa.table({"text": ["w"] * size, "labels": [["a"]] * size}), file)
            if data.draw(st.integers(0, 3)) == 0:
                file.write_bytes(data.draw(damaged(file.read_bytes())))
        check(read_hf, folder)
    finally:
        shutil.rmtree(folder)
