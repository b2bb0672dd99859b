"""The head beside an encoder that FSDP2 shards: each process owns a part of the encoder and a share of the labels.

torchrun --nproc_per_node 2 launchers/examples/torch_fsdp2.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from torch_ddp import Classifier
from toy import Texts, collate, precision


def main(epochs: int = 4) -> float:
    """Train, and return P@1 on new texts."""
    dist.init_process_group("gloo")  # nccl on GPUs
    try:
        model = Classifier()
        # The head has no parameters to shard, and FSDP2 leaves buffers alone, so the model needs no `ignored_params`.
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.encoder.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        texts = Texts(4000)
        sampler = DistributedSampler(texts, shuffle=False)
        for _ in range(epochs):
            for batch in DataLoader(texts, 128 // dist.get_world_size(), sampler=sampler, collate_fn=collate):
                loss = model(**batch)  # also updates the head
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        batch = collate([*Texts(200, seed=1)])
        with torch.no_grad():
            model.unshard()
            return precision(model.head, model.encoder(batch["words"]), batch)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(f"P@1 {main():.2f}")
