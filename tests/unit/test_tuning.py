"""The fastest way is measured once and remembered; what the file holds is not trusted."""

from __future__ import annotations

import json

import pytest
import torch

from xmc_trainer.kernels import tuning


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Names in the order in which they were measured; a way "is" its own time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(tuning, "_milliseconds", lambda way, device: way())
    return []


def ask(measured, times, question="B = 3"):
    def trial(name):
        measured.append(name)
        return lambda: times[name]

    return tuning.fastest(question, list(times), trial, torch.device("cpu"))


def test_the_fastest_is_remembered_by_the_process_and_on_disk(measured, monkeypatch):
    times = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert ask(measured, times) == "b" and measured == ["a", "b", "c"]
    assert ask(measured, times) == "b" and len(measured) == 3
    monkeypatch.setattr(tuning, "_known", {})  # another process
    assert ask(measured, {"a": 0.0, "b": 1.0, "c": 2.0}) == "b" and len(measured) == 3
    assert ask(measured, times, "B = 4") == "b" and len(measured) == 6
    # With another set of ways the question is another one.
    assert ask(measured, {"a": 3.0, "c": 2.0}) == "c" and len(measured) == 8


@pytest.mark.parametrize("content", ["", "[1, 2]", "{broken", None])
def test_a_file_that_says_nothing_useful_is_replaced(measured, content):
    file = tuning.cache_folder() / "choices.json"
    file.parent.mkdir(parents=True)
    if content is None:
        ask([], {"a": 1.0, "b": 2.0})
        content = file.read_text().replace('"a"', '"no such way"')
        tuning._known.clear()
    file.write_text(content)
    assert ask(measured, {"a": 2.0, "b": 1.0}) == "b"
    assert list(json.loads(file.read_text()).values()) == ["b"]


@pytest.mark.parametrize("labels, bytes_a_label, free, tried", [
    (3 << 20, 768, 32 * 768 << 20, 1 << 20),  # a copy of a million labels is a 32nd of what is free
    (3 << 20, 768, (32 * 768 << 20) - 1, 1 << 18),
    (400_000, 768, 32 * 768 * 400_000, 400_000),
    (400_000, 768, 1 << 30, 1 << 18),
    (70_000, 768, 0, 70_000),
])  # fmt: skip
def test_ways_are_tried_on_as_many_labels_as_memory_allows(labels, bytes_a_label, free, tried, monkeypatch):
    triton_head = pytest.importorskip("xmc_trainer.kernels.triton_head", reason="the Triton backend needs triton")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    assert triton_head._trial_labels.__wrapped__(labels, bytes_a_label, torch.device("cuda")) == tried
