"""What libraries log and warn goes to the run's file, ours to the terminal."""

from __future__ import annotations

import logging
import warnings

import pytest

from xmc_trainer.library_log import _OURS, libraries_log_to


def test_what_libraries_say_is_kept_in_a_file(tmp_path, capsys):
    path = tmp_path / "run" / "run.log"
    library, later, ours = (logging.getLogger(name) for name in ("transformers.x", "DeepSpeed", "xmc_trainer.x"))
    top = logging.getLogger("transformers")
    before = list(top.handlers), top.propagate, warnings.showwarning
    with pytest.warns(UserWarning) as shown, libraries_log_to(path):
        library.error("early %d", 1)
        assert not path.exists()
        path.parent.mkdir()
        handler = logging.StreamHandler()  # as DeepSpeed adds one at its import
        later.addHandler(handler)
        later.error("later")
        warnings.warn_explicit("a library's warning", UserWarning, "/site-packages/lib.py", 1)
        warnings.warn_explicit("our own warning", UserWarning, f"{_OURS}/kernels/cuda/source.py", 1)
        ours.warning("a note")
    later.removeHandler(handler)
    assert (list(top.handlers), top.propagate, warnings.showwarning) == before and not later.filters
    lines = path.read_text().splitlines()
    assert lines[0].endswith("ERROR transformers.x: early 1") and lines[1].endswith("ERROR DeepSpeed: later")
    assert "a library's warning" in lines[2] and not any("our own" in line or "a note" in line for line in lines)
    said = capsys.readouterr().err
    assert (
        [str(each.message) for each in shown] == ["our own warning"] and "library" not in said and "later" not in said
    )
    with libraries_log_to(None):
        library.error("dropped")
    assert "dropped" not in path.read_text() + capsys.readouterr().err
