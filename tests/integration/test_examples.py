"""The examples of launchers/examples run, learn, and with two processes train as with one."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.integration.test_launchers import free_port
from xmc_trainer.head import AdamW, FixedFanInHead, exclude_from_ddp

EXAMPLES = Path(__file__).parents[2] / "launchers" / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("name", ["accelerate_loop", "hf_trainer", "lightning_module"])
def test_an_example_learns(name, fresh_accelerator):
    if name == "lightning_module":
        pytest.importorskip("lightning")
    assert importlib.import_module(name).main(epochs=3) > 0.6


class Wrapped(nn.Module):
    def __init__(self, fan_in: int | None) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.head = FixedFanInHead(8, 24, fan_in=fan_in, optimizer=AdamW())

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(batch[0]), *batch[1:])


def in_rank(rank: int, ranks: int, ports: list[int], folder: str) -> None:
    """Write the P@1 of both examples, and what becomes of a head inside DistributedDataParallel."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    found = {}
    for port, name in zip(ports, ("torch_ddp", "torch_fsdp2")):
        os.environ["MASTER_PORT"] = str(port)
        found[name] = importlib.import_module(name).main(epochs=2)
    os.environ["MASTER_PORT"] = str(ports[2])
    dist.init_process_group("gloo")
    batch = torch.ones(2, 8), torch.tensor([0, 23]), torch.tensor([1, 1])
    try:
        DistributedDataParallel(Wrapped(None))(
            *batch
        )  # torch itself refuses to broadcast the int16 index of a sparse head
    except ValueError as error:
        found["message"] = str(error)
    kept = Wrapped(4)
    before = kept.head.weight.clone()
    exclude_from_ddp(kept)
    DistributedDataParallel(kept).eval()(*batch)  # no update
    found["kept"] = torch.equal(kept.head.weight, before)
    dist.destroy_process_group()
    torch.save(found, Path(folder, f"{ranks}-{rank}"))


@pytest.mark.slow
def test_two_processes_of_ddp_and_fsdp2_train_as_one(tmp_path):
    for ranks in (1, 2):
        ports = [free_port() for _ in range(3)]
        torch.multiprocessing.spawn(in_rank, (ranks, ports, str(tmp_path)), ranks)
    one, *two = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    assert one["torch_ddp"] > 0.5 and "message" not in one
    for rank in two:
        for name in ("torch_ddp", "torch_fsdp2"):
            assert rank[name] == pytest.approx(one[name], abs=0.02)
        assert rank["kept"] and "call exclude_from_ddp(module)" in rank["message"]


def test_an_example_stays_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
