"""Encoders and decoders of many architectures: each trains, resumes, saves and predicts as before saving."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState

from tests.conftest import WORDS
from tests.data_helpers import tiny_tokenizer
from tests.encoders import save_encoder
from tests.integration.test_resume import CutAfter, PowerCut
from tests.integration.test_training import log_of
from xmc_trainer.builders.encoder import encoder_of, tokenizer_of
from xmc_trainer.builders.inputs import require_encoder
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.checkpoint.encoder_state import EncoderState
from xmc_trainer.config import load_config
from xmc_trainer.data.batches import padded_texts
from xmc_trainer.data.texts import encode_texts
from xmc_trainer.encoder.adapters import add_adapters
from xmc_trainer.encoder.flat import named_parts
from xmc_trainer.encoder.loading import load_backbone
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError
from xmc_trainer.model import XMCModel

_SIZE = {
    "vocab_size": WORDS + 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_DECODER = _SIZE | {"num_key_value_heads": 1, "head_dim": 16}
DECODERS = {
    "qwen2": (hf.Qwen2Model, hf.Qwen2Config, _DECODER),
    "qwen3": (hf.Qwen3Model, hf.Qwen3Config, _DECODER),
    "llama": (hf.LlamaModel, hf.LlamaConfig, _DECODER),
    "mistral": (hf.MistralModel, hf.MistralConfig, _DECODER | {"sliding_window": 8}),
    "gemma2": (hf.Gemma2Model, hf.Gemma2Config, _DECODER | {"query_pre_attn_scalar": 16}),
    "gemma3": (hf.Gemma3TextModel, hf.Gemma3TextConfig, _DECODER | {"query_pre_attn_scalar": 16}),
}
ENCODERS = {
    "modernbert": (hf.ModernBertModel, hf.ModernBertConfig, _SIZE | {"embedding_dropout": 0.0}),
    "roberta": (hf.RobertaModel, hf.RobertaConfig, _SIZE | {"pad_token_id": 1}),
    "t5": (hf.T5EncoderModel, hf.T5Config, {"vocab_size": WORDS + 4, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}),
}  # fmt: skip
EVERY = DECODERS | ENCODERS
TEXTS = ["w1 w2 w3", "w7", "", "w5 w1 w8 w9 w30 w31 w4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a tiny random model of each architecture, and a tokenizer."""
    root = tmp_path_factory.mktemp("architectures")
    for name, (model, config, arguments) in EVERY.items():
        torch.manual_seed(0)
        model(config(**arguments)).save_pretrained(root / name)
    tiny_tokenizer(WORDS).save_pretrained(root / "words")  # beside Qwen's config.json it would load as Qwen's class
    return root


def train(settings, name, **more):
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = build_trainer(load_config([*settings, f"log_fname={name}"]), **more)
    trainer.train()
    return trainer


def check_resume(settings, folder, **more):
    """Train, train again with an interruption, and predict. Returns the uninterrupted training."""
    settings = [
        *settings, f"model.encoder.encoder_model={folder}", f"model.encoder.encoder_tokenizer={folder.parent / 'words'}", "training.optimization.max_steps=4", "environment.device=cpu",
        "training.checkpoint_interval=2", "training.overwrite=false", "training.optimization.warmup_steps=1",
        "data.train_sample=160", "model.encoder.instruction=w3 w4",
    ]  # fmt: skip
    start = load_backbone(str(folder)).state_dict()
    whole = train(settings, "whole", **more)
    with pytest.raises(PowerCut):
        train(settings, "cut", hooks=[CutAfter(3)])
    again = train([*settings, "training.resume=true"], "cut")
    assert [record["step"] for record in log_of(again, "resume")] == [2]
    expected = whole.encoder_module.state_dict()
    for key, value in again.encoder_module.state_dict().items():
        assert torch.equal(value, expected[key]), key
    model = XMCModel.load(whole.run_folder / "model", "cpu")
    learned = model.saved.encoder.backbone.state_dict()
    assert learned.keys() == start.keys()
    changed = [key for key, value in start.items() if not torch.equal(value, learned[key])]
    assert sum("q" in key for key in changed) >= 2, changed  # in both layers
    encoder, tokenizer = whole.encoder_module.eval(), whole.tokenizer
    with torch.no_grad():
        features = encoder(**padded_texts(encode_texts(tokenizer, TEXTS, 16), tokenizer, 16)).numpy()
    assert model.embed(TEXTS) == pytest.approx(features, abs=1e-4)
    model.saved.tokenizer.init_kwargs.clear()  # of the instruction
    told = [f"w3 w4{text}" for text in TEXTS]
    assert model.embed(told) == pytest.approx(features, abs=1e-4)
    assert not model.embed(TEXTS) == pytest.approx(features, abs=1e-2)
    return whole


