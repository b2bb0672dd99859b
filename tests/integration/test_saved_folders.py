"""Damaged, forged and hostile models and checkpoints give a one-line error, or load as saved."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fuzz import examples
from tests.integration.test_resume import new_process
from tests.saved_folders import forge, no_file_longer_than
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.checkpoint import resume
from xmc_trainer.checkpoint.folder import read_folder
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.checkpoint.model_manifest import MODEL
from xmc_trainer.checkpoint.resume import CHECKPOINT, restore
from xmc_trainer.checkpoint.saved_model import load_model
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError
from xmc_trainer.files import CannotWrite
from xmc_trainer.hooks import Hook
from xmc_trainer.model import XMCModel
from xmc_trainer.run_folder import RunFolder, find_checkpoint
from xmc_trainer.trainer import Trainer

TEXTS = ["w3 w60 w61", "w7 w12", "w40 w50 w51 w52"]


class SaveAll(Hook):
    """Save a model and a checkpoint of the same step."""

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step == 6:
            trainer.save(trainer.run_folder / "model")
            resume.save(trainer, kept=1)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def saved(toy_settings_in, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Return a trainer, its settings, and a folder in memory with the model and the checkpoint that it wrote."""
    new_process()
    own = [
        "model.ffi.growth_mode=gradient",
        "model.ffi.growth_batches=2",
        "model.ffi.prune_mode=fraction",
        "model.ffi.group_size=4",
    ]
    own += ["model.ffi.head_ratio=0.2", "model.ffi.head_fan_in=20", "model.penultimate.use_penultimate_layer=true"]
    words = [*toy_settings_in(tmp_path_factory.mktemp("saved")), *own, "model.penultimate.penultimate_size=24"]
    trainer = build_trainer(load_config(words), hooks=[SaveAll()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        shutil.copytree(trainer.run_folder / "model", Path(folder, "model"))
        shutil.copytree(find_checkpoint(trainer.run_folder), Path(folder, "checkpoint"))
        yield SimpleNamespace(trainer=trainer, folder=Path(folder), settings=words)
    new_process()


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return shutil.copytree(saved.folder / "model", tmp_path / "model")


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return shutil.copytree(saved.folder / "checkpoint", tmp_path / "checkpoint")


def outcome(folder: Path) -> list:
    return XMCModel.load(folder, "cpu").predict(TEXTS, k=3)


def message_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", ["model", "checkpoint"])
def test_a_flipped_bit_is_refused_or_changes_nothing(saved, what):
    """Any bit of any file; half of the cases are in the manifest."""
    folder, random = saved.folder / what, Random(what)
    kind, expected = (MODEL, outcome(folder)) if what == "model" else (CHECKPOINT, None)
    manifest = read_folder(folder, kind)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    refused = 0
    for _ in range(examples(2000)):
        path = folder / "manifest.json" if random.random() < 0.5 else random.choice(files)
        data = bytearray(contents[path])
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        try:
            # A checkpoint is determined by its manifest and by the files whose checksums the manifest holds.
            assert read_folder(folder, kind) == manifest
            assert expected is None or outcome(folder) == expected
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            refused += 1
        finally:
            path.write_bytes(contents[path])
    assert refused > 0.9 * examples(2000)


def entries_of(value, at=()) -> list[tuple]:
    """Yield the path of every entry of a manifest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in inner for place in ((*at, key), *entries_of(child, (*at, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([-1, 0, 1, 41, 10**12, 1 << 63, 1e300, "", "..", "../x", "/etc/passwd", "head-00000-of-00001.safetensors", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.parametrize("what, signed", [("model", True), ("model", False), ("checkpoint", True)])
def test_a_forged_entry_is_refused_or_loads(saved, what, signed):
    """With a valid digest; and in the previous format, which has none."""
    folder = saved.folder / what
    path = folder / "manifest.json"
    content, plain = path.read_bytes(), json.loads(path.read_bytes())
    del plain["manifest_sha256"]
    places = entries_of(plain)

    @settings(max_examples=examples(200), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(places), JSON, st.sampled_from(["replace", "remove", "add"]))
    def run(place, value, how):
        def change(manifest):
            for key in place[:-1]:
                manifest = manifest[key]
            if how == "add" and isinstance(manifest, dict):
                manifest["another\none"] = value
            elif how == "remove":
                del manifest[place[-1]]
            else:
                manifest[place[-1]] = value

        begin = time.monotonic()
        try:
            if signed:
                forge(folder, change)
            else:
                manifest = json.loads(json.dumps(plain)) | {"format": 3}
                change(manifest)
                path.write_text(json.dumps(manifest))
            outcome(folder) if what == "model" else restore(folder, saved.trainer)
        except UserError as error:
            assert "\n" not in str(error)
        finally:
            path.write_bytes(content)
        assert time.monotonic() - begin < 5

    run()


def shards(change):
    """Return a change of a split head's first shard."""
    return lambda manifest: change(manifest["heads"][0]["shards"][0])


HEAD = "head-00000-of-00001.safetensors"
FORGERIES = {
    "no checksums": (lambda m: m["sha256"].clear(), "has no checksum for config.yaml"),
    "no checksum of a head": (lambda m: m["sha256"].pop(HEAD), f"has no checksum for {HEAD}"),
    "outside": (shards(lambda s: s.update(file=f"../model/{HEAD}")), "must be the name of a file in this folder"),
    "absolute": (shards(lambda s: s.update(file="/etc/passwd")), "must be the name of a file in this folder"),
    "a file above": (lambda m: m["sha256"].update({"../x": "0" * 64}), "must be the name of a file in this folder"),
    "labels left out": (shards(lambda s: s.update(labels=[0, 4])), "must be F32 [4, 20]"),
    "no shards": (lambda m: m["heads"][0].update(shards=[]), "its files have 0 of 8 labels"),
    "labels twice": (lambda m: m["heads"][1].update(shards=m["heads"][1]["shards"] * 2), "must begin at 33"),
    "more labels": (
        lambda m: m["heads"][1]["arguments"].update(num_labels=100),
        "has the labels 0 to 33 of 100, but must begin at 0 and end between groups of 4",
    ),
    "a trillion labels": (
        lambda m: m["heads"][1]["arguments"].update(num_labels=10**12),
        "has the labels 0 to 33 of 1000000000000",
    ),
    "a trillion rows": (
        lambda m: (
            m["heads"][1]["arguments"].update(num_labels=10**12),
            m["heads"][1]["shards"][0].update(labels=[0, 10**12]),
        ),
        "weight is F32 [33, 12], must be F32 [1000000000000, 12]",
    ),
    "other groups": (
        lambda m: m["heads"][1]["arguments"].update(group_size=2),
        "index is I16 [9, 12], must be I16 [17, 12]",
    ),
    "other numbers": (lambda m: m["heads"][0]["arguments"].update(weight_dtype="bfloat16"), "must be BF16"),
    "one head": (lambda m: m["heads"].pop(0), "the unknown tensor 'frequent."),
    "other features": (
        lambda m: [head["arguments"].update(in_features=32) for head in m["heads"]],
        "has 24 features, the head needs 32",
    ),
    "other format": (lambda m: m.update(format=99), "has format 99, but this version reads 3 and 4 of a saved model"),
    "a number as text": (
        lambda m: m.update(max_len="16"),
        'max_len must be a whole number from 1 to 9007199254740991, not "16"',
    ),
    "ten million layers": (
        lambda m: m["encoder"].update(feature_layers=10**7),
        "the encoder has fewer than 10000000 layers",
    ),
    "an entry more": (lambda m: m.update({"more\nof": 1}), r'"more\nof" is unknown'),
    "true as a number": (lambda m: m.update(step=True), "step must be a whole number"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_model_is_refused_before_anything_is_made(model, name):
    change, said = FORGERIES[name]
    forge(model, change)
    assert said in message_of(load_model, model)


def test_forged_and_foreign_files_are_refused(model, tmp_path):
    tensors = load_file(model / HEAD)
    tensors["index"][-1, -1] = 24
    save_file(tensors, model / HEAD)
    forge(model)
    assert "its index names features beyond the 24 of the encoder" in message_of(load_model, model)
    tensors["index"][-1, -1] = 23
    save_file(tensors | {"more": torch.zeros(1)}, model / HEAD)
    forge(model)
    assert "a head's file holds the unknown tensor 'more'" in message_of(load_model, model)
    save_file(tensors, model / HEAD)
    forge(model)
    load_model(model)
    (model / "notes.txt").write_text("ours, and read by nobody")
    load_model(model)
    (model / HEAD).rename(tmp_path / "elsewhere")
    (model / HEAD).symlink_to(tmp_path / "elsewhere")
    assert f"{HEAD}: is a link out of the folder" in message_of(load_model, model)


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_no_file_of_a_model_or_checkpoint_runs_code(model, checkpoint, saved, tmp_path):
    proof = tmp_path / "code ran"
    evil = pickle.dumps(Evil(proof))
    (model / "encoder" / "pytorch_model.bin").write_bytes(evil)
    assert "pytorch_model.bin: is not part of what was saved" in message_of(load_model, model)
    digest = hashlib.sha256(evil).hexdigest()
    forge(model, lambda manifest: manifest["sha256"].update({"encoder/pytorch_model.bin": digest}))
    assert "pytorch_model.bin: may hold code" in message_of(load_model, model)
    yaml = f"data: !!python/object/apply:os.mkdir [{proof}]\n"
    for folder in (model, checkpoint):
        (folder / "config.yaml").write_text(yaml)
        forge(folder)
    message_of(config_of_model, model, [])
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    shutil.move(checkpoint, run / "checkpoint-6")
    again = load_config([*saved.settings, "training.resume=true", f"output_dir={run.parent}"])
    assert "config.yaml, line 1: data: is a section" in message_of(RunFolder, again, saved.trainer.ranks)
    for name in ("encoder.safetensors", HEAD, "recent.safetensors"):
        folder = shutil.copytree(saved.folder / "checkpoint", tmp_path / name)
        (folder / name).write_bytes(evil)
        forge(folder)
        message_of(restore, folder, saved.trainer)
    assert not proof.exists()


def test_an_endless_manifest_is_not_read(model):
    (model / "manifest.json").unlink()
    (model / "manifest.json").symlink_to("/dev/zero")
    assert "manifest.json: is not a regular file" in message_of(load_model, model)


def test_settings_of_a_model_are_verified_before_they_are_read(model):
    (model / "config.yaml").write_text("data: [not, verified")
    assert "config.yaml: is damaged" in message_of(config_of_model, model, [])


def test_a_model_of_the_previous_format_loads(model):
    expected = outcome(model)
    forge(model, lambda manifest: manifest.update(format=3))
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "manifest_sha256"}))
    assert outcome(model) == expected
    (model / "manifest.json").write_text(
        json.dumps({k: v for k, v in manifest.items() if k != "manifest_sha256"} | {"format": 4})
    )
    assert "damaged, its digest is missing" in message_of(load_model, model)


def test_a_full_disk_is_a_one_line_error_and_keeps_the_old_folder(saved, tmp_path):
    """The disk takes files up to every size, from zero, whichever library writes them."""
    trainer = saved.trainer
    saved_again, checkpoint = tmp_path / "model", find_checkpoint(trainer.run_folder)
    trainer.save(saved_again)
    before = {
        path: path.read_bytes() for folder in (saved_again, checkpoint) for path in folder.rglob("*") if path.is_file()
    }
    sizes = sorted({max(len(content) - 1, 0) for content in before.values()})
    failed = 0
    for size in sizes:
        for folder, write in (
            (saved_again, lambda: trainer.save(saved_again)),
            (checkpoint, lambda: resume.save(trainer, kept=1)),
        ):
            try:
                with no_file_longer_than(size):
                    write()
            except CannotWrite as error:
                assert (
                    f"{folder}" in str(error)
                    and "cannot be written (File too large)" in str(error)
                    and "\n" not in str(error)
                )
                failed += 1
                assert all(
                    path.read_bytes() == content for path, content in before.items() if path.is_relative_to(folder)
                )
            assert not folder.with_name(folder.name + ".partial").exists()
    assert failed > len(sizes)
