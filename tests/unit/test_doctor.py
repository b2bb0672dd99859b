"""`xmc-trainer doctor` and `--version`: correct for this machine, and complete when a library is broken."""

from __future__ import annotations

import importlib.metadata
import sys

import torch

from xmc_trainer import __version__
from xmc_trainer.commands import doctor
from xmc_trainer.commands.cli import main


def test_the_page_shows_versions_and_backends(monkeypatch, capsys):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr(sys, "argv", ["xmc-trainer", "doctor"])
    main()
    page = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in page.splitlines() if not line.startswith(("backend", "GPU")))
    assert lines["xmc_trainer"] == __version__ and lines["torch"] == importlib.metadata.version("torch")
    for name in ("deepspeed", "pyyaml", "pyarrow", "safetensors"):
        assert lines[name] == importlib.metadata.version(name)
    assert lines["NCCL_SOCKET_IFNAME"] == "eth7" and "secret" not in page  # the page is pasted in public
    auto = next(line for line in page.splitlines() if line.startswith("backend auto"))
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in page and "the GPU kernels" in auto
    else:
        assert "runs reference (there is no usable GPU)" in auto and "none usable" in page
    assert "error" not in lines


def test_a_missing_or_broken_library_has_a_line(monkeypatch, tmp_path):
    assert doctor.library_version("xmc-trainer-has-no-such-library") == "not installed: pip install --editable ."
    (tmp_path / "halfinstalled.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    info = tmp_path / "halfinstalled-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halfinstalled\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = doctor.library_version("halfinstalled")
    assert said == "1.2, cannot be imported: libcudart.so.12: cannot open shared object file"


def test_a_failing_section_does_not_hide_the_rest(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    page = list(doctor.report())
    assert ("error", "RuntimeError: driver too old") in page and page[-1][0] != "error"
    assert any(name == "commit" for name, _ in page)


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["xmc-trainer", "--version"])
    main()
    assert capsys.readouterr().out == f"xmc-trainer {__version__}\n"


def test_compilers_are_found_on_the_path():
    assert doctor.compiler_version("python3", "Python").startswith(f"Python {sys.version_info.major}.")
    assert doctor.compiler_version("no-such-compiler", "") == "not found on PATH"
