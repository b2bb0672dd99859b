"""The encoder: architectures, complete weights, no foreign code, optimizer groups, and state dict files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data_helpers import tiny_tokenizer
from tests.encoders import DECODERS, READ, REFUSED, WORDS, save_encoder
from xmc_trainer.builders.encoder import tokenizer_of
from xmc_trainer.config import load_config
from xmc_trainer.encoder.loading import (
    check_padding_is_hidden,
    check_tokens_fit,
    load_backbone,
    load_state_dict_file,
    load_tokenizer,
    sees_later_tokens,
)
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError

# Architectures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ | DECODERS)
def test_an_encoder_loads_completely_and_survives_saving(name, tmp_path):
    backbone = load_backbone(str(save_encoder(name, tmp_path / "a")), for_cpu=True)
    encoder = TextEncoder(backbone, pool_mode="last_nhidden_conlast", feature_layers=2)
    check_padding_is_hidden(encoder, 16, name)
    assert sees_later_tokens(backbone) == (name in READ)
    encoder.save_pretrained(tmp_path / "b", encoder.state_dict())
    again = load_backbone(str(tmp_path / "b"), saved=True)
    assert type(again) is type(backbone) and "decoder" not in " ".join(again.state_dict())
    written = load_file(tmp_path / "a" / "model.safetensors").values()
    assert again.state_dict().keys() == backbone.state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[key]), key
        assert value.ndim < 2 or any(torch.equal(value, own) for own in written), (
            key
        )  # no weight was initialised at random


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_read_masked_texts_are_refused(name, tmp_path):
    said = {
        "fnet": "takes no attention_mask",
        "vit": "takes no input_ids",
        "convbert": "padding changes a text.s features",
        "bart decoder": "lack .* of the encoder.s",
    }
    with pytest.raises(UserError, match=said[name]):
        encoder = TextEncoder(load_backbone(str(save_encoder(name, tmp_path))))
        check_padding_is_hidden(encoder, 16, name)


# Weights --------------------------------------------------------------------------------------------------------------


def renamed(folder: Path, rename) -> None:
    """Rename the weights of a folder; None drops one."""
    state = load_file(folder / "model.safetensors")
    save_file(
        {rename(name): value for name, value in state.items() if rename(name)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "encoder.", "module._orig_mod.", "model.encoder.", "_orig_mod.module.encoder.bert."],
)
@pytest.mark.parametrize("name", ["bert", "t5 encoder"])
def test_a_prefix_of_all_weights_is_stripped_with_a_message(name, prefix, tmp_path, capsys):
    plain = load_backbone(str(save_encoder(name, tmp_path))).state_dict()
    assert capsys.readouterr().out == ""
    renamed(tmp_path, lambda weight: prefix + weight)
    found = load_backbone(str(tmp_path)).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in plain.items() if "pooler" not in key)
    assert prefix in capsys.readouterr().out


def test_missing_weights_are_never_initialised_at_random(tmp_path):
    folder = str(tmp_path)
    for rename, message in [
        (lambda name: None if "layer.1.output.dense" in name else name, "lack 2 of the encoder's .* weights, such as encoder.layer.1.output.dense.bias"),
        (lambda name: f"x.{name}" if "layer.0" in name else f"y.{name}", "lack .*they hold others, such as x.encoder"),
        (lambda name: name.replace("embeddings", "embedded"), "lack 5 of"),
    ]:  # fmt: skip
        save_encoder("bert", tmp_path)
        renamed(tmp_path, rename)
        for saved in (False, True):
            with pytest.raises(UserError, match=message):
                load_backbone(folder, saved=saved)
    save_encoder("bert", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    two = {f"{prefix}{name}": value for name, value in state.items() for prefix in ("query.", "passage.")}
    save_file({name: value.clone() for name, value in two.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lack .* such as passage"):  # ambiguous
        load_backbone(folder)
    save_encoder("bert", tmp_path)
    renamed(tmp_path, lambda name: None if "pooler" in name else name)
    load_backbone(folder)  # the encoder's pooler is not used
    save_file(state | {"embeddings.LayerNorm.weight": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"embeddings.LayerNorm.weight has the shape \[3\], and \[16\] according to config.json"
    ):
        load_backbone(folder)


@pytest.mark.parametrize("file, content", [("model.safetensors", b""), ("model.safetensors", b"x" * 99), ("config.json", b"{"), ("config.json", b"[]"),
                                           ("config.json", b'{"model_type": "bert", "hidden_size": "a"}'), ("config.json", b'{"model_type": "none"}'),
                                           ("config.json", b"\xff")])  # fmt: skip
def test_damaged_files_are_a_one_line_error(file, content, tmp_path):
    save_encoder("bert", tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded|lack") as error:
        load_backbone(str(tmp_path))
    assert str(error.value).isprintable()


def test_a_tokenizer_and_max_len_must_fit_the_encoder(tmp_path):
    words = {"tokenizer_is": "T", "max_len_is": "M"}
    for name, longest in (("bert", 26), ("roberta", 24), ("bart", 24), ("xlnet", 10**6), ("t5", 10**6)):
        backbone = load_backbone(str(save_encoder(name, tmp_path / name)))
        check_tokens_fit(backbone, tiny_tokenizer(WORDS), longest, **words)
        if longest < 10**6:
            with pytest.raises(UserError, match=f"M: the encoder reads at most {longest} tokens"):
                check_tokens_fit(backbone, tiny_tokenizer(WORDS), longest + 1, **words)
        grown = tiny_tokenizer(WORDS)
        grown.add_tokens(["<new>"])
        with pytest.raises(UserError, match="T: its token '<new>' has the id 64, but the encoder has only 64"):
            check_tokens_fit(backbone, grown, 8, **words)


def test_a_penultimate_layer_is_complete_or_refused(tmp_path):
    backbone = load_backbone(str(save_encoder("bert", tmp_path / "a")))
    encoder = TextEncoder(backbone, penultimate_size=8)
    encoder.save_pretrained(tmp_path / "b", encoder.state_dict())
    again = TextEncoder(backbone, penultimate_size=8)
    again.load_penultimate(tmp_path / "b")
    assert torch.equal(again.penultimate[0].weight, encoder.penultimate[0].weight)
    with pytest.raises(UserError, match="penultimate.safetensors: does not hold the penultimate layer"):
        TextEncoder(backbone, penultimate_size=9).load_penultimate(tmp_path / "b")
    with pytest.raises(UserError, match="penultimate.safetensors: does not hold the penultimate layer"):
        again.load_penultimate(tmp_path / "a")


# Foreign code --------------------------------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Config(BertConfig):
    model_type = "evil"
class Model(BertModel):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """Return a folder of an encoder and a tokenizer that bring code, while standard input answers yes to every question."""
    folder = save_encoder("bert", tmp_path / "hostile")
    tiny_tokenizer(WORDS).save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "was_run")))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 99)))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["evil", "bert"])
def test_code_that_comes_with_a_model_is_not_run(hostile, tmp_path, kind, saved):
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": [None, "evil.Words"]}
    change(hostile / "config.json", model_type=kind, auto_map=names, architectures=["Model"])
    change(hostile / "tokenizer_config.json", auto_map=names, tokenizer_class="Words")
    for load in (load_backbone, load_tokenizer):
        try:
            load(str(hostile), saved=saved)
        except UserError as error:
            assert (
                "comes with Python code, which is not run; " in str(error)
                and ("`trust_remote_code`=true" in str(error)) != saved
            )
            assert kind == "evil" or load is load_tokenizer
    assert not (tmp_path / "was_run").exists()
    if kind == "evil" and not saved:
        load_backbone(str(hostile), trust_remote_code=True)  # on request
        assert (tmp_path / "was_run").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_pickled_weights_run_no_code(hostile, tmp_path, saved):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    (hostile / "model.safetensors").unlink()
    torch.save({"embeddings.LayerNorm.weight": Evil()}, hostile / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(hostile), saved=saved)
    assert not (tmp_path / "was_run").exists()


# Optimizer groups and state dict files --------------------------------------------------------------------------------


def test_only_matrices_decay_at_every_stage(tiny_encoder: Path):
    encoder = TextEncoder(load_backbone(str(tiny_encoder)), penultimate_size=8, penultimate_activation="relu")
    groups = encoder.parameter_groups(1e-4, 1e-2, 0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-4, 0.01),
        (1e-4, 0.0),
        (1e-2, 0.01),
        (1e-2, 0.0),
    ]
    assert all(p.ndim > 1 for group in groups[::2] for p in group["params"])
    assert all(p.ndim == 1 for group in groups[1::2] for p in group["params"])
    members = [[id(p) for p in group["params"]] for group in groups]
    for parameter in encoder.parameters():  # as DeepSpeed does
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert [[id(p) for p in group["params"]] for group in encoder.parameter_groups(1e-4, 1e-2, 0.01)] == members


def test_state_dicts_are_loaded_safely_or_refused(tiny_encoder, tmp_path):
    source = load_backbone(str(tiny_encoder))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()} | {"classifier": torch.ones(3)}
    # Older versions of transformers saved these position counters; they are no weights.
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
        ("evil.pt", "", "is damaged or holds more than tensors"),
        ("broken.pt", "", "is damaged or holds more than tensors"),
        ("missing.pt", "", "No such file"),
        ("deeper.pt", "encoder.", "1 weights that the encoder does not have, such as encoder.encoder.layer.2.output"),
        ("nothing.pt", "", "holds no weights"),
        ("empty.pt", "", "the file is empty"),
        ("empty.safetensors", "", "the file is empty"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_state_dict_file(target, str(tmp_path / file), prefix)
        assert str(error.value).isprintable(), file  # one line, without the terminal codes of torch's messages
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_a_missing_tokenizer_names_the_setting_that_was_given(tmp_path):
    for field in ("encoder_model", "encoder_tokenizer"):
        config = load_config(["dataset=wordnet", f"model.encoder.{field}={tmp_path / 'none'}"])
        with pytest.raises(UserError, match=f"model.encoder.{field}={tmp_path / 'none'}: "):
            tokenizer_of(config)
