"""Compiled code recomputes activations in the backward pass, but must not draw random numbers again."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy


class KeepDraws(CustomGraphPass):
    """Marks every random draw of a layer as kept for its backward pass.

    torch's memory budget recomputes draws like everything else. The backward pass then has other random numbers, and its
    gradient is that of another dropout.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        """Identify this code in the cache of compiled code."""
        return get_hash_for_files((__file__,))
