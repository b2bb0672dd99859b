"""The scripts of launchers/ under real launchers: equal loss curves, predictions, and errors."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from tests.data_helpers import instance, write_lf, write_raw
from tests.saved_folders import forge
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config
from xmc_trainer.hooks import Hook

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FLOAT16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
needs_float16 = pytest.mark.skipif(not FLOAT16, reason="this CPU does not multiply in float16")


def launch(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    return subprocess.run(
        ["sh", "-c", 'LAUNCHER=$$ exec "$@"', "sh", *map(str, command)],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        start_new_session=True,  # so that a signal to the process group does not reach the tests
    )


class Kept(io.TextIOWrapper):
    """Standard output that can be read after a script has closed it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def close(self) -> None:
        pass

    def getvalue(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


def run_here(script: str, *words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script of launchers/ in this process, which has done all imports."""
    output, errors, status = Kept(), io.StringIO(), 0
    with redirect_stdout(output), redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *map(str, words)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(sys.argv, status, output.getvalue(), errors.getvalue())


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_command(how: str, processes: int = 1, script: str = "launchers/train.py") -> list[str]:
    """Return the command in front of the settings. `how`: python, torchrun, or launcher-stage, such as accelerate-2."""
    launcher, _, stage = how.partition("-")
    if launcher == "python":
        return [sys.executable, script]
    if launcher == "torchrun":
        return ["torchrun", "--nproc_per_node", str(processes), "--master_port", free_port(), script]
    if launcher == "deepspeed":
        words = ["deepspeed", "--master_port", free_port(), "--num_gpus", str(processes), script]
        return [*words, "--deepspeed_config", f"ds_configs/zero{stage}.json"] if stage else words
    return [
        "accelerate", "launch", "--config_file", f"launchers/accelerate_zero{stage}.yaml",
        "--num_processes", str(processes), "--main_process_port", free_port(), script,
    ]  # fmt: skip


def train_in_turn(
    how: str, processes: int, trainings: list[dict[str, object]], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run several trainings in one launch; see tests/distributed/trainings.py. `how` may be deepspeed without a stage.

    If the last one fails, the launcher must end its other processes within a minute. The failed rank's error must come first; the
    others must print one line that they lost it.
    """
    files = [folder / f"{how}-{number}.json" for number in range(len(trainings))]
    for file, training in zip(files, trainings):
        file.write_text(json.dumps(training))
    done = launch(*start_command(how, processes, "tests/distributed/trainings.py"), *files)
    failure, _ = trainings[-1].get("fails", (None, None))
    assert (done.returncode != 0) == (failure is not None or "signal" in trainings[-1]), done.stdout + done.stderr
    if failure is not None:
        failed = load_config(trainings[-1]["settings"]).run_folder / "fails"
        assert time.time() - failed.stat().st_mtime < 60
    if failure == "raise":
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        assert "this rank's own error" in errors[0], done.stderr
        assert done.stderr.count("Traceback") <= 2  # its own line, and the launcher's
        # The other rank notices by its collective, or earlier by the store.
        assert "error: lost the other ranks (" in done.stderr or "failed; see its own error" in done.stderr
    return done


def assert_ended(done: subprocess.CompletedProcess[str], number: signal.Signals, step: int) -> None:
    """Check that a signal ended the training after a step, with one line."""
    said = [line for line in done.stderr.splitlines() if line.startswith("SIG")]
    assert len(said) == 1 and said[0].startswith(f"{number.name}: ended after step {step}, with a checkpoint in "), (
        done.stderr
    )
    assert "in train" not in done.stderr  # no rank's traceback


def train_here(settings: list[str], hooks: list[Hook] | None = None) -> None:
    """Train in this process, which has done all imports."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        build_trainer(load_config(settings), hooks=hooks).train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def curve(settings: list[str], how: str, processes: int = 1) -> list[float]:
    """Train and return the losses. `how`: see `start_command`; "here" means in this process."""
    name = f"{how}-{processes}"
    settings = [*settings, f"log_fname={name}"]
    if how == "here":
        train_here(settings)
    else:
        done = launch(*start_command(how, processes), *settings)
        assert done.returncode == 0, done.stdout + done.stderr
    return losses_of(Path(settings_value(settings, "output_dir=")) / name)


def records_of(run: Path) -> list[dict]:
    return list(map(json.loads, (run / "log.jsonl").read_text().splitlines()))


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in records_of(run) if record["event"] == "step"]


def settings_value(settings: list[str], prefix: str) -> str:
    return [word for word in settings if word.startswith(prefix)][-1].removeprefix(prefix)


@pytest.fixture
def short(toy_settings):
    return [*toy_settings, "training.optimization.max_steps=20"]


@pytest.mark.slow
def test_accelerate_gives_the_curve_of_plain_python(short):
    # deepspeed launches this script in distributed/test_nodes; other stages and more processes: distributed/test_engines.
    plain = curve(short, "here")
    assert len(plain) == 20 and plain[-1] < plain[0]
    assert curve(short, "accelerate-3") == pytest.approx(plain, rel=1e-5)


def outcome(settings: list[str], how: str, processes: int = 1) -> dict:
    """Train and return the results."""
    curve(settings, how, processes)
    return outcome_of(Path(settings_value(settings, "output_dir=")) / f"{how}-{processes}", processes)


def outcome_of(run: Path, processes: int) -> dict:
    """Return a training's losses, metrics, moved slots and head tensors of all processes."""
    records = records_of(run)
    shards = sorted((run / "model").glob("head-*.safetensors"))
    assert len(shards) == processes
    parts = [load_file(shard) for shard in shards]
    return {
        "curve": losses_of(run),
        "metrics": [{k: r[k] for k in ("P@1", "P@5", "PSP@5", "R@3")} for r in records if r["event"] == "evaluate"],
        "moved": [(r["step"], r["moved"]) for r in records if r["event"] == "rewire"],
        "tensors": {key: torch.cat([part[key] for part in parts]) for key in parts[0]},
    }


def assert_same(one: dict, other: dict) -> None:
    assert other["curve"] == pytest.approx(one["curve"], rel=1e-5)
    # Not exact: the order of summation differs.
    assert other["metrics"] == [pytest.approx(metrics, rel=1e-12) for metrics in one["metrics"]]
    assert other["moved"] == one["moved"] and one["moved"][0][1] > 0
    assert torch.equal(one["tensors"]["index"], other["tensors"]["index"])
    torch.testing.assert_close(one["tensors"]["weight"], other["tensors"]["weight"], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory, toy_data, tiny_encoder):
    """Return (folder, metrics) of a trained model."""
    out = tmp_path_factory.mktemp("trained")
    yaml = out / "toy.yaml"
    yaml.write_text(
        f"data: {{dataset: toy, max_len: 16, num_workers: 1, batch_size: 32, label_text_file: names.tsv}}\n"
        f"model: {{encoder: {{encoder_model: {tiny_encoder}, embed_dropout: 0.0}}, ffi: {{fan_in: 12}}}}\n"
        "training: {optimization: {xmc_optimizer: adamw, encoder_lr: 2.0e-3, lr: 2.0e-2, epochs: 6, warmup_steps: 5}}\n"
    )
    train_here(
        [
            f"dataset={yaml}",
            f"dataset_path={toy_data}",
            f"output_dir={out}",
            f"data.cache_dir={out / 'cache'}",
            "log_fname=m",
        ]
    )
    return out / "m" / "model", [record for record in records_of(out / "m") if record["event"] == "evaluate"][-1]


def predict(model, *words, stdin=""):
    return run_here("launchers/predict.py", model, *words, stdin=stdin)


def evaluate(model, *words):
    return run_here("launchers/evaluate.py", model, *words)


def test_predict_reads_files_and_standard_input(model, tmp_path):
    folder, _ = model
    texts = ["w3 w60", "w7 w50 w51", "w11"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text, "more": 1}) + "\n" for text in texts))
    outputs = [
        predict(folder, tmp_path / "texts.txt", "-k", "3"),
        predict(folder, tmp_path / "texts.jsonl", "-k", "3"),
        predict(folder, "-k", "3", stdin="\n".join(texts)),
    ]
    done = predict(folder, tmp_path / "texts.txt", "-k", "3", "--output", tmp_path / "out.jsonl", "--batch_size", "2")
    assert done.returncode == 0 and done.stdout == ""
    assert all(output.returncode == 0 for output in outputs), outputs[0].stderr
    assert outputs[0].stdout == outputs[1].stdout == outputs[2].stdout
    records = [json.loads(line) for line in outputs[0].stdout.splitlines()]
    assert [record["text"] for record in records] == texts
    for record, expected in zip(records, (3, 7, 11)):
        assert (
            record["labels"][0]["id"] == f"tag{expected:02d}" and record["labels"][0]["text"] == f"name of {expected}"
        )
        scores = [label["score"] for label in record["labels"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and 0 <= scores[-1] <= scores[0] <= 1
    for line, record in zip((tmp_path / "out.jsonl").read_text().splitlines(), records):
        assert [label["id"] for label in json.loads(line)["labels"]] == [label["id"] for label in record["labels"]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("b.txt", b"w1\n\xff\n", "b.txt, line 2: not UTF-8"),
        ("a.txt", b"\xff\xfew\x001\x00", "a.txt, line 1: not UTF-8"),
        ("c.jsonl", b'{"text": "w1"}\n{"text": 3}\n', "c.jsonl, line 2: write an object"),
        ("f.json", b"[" * 100_000, "f.json, line 1: not valid JSON"),
        ("g.json", b'{"text": ' + b"9" * 5000 + b"}", "g.json, line 1: not valid JSON"),
        ("d.jsonl", b'{"text": "w1"\n', "d.jsonl, line 1: not valid JSON"),
        ("e.jsonl", b'{"text": "w1 \\ud83d"}\n', "e.jsonl, line 1: holds half of a surrogate pair"),
        (None, b"", "missing.txt: cannot be read (No such file"),
    ],
)
def test_predict_refuses_bad_input_and_writes_nothing(model, tmp_path, name, content, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    done = predict(model[0], path, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2 and not (tmp_path / "out.jsonl").exists()
    assert_one_line(done.stderr, message)


def assert_one_line(stderr: str, message: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and message in errors[0], stderr
    assert "Traceback" not in stderr


def test_evaluate_repeats_the_runs_metrics(model):
    folder, metrics = model
    done = evaluate(folder, "--json", "data.test_batch_size=7", "--samples=0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    logged = {name: value for name, value in metrics.items() if name in found}
    assert {name: found[name] for name in logged} == pytest.approx(logged, abs=1e-6) and len(logged) == 15
    done = evaluate(folder, "--samples=10")
    assert "most popular labels" in done.stdout and f"{100 * metrics['PSP@3']:.2f}" in done.stdout
    done = evaluate(folder, "model.ffi.fan_in=3")
    assert done.returncode == 2
    assert_one_line(done.stderr, "model.ffi.fan_in=3")


@pytest.fixture
def tied(model, tmp_path):
    """Return a copy of the trained model in which every third label always has the same score."""
    folder = tmp_path / "tied"
    shutil.copytree(model[0], folder)
    shard = folder / "head-00000-of-00001.safetensors"
    tensors = load_file(shard)
    tensors["weight"][::3] = 0.0
    tensors["bias"][::3] = -2.5
    save_file(tensors, shard)
    forge(folder)
    return folder


@pytest.mark.slow
def test_two_processes_evaluate_and_predict_as_one(tied, toy_data, tmp_path):
    """Also ties, filter pairs, and a rank without texts. The output is written once."""
    texts, labels = (
        (toy_data / "toy" / f"test_{kind}.txt").read_text().splitlines() for kind in ("raw_texts", "labels")
    )
    records = [instance(text, [int(tag[3:]) for tag in line.split()]) for text, line in zip(texts, labels)]
    inside = write_lf(
        tmp_path / "toy", records, records, [{"uid": f"tag{n:02d}", "title": f"w{n}", "content": ""} for n in range(41)]
    )
    (inside / "filter_labels_test.txt").write_text("".join(f"{row} {row % 41}\n" for row in range(len(records))))
    settings = [
        f"dataset_path={tmp_path}",
        "data.is_lf_data=true",
        "data.use_filter_eval=true",
        "data.label_text_file=null",
    ]
    (tmp_path / "some.txt").write_text("\n".join(texts[:5]) + "\n")
    scripts = [
        [
            "launchers/evaluate.py",
            str(tied),
            "--json",
            "--samples=0",
            "--threshold=0.2",
            "data.test_batch_size=20",
            *settings,
        ],
        # The second batch has one text.
        ["launchers/predict.py", str(tied), str(tmp_path / "some.txt"), "-k", "41", "--batch_size", "4"],
    ]
    here = [run_here(*words) for words in scripts]
    in_turn = json.dumps([[free_port(), *words] for words in scripts])
    there = launch(
        "torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "tests/distributed/scripts.py", in_turn
    )
    assert all(done.returncode == 0 for done in (*here, there)), there.stderr
    (found, *one), (found_by_two, *two) = (
        list(map(json.loads, output.splitlines())) for output in ("".join(done.stdout for done in here), there.stdout)
    )
    assert found_by_two == pytest.approx(found, rel=1e-12) and 0 < found["P@5"] < 1
    assert [record["text"] for record in two] == [record["text"] for record in one] == texts[:5]
    for left, right in zip(one, two):
        assert [label["id"] for label in right["labels"]] == [label["id"] for label in left["labels"]]
        assert [label["score"] for label in right["labels"]] == pytest.approx(
            [label["score"] for label in left["labels"]], rel=1e-5
        )
        alike = [label["id"] for label in left["labels"] if int(label["id"][3:]) % 3 == 0]
        assert alike == sorted(alike) and len(alike) == 14


def test_evaluate_refuses_other_labels(model, tmp_path):
    write_raw(tmp_path / "toy")
    (tmp_path / "toy" / "names.tsv").write_text("a\tname of a\n")
    done = evaluate(model[0], f"dataset_path={tmp_path}")
    assert done.returncode == 2
    assert_one_line(done.stderr, "has 3 labels, the model 41")


def test_evaluate_refuses_labels_of_other_names(model, toy_data, tmp_path):
    shutil.copytree(toy_data / "toy", tmp_path / "toy")
    for name in ("train_labels.txt", "test_labels.txt", "names.tsv"):
        path = tmp_path / "toy" / name
        path.write_text(path.read_text().replace("tag40", "aaa"))
    done = evaluate(model[0], f"dataset_path={tmp_path}")
    assert done.returncode == 2
    assert_one_line(done.stderr, "labels differ from the model's")


def test_predict_writes_all_or_nothing(model, tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"w1\n" * 4097 + b"\xff\n")
    done = predict(model[0], tmp_path / "texts.txt", "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2 and [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
    assert_one_line(done.stderr, "line 4098: not UTF-8")
    done = predict(model[0], tmp_path / "texts.txt", "--output", tmp_path / "texts.txt")
    assert done.returncode == 2 and (tmp_path / "texts.txt").stat().st_size > 4097


def test_predict_reads_lines_as_the_training_files_are_read(model, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfw3 w60\r\n\r\nw7\x00 w50\xc2\x85\n  \nw11")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    done = predict(model[0], tmp_path / "a.txt", "-k", "1")
    records = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert [record["text"] for record in records] == ["w3 w60", "", "w7\x00 w50\x85", "  ", "w11"]
    assert records[0]["labels"][0]["id"] == "tag03" and records[1]["labels"][0]["id"] == records[3]["labels"][0]["id"]
    for path in (tmp_path / "b.txt", os.devnull):
        done = predict(model[0], path)
        assert (done.returncode, done.stdout, done.stderr.endswith(f"{path}: no texts\n")) == (0, "", True)


def test_only_regular_files_are_replaced(model, tmp_path):
    (tmp_path / "texts.txt").write_text("w3\n")
    (tmp_path / "plain").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    for name in ("link", "pipe"):
        done = predict(model[0], tmp_path / "texts.txt", "-k", "1", "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    reader.join(timeout=60)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert [(tmp_path / "plain").read_text()] == read and json.loads(read[0])["text"] == "w3"
    for output, message in [
        ("/dev/full", "/dev/full: cannot be written (No space left on device)"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "out", "its folder does not exist"),
        (tmp_path / ("x" * 300), "cannot be written (File name too long)"),
        (tmp_path / "texts.txt", "is the input file"),
    ]:
        done = predict(model[0], tmp_path / "texts.txt", "--output", output)
        assert done.returncode == 2
        assert_one_line(done.stderr, message)
    assert not list(tmp_path.glob("*.partial"))


def test_print_config_and_refusals(toy_settings, tmp_path):
    train = "launchers/train.py"
    done = launch(sys.executable, train, "dataset=wordnet", "--print-config", "model.ffi.fan_in=32")
    assert done.returncode == 0 and "fan_in: 32" in done.stdout
    for done, message in [
        (launch(sys.executable, train, "dataset=wordnet", "model.ffi.fanin=3"), "fanin"),
        (run_here(train, *toy_settings, "data.folder=elsewhere"), "elsewhere: no such folder"),
        (run_here(train, *toy_settings, "--deepspeed_config", "nowhere.json"), "nowhere.json"),
    ]:
        assert done.returncode == 2, done.stderr
        assert_one_line(done.stderr, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_contradicting_launcher_options_are_refused(toy_settings, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads((ROOT / "ds_configs/zero2.json").read_text()) | {"gradient_clipping": 1.0}))
    accelerate = ["accelerate", "launch", "--main_process_port", free_port(), "--num_processes", "1"]
    for done, message in [
        (run_here("launchers/train.py", "--deepspeed_config", path, *toy_settings), "gradient_clipping=1.0 contradicts"),
        (launch(*accelerate, "--config_file", "launchers/accelerate_zero2.yaml", "--gradient_accumulation_steps", "4",
                "launchers/train.py", *toy_settings), "gradient_accumulation_steps=4, but"),
    ]:  # fmt: skip
        assert done.returncode and message in done.stderr, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_a_gpu(short, dtype):
    settings = [*short, "training.amp.enabled=true", f"training.amp.dtype={dtype}"]
    plain = curve(short, "python")
    for how in ("python", "accelerate-2", "deepspeed-3"):
        assert curve(settings, how) == pytest.approx(plain, rel=0.05), how
