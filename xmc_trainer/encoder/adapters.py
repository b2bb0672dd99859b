"""LoRA through peft: two thin trained matrices beside each frozen one. A saved model has their products in its weights."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from xmc_trainer.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's name of a layer's only adapter


def require_peft() -> None:
    """Raise UserError if peft is not installed. Quick: imports nothing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("`lora_rank`: needs the package peft; run pip install 'xmc_trainer[lora]', or set it to 0")


def add_adapters(backbone: PreTrainedModel, *, rank: int, alpha: int, dropout: float, target: str) -> None:
    """Freeze a backbone's weights and add trained adapters, in place. The features stay the same.

    Args:
        rank: of each adapter; the smaller side of its two matrices.
        alpha: an adapter's product is multiplied by `alpha / rank`.
        dropout: on an adapter's input, in training.
        target: "all-linear" for every linear layer, or the ends of layers' names, separated by commas.
    Raises UserError if peft is missing, or a layer does not exist or cannot have an adapter.
    """
    require_peft()
    import peft

    # TextEncoder pools, so a pooler never gets a gradient.
    unused = r"pooler\..*" if getattr(backbone, "pooler", None) is not None else None
    names = [name.strip() for name in target.split(",")]
    wrong = [
        each for each in names
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{each}") for name, _ in backbone.named_modules())
    ]  # fmt: skip
    if wrong:
        raise UserError(
            f"`lora_target`={target}: {type(backbone).__name__} has no layer whose name ends in {wrong[0]}; correct it, or set it "
            f"to {ALL_LINEAR}"
        )
    adapters = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target if target == ALL_LINEAR else names,
        exclude_modules=unused,
    )
    try:
        peft.inject_adapter_in_model(adapters, backbone)
    except (ValueError, NotImplementedError) as error:  # layers of a kind that peft does not know
        raise UserError(f"`lora_target`={target}: not for {type(backbone).__name__} ({reason(error)})") from None


def is_adapter(name: str) -> bool:
    """Tell whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def merged(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state dict with the adapters' products added to the weights, under the names without adapters.

    Args:
        state: of `backbone`, whose own tensors ZeRO 3 may have emptied. Without adapters it is returned as it is.
    """
    found: dict[str, Tensor] = {}
    layers: dict[str, Any] = dict(backbone.named_modules())
    for name, value in state.items():
        owner, _, kind = name.rpartition(".base_layer.")
        if kind == "weight":
            layer = layers[owner]
            down, up = (state[f"{owner}.lora_{each}.{_NAME}.weight"].float() for each in "AB")
            change = layer.scaling[_NAME] * (up @ down)
            value = (value.float() + (change.T if layer.fan_in_fan_out else change)).to(value.dtype)
        if not is_adapter(name):
            found[name.replace(".base_layer.", ".")] = value
    return found
