"""Load backbones and tokenizers from folders or the hub, and check them."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
from transformers.utils.logging import disable_progress_bar

from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.errors import UserError, reason

# Entries that a state dict may hold and the encoder ignores: a pooler, because TextEncoder pools, and constant buffers
# that older versions of transformers saved.
_LEFT_OUT = re.compile(r"^pooler\.|(^|\.)(position_ids|token_type_ids|inv_freq)$")


# Relative difference of a token's states, in float32, that rounding does not reach.
_SAME = 1e-6


def _load(loader: Any, name: str, where: str, trust_remote_code: bool, saved: bool, **options: Any) -> Any:
    """Call `loader.from_pretrained`. Raises UserError, beginning with `where`, whatever goes wrong."""
    disable_progress_bar()  # loading and saving take about a second
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        # Not a hub id, which has at most two parts: do not wait for the hub.
        raise UserError(f"{where}: no such folder; name a folder that holds the model, or a hub id")
    try:
        # Without trust_remote_code transformers asks on standard input whether to run the code.
        return loader.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the libraries raise many types for a damaged file
        if "trust_remote_code" in str(error):
            remedy = "train an encoder whose architecture transformers has built in" if saved else (
                "set `trust_remote_code`=true to run it, or choose another encoder"
            )  # fmt: skip
            raise UserError(f"{where}: comes with Python code, which is not run; {remedy}") from None
        raise UserError(
            f"{where}: cannot be loaded ({reason(error)}); name a folder that holds the model, or a hub id that is "
            "reachable or in the local Hugging Face cache"
        ) from error


def load_backbone(
    name: str, *, for_cpu: bool = False, trust_remote_code: bool = False, saved: bool = False
) -> PreTrainedModel:
    """Load the encoder or decoder of a folder or hub id in float32; for an encoder-decoder, only its encoder.

    Args:
        for_cpu: whether it is going to be trained on a CPU.
        trust_remote_code: run Python code that comes with the model.
        saved: whether `name` is a folder that `TextEncoder.save_pretrained` wrote, with weights in safetensors only.
    Raises UserError if the model cannot be loaded (offline, for example), is not a text encoder, or lacks weights.
    """
    where = name if saved else f"`encoder_model`={name}"
    config = _load(AutoConfig, name, where, trust_remote_code, saved)
    loader = _encoder_class(config) or AutoModel
    backbone = _load_whole(loader, name, where, trust_remote_code, saved)
    backbone = _encoder_part(backbone, loader, config, where)
    if for_cpu:
        # On a CPU the backward pass of torch's fused attention takes as long as the rest of the encoder (torch 2.13).
        backbone.set_attn_implementation("eager")
    return backbone


def backbone_without_weights(
    name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the encoder that `load_backbone` would load from its config.json alone, with random weights.

    Call it where tensors take no memory, such as under FakeTensorMode. For arguments and errors see `load_backbone`.
    """
    where = f"`encoder_model`={name}"
    config = _load(AutoConfig, name, where, trust_remote_code, False)
    loader = _encoder_class(config) or AutoModel
    make = loader._from_config if hasattr(loader, "_from_config") else loader.from_config
    backbone = make(config, dtype=dtype)
    return _encoder_part(backbone, loader, config, where)


