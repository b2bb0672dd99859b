"""Results do not depend on the number of ranks: optimizers, losses, accumulation, groups, meta branch, rewiring; 1, 2, 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.matrix import CASES, LABELS
from tests.integration.test_launchers import ROOT, free_port, launch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What each rank wrote, by world size."""
    folder = tmp_path_factory.mktemp("matrix")
    for size in (1, 2, 3):
        done = launch(
            "torchrun", "--nproc_per_node", str(size), "--master_port", free_port(),
            ROOT / "tests/distributed/matrix.py", folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    load = lambda size, rank: torch.load(Path(folder) / f"{size}-{rank}.pt", weights_only=False)  # noqa: E731
    return {size: [load(size, rank) for rank in range(size)] for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_any_number_of_ranks_trains_as_one(results, case, size):
    one, parts = results[1][0][case], [result[case] for result in results[size]]
    if not case[-1]:  # a fading meta branch changes what the loss is made of
        assert one["curve"][-1] < one["curve"][0]
    for part in parts:
        assert part["curve"] == pytest.approx(one["curve"], rel=1e-5)
    shares = [len(part["weight"]) for part in parts]
    assert sum(shares) == LABELS and all(0 < share < LABELS for share in shares)
    assert torch.equal(torch.cat([part["index"] for part in parts]), one["index"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), one[name], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(part["best"], one["best"]) for part in parts)
