"""The text encoder: any Hugging Face AutoModel, pooled to one feature vector per text."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from xmc_trainer.encoder.adapters import merged
from xmc_trainer.errors import UserError, reason

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "none": nn.Identity}


class TextEncoder(nn.Module):
    """Backbone, pooling, dropout, and optionally a penultimate layer.

    Args:
        backbone: as `load_backbone` returns it.
        pool_mode: "last_hidden_avg": the mean of the last layer over the text's tokens. "last_nhidden_conlast": the first
            token's states in the last `feature_layers` layers, concatenated, last layer first. "last_token": the last layer's
            states of the text's last token, on whichever side the padding is.
        penultimate_size: width of a linear layer with `penultimate_activation` after the dropout; None for no such layer.
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
        """Encode int64 [b, T] token ids with a 0/1 mask of the same shape. Returns [b, out_features], the backbone's dtype."""
        pooled = self.dropout(self.pool(input_ids, attention_mask))
        return pooled if self.penultimate is None else self.penultimate(pooled)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the features before dropout and penultimate layer, [b, pooled_features]."""
        if self.pool_mode == "last_hidden_avg":
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[:, :, None].to(hidden.dtype)
            return (hidden * mask).sum(1) / mask.sum(1)
        if self.pool_mode == "last_token":
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            last = (attention_mask * places).argmax(1)
            return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
        if self.feature_layers == 1:
            # output_hidden_states makes transformers install hooks, which torch.compile cannot trace.
            return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return torch.cat([out.hidden_states[-1 - n][:, 0] for n in range(self.feature_layers)], dim=-1)

    def recompute_layers(self, on: bool) -> None:
        """Choose whether a training's backward pass computes each layer again from its input, to save memory.

        Raises ValueError if the backbone cannot.
        """
        # transformers renamed its method.
        name = (
            "activation_checkpointing"
            if hasattr(self.backbone, "activation_checkpointing_enable")
            else "gradient_checkpointing"
        )
        if on:
            getattr(self.backbone, f"{name}_enable")({"use_reentrant": False})
        else:
            getattr(self.backbone, f"{name}_disable")()

    def parameter_groups(self, encoder_lr: float, penultimate_lr: float, weight_decay: float) -> list[dict]:
        """Build optimizer groups: weight decay for matrices only, and a learning rate of its own for the penultimate layer."""
        parts: list[tuple[nn.Module, float]] = [(self.backbone, encoder_lr)]
        if self.penultimate is not None:
            parts.append((self.penultimate, penultimate_lr))
        groups = []
        for module, lr in parts:
            params = [p for p in module.parameters() if p.requires_grad]
            # ZeRO 3 empties the parameters and keeps their shapes in ds_shape.
            matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in params]
            for chosen, decay in (
                ([p for p, decays in zip(params, matrix) if decays], weight_decay),
                ([p for p, decays in zip(params, matrix) if not decays], 0.0),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
        return groups

    def save_pretrained(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the backbone (Hugging Face layout, adapters merged) and the penultimate layer as safetensors.

        Args:
            state: this module's full state dict. Under ZeRO 3 the module itself holds only a part of it.
        """
        prefix = "backbone."
        backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.backbone.save_pretrained(folder, state_dict=merged(self.backbone, backbone))
        rest = {name: value.contiguous() for name, value in state.items() if not name.startswith(prefix)}
        if rest:
            save_file(rest, folder / "penultimate.safetensors")

    def load_penultimate(self, folder: Path) -> None:
        """Load the penultimate layer that `save_pretrained` wrote. Raises UserError if the file is missing or does not fit."""
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
