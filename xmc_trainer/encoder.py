"""The text encoder: any Hugging Face AutoModel, pooled to one feature vector a text."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
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
        parts = [(self.backbone, encoder_lr)]
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
        """Read what `save_pretrained` wrote beside the backbone."""
        if self.penultimate is not None:
            state = load_file(folder / "penultimate.safetensors")
            self.penultimate.load_state_dict({k.removeprefix("penultimate."): v for k, v in state.items()})


def _load(loader: type, name: str, field: str, **options: object) -> object:
    disable_progress_bar()  # its bars are of a second's work, here and when saving
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        # The hub would be asked, and waited for; its ids have two parts at most.
        raise UserError(f"{field}={name}: no such folder; name one that holds the model, or a hub id")
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}={name}: cannot be loaded; name a folder that holds the model, or a hub id that is reachable or "
            f"in the local Hugging Face cache ({reason(error)})"
        ) from None


def load_backbone(name: str, for_cpu: bool = False) -> PreTrainedModel:
    """The model of a folder or hub id, in float32. UserError if it is not to be had (offline, for example)."""
    backbone = _load(AutoModel, name, "model.encoder.encoder_model", dtype=torch.float32)
    if for_cpu:
        # The backward pass of torch's fused attention takes as long as the rest of the encoder on a CPU (2.13).
        backbone.set_attn_implementation("eager")
    if getattr(backbone, "pooler", None) is not None:
        # Pooling is ours: this layer would wait for a gradient that never comes. It stays, so that what is saved is whole.
        backbone.pooler.requires_grad_(False)
    return backbone


def load_state_dict_file(backbone: PreTrainedModel, path: str, key_prefix: str) -> None:
    """Replace a backbone's weights by those of a state dict (of NGAME, for example), in place.

    Args: path: .safetensors, or a file of torch.save that holds nothing but tensors: no code in it is ever run.
        key_prefix: entries without it are left out; it is stripped from the others.
    Raises UserError unless every weight of the backbone that is trained is there, in the right shape, and no other.
    """
    field = f"model.encoder.ngame_checkpoint={path}"
    try:
        if not Path(path).stat().st_size:
            raise UserError(f"{field}: the file is empty; copy it again")
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{field}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(f"{field}: not a file of tensors alone ({reason(error)})") from None
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
            raise UserError(f"{field}: {name} has the shape {list(given[name].shape)}, the encoder's has {list(value.shape)}")
    backbone.load_state_dict({name: given[name] for name in own if name in given}, strict=False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. UserError if it is not to be had, or cannot pad."""
    tokenizer = _load(AutoTokenizer, name, "model.encoder.encoder_tokenizer")
    if tokenizer.pad_token_id is None:
        raise UserError(f"model.encoder.encoder_tokenizer={name}: has no padding token; name one that has")
    return tokenizer
