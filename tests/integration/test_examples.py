"""The examples of launchers/examples run and learn, and torch's wrappers leave the labels of each process alone."""

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

from xmc_trainer.head import AdamW, FixedFanInHead, exclude_from_ddp

EXAMPLES = Path(__file__).parents[2] / "launchers" / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("name", ["accelerate_loop", "hf_trainer", "lightning_module"])
def test_an_example_learns(name, fresh_accelerator):
    assert importlib.import_module(name).main(epochs=2) > 0.4


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
        found[name] = importlib.import_module(name).main(epochs=1)
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
    torch.save(found, Path(folder, str(rank)))


@pytest.mark.slow
def test_ddp_and_fsdp2_train_alike_in_two_processes(tmp_path):
    from tests.integration.test_launchers import free_port  # not at the top: the processes need not import it

    ports = [free_port() for _ in range(3)]
    torch.multiprocessing.spawn(in_rank, (2, ports, str(tmp_path)), 2)
    for found in map(torch.load, (tmp_path / "0", tmp_path / "1")):
        assert found["torch_ddp"] > 0.2
        assert found["torch_fsdp2"] == pytest.approx(found["torch_ddp"], abs=0.02)
        assert found["kept"] and "call exclude_from_ddp(module)" in found["message"]


def test_an_example_stays_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