@pytest.mark.parametrize("name", EVERY)
def test_it_trains_resumes_saves_and_predicts_as_before(name, toy_settings, folders, fresh_accelerator):
    pool_mode = "last_token" if name in DECODERS else "last_hidden_avg"
    check_resume([*toy_settings, f"model.encoder.pool_mode={pool_mode}"], folders / name)


@pytest.mark.parametrize("name", EVERY)
def test_the_last_token_is_that_of_the_text_without_padding(name, folders):
    encoder = TextEncoder(load_backbone(str(folders / name)), pool_mode="last_token").eval()
    tokens, longest = [[5, 6, 7], [8], [9, 4, 11, 12, 13]], 7
    with torch.no_grad():
        alone = [
            encoder.backbone(torch.tensor([each]), torch.ones(1, len(each))).last_hidden_state[0, -1] for each in tokens
        ]
        for left in (False, True):
            if left and name in ENCODERS:  # with absolute positions, or local attention that sees padding
                continue
            ids, mask = torch.zeros(2, 3, longest, dtype=torch.int64)
            for row, each in enumerate(tokens):
                place = slice(longest - len(each), longest) if left else slice(len(each))
                ids[row, place], mask[row, place] = torch.tensor(each), 1
            torch.testing.assert_close(encoder(ids, mask), torch.stack(alone), rtol=1e-4, atol=1e-5)


def encoder_with(folders, name, *settings):
    config = load_config(["dataset=wordnet", f"model.encoder.encoder_model={folders / name}", "data.max_len=16",
                          "model.ffi.fan_in=8", "model.encoder.encoder_ftr_dim=null", *settings])  # fmt: skip
    return encoder_of(config, load_backbone(str(folders / name), for_cpu=True))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_attends_both_ways_on_request_and_stays_so(name, folders, tmp_path):
    with pytest.raises(UserError, match="pool_mode=last_nhidden_conlast: the first token of .*, a decoder, sees none"):
        encoder_with(folders, name, "model.encoder.pool_mode=last_nhidden_conlast")
    encoder_with(folders, name)  # the mean over tokens
    encoder = encoder_with(
        folders, name, "model.encoder.pool_mode=last_nhidden_conlast", "model.encoder.bidirectional=true"
    )
    encoder.save_pretrained(tmp_path, encoder.state_dict())
    ids = torch.tensor([[4, 5, 6, 7]])
    whole = encoder.eval()(ids, torch.ones_like(ids))
    backbone = load_backbone(str(tmp_path), saved=True)
    for kind in ("eager", "sdpa") if backbone._supports_sdpa else ("eager",):
        backbone.set_attn_implementation(kind)
        again = TextEncoder(backbone, pool_mode="last_nhidden_conlast").eval()
        torch.testing.assert_close(again(ids, torch.ones_like(ids)), whole, rtol=1e-4, atol=1e-5)
        other = again(ids.flip(1).roll(1, 1), torch.ones_like(ids))  # 4 7 6 5
        assert not torch.allclose(other, whole, rtol=1e-3)


# Adapters -------------------------------------------------------------------------------------------------------------

LORA = ["model.encoder.lora_rank=2", "model.encoder.lora_dropout=0.1", "training.optimization.encoder_lr=0.1"]


def test_only_adapters_are_trained_and_kept(toy_settings, folders, fresh_accelerator):
    settings = [*toy_settings, *LORA, "model.encoder.lora_target=q_proj, down_proj", "model.encoder.pool_mode=last_token",
                "training.checkpoints_kept=2"]  # fmt: skip
    kept = []

    class Look(CutAfter):
        def on_step_end(self, trainer):
            if trainer.state.step == 2:
                kept.extend(named_parts(trainer.accelerator.unwrap_model(trainer.encoder)))
                kept.append(dict(EncoderState(trainer.accelerator, trainer.encoder, trainer.optimizer).tensors()))

    trainer = check_resume(settings, folders / "llama", hooks=[Look(99)])
    *parts, tensors = kept
    # A rank of 2, over 32 to 32 features in each q_proj and 64 to 32 in each down_proj, of two layers.
    assert sum(whole.numel() for whole, _ in parts) == 2 * (2 * (32 + 32) + 2 * (64 + 32))
    assert len(tensors) == 3 * 8 and all("lora_" in name for name in tensors)  # weights, and Adam's two states
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == 640


