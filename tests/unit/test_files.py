"""Which files are replaced atomically, and which are appended to."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from xmc_trainer.files import CannotWrite, remove, replacing, settle, write_text


def test_an_open_file_keeps_its_content(tmp_path: Path) -> None:
    # /dev/stdout after `>> all.jsonl`: replacing that file would lose its content.
    file, link = tmp_path / "all.jsonl", tmp_path / "link"
    file.write_text("before\n")
    with open(file, "a") as opened:
        link.symlink_to(f"/dev/fd/{opened.fileno()}")
        for path in (Path(f"/dev/fd/{opened.fileno()}"), link):
            with replacing(path) as out:
                out.write("after\n")
        assert file.read_text() == "before\nafter\nafter\n"
        file.unlink()  # the file was deleted
        write_text(link, "more\n")
    assert os.listdir(tmp_path) == ["link"]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("old")
    file.chmod(0o600)
    with replacing(file) as out:
        assert [stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()] == [0o600, 0o600]
        out.write("new")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o600)


def test_circular_links_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CannotWrite, match="correct the circular links"):
        write_text(tmp_path / "a", "text")
    assert all(path.is_symlink() for path in tmp_path.iterdir())


def test_removing_a_linked_folder_removes_only_the_link(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    for name in ("checkpoint-1", "checkpoint-1.removed", "checkpoint-2.old", "checkpoint-2"):
        (run / name).symlink_to(elsewhere)
    remove([run / "checkpoint-1"])
    settle(run, re.compile("checkpoint-.*"))
    assert os.listdir(run) == ["checkpoint-2"] and os.listdir(elsewhere) == ["file"]
