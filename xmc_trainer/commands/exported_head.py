"""The head of a model of xmc_trainer in plain torch. `xmc-trainer export` puts a copy beside head.safetensors.

head = Head("head.safetensors")
scores, labels = head.topk(features, k=5)  # features: float32 [texts, d] of the encoder

Rows of labels.parquet name the labels.
"""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor


class Head(torch.nn.Module):
    """A linear layer in which each label reads a few features.

    The file holds one or two parts, one after the other in label order. Part p has the tensors
        p.weight [labels, fan_in], p.bias [labels], and, unless each label reads all features,
        p.index [groups, fan_in]: the features that the `p.group_size` labels of a group read, group after group.
    Its metadata has in_features, loss, parts and p.group_size.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, path: str = "head.safetensors") -> None:
        super().__init__()
        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        self.in_features, self.is_probability = int(about["in_features"]), about["loss"] == "bce"
        rows, biases = [], []
        for part in range(int(about["parts"])):
            weight, index = tensors[f"{part}.weight"].float(), tensors.get(f"{part}.index")
            if index is not None:
                group = torch.arange(len(weight)) // int(about[f"{part}.group_size"])
                weight = torch.zeros(len(weight), self.in_features).scatter_(1, index.long()[group], weight)
            rows.append(weight)
            biases.append(tensors[f"{part}.bias"])
        # Dense rows: faster on most devices than gathering features, though in_features / fan_in times the memory.
        self.register_buffer("weight", torch.cat(rows))
        self.register_buffer("bias", torch.cat(biases))

    def forward(self, features: Tensor) -> Tensor:
        """Return every label's score, float32 [texts, labels]: a probability for a model trained with bce, or a margin."""
        logits = torch.nn.functional.linear(features.float(), self.weight, self.bias)
        return logits.sigmoid() if self.is_probability else logits

    def topk(self, features: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
        """Return the scores and the numbers of the k best labels of each text, best first."""
        return tuple(self(features).topk(k, dim=1))
