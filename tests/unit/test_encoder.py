"""The encoder's optimizer groups, whole and as ZeRO-3 leaves them, and weights from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xmc_trainer.encoder import TextEncoder, load_backbone, load_state_dict_file
from xmc_trainer.errors import UserError


def test_matrices_decay_and_vectors_do_not_at_every_stage(tiny_encoder: Path):
    encoder = TextEncoder(load_backbone(str(tiny_encoder)), penultimate_size=8, penultimate_activation="relu")
    groups = encoder.parameter_groups(1e-4, 1e-2, 0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-4, 0.01), (1e-4, 0.0), (1e-2, 0.01), (1e-2, 0.0)]
    assert all(p.ndim > 1 for group in groups[::2] for p in group["params"])
    assert all(p.ndim == 1 for group in groups[1::2] for p in group["params"])
    members = [[id(p) for p in group["params"]] for group in groups]
    for parameter in encoder.parameters():  # what DeepSpeed does to them
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert [[id(p) for p in group["params"]] for group in encoder.parameter_groups(1e-4, 1e-2, 0.01)] == members


def test_state_dicts_are_loaded_safely_or_refused(tiny_encoder, tmp_path):
    source = load_backbone(str(tiny_encoder))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()} | {"classifier": torch.ones(3)}
    # Older versions of transformers saved these; they are counted, not trained.
    state["encoder.embeddings.position_ids"] = torch.arange(24)[None]
    state["encoder.pooler.extra"] = torch.ones(3)
    torch.save(state, tmp_path / "ngame.pt")
    save_file(state, tmp_path / "ngame.safetensors")
    for name in ("ngame.pt", "ngame.safetensors"):
        target = load_backbone(str(tiny_encoder))
        load_state_dict_file(target, str(tmp_path / name), "encoder.")
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), key

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    name = next(iter(source.state_dict()))
    torch.save(state | {f"encoder.{name}": torch.ones(2)}, tmp_path / "shape.pt")
    torch.save(state | {"encoder.encoder.layer.2.output.dense.bias": torch.ones(32)}, tmp_path / "deeper.pt")
    torch.save({}, tmp_path / "nothing.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty.safetensors").touch()
    target = load_backbone(str(tiny_encoder))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for file, prefix, message in [
        ("ngame.pt", "", "ngame_key_prefix"),
        ("shape.pt", "encoder.", r"has the shape \[2\]"),
        ("evil.pt", "", "not a file of tensors"),
        ("broken.pt", "", "not a file of tensors"),
        ("missing.pt", "", "No such file"),
        ("deeper.pt", "encoder.", "1 weights that the encoder does not have, such as encoder.encoder.layer.2.output"),
        ("nothing.pt", "", "holds no weights"),
        ("empty.pt", "", "the file is empty"),
        ("empty.safetensors", "", "the file is empty"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_state_dict_file(target, str(tmp_path / file), prefix)
        assert str(error.value).isprintable(), file  # one line, without the colours of torch's messages
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
