"""Started by test_exactness.py: train small heads on 2 and on 3 ranks and write the results.

The encoder is a linear layer. Its gradients are averaged over ranks and micro-batches, as the engines do.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from xmc_trainer.head import SGD, AdamW, FixedFanInHead, Head, RewireRule, RowwiseRMSprop, SplitHead, multi_head_step
from xmc_trainer.head.cluster_branch import MetaBranch
from xmc_trainer.parallel import Ranks

LABELS, INPUTS, FEATURES, TEXTS, STEPS = 101, 20, 24, 17, 6
OPTIMIZERS = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "adamw": AdamW(eps=1e-4),
    "rowwise_rmsprop": RowwiseRMSprop(eps=1e-4),
}
FREQUENT = 23  # labels of a split head's dense part


class Case(NamedTuple):
    optimizer: str
    loss: str
    accumulation: int
    group_size: int
    auxiliary: bool = False
    variant: str = "plain"  # or gradient (growth mode), sum (text reduction), dense, split, bfloat16 (weights)

    @property
    def rewires(self) -> bool:
        return self.variant != "dense"


# Each optimizer is tested with every pair of loss, accumulation and group size; over all, each occurs with and without meta branch.
CASES = [
    Case(
        optimizer,
        "bce" if (accumulation == 3) == (group_size == 16) else "squared_hinge",
        accumulation,
        group_size,
        auxiliary,
    )
    for number, optimizer in enumerate(OPTIMIZERS)
    for accumulation, group_size, auxiliary in [
        (1, 1, False),
        (1, 16, True),
        (3, 1, number % 2 == 0),
        (3, 16, number % 2 == 1),
    ]
]
for variant in ("gradient", "sum", "dense", "split", "bfloat16"):
    CASES.append(Case("adamw", "bce", 3, 1, variant=variant))
    CASES.append(Case("momentum", "squared_hinge", 1, 1 if variant == "dense" else 4, variant=variant))


def head_of(case: Case, ranks: Ranks) -> Head:
    arguments = dict(
        group_size=case.group_size, loss=case.loss, text_reduction="sum" if case.variant == "sum" else "mean", seed=4,
        lr=0.002 if case.variant == "sum" else 0.02, optimizer=OPTIMIZERS[case.optimizer], weight_decay=0.01,
        tile_labels=13, ranks=ranks, growth_batches=3 if case.variant == "gradient" else 0,
        weight_dtype=torch.bfloat16 if case.variant == "bfloat16" else torch.float32,
    )  # fmt: skip
    if case.variant != "split":
        return FixedFanInHead(FEATURES, LABELS, fan_in=None if case.variant == "dense" else 9, **arguments)
    frequent = FixedFanInHead(FEATURES, FREQUENT, fan_in=None, **arguments | {"group_size": 1, "seed": 5})
    return SplitHead(frequent, FixedFanInHead(FEATURES, LABELS - FREQUENT, fan_in=9, **arguments))


def train(case: Case) -> dict[str, torch.Tensor | list[float]]:
    ranks, accumulation = Ranks(), case.accumulation
    torch.manual_seed(0)
    encoder = torch.nn.Linear(INPUTS, FEATURES)
    encoder_optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3, eps=1e-4)
    head = head_of(case, ranks)
    branch = None
    if case.auxiliary:
        branch = MetaBranch.build(
            FEATURES, np.arange(LABELS) % 11, scaling=0.4, last_step=4, loss=case.loss, text_reduction="mean", seed=4,
            lr=0.02, tile_labels=13, ranks=ranks,
        )  # fmt: skip
    rng = np.random.default_rng(7)
    curve, moved = [], 0
    for step in range(1, STEPS + 1):
        texts = torch.from_numpy(rng.standard_normal((TEXTS, INPUTS), dtype=np.float32))
        counts = rng.integers(0, 5, TEXTS)
        ids = [torch.from_numpy(rng.integers(0, LABELS, count)) for count in counts]
        total = 0.0
        for number, micro in enumerate(np.array_split(np.arange(TEXTS), accumulation)):
            parts = np.array_split(micro, ranks.size)  # uneven, sometimes empty
            rows = parts[ranks.rank]
            # Sizes that are given and sizes that ranks exchange have the same result.
            known = [len(part) for part in parts], [int(counts[part].sum()) for part in parts]
            positives = torch.cat([ids[row] for row in rows]) if len(rows) else torch.empty(0, dtype=torch.int64)
            arguments = dict(
                end_of_step=number == accumulation - 1,
                texts_in_step=TEXTS,
                engine_divisor=float(ranks.size * accumulation),
                rank_sizes=known if step % 2 else None,
            )
            features, label_counts = (
                encoder(texts[rows]),
                torch.tensor([len(ids[row]) for row in rows], dtype=torch.int64),
            )
            share = branch.weight(step - 1) if branch else 0.0
            parts = head.terms(1 - share) + (branch.terms(share) if share else [])
            loss = multi_head_step(parts, features, positives, label_counts, **arguments)
            (loss / accumulation).backward()
            total += loss.item()
        for parameter in encoder.parameters():
            if ranks.size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks.size
        encoder_optimizer.step()
        encoder_optimizer.zero_grad()
        curve.append(total)
        if step % 3 == 0 and case.rewires:
            moved += head.rewire(
                RewireRule("fraction", 0.3, "random", "gradient" if case.variant == "gradient" else "random")
            ).moved
    tensors = {
        prefix + name: getattr(part, name)
        for prefix, part in head.parts()
        for name in ("index", "weight", "bias")
        if getattr(part, name) is not None
    }
    best = head.topk(encoder(torch.from_numpy(rng.standard_normal((4, INPUTS), dtype=np.float32))), 5)
    return tensors | {"curve": curve, "moved": moved, "best": best[1]}


def ties(variant: str) -> torch.Tensor:
    """Return the best labels of this rank's texts, int64 [b, 60], from a head that gives most labels equal scores."""
    ranks = Ranks()
    head = head_of(Case("sgd", "bce", 1, 1, variant=variant), ranks)
    for _, part in head.parts():
        part.weight.zero_()
        part.bias.copy_(torch.tensor([float(label % 7 == 0) for label in part.labels]))
    texts = range(4)[
        {1: slice(4), 2: slice(4 * ranks.rank, 4), 3: (slice(0), slice(3), slice(3, 4))[ranks.rank]}[ranks.size]
    ]
    return head.topk(torch.ones(len(texts), FEATURES), 60)[1]


def results() -> dict[tuple | str, dict | torch.Tensor]:
    return {tuple(case): train(case) for case in CASES} | {name: ties(name) for name in ("plain", "split")}


def write_results(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{size}-ranks", rank=rank, world_size=size)
    found = results()
    dist.barrier()  # no rank may close a connection that another one still reads
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Fork, so that the imports above are done only once.
    for size in (2, 3):
        start_processes(write_results, (size, sys.argv[1]), nprocs=size, start_method="fork")