@pytest.mark.parametrize("name", ["qwen2", "modernbert", "t5", "gpt2", "bert"])
def test_merged_adapters_compute_the_same(name, folders, tmp_path):
    folder = folders / name if name in EVERY else save_encoder(name, tmp_path / "source")
    encoder = TextEncoder(load_backbone(str(folder)), pool_mode="last_token").eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    plain = encoder(ids, torch.ones_like(ids))
    add_adapters(encoder.backbone, rank=3, alpha=6, dropout=0.5, target="all-linear")
    torch.testing.assert_close(encoder.eval()(ids, torch.ones_like(ids)), plain)
    trained = [(key, p) for key, p in encoder.named_parameters() if p.requires_grad]
    assert all(".lora_" in key and "pooler" not in key for key, _ in trained)
    with torch.no_grad():
        for _, parameter in trained:
            parameter.normal_(0, 0.1)
    adapted = encoder(ids, torch.ones_like(ids))
    assert not torch.allclose(adapted, plain, rtol=1e-2)
    encoder.save_pretrained(tmp_path / "merged", encoder.state_dict())
    again = TextEncoder(load_backbone(str(tmp_path / "merged"), saved=True), pool_mode="last_token").eval()
    torch.testing.assert_close(again(ids, torch.ones_like(ids)), adapted, rtol=1e-4, atol=1e-5)


def test_adapters_that_cannot_be_are_refused(folders, monkeypatch):
    with pytest.raises(
        UserError, match="lora_target=q_proj,up: LlamaModel has no layer whose name ends in up; correct it"
    ):
        encoder_with(folders, "llama", "model.encoder.lora_rank=2", "model.encoder.lora_target=q_proj,up")
    with pytest.raises(UserError, match="lora_target=norm: not for LlamaModel"):
        encoder_with(folders, "llama", "model.encoder.lora_rank=2", "model.encoder.lora_target=norm")
    with pytest.raises(UserError, match="lora_alpha=4: has no effect with model.encoder.lora_rank=0"):
        load_config(["dataset=wordnet", "model.encoder.lora_alpha=4"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(["dataset=wordnet", "model.encoder.lora_rank=2"])
    with pytest.raises(UserError, match=r"model.encoder.lora_rank: needs the package peft; .* 'xmc_trainer\[lora\]'"):
        require_encoder(config)


def test_what_a_backbone_cannot_do_is_refused(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, kind in (("gemma2", "sdpa"), ("qwen2", "flash_attention_2")):
        with pytest.raises(
            UserError, match=f"model.encoder.attn_implementation={kind}: .* cannot use it here"
        ) as error:
            encoder_with(folders, name, f"model.encoder.attn_implementation={kind}", "training.amp.enabled=true")
        assert str(error.value).isprintable()
    assert (
        encoder_with(folders, "llama", "model.encoder.attn_implementation=sdpa").backbone.config._attn_implementation
        == "sdpa"
    )
    with pytest.raises(UserError, match="flash_attention_2: computes in 16 bits only"):
        load_config(
            ["dataset=wordnet", "model.encoder.attn_implementation=flash_attention_2", "training.amp.enabled=false"]
        )
    monkeypatch.setattr("xmc_trainer.builders.encoder.attend_both_ways", lambda backbone: None)
    with pytest.raises(UserError, match="bidirectional=true: LlamaModel .* cannot attend to later tokens"):
        encoder_with(folders, "llama", "model.encoder.bidirectional=true")
    config = load_config(["dataset=wordnet", f"model.encoder.encoder_model={folders / 'llama'}", "data.max_len=4",
                          f"model.encoder.encoder_tokenizer={folders / 'words'}", "model.encoder.instruction=w1 w2 w3 w4"])  # fmt: skip
    with pytest.raises(UserError, match="instruction: leaves no room for a text in the 4 tokens of data.max_len"):
        tokenizer_of(config)
