"""Mistakes in data, encoder and run folder are refused before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from xmc_trainer.builders.inputs import require_data, require_encoder
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError

# Runs `train` once for each list of words in one process. Prints the errors, and what was imported meanwhile.
REFUSED = """
import json, sys
from xmc_trainer.commands.train import main
from xmc_trainer.errors import UserError
said = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["train", *words]
    try:
        main()
    except UserError as error:
        said.append(str(error))
print(json.dumps([said, [name for name in ("torch", "transformers", "datasets", "deepspeed") if name in sys.modules]]))
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"text": f"w{n}", "labels": ["a"], "who": n} for n in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_refusals_import_neither_torch_nor_the_libraries_on_it(data, tiny_encoder, monkeypatch):
    (data / "bad.csv").write_text("text,labels\nw0,a\nw0,a,b\n")
    (data / "empty").mkdir()
    (data / "out" / "run" / "model").mkdir(parents=True)
    (data / "out" / "run" / "model" / "manifest.json").write_text("{}")
    (data / "partial").mkdir()
    (data / "partial" / "config.json").write_text("{}")
    cases = {
        "data.source=missing.csv": "data.source=missing.csv: no such file",
        "data.source=bad.csv": "bad.csv, row 2: has 3 cells",
        "data.source=empty": "data.source=empty: has no split 'train'",
        "data.text_column=body": "t.jsonl, line 1: has no column 'body'",
        "data.num_labels=7": "data.num_labels=7: the data have 1 labels",
        "data.test_split=dev": "data.test_split=dev: no texts are held out for it",
        "data.source=some/where/else": "no such folder",
        "model.encoder.encoder_model=nobody/nothing": "HF_HUB_OFFLINE is set, and it is not in the local cache",
        "model.encoder.encoder_model=./nothing": "model.encoder.encoder_model=./nothing: no such folder",
        "model.encoder.encoder_model=empty": "the folder has no config.json",
        "model.encoder.encoder_model=partial": "the folder has no weights",
        "model.encoder.encoder_tokenizer=/nothing": "model.encoder.encoder_tokenizer=/nothing: no such folder",
        "model.ffi.fan_in=33": "model.ffi.fan_in=33: there are only 32 features",
        "data.max_len=25": "data.max_len=25: the encoder reads at most 24 tokens",
        "model.auxiliary.use_meta_branch=true": "no such label clusters",
        "output_dir=out": "holds a finished run; choose another name (log_fname=run-2)",
        "output_dir=/proc/nothing": "cannot be written",
    }
    plain = {"data.source": "t.jsonl", "model.encoder.encoder_model": str(tiny_encoder), "data.max_len": "16", "model.ffi.fan_in": "8",
             "output_dir": "new", "data.cache_dir": "cache"}  # fmt: skip
    words = [[f"{name}={value}" for name, value in (plain | dict([case.split("=")])).items()] for case in cases]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], input=json.dumps(words), capture_output=True, text=True, cwd=data
    )
    assert done.returncode == 0, done.stderr
    said, imported = json.loads(done.stdout)
    assert len(said) == len(cases) and not imported
    for error, expected in zip(said, cases.values()):
        assert expected in error and "`" not in error
    assert not (data / "new").exists()


def test_good_inputs_pass(data, tiny_encoder):
    config = load_config([
        f"data.source={data / 't.jsonl'}", f"model.encoder.encoder_model={tiny_encoder}", "data.max_len=24", "model.ffi.fan_in=32",
        "data.group_column=who",
    ])  # fmt: skip
    require_data(config)
    require_encoder(config)


@pytest.mark.parametrize("settings", ["data.source=some/set", "model.encoder.encoder_model=some/model"])
def test_the_hub_is_asked_once(data, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    config = load_config([f"data.source={data / 't.jsonl'}", settings])
    check = require_data if settings.startswith("data") else require_encoder
    asked = []

    def unreachable(url, timeout):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(UserError) as raised:
        check(config)
    said = f"{settings}: no such folder, and the hub cannot be reached: no route to host; name a folder"
    assert str(raised.value).startswith(said)
    assert len(asked) == 1 and "some/" in asked[0] and ("datasets/" in asked[0]) == settings.startswith("data")
