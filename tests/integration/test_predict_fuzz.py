"""xmc-trainer predict with hostile files and arguments gives predictions or a one-line error, and no partial output."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.encoders import save_untrained
from tests.fuzz import examples
from xmc_trainer.commands import predict
from xmc_trainer.commands.cli import run
from xmc_trainer.errors import UserError
from xmc_trainer.model import XMCModel

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> XMCModel:
    return XMCModel.load(save_untrained("bert", tmp_path_factory.mktemp("untrained")), "cpu")


_LINE = st.sampled_from(
    [b"w1 w2", b"", b"  ", b"w3\r", b"\0", b"\xff", b"\xef\xbb\xbfw4", b"\xc2\x85", b"w" * 70_000, b'{"text": "w1"}', b'{"text": ""}', b'{"text": null}',
     b'{"text": "\\ud83d"}', b'{"text": "a", "text": "b"}', b"[" * 5000, b"9" * 5000, b'{"text": NaN}', b"null", b'{"a": 1e999}', b"{}"]
)  # fmt: skip
_CONTENT = st.lists(
    _LINE | st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode()), max_size=6
).map(b"\n".join)


@settings(max_examples=examples(100), **QUICK)
@given(content=_CONTENT, end=st.sampled_from([b"", b"\n", b"\r\n"]), front=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
       name=st.sampled_from(["in.txt", "in.jsonl", "in.json", "-"]), k=st.integers(1, 9))  # fmt: skip
def test_fuzzed_files_are_predicted_or_refused(model, content, end, front, name, k):
    folder = model.saved.folder.parent
    source, out = folder / name, folder / "out.jsonl"
    out.unlink(missing_ok=True)
    words = SimpleNamespace(
        input="-" if name == "-" else str(source),
        output=str(out),
        k=k,
        batch_size=2,
        format=None,
        text_column="text",
        threshold=None,
    )
    with pytest.MonkeyPatch.context() as patch:
        if name == "-":
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(front + content + end)))
        else:
            source.write_bytes(front + content + end)
        try:
            predict.predict(model, words)
        except UserError as error:
            assert "\n" not in str(error) and not list(folder.glob("out*"))
            return
    text = (front + content + end).decode("utf-8-sig")
    lines = text.removesuffix("\n").split("\n") if text else []
    found = [json.loads(line) for line in out.read_bytes().decode().split("\n")[:-1]]
    assert len(found) == len(lines)
    if not name.startswith("in.j"):
        assert [record["text"] for record in found] == [line.removesuffix("\r") for line in lines]


_WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
_WORDS = st.lists(
    st.sampled_from(["-k", "--batch_size", "--device", "--output", "0", "-1", "1e3", "nan", "gpu", "cuda:9", "cpu", "", "/dev/full", "/dev/null/x",
                     "MODEL", "FOLDER", "TEXTS", "9" * 5000, "x" * 300, "--", "-h", "٣"]) | _WORD,
    max_size=6,
)  # fmt: skip


@settings(max_examples=examples(60), **QUICK)
@given(words=_WORDS)
def test_fuzzed_command_lines_are_answered(model, words):
    folder = model.saved.folder.parent
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "texts.txt").write_text("w1\n")
    places = {"MODEL": str(model.saved.folder), "FOLDER": str(folder), "TEXTS": str(folder / "texts.txt")}
    out, err, status = io.TextIOWrapper(io.BytesIO()), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "empty")
        patch.setattr(sys, "argv", ["predict.py", *(places.get(word, word) for word in words)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w1\n")))
        try:
            run(predict.main)
        except SystemExit as end:
            status = end.code
    assert status in (0, None) or (status == 2 and "error" in err.getvalue())
