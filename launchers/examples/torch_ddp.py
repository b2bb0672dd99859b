"""The head in a plain loop of torch with DistributedDataParallel: each process owns a share of the labels.

torchrun --nproc_per_node 2 launchers/examples/torch_ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from toy import FEATURES, LABELS, Encoder, Texts, collate, precision

from xmc_trainer import FixedFanInHead
from xmc_trainer.head import AdamW, exclude_from_ddp


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        # Make the head when the process group exists: it then holds this process's labels alone.
        self.head = FixedFanInHead(FEATURES, LABELS, fan_in=32, optimizer=AdamW(), lr=0.05)

    def forward(self, words: Tensor, label_ids: Tensor, label_counts: Tensor) -> Tensor:
        # DDP averages the encoder's gradients over processes; the head's loss is a sum over all their texts.
        ranks = dist.get_world_size()
        return self.head(self.encoder(words), label_ids, label_counts, engine_divisor=float(ranks))


def main(epochs: int = 4) -> float:
    """Train, and return P@1 on new texts."""
    dist.init_process_group("gloo")  # nccl on GPUs
    try:
        model = Classifier()
        exclude_from_ddp(model)  # or DDP would copy rank 0's labels over the other ranks' labels
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=0.02)
        texts = Texts(4000)
        sampler = DistributedSampler(texts, shuffle=False)
        for _ in range(epochs):
            for batch in DataLoader(texts, 128 // dist.get_world_size(), sampler=sampler, collate_fn=collate):
                loss = wrapped(**batch)  # also updates the head
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        batch = collate([*Texts(200, seed=1)])
        with torch.no_grad():
            return precision(model.head, model.encoder(batch["words"]), batch)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(f"P@1 {main():.2f}")
