"""Reports of synthetic runs: how they are grouped and named, and what is plotted."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from xmc_trainer.commands.report import against, main
from xmc_trainer.commands.runs import curve, find_runs, lines_of
from xmc_trainer.config import load_config, to_yaml
from xmc_trainer.errors import UserError


@pytest.fixture
def make_run(tmp_path):
    def make(name, *words, scores=(0.1, 0.3), end=True):
        config = load_config(
            ["dataset=wordnet", "dataset_path=d", f"output_dir={tmp_path}", f"log_fname={name}", *words]
        )
        config.run_folder.mkdir()
        (config.run_folder / "config.yaml").write_text(to_yaml(config))
        names = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5")
        log = [
            {
                "event": "start",
                "head_bytes": 3 << 20,
                "device": "x",
                "torch": "2",
                "version": "0",
                "commit": "c",
                "seconds": 0,
            }
        ]
        for step, score in enumerate(scores, 1):
            log.append({"event": "step", "step": step, "loss": 1.0, "seconds": 0})
            log.append(
                {"event": "evaluate", "split": "test", "step": step, "seconds": 60 * step} | dict.fromkeys(names, score)
            )
        log += [{"event": "end", "seconds": 200}] if end else []
        (config.run_folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))

    return make


def test_seeds_make_a_line_and_differences_name_it(make_run, tmp_path):
    make_run("a", "training.seed=1")
    make_run("b", "training.seed=2", "training.evaluation.test_evaluate_every=7", scores=(0.2, 0.5, 0.6))
    make_run("c", "training.seed=1", "model.ffi.fan_in=32", "training.optimization.lr=0.5")
    make_run("unfinished", end=False)
    (tmp_path / "other").mkdir()
    lines = lines_of(find_runs([tmp_path]))
    assert [[run.folder.name for run in runs] for runs in lines.values()] == [["a", "b"], ["c"]]
    assert list(lines)[1] == "fan_in=32, lr=0.5"
    for old, new in ("a", "narrow-1"), ("b", "narrow-2"), ("c", "wide"):
        (tmp_path / old).rename(tmp_path / new)
    assert list(lines_of(find_runs([tmp_path]))) == ["narrow", "wide"]
    assert len(find_runs([tmp_path, tmp_path / "wide"])) == 3  # a run counts once
    minutes, values = curve(next(iter(lines.values())), "P@1")
    assert minutes.tolist() == [1, 2]
    np.testing.assert_allclose(values, [[10, 30], [20, 50]])


def test_a_metric_against_a_setting(make_run, tmp_path):
    for fan_in, seed, score in [(64, 1, 0.4), (16, 1, 0.1), (16, 2, 0.3)]:
        make_run(f"r{fan_in}-{seed}", f"model.ffi.fan_in={fan_in}", f"training.seed={seed}", scores=(score,))
    runs = find_runs([tmp_path])
    lines = lines_of(runs, ("model.ffi.fan_in",))
    assert list(lines) == ["r16, r64"]  # one line, named after all its folders
    values, mean, bounds = against(runs, "model.ffi.fan_in", "PSP@1")
    assert values.tolist() == [16, 64]
    np.testing.assert_allclose(mean, [20, 40])
    np.testing.assert_allclose(bounds, [[10, 40], [30, 40]])
    make_run("dense-1", "model.ffi.use_sparse_layer=false", "model.ffi.fan_in=16", "training.seed=1", scores=(0.6,))
    values, mean, _ = against(find_runs([tmp_path]), "model.ffi.use_sparse_layer", "P@1")
    assert values.tolist() == ["False", "True"]
    np.testing.assert_allclose(mean, [60, 80 / 3])


def test_the_command_prints_and_plots(make_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    make_run("a", "training.seed=1")
    make_run("b", "training.seed=2", scores=(0.2, 0.5))
    make_run("c", "training.seed=1", "model.ffi.fan_in=32")
    files = [tmp_path / "curves.svg", tmp_path / "against.png"]
    words = [str(tmp_path), "--curves", str(files[0]), "--against", "model.ffi.fan_in", "--picture", str(files[1])]
    monkeypatch.setattr(sys, "argv", ["report", *words])
    main()
    out = capsys.readouterr().out
    assert "| fan_in=64 | 2 | 40.00 ± 14.14 |" in out
    assert "<svg" in files[0].read_text() and files[1].read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--curves", str(tmp_path / "curves.docx")])
    with pytest.raises(UserError, match="curves.docx: unknown ending .docx; use"):
        main()
    make_run("d", "training.seed=1", "model.ffi.index_init=informed")
    words = [str(tmp_path), "--against", "model.ffi.index_init", "--picture", str(tmp_path / "words.svg")]
    monkeypatch.setattr(sys, "argv", ["report", *words])
    main()
    assert (
        "discriminant" in (tmp_path / "words.svg").read_text()
    )  # matplotlib writes the text as a comment beside the glyph outlines


def test_runs_that_cannot_be_reported_are_errors(make_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no finished run"):
        find_runs([tmp_path])
    make_run("a", scores=())
    for words, message in [([], "has no evaluation"), (["--curves", "x.svg"], "a: was evaluated without PSP")]:
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), *words])
        with pytest.raises(UserError, match=message):
            main()
    make_run("b")
    for words, message in [(["--against", "model.fan_in", "--picture", "x.svg"], "not every run has this setting")]:
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "b"), *words])
        with pytest.raises(UserError, match=message):
            main()


def test_an_axis_needs_a_setting_that_differs(make_run, tmp_path, monkeypatch):
    make_run("a")
    make_run("b", "model.ffi.fan_in=32")
    words = ["report", str(tmp_path), "--against", "training.optimization.lr", "--picture", str(tmp_path / "x.svg")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="optimization.lr: is 0.002 in every run"):
        main()


def test_unfinished_logs_are_skipped_and_damaged_ones_named(make_run, tmp_path):
    make_run("whole")
    make_run("damaged")
    log = tmp_path / "damaged" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for torn in (b'{"event": "en', b"", b"\xff\n", b"[" * 10_000, b'{"event": "end"}\n', b"7\n"):
        log.write_bytes(b"".join(lines[:-1]) + torn)
        assert [run.folder.name for run in find_runs([tmp_path])] == ["whole"]
    for number, line, said in [
        (1, b'{"event": "st', "line 1: is not a log record"),
        (1, b"\xff", "line 1: is not a log record"),
        (1, b'{"event": "start", "head_bytes": "many"}', "line 1: its start record has no valid head_bytes"),
        (3, b"[]", "line 3: is not a log record"),
        (3, b'{"event": ["evaluate"]}', "line 3: is not a log record"),
        (
            3,
            b'{"event": "evaluate", "split": "test", "step": 1, "seconds": 1, "P@1": null}',
            "line 3: its evaluate record has no valid P@1",
        ),
        (
            3,
            b'{"event": "evaluate", "split": "test", "step": 1, "seconds": 1, "P@1": 1, "PSP@1": "x"}',
            "no valid PSP@1",
        ),
    ]:
        log.write_bytes(b"".join([*lines[: number - 1], line + b"\n", *lines[number:]]))
        with pytest.raises(UserError, match=said) as error:
            find_runs([tmp_path])
        assert str(log) in str(error.value)
    log.write_bytes(b"".join(lines))
    for content, said in (
        (b"\xff", "config.yaml, line 1: not UTF-8"),
        (b"a: [", "config.yaml, line 1: not valid YAML"),
        (b"a: 1", "has no training.seed"),
    ):
        (tmp_path / "damaged" / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=said):
            find_runs([tmp_path])
