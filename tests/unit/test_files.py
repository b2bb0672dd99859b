"""Files that are replaced, and those that are not."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from xmc_trainer.files import CannotWrite, remove, replacing, settle, write_text


def test_file_that_is_open_already_keeps_what_it_holds(tmp_path: Path) -> None:
    # /dev/stdout after `>> all.jsonl`: to replace that file would lose what it holds.
    file, link = tmp_path / "all.jsonl", tmp_path / "link"
    file.write_text("before\n")
    with open(file, "a") as opened:
        link.symlink_to(f"/dev/fd/{opened.fileno()}")
        for path in (Path(f"/dev/fd/{opened.fileno()}"), link):
            with replacing(path) as out:
                out.write("after\n")
        assert file.read_text() == "before\nafter\nafter\n"
        file.unlink()  # it has no name any more
        write_text(link, "more\n")
    assert os.listdir(tmp_path) == ["link"]


def test_replaced_file_is_as_secret_as_before(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("old")
    file.chmod(0o600)
    with replacing(file) as out:
        assert [stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()] == [0o600, 0o600]
        out.write("new")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o600)


def test_links_in_a_circle_are_said(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CannotWrite, match="correct the circular links"):
        write_text(tmp_path / "a", "text")
    assert all(path.is_symlink() for path in tmp_path.iterdir())


def test_of_a_link_in_a_folders_place_the_link_alone_is_removed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    for name in ("checkpoint-1", "checkpoint-1.removed", "checkpoint-2.old", "checkpoint-2"):
        (run / name).symlink_to(elsewhere)
    remove([run / "checkpoint-1"])
    settle(run, re.compile("checkpoint-.*"))
    assert os.listdir(run) == ["checkpoint-2"] and os.listdir(elsewhere) == ["file"]