def _encoder_part(backbone: Any, loader: Any, config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """Return the part that encodes texts, ready for `TextEncoder`. Raises UserError if it does not take texts."""
    if loader is AutoModel and getattr(config, "is_encoder_decoder", False):
        backbone = backbone.get_encoder()
    _check_inputs(backbone, where)
    if getattr(backbone, "attention_type", None) == "block_sparse":
        # A short batch would switch BigBird to full attention for good: features would depend on earlier batches.
        backbone.set_attention_type("original_full")
    if getattr(backbone, "pooler", None) is not None:
        # TextEncoder pools, so the pooler never gets a gradient. It is kept, so that saved models are complete.
        backbone.pooler.requires_grad_(False)
    backbone.config.use_cache = False  # a decoder would keep its keys and values for a next token
    if getattr(backbone.config, "is_causal", None) is False:
        attend_both_ways(backbone)
    return backbone


def attend_both_ways(backbone: PreTrainedModel) -> None:
    """Let each token of a decoder see those after it, too. The setting is stored in the config.json of a saved model.

    An architecture may ignore it; see `sees_later_tokens`.
    """
    backbone.config.is_causal = False  # transformers builds the mask from it
    layer: Any
    for layer in backbone.modules():
        if hasattr(layer, "is_causal"):  # read where a batch without padding has no mask
            layer.is_causal = False


@torch.no_grad()
def sees_later_tokens(backbone: PreTrainedModel) -> bool:
    """Measure whether a token's states depend on the tokens after it, as in an encoder but not in a decoder.

    Under ZeRO 3 gather the weights first.
    """
    training = backbone.training
    backbone.eval()
    tokens = torch.tensor([[1, 2, 3], [1, 2, 1]], device=backbone.device)
    first, other = backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[:, 0].float()
    backbone.train(training)
    return bool((first - other).norm() > _SAME * first.norm())


def choose_attention(backbone: PreTrainedModel, name: str, field: str) -> None:
    """Let a backbone compute attention by transformers' implementation `name`.

    Args:
        field: start of the error message.
    Raises UserError if this machine or the backbone lacks it.
    """
    why = "it has another of its own"
    try:
        if name.startswith("flash") and not torch.cuda.is_available():
            raise ValueError("it needs a GPU")
        backbone.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        why = reason(error)
    if backbone.config._attn_implementation != name:
        raise UserError(f"{field}={name}: {type(backbone).__name__} cannot use it here ({why}); set it to auto")


def _encoder_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads only the encoder of an encoder-decoder; None if there is none."""
    if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return None
    if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return AutoModelForTextEncoding
    if not (config.architectures or [""])[0].endswith("Encoder"):
        return None
    with torch.device("meta"):  # saved by save_pretrained: its class is in none of transformers' lists
        return type(AutoModel.from_config(config, trust_remote_code=False).get_encoder())


def _load_whole(loader: Any, name: str, where: str, trust_remote_code: bool, saved: bool) -> PreTrainedModel:
    """Load a model. Raises UserError for missing weights, which transformers would draw at random."""
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if saved:
        options["use_safetensors"] = True
    backbone, found = _load(loader, name, where, trust_remote_code, saved, **options)
    missing = _own(backbone, found["missing_keys"])
    prefixes = _prefixes(missing, found["unexpected_keys"])
    if len(prefixes) == 1:
        (prefix,) = prefixes
        if os.environ.get("RANK", "0") == "0":
            print(f"{where}: weight names start with {prefix}; loaded without this prefix", flush=True)
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        backbone, found = _load(loader, name, where, trust_remote_code, saved, **options)
        missing = _own(backbone, found["missing_keys"])
    if missing:
        others = sorted(found["unexpected_keys"])
        like = f" (they hold others, such as {others[0]})" if others else ""
        raise UserError(
            f"{where}: its files lack {len(missing)} of the encoder's {len(backbone.state_dict())} weights, such as "
            f"{missing[0]}{like}; name the folder of a complete model with the weight names of transformers"
        )
    if found["error_msgs"]:
        raise UserError(
            f"{where}: its weights do not fit its config.json ({found['error_msgs'][0].splitlines()[0]}); use the config.json "
            "that was saved with these weights"
        )
    wrong = [key for key in found["mismatched_keys"] if not _LEFT_OUT.search(key[0])]
    if wrong:
        weight, shape, own = wrong[0]
        raise UserError(
            f"{where}: {weight} has the shape {list(shape)}, and {list(own)} according to config.json; use the config.json "
            "that was saved with these weights"
        )
    return backbone


def _own(backbone: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Select, sorted, the names that a file must hold: no ignored entries and no tied weights."""
    tied = backbone.all_tied_weights_keys
    return sorted(name for name in names if name not in tied and not _LEFT_OUT.search(name))


def _prefixes(missing: list[str], unexpected: Collection[str]) -> set[str]:
    """Find the prefixes (`module.`, `encoder.` ...) with which all missing names exist; two if a file holds two encoders."""
    if not missing:
        return set()
    names = set(unexpected)
    found = {name.removesuffix(missing[0]) for name in names if name.endswith(f".{missing[0]}")}
    return {prefix for prefix in found if all(prefix + name in names for name in missing)}


def _check_inputs(backbone: PreTrainedModel, where: str) -> None:
    """Raise UserError unless the model takes token ids with a mask and states its hidden size."""
    read = inspect.signature(backbone.forward).parameters
    lacks = [name for name in ("input_ids", "attention_mask") if name not in read]
    if lacks or not isinstance(getattr(backbone.config, "hidden_size", None), int):
        what = f"takes no {' and no '.join(lacks)}" if lacks else "has no hidden_size in config.json"
        raise UserError(f"{where}: {type(backbone).__name__} {what}; name a text encoder of transformers")


def check_tokens_fit(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    tokenizer_is: str,
    max_len_is: str,
) -> None:
    """Raise UserError if a token id has no embedding, or if the encoder has fewer positions than `max_len`.

    Args:
        tokenizer_is, max_len_is: start of the error message, for example "`max_len`=128".
    """
    longest = getattr(backbone.config, "max_position_embeddings", None) or -1  # XLNet: -1, any length
    padding = getattr(getattr(backbone, "embeddings", None), "padding_idx", None)
    if longest > 0 and padding is not None:
        longest -= padding + 1  # RoBERTa's positions start there
    if 0 < longest < max_len:
        raise UserError(f"{max_len_is}: the encoder reads at most {longest} tokens; lower it")
    table = backbone.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if highest >= table.num_embeddings:
        raise UserError(
            f"{tokenizer_is}: its token {token!r} has the id {highest}, but the encoder has only {table.num_embeddings} "
            "embeddings; use the tokenizer that was saved with the encoder"
        )


# Relative difference of a text's features with and without padding, in float32. Rounding stays far below, visible padding far above.
_PADDING_TOLERANCE = 1e-3


@torch.no_grad()
def check_padding_is_hidden(encoder: TextEncoder, longest: int, where: str) -> None:
    """Raise UserError if padding changes a text's features, as in an encoder with convolutions.

    Under ZeRO 3 gather the weights first.

    Args:
        longest: most tokens that the encoder reads, at least 3.
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
        raise UserError(
            f"{where}: its features have the width {alone.shape[1]}, and {encoder.pooled_features} according to config.json"
        )
    if not (alone - padded).norm() <= _PADDING_TOLERANCE * alone.norm():  # refuses nan too
        raise UserError(
            f"{where}: {type(encoder.backbone).__name__}: padding changes a text's features, so scores would depend on the "
            "batch; name another encoder"
        )


def load_state_dict_file(backbone: PreTrainedModel, path: str, key_prefix: str) -> None:
    """Replace a backbone's weights in place by those of a state dict file (from NGAME, for example).

    Args:
        path: a .safetensors file, or a torch.save file of tensors only; code in it is never run.
        key_prefix: stripped from the names of the entries; entries without it are ignored.
    Raises UserError unless the file holds exactly the backbone's trained weights, in their shapes.
    """
    field = f"`ngame_checkpoint`={path}"
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
        raise UserError(f"{field}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # the libraries raise many types for a damaged file
        raise UserError(
            f"{field}: is damaged or holds more than tensors ({reason(error)}); save it again as .safetensors"
        ) from None
    if empty:
        raise UserError(f"{field}: the file is empty; copy it again")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{field}: holds no state dict; save a dict of names and tensors")
    if not state:
        raise UserError(f"{field}: holds no weights; save it again")
    given = {name.removeprefix(key_prefix): value for name, value in state.items() if name.startswith(key_prefix)}
    own = backbone.state_dict()
    missing = [name for name in own if name not in given and not name.startswith("pooler.")]
    if missing:
        first = next(iter(state))
        raise UserError(
            f"{field}: lacks {len(missing)} of the encoder's {len(own)} weights, such as {missing[0]} (its first entry is {first}); "
            "set `ngame_key_prefix` to the prefix of its names"
        )
    unknown = [name for name in given if name not in own and not _LEFT_OUT.search(name)]
    if unknown:
        raise UserError(
            f"{field}: holds {len(unknown)} weights that the encoder does not have, such as {key_prefix}{unknown[0]}; "
            "set `encoder_model` to the model that it was saved from, or `ngame_key_prefix` to skip them"
        )
    for name, value in own.items():
        if name in given and given[name].shape != value.shape:
            raise UserError(
                f"{field}: {name} has the shape {list(given[name].shape)}, the encoder's {list(value.shape)}; set "
                "`encoder_model` to the model that it was saved from"
            )
    backbone.load_state_dict({name: given[name] for name in own if name in given}, strict=False)


def load_tokenizer(
    name: str, *, where: str = "", trust_remote_code: bool = False, saved: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id. For the other arguments and errors see `load_backbone`.

    Args:
        where: start of error messages; default: `name`.
    """
    return _load(AutoTokenizer, name, where or name, trust_remote_code, saved)
