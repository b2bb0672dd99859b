"""Tiny encoders with random weights, one per architecture, and untrained saved models with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset

from tests.data_helpers import tiny_tokenizer
from xmc_trainer.checkpoint.saved_model import save_model
from xmc_trainer.encoder.loading import load_backbone
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.head import SGD, FixedFanInHead

WORDS = 60
_VOCABULARY = WORDS + 4
_BERT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 26,
}
_BART = {
    "vocab_size": _VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 24,
    "tie_word_embeddings": True,
}
_T5 = {"vocab_size": _VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
_XLNET = {"vocab_size": _VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}

# name -> class and configuration
READ = {
    "bert": (hf.BertModel, hf.BertConfig, _BERT),
    "roberta": (hf.RobertaModel, hf.RobertaConfig, _BERT | {"pad_token_id": 1}),
    "xlnet": (hf.XLNetModel, hf.XLNetConfig, _XLNET),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, _T5),
    "t5 encoder": (hf.T5EncoderModel, hf.T5Config, _T5),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, _BART),
    "longformer": (hf.LongformerModel, hf.LongformerConfig, _BERT | {"attention_window": 4, "pad_token_id": 1}),
    "deberta": (
        hf.DebertaV2Model,
        hf.DebertaV2Config,
        _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "big bird": (hf.BigBirdModel, hf.BigBirdConfig, _BERT | {"block_size": 1, "num_random_blocks": 1}),
}
DECODERS = {
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"vocab_size": _VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "llama": (hf.LlamaModel, hf.LlamaConfig, _BERT),
    "bert decoder": (hf.BertModel, hf.BertConfig, _BERT | {"is_decoder": True}),
}
REFUSED = {
    "bart decoder": (hf.BartForCausalLM, hf.BartConfig, _BART),
    "fnet": (hf.FNetModel, hf.FNetConfig, {name: _BERT[name] for name in _BERT if name != "num_attention_heads"}),
    "vit": (
        hf.ViTModel,
        hf.ViTConfig,
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    ),
    "convbert": (
        hf.ConvBertModel,
        hf.ConvBertConfig,
        _BERT | {"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3},
    ),
}


def save_encoder(name: str, folder: Path, **more: Any) -> Path:
    """Save an encoder without a tokenizer. Its weights are large, so that every token influences every feature."""
    model, config, arguments = (READ | DECODERS | REFUSED)[name]
    torch.manual_seed(0)
    made = model(config(**arguments | more))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    made.save_pretrained(folder)
    return folder


def save_untrained(
    name: str, folder: Path, *, pool_mode: str = "last_hidden_avg", labels: int = 7, **tokenizer: Any
) -> Path:
    """Save a model with an encoder of `READ`. Args: tokenizer: attributes of the tokenizer, such as padding_side."""
    encoder = TextEncoder(load_backbone(str(save_encoder(name, folder / "source"))), pool_mode=pool_mode)
    words = tiny_tokenizer(WORDS)
    for attribute, value in tokenizer.items():
        setattr(words, attribute, value)
    head = FixedFanInHead(16, labels, fan_in=5, optimizer=SGD(), seed=1)
    head.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_model(
        folder / "model",
        encoder=encoder,
        encoder_state=encoder.state_dict(),
        tokenizer=words,
        head=head,
        labels=Dataset.from_dict(
            {"id": [f"tag{n}" for n in range(labels)], "text": [f"name of {n}" for n in range(labels)]}
        ),
        max_len=20,
        step=0,
        config_yaml="dataset: toy\n",
    )
    return folder / "model"
