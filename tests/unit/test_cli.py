"""The command `xmc-trainer`: its commands, exit statuses and one-line errors."""

from __future__ import annotations

import csv
import errno
import importlib
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xmc_trainer import signals
from xmc_trainer.builders.data import corpus_of
from xmc_trainer.builders.encoder import tokenizer_of
from xmc_trainer.commands.cli import COMMANDS, main, run
from xmc_trainer.config import load_config
from xmc_trainer.data import corpus
from xmc_trainer.errors import NothingToDo


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["xmc-trainer", *words])
    main()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, monkeypatch, capsys):
    assert not inspect.signature(importlib.import_module(COMMANDS[name][0]).main).parameters
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, *name.split(), "--help")
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: xmc-trainer {name} ")
    assert f"xmc-trainer {name}" in rest or f"xmc_trainer {name}" in rest  # an example


@pytest.mark.parametrize("words, message", [
    (["trian"], "no such command 'trian'; write train\n"), (["bench", "haed"], "no such command 'bench haed'; write bench head\n"),
    (["xyz"], "no such command 'xyz'\n"), ([], "name a command\n"), (["bench"], "name a command of bench\n"),
])  # fmt: skip
def test_an_unknown_command_lists_the_known_ones(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *words)
    err = capsys.readouterr().err
    group = "bench " if words[:1] == ["bench"] else ""
    assert message in err and all(f"\n  {name} " in err for name in COMMANDS if name.startswith(group))
    call(monkeypatch, *group.split(), "--help")
    out = capsys.readouterr().out
    assert err.endswith(out) and ("train  " in out.replace("bench train", "")) != bool(group)


def test_the_shell_completes_commands_options_settings_and_choices(monkeypatch, capsys):
    call(monkeypatch, "completion", "bash")
    typed = {
        "tr": ["train"], "bench h": ["head"], "train --z": ["--zero"], "train dataset=wik": ["wiki31k", "wiki500k"],
        "train seed=1 model.ffi.fan_": ["model.ffi.fan_in="], "adjust m training.evaluation.eval_p": ["training.evaluation.eval_psp="],
        "plan model.ffi.index_init=d": ["discriminant"], "train data.is_lf_data=": ["true", "false"], "train my": [], "doctor model.f": [], "train data.source=my\\ da": [],
    }  # fmt: skip
    script = (
        capsys.readouterr().out
        + """
        COMP_CWORD=0
        for COMP_LINE; do
            word="${COMP_LINE##*[!\\\\] }"; COMP_POINT=${#COMP_LINE} COMP_WORDS=("${word##*=}") COMPREPLY=(); _xmc_trainer; echo ${COMPREPLY[*]}
        done"""
    )
    words = [f"xmc-trainer {line}" for line in typed]
    done = subprocess.run(["bash", "-uc", script, "-", *words], text=True, capture_output=True)
    assert done.stderr == "" and [line.split() for line in done.stdout.splitlines()] == list(typed.values())


@pytest.mark.parametrize("words, processes, config", [
    (["--gpus", "4"], "4", "zero2.json"), (["--gpus", "2", "--zero", "3"], "2", "zero3.json"), (["--zero", "0"], "1", "zero0.json"),
    (["--gpus", "2", "--deepspeed_config", "mine.json"], "2", "mine.json"),
])  # fmt: skip
def test_train_starts_the_deepspeed_launcher(words, processes, config, toy_settings, monkeypatch):
    started = []

    def execv(path, command):
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    for name in ("RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, "train", *toy_settings, *words, "log_fname=a")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, "train", *toy_settings, *words, "log_fname=a")
    chosen = started.pop()
    assert chosen[chosen.index("--include") + 1] == "localhost:" + ",".join("7531"[: int(processes)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, "train", *toy_settings, *words, "log_fname=a", "environment.device=cpu")
    command, on_cpu = started
    for each in (command, on_cpu):
        assert each[each.index("--num_gpus") + 1] == processes
    given = Path(command[command.index("--deepspeed_config") + 1])
    assert given.name == config and command[-len(toy_settings) - 1 :] == [*toy_settings, "log_fname=a"]
    if config != "mine.json":
        assert given.read_bytes() == (Path(__file__).parents[2] / "ds_configs" / config).read_bytes()


@pytest.mark.parametrize("words, rank, message", [
    (["--gpus", "0"], None, "--gpus=0: must be at least 1"), (["--gpus", "3"], None, "CUDA_VISIBLE_DEVICES=0,1 names 2 GPUs"), (["--gpus", "2"], "0", "a launcher has started this process already"),
    (["--zero", "1", "--deepspeed_config", "x.json"], None, "--zero: --deepspeed_config names the ZeRO stage"),
    (["--gpus", "2", "model.ffi.fan_in=0"], None, "model.ffi.fan_in=0: must be in"),
])  # fmt: skip
def test_train_refuses_words_before_it_launches(words, rank, message, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "train", "dataset=wordnet", *words)
    assert message in capsys.readouterr().err


def test_settings_are_listed(monkeypatch, capsys):
    call(monkeypatch, "settings")
    out = capsys.readouterr().out
    assert "model.ffi.fan_in = 128   in [1, 65536]\n" in out and "training.seed = 42   in [0, 4294967295]\n" in out


def test_a_user_error_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "clusters", "dataset=nothing")
    assert capsys.readouterr().err.startswith("error: dataset=nothing: no such data set")


def test_prepare_makes_the_cache_that_a_training_opens(toy_settings, monkeypatch, tmp_path, capsys):
    settings = [*toy_settings, f"data.cache_dir={tmp_path / 'cache'}"]
    monkeypatch.setattr(sys, "argv", ["xmc-trainer", "prepare", *settings, "--csv", str(tmp_path / "p.csv")])
    main()
    assert "training and" in capsys.readouterr().out and len(list((tmp_path / "cache").iterdir())) == 1
    (row,) = csv.DictReader((tmp_path / "p.csv").open(newline=""))
    assert int(row["all_peak_mib"]) > 50 and float(row["tokenised_texts_s"]) > 0
    monkeypatch.setattr(corpus, "tokenised", None)  # the cache has everything
    config = load_config(settings)
    assert len(corpus_of(config, tokenizer_of(config)).labels) > 0


def test_commands_run_in_one_process(monkeypatch, capsys):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "clusters", "dataset=wordnet")
    assert (
        "xmc-trainer clusters: runs in one process, but 2 were started; start it without a launcher"
        in capsys.readouterr().err
    )


def test_a_closed_pipe_ends_the_command_quietly():
    """As with `xmc-trainer settings | head -1`, with more output than a pipe buffers."""
    code = "from xmc_trainer.commands.cli import run; run(lambda: print('x' * 10**6))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 141


def test_another_broken_pipe_keeps_its_traceback(capsys):
    def broken():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run(broken)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/run"),
            2,
            "error: /out/run: No space left on device; free some space\n",
        ),
        (
            RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
            2,
            "error: lost the other ranks (",
        ),
        (signals.Interrupted(signal.SIGUSR1, "after step 7"), 128 + signal.SIGUSR1, "SIGUSR1: ended after step 7\n"),
        (NothingToDo("done before"), 0, ""),
    ],
)
def test_user_and_system_errors_are_one_line(error, status, message, capsys):
    def fail():
        raise error

    try:
        run(fail)
        ended = 0
    except SystemExit as end:
        ended = end.code
    err = capsys.readouterr().err
    assert ended == status and err.startswith(message) and err.count("\n") == bool(message)


def test_a_bug_keeps_its_traceback():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(fail)
