"""Started by torchrun from test_exactness.py: trains small heads on this many ranks and writes what came out.

The encoder is a linear layer whose gradients are averaged over ranks and micro-batches, as the engines do.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch
import torch.distributed as dist

from xmc_trainer.head import SGD, AdamW, FixedFanInHead, RewireRule
from xmc_trainer.meta_branch import MetaBranch
from xmc_trainer.parallel import Ranks

LABELS, INPUTS, FEATURES, TEXTS, STEPS = 101, 20, 24, 17, 30
OPTIMIZERS = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adamw": AdamW(eps=1e-4)}
CASES = list(itertools.product(OPTIMIZERS, ("bce", "squared_hinge"), (1, 3), (1, 16), (False, True)))


def train(
    optimizer: str, loss_name: str, accumulation: int, group_size: int, auxiliary: bool
) -> dict[str, torch.Tensor | list[float]]:
    ranks = Ranks()
    torch.manual_seed(0)
    encoder = torch.nn.Linear(INPUTS, FEATURES)
    encoder_optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3, eps=1e-4)
    head = FixedFanInHead(
        FEATURES, LABELS, fan_in=9, group_size=group_size, loss=loss_name, text_reduction="mean", seed=4, lr=0.02,
        optimizer=OPTIMIZERS[optimizer], weight_decay=0.01, tile_labels=13, ranks=ranks,
    )  # fmt: skip
    branch = None
    if auxiliary:
        branch = MetaBranch.build(
            FEATURES, np.arange(LABELS) % 11, scaling=0.4, last_step=20, loss=loss_name, text_reduction="mean", seed=4,
            lr=0.02, tile_labels=13, ranks=ranks,
        )  # fmt: skip
    rng = np.random.default_rng(7)
    curve = []
    for step in range(1, STEPS + 1):
        texts = torch.from_numpy(rng.standard_normal((TEXTS, INPUTS), dtype=np.float32))
        counts = rng.integers(0, 5, TEXTS)
        ids = [torch.from_numpy(rng.integers(0, LABELS, count)) for count in counts]
        total = 0.0
        for number, micro in enumerate(np.array_split(np.arange(TEXTS), accumulation)):
            parts = np.array_split(micro, ranks.size)  # uneven, and empty now and then
            rows = parts[ranks.rank]
            # Told or exchanged: the same.
            known = [len(part) for part in parts], [int(counts[part].sum()) for part in parts]
            positives = torch.cat([ids[row] for row in rows]) if len(rows) else torch.empty(0, dtype=torch.int64)
            arguments = dict(
                end_of_step=number == accumulation - 1,
                texts_in_step=TEXTS,
                engine_divisor=float(ranks.size * accumulation),
                rank_sizes=known if step % 2 else None,
            )
            features, label_counts = encoder(texts[rows]), torch.tensor([len(ids[row]) for row in rows], dtype=torch.int64)
            share = branch.weight(step - 1) if branch else 0.0
            loss = head(features, positives, label_counts, loss_weight=1 - share, **arguments)
            if share:
                loss = loss + branch.head(features, branch.clusters(positives), label_counts, loss_weight=share, **arguments)
            (loss / accumulation).backward()
            total += loss.item()
        for parameter in encoder.parameters():
            if ranks.size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks.size
        encoder_optimizer.step()
        encoder_optimizer.zero_grad()
        curve.append(total)
        if step % 7 == 0:
            head.rewire(RewireRule("fraction", 0.3, "random"))
    best = head.topk(encoder(torch.from_numpy(rng.standard_normal((4, INPUTS), dtype=np.float32))), 5)
    return {"curve": curve, "index": head.index, "weight": head.weight, "bias": head.bias, "best": best[1]}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {case: train(*case) for case in CASES}
    dist.barrier()  # nobody closes a connection that another rank still reads from
    torch.save(results, f"{sys.argv[1]}/{dist.get_world_size()}-{dist.get_rank()}.pt")
    dist.destroy_process_group()
