"""The text encoder: any Hugging Face AutoModel, pooled to one feature vector a text."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
from transformers.utils.logging import disable_progress_bar

from xmc_trainer.errors import UserError, reason

# What a state dict may hold beyond the encoder: a pooler, for pooling is ours, and positions, which older versions of
# transformers saved although they are counted, not trained.
_LEFT_OUT = re.compile(r"^pooler\.|(^|\.)(position_ids|token_type_ids|inv_freq)$")
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "none": nn.Identity}


class TextEncoder(nn.Module):
    """Backbone, pooling, dropout, and optionally a penultimate layer.

    Args:
        backbone: of `load_backbone`.
        pool_mode: "last_hidden_avg", the mean of the last layer over the text's tokens, or "last_nhidden_conlast", the
            first token of the last `feature_layers` layers, the last layer first.
        penultimate_size: width of a linear layer with `penultimate_activation` after the dropout; None: no such layer.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        pool_mode: str = "last_hidden_avg",
        feature_layers: int = 1,
        embed_dropout: float = 0.0,
        penultimate_size: int | None = None,
        penultimate_activation: str = "relu",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool_mode, self.feature_layers = pool_mode, feature_layers
        self.penultimate_activation = penultimate_activation
        self.dropout = nn.Dropout(embed_dropout)
        self.pooled_features: int = backbone.config.hidden_size * feature_layers
        self.penultimate = None
        if penultimate_size is not None:
            activation = _ACTIVATIONS[penultimate_activation]()
            self.penultimate = nn.Sequential(nn.Linear(self.pooled_features, penultimate_size), activation)
        self.out_features: int = penultimate_size or self.pooled_features

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [b, T] token ids and 0/1 mask -> features [b, out_features] in the backbone's dtype."""
        pooled = self.dropout(self.pool(input_ids, attention_mask))
        return pooled if self.penultimate is None else self.penultimate(pooled)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The same before dropout and penultimate layer: [b, pooled_features]."""
        if self.pool_mode == "last_hidden_avg":
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[:, :, None].to(hidden.dtype)
            return (hidden * mask).sum(1) / mask.sum(1)
        if self.feature_layers == 1:
            # Asking for all layers' makes transformers set up hooks, which a compiler cannot see through.
            return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return torch.cat([out.hidden_states[-1 - n][:, 0] for n in range(self.feature_layers)], dim=-1)

    def parameter_groups(self, encoder_lr: float, penultimate_lr: float, weight_decay: float) -> list[dict]:
        """Optimizer groups: weight decay on matrices, none on biases and norms; the penultimate layer's own rate."""
        parts: list[tuple[nn.Module, float]] = [(self.backbone, encoder_lr)]
        if self.penultimate is not None:
            parts.append((self.penultimate, penultimate_lr))
        groups = []
        for module, lr in parts:
            params = [p for p in module.parameters() if p.requires_grad]
            # ZeRO-3 leaves empty vectors in place of the parameters, which remember their shapes.
            matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in params]
            for chosen, decay in (
                ([p for p, decays in zip(params, matrix) if decays], weight_decay),
                ([p for p, decays in zip(params, matrix) if not decays], 0.0),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
        return groups

    def save_pretrained(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write backbone (Hugging Face layout) and penultimate layer as safetensors.

        Args: state: this module's full state dict; under ZeRO the module itself holds only a share of it.
        """
        prefix = "backbone."
        backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.backbone.save_pretrained(folder, state_dict=backbone)
        rest = {name: value.contiguous() for name, value in state.items() if not name.startswith(prefix)}
        if rest:
            save_file(rest, folder / "penultimate.safetensors")

    def load_penultimate(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote beside the backbone. UserError if it is another layer's, or none."""
        if self.penultimate is None:
            return
        path = folder / "penultimate.safetensors"
        try:
            state = load_file(path)
            self.penultimate.load_state_dict({k.removeprefix("penultimate."): v for k, v in state.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{path}: does not hold the penultimate layer ({reason(error)}); save the model again"
            ) from None


def _load(loader: Any, name: str, where: str, trust_remote_code: bool, saved: bool, **options: Any) -> Any:
    """What `loader.from_pretrained` gives. UserError, which begins with `where`, for whatever a folder or the hub does to it."""
    disable_progress_bar()  # its bars are of a second's work, here and when saving
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        # The hub would be asked, and waited for; its ids have two parts at most.
        raise UserError(f"{where}: no such folder; name one that holds the model, or a hub id")
    try:
        # Left out, transformers would ask on standard input whether to run the code.
        return loader.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # what the libraries raise for a damaged file is of many kinds
        if "trust_remote_code" in str(error):
            remedy = "train an encoder of a kind that transformers knows" if saved else (
                "to run it in this training set model.encoder.trust_remote_code=true, else choose another encoder"
            )  # fmt: skip
            raise UserError(f"{where}: brings Python code of its own, which is not run; {remedy}") from None
        raise UserError(
            f"{where}: cannot be loaded; name a folder that holds the model, or a hub id that is reachable or in the local "
            f"Hugging Face cache ({reason(error)})"
        ) from error


def load_backbone(
    name: str, *, for_cpu: bool = False, trust_remote_code: bool = False, saved: bool = False
) -> PreTrainedModel:
    """The encoder of a folder or hub id, in float32; of an encoder-decoder its encoder alone.

    Args:
        for_cpu: it will be trained on a CPU.
        trust_remote_code: run Python code that comes with it.
        saved: `name` is a folder of `TextEncoder.save_pretrained`, which holds safetensors only.
    Raises UserError if it is not to be had (offline, for example), is not an encoder of texts, or if its files lack weights.
    """
    where = name if saved else f"model.encoder.encoder_model={name}"
    config = _load(AutoConfig, name, where, trust_remote_code, saved)
    _check_reads_both_ways(config, where)
    loader = _encoder_class(config) or AutoModel
    backbone = _load_whole(loader, name, where, trust_remote_code, saved)
    if loader is AutoModel and getattr(config, "is_encoder_decoder", False):
        backbone = backbone.get_encoder()
    _check_inputs(backbone, where)
    if getattr(backbone, "attention_type", None) == "block_sparse":
        # BigBird's first short batch would turn it off for all that follow: what a text gets would depend on what came before.
        big_bird: Any = backbone
        big_bird.set_attention_type("original_full")
    if for_cpu:
        # The backward pass of torch's fused attention takes as long as the rest of the encoder on a CPU (2.13).
        backbone.set_attn_implementation("eager")
    if getattr(backbone, "pooler", None) is not None:
        # Pooling is ours: this layer would wait for a gradient that never comes. It stays, so that what is saved is whole.
        backbone.pooler.requires_grad_(False)
    return backbone


def backbone_without_weights(
    name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The encoder that `load_backbone` would load, with the shapes of its config.json alone: no file of weights is read.

    Call it where tensors take no memory, such as under FakeTensorMode. Args and errors: as of `load_backbone`.
    """
    where = f"model.encoder.encoder_model={name}"
    config = _load(AutoConfig, name, where, trust_remote_code, False)
    _check_reads_both_ways(config, where)
    loader = _encoder_class(config) or AutoModel
    make = loader._from_config if hasattr(loader, "_from_config") else loader.from_config
    backbone = make(config, dtype=dtype)
    if loader is AutoModel and getattr(config, "is_encoder_decoder", False):
        backbone = backbone.get_encoder()
    _check_inputs(backbone, where)
    if getattr(backbone, "attention_type", None) == "block_sparse":
        backbone.set_attention_type("original_full")
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler.requires_grad_(False)
    return backbone


def _check_reads_both_ways(config: PreTrainedConfig, where: str) -> None:
    """UserError for a decoder alone, in which a token does not see those after it."""
    kind = config.model_type
    listed = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        or kind in ("xlnet", "bert-generation")
    )
    # Of a model that transformers does not know, the name of its class is all there is.
    named = kind not in CONFIG_MAPPING_NAMES and any("CausalLM" in name for name in config.architectures or ())
    told = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    both_ways = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    if (listed or named or told) and not both_ways:
        raise UserError(
            f"{where}: a decoder ({kind}), in which a word does not see those that follow; name an encoder, such as a "
            "BERT, or an encoder-decoder, such as a T5, of which the encoder is taken"
        )


def _encoder_class(config: PreTrainedConfig) -> Any:
    """What loads the encoder of an encoder-decoder without the decoder, where its files allow it."""
    if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return None
    if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return AutoModelForTextEncoding
    if not (config.architectures or [""])[0].endswith("Encoder"):
        return None
    with torch.device("meta"):  # one that we saved, whose class has no name in transformers' lists
        return type(AutoModel.from_config(config, trust_remote_code=False).get_encoder())


def _load_whole(loader: Any, name: str, where: str, trust_remote_code: bool, saved: bool) -> PreTrainedModel:
    """The model with every weight from its files, which transformers would make up at random where it is missing."""
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if saved:
        options["use_safetensors"] = True
    backbone, found = _load(loader, name, where, trust_remote_code, saved, **options)
    missing = _own(backbone, found["missing_keys"])
    prefixes = _prefixes(missing, found["unexpected_keys"])
    if len(prefixes) == 1:
        (prefix,) = prefixes
        if os.environ.get("RANK", "0") == "0":
            print(f"{where}: its weights are named {prefix}...; loaded without that prefix", flush=True)
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        backbone, found = _load(loader, name, where, trust_remote_code, saved, **options)
        missing = _own(backbone, found["missing_keys"])
    if missing:
        others = sorted(found["unexpected_keys"])
        like = f"; it has others, such as {others[0]}" if others else ""
        raise UserError(
            f"{where}: its files lack {len(missing)} of the encoder's {len(backbone.state_dict())} weights, such as "
            f"{missing[0]}{like}: name the folder of a whole model, saved with the names that transformers gives"
        )
    if found["error_msgs"]:
        raise UserError(
            f"{where}: its weights are not those of its config.json ({found['error_msgs'][0].splitlines()[0]})"
        )
    wrong = [key for key in found["mismatched_keys"] if not _LEFT_OUT.search(key[0])]
    if wrong:
        weight, shape, own = wrong[0]
        raise UserError(
            f"{where}: {weight} has the shape {list(shape)} in its files, by config.json it is {list(own)}; use the "
            "config.json that was saved with these weights"
        )
    return backbone


def _own(backbone: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those that a file must hold: not what is left out, nor what is the same tensor as another."""
    tied = backbone.all_tied_weights_keys
    return sorted(name for name in names if name not in tied and not _LEFT_OUT.search(name))


def _prefixes(missing: list[str], unexpected: Collection[str]) -> set[str]:
    """What may stand in front of all missing names (`module.`, `_orig_mod.`, `encoder.` ...); of two encoders in a file two."""
    if not missing:
        return set()
    names = set(unexpected)
    found = {name.removesuffix(missing[0]) for name in names if name.endswith(f".{missing[0]}")}
    return {prefix for prefix in found if all(prefix + name in names for name in missing)}


def _check_inputs(backbone: PreTrainedModel, where: str) -> None:
    """UserError for what does not read token ids with a mask, or does not say how wide its output is."""
    read = inspect.signature(backbone.forward).parameters
    lacks = [name for name in ("input_ids", "attention_mask") if name not in read]
    if lacks or not isinstance(getattr(backbone.config, "hidden_size", None), int):
        what = f"takes no {' and no '.join(lacks)}" if lacks else "has no hidden_size in config.json"
        raise UserError(
            f"{where}: {type(backbone).__name__} {what}; name an encoder of texts that reads token ids and a mask of them"
        )


def check_tokens_fit(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    tokenizer_is: str,
    max_len_is: str,
) -> None:
    """UserError where the tokenizer has ids that the encoder has no embedding for, or a text can be longer than it reads.

    Args: tokenizer_is, max_len_is: how the message begins; for example "data.max_len=128".
    """
    longest = getattr(backbone.config, "max_position_embeddings", None) or -1  # -1: XLNet's word for any length
    padding = getattr(getattr(backbone, "embeddings", None), "padding_idx", None)
    if longest > 0 and padding is not None:
        longest -= padding + 1  # RoBERTa's count their positions from there
    if 0 < longest < max_len:
        raise UserError(f"{max_len_is}: this encoder reads at most {longest} tokens")
    table = backbone.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if highest >= table.num_embeddings:
        raise UserError(
            f"{tokenizer_is}: its token {token!r} is number {highest}, and the encoder has embeddings of {table.num_embeddings} "
            "tokens, counted from 0; take the tokenizer that was saved with the encoder"
        )


# Of texts of different lengths in one batch, float32 on any device: rounding stays far below, and a pad that is seen far above.
_PADDING_TOLERANCE = 1e-3


@torch.no_grad()
def check_padding_is_hidden(encoder: TextEncoder, longest: int, where: str) -> None:
    """UserError for an encoder whose features of a text depend on what it is padded to, such as one with convolutions.

    Its weights must be whole. Args: longest: 3 or more, tokens that it can read.
    """
    training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    size = min(longest, 16)
    tokens = torch.arange(size, device=device).remainder(4).repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[0, size // 3 :] = 0
    alone, padded = encoder.pool(tokens[:1, : size // 3], mask[:1, : size // 3]), encoder.pool(tokens, mask)[:1]
    encoder.train(training)
    if alone.shape[1] != encoder.pooled_features:
        raise UserError(f"{where}: gives {alone.shape[1]} features, by config.json it is {encoder.pooled_features}")
    if not (alone - padded).norm() <= _PADDING_TOLERANCE * alone.norm():  # nan is refused too
        raise UserError(
            f"{where}: {type(encoder.backbone).__name__} gives a text other features where it is padded, so that scores would "
            "depend on the batch; name another encoder"
        )


def load_state_dict_file(backbone: PreTrainedModel, path: str, key_prefix: str) -> None:
    """Replace a backbone's weights by those of a state dict (of NGAME, for example), in place.

    Args: path: .safetensors, or a file of torch.save that holds nothing but tensors: no code in it is ever run.
        key_prefix: entries without it are left out; it is stripped from the others.
    Raises UserError unless every weight of the backbone that is trained is there, in the right shape, and no other.
    """
    field = f"model.encoder.ngame_checkpoint={path}"
    try:
        empty = not Path(path).stat().st_size
        state = (
            {}
            if empty
            else load_file(path)
            if path.endswith(".safetensors")
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise UserError(f"{field}: {error.strerror or error}") from None
    except Exception as error:  # what the libraries raise for a damaged file is of many kinds
        raise UserError(f"{field}: not a file of tensors alone ({reason(error)})") from None
    if empty:
        raise UserError(f"{field}: the file is empty; copy it again")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{field}: must hold a state dict: names and tensors")
    if not state:
        raise UserError(f"{field}: holds no weights")
    given = {name.removeprefix(key_prefix): value for name, value in state.items() if name.startswith(key_prefix)}
    own = backbone.state_dict()
    missing = [name for name in own if name not in given and not name.startswith("pooler.")]
    if missing:
        first = next(iter(state))
        raise UserError(
            f"{field}: lacks {len(missing)} of the encoder's {len(own)} weights, such as {missing[0]}; its entries are named "
            f"like {first}: set model.encoder.ngame_key_prefix to what stands in front"
        )
    unknown = [name for name in given if name not in own and not _LEFT_OUT.search(name)]
    if unknown:
        raise UserError(
            f"{field}: holds {len(unknown)} weights that the encoder does not have, such as {key_prefix}{unknown[0]}: it "
            "is of another model; set model.encoder.encoder_model to that, or model.encoder.ngame_key_prefix to leave them out"
        )
    for name, value in own.items():
        if name in given and given[name].shape != value.shape:
            raise UserError(
                f"{field}: {name} has the shape {list(given[name].shape)}, the encoder's has {list(value.shape)}"
            )
    backbone.load_state_dict({name: given[name] for name in own if name in given}, strict=False)


def load_tokenizer(
    name: str, *, where: str = "", trust_remote_code: bool = False, saved: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; other arguments and errors as of `load_backbone`.

    Args: where: how the message of an error begins; default: `name`.
    """
    return _load(AutoTokenizer, name, where or name, trust_remote_code, saved)
