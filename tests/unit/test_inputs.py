"""Mistakes in arguments, data, models and output files are refused before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.encoders import save_untrained
from xmc_trainer.builders.inputs import require_data, require_encoder
from xmc_trainer.checkpoint.model_manifest import ModelFacts, facts_of_model
from xmc_trainer.config import load_config, to_yaml
from xmc_trainer.errors import UserError

# Runs a command for each list of words in one process. Prints the errors, and what was imported meanwhile.
REFUSED = """
import contextlib, importlib, io, json, sys
from xmc_trainer.commands.cli import COMMANDS
from xmc_trainer.errors import UserError
said = []
for command, *words in json.loads(sys.stdin.read()):
    sys.argv = [f"xmc-trainer {command}", *words]
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            importlib.import_module(COMMANDS[command][0]).main()
    except UserError as error:
        said.append(str(error))
    except SystemExit:
        said.append(usage.getvalue())
print(json.dumps([said, [name for name in ("torch", "transformers", "datasets", "deepspeed") if name in sys.modules]]))
"""


def refusals(commands: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run commands in `folder`; return their errors."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said, imported = json.loads(done.stdout)
    assert len(said) == len(commands) and not imported
    return said


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
    words = [
        ["train", *(f"{name}={value}" for name, value in (plain | dict([case.split("=")])).items())] for case in cases
    ]
    for error, expected in zip(refusals(words, data, monkeypatch), cases.values()):
        assert expected in error and "`" not in error
    assert not (data / "new").exists()


def test_the_other_commands_refuse_before_these_imports_too(data, monkeypatch):
    model = save_untrained("bert", data)
    assert facts_of_model(model) == ModelFacts(labels=7, has_biases=True, is_calibrated=False, feature_layers=1)
    lacking = shutil.copytree(model, data / "lacking")
    (lacking / "encoder" / "model.safetensors").unlink()
    littered = shutil.copytree(model, data / "littered")
    (littered / "notes.txt").write_text("mine")
    (data / "new.csv").write_text("text,labels\nw1,tag1\n")
    (data / "few.csv").write_text("text,labels\nw1,new\n")
    config = load_config(["data.source=t.jsonl", "log_fname=r", f"output_dir={data}"])
    (data / "r").mkdir()
    (data / "r" / "config.yaml").write_text(to_yaml(config))
    metrics = {"P@1": 0.5, "PSP@1": 0.5, "seconds": 1, "step": 1}
    events = [
        {"event": "start", "head_bytes": 1, "device": "cpu", "torch": "2", "version": "1", "commit": "c"},
        {"event": "evaluate", "split": "test"} | metrics,
        {"event": "end", "seconds": 1},
    ]
    (data / "r" / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    source = "data.source=t.jsonl"
    cases = {
        "evaluate none": "none/manifest.json: No such file or directory; name the folder of a saved model",
        "evaluate model data.source=none.csv": "data.source=none.csv: no such file",
        "evaluate model model.ffi.fan_in=3": "model.ffi.fan_in=3: cannot be changed for a saved model",
        f"evaluate model {source}": "has 1 labels, the model 7; set data.source to the data set that it was trained on",
        f"evaluate model {source} --threshold fitted": "model: has no fitted thresholds",
        f"evaluate model {source} -k 0": "-k must be at least 1",
        f"evaluate model {source} -k 3": "-k=3: says how many labels a threshold can let through; give a --threshold",
        "evaluate lacking": "encoder/model.safetensors: is missing",
        "predict none t.jsonl": "none/manifest.json: No such file or directory",
        "predict lacking t.jsonl": "encoder/model.safetensors: is missing",
        "predict model none.txt": "none.txt: cannot be read (No such file or directory); name another file",
        "predict model new.csv --text-column body": "new.csv, row 1: has no column 'body'",
        "predict model t.txt --text-column body": "--text-column=body: t.txt has one text per line and no columns",
        "predict model t.jsonl -k 8": "-k=8: the model has 7 labels; lower it",
        "predict model t.jsonl --device gpu": "--device=gpu: is not valid",
        "predict model t.jsonl --threshold fitted": "model: has no fitted thresholds",
        "predict model t.jsonl --output x.xlsx": "--output=x.xlsx: unknown ending .xlsx; use .jsonl, .json, .tsv, .csv",
        "predict model t.jsonl --output no/x.csv": "--output=no/x.csv: its folder does not exist",
        "predict model t.jsonl --output /proc/x.csv": "--output=/proc/x.csv: cannot be written",
        "adjust none": "none/manifest.json: No such file",
        "adjust model --strength x": "--strengths='x': must be comma-separated numbers",
        "adjust model data.source=none.csv": "data.source=none.csv: no such file",
        f"adjust model {source} --keep 0.1 --json": "--json: prints metrics, which --keep does not compute",
        f"adjust littered {source} --keep 0.1": "littered/notes.txt: does not belong to the model",
        "calibrate none": "none/manifest.json: No such file",
        f"calibrate model {source} -k 0": "-k and --fewest: must be at least 1",
        f"calibrate model {source} --fewest 2": "--fewest: applies to --thresholds label only",
        f"calibrate model {source}": "has 1 labels, the model 7",
        f"calibrate littered {source}": "littered/notes.txt: does not belong to the model",
        "extend none new.csv --output out": "none/manifest.json: No such file",
        "extend model new.csv --output model": "model: exists already",
        "extend model none.csv --output out": "none.csv",
        "extend model new.csv --output out": "new.csv: has no label that the model does not have",
        "extend model few.csv --output out": "the background has 1 texts",
        "export none out --format torch": "none/manifest.json: No such file",
        "export model model --format torch": "model: exists already",
        "export model /proc/out --format torch": "/proc/out: cannot be written",
        "export model out --format onnx -k 8": "-k=8: must be 1 to 7, the number of labels",
        "report none": "none: no finished run",
        "report r --output r.pdf": "--output=r.pdf: unknown ending .pdf; use .html, .htm",
        "report r --curves c.docx": "--curves=c.docx: unknown ending .docx; use ",
        "report r --output r.html --samples 2": "r/model/manifest.json: No such file",
        "plan dataset=none": "none",
        "plan dataset=wordnet --rates none.csv": "--rates=none.csv: no such file",
        "plan dataset=wordnet --chart c.docx": "--chart=c.docx: unknown ending .docx",
        "sweep none.yaml": "none.yaml",
        "prepare data.source=none.csv": "data.source=none.csv: no such file",
        f"prepare {source} --csv no/p.csv": "--csv=no/p.csv: its folder does not exist",
        "clusters data.source=none.csv": "data.source=none.csv: no such file",
        "bench data out --texts 5": "--test-texts: is missing",
        "bench head --batch 0": "'0' must be a whole number of at least 1",
        "bench head --csv no/h.csv": "--csv=no/h.csv: its folder does not exist",
        "bench head --compare none.csv": "--compare=none.csv: no such file",
        "bench ranks --labels 5,x": "'x' must be a whole number of at least 1",
        "bench train data.source=none.csv": "data.source=none.csv: no such file",
        "bench train --steps x": "'x' must be a whole number",
    }  # fmt: skip
    pairs = (
        ("bench " + case[6:].split()[0], case[6:].split()[1:])
        if case.startswith("bench ")
        else (case.split()[0], case.split()[1:])
        for case in cases
    )
    said = refusals([[command, *words] for command, words in pairs], data, monkeypatch)
    wrong = {
        case: error for (case, expected), error in zip(cases.items(), said) if expected not in error or "`" in error
    }
    assert not wrong
    assert not (data / "out").exists() and not list(data.glob("*.partial"))


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
