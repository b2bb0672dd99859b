"""The head step and rankings with PyG's torch_sparse, for comparisons: `reference`, with a tile's products in CSR kernels.

A tile of labels is a CSR matrix W_Td with F entries in each row. `torch_sparse.matmul` and its two gradients compute

    z_TB = W_Td x_dB        dx_dB = W_Td^T g_TB        dW_TF = (g_TB x_dB^T) at W's entries

The work grows with F, not with d. A dense head has no index and uses the reference's products.
"""

from __future__ import annotations

from functools import partial

import torch
import torch_sparse
from torch import Tensor

from xmc_trainer.kernels import reference
from xmc_trainer.kernels.interface import HeadTensors, index_rows
from xmc_trainer.kernels.reference import DenseTile, Tile

__all__ = ["head_step", "head_topk"]


class SparseTile:
    """A `reference.Tile` of labels with an index."""

    def __init__(self, head: HeadTensors, start: int, stop: int, feat_Bd: Tensor) -> None:
        labels, fan_in = head.weight_LF[start:stop].shape
        self.weight_TF = head.weight_LF[start:stop].to(torch.float32, copy=True).requires_grad_()
        self.feat_dB = feat_Bd.T.contiguous().requires_grad_()
        with torch.enable_grad():
            matrix = torch_sparse.SparseTensor(
                rowptr=torch.arange(labels + 1, device=feat_Bd.device) * fan_in,
                col=index_rows(head, start, stop).flatten(),  # ascending in every row
                value=self.weight_TF.flatten(),
                sparse_sizes=(labels, feat_Bd.shape[1]),
                is_sorted=True,
                trust_data=True,
            )
            self.logit_TB = torch_sparse.matmul(matrix, self.feat_dB)

    def logits(self) -> Tensor:
        return self.logit_TB.detach().T.contiguous()

    def feature_grad(self, dlogit_BT: Tensor, grad_start: int) -> Tensor:
        return self._grad(self.feat_dB, dlogit_BT).T[grad_start:]

    def weight_grad(self, dlogit_BT: Tensor) -> Tensor:
        return self._grad(self.weight_TF, dlogit_BT)

    def _grad(self, of: Tensor, dlogit_BT: Tensor) -> Tensor:
        return torch.autograd.grad(self.logit_TB, of, dlogit_BT.T.contiguous(), retain_graph=True)[0]


def _tile(head: HeadTensors, start: int, stop: int, feat_Bd: Tensor) -> Tile:
    # The package's kernels divide by the number of texts.
    by_index = head.index_RF is not None and feat_Bd.shape[0] > 0
    return (SparseTile if by_index else DenseTile)(head, start, stop, feat_Bd)


head_step = partial(reference.head_step, tile_type=_tile)
head_topk = partial(reference.head_topk, tile_type=_tile)
