"""The Triton backend's best labels against float64 oracles. It runs on a GPU under the mark `gpu`, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.head_helpers import OneOf, dense_of, ragged_batch
from tests.kernels.test_triton import DEVICES, FEATURES, make_head
from xmc_trainer.kernels.interface import unpack_candidates

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "labels, fan_in, group_size", [(400, None, 1), (400, 12, 1), (509, 12, 40), (129, 48, 1), (5, 12, 1)]
)
def test_topk_of_shards_sorts_by_score_then_label(labels, fan_in, group_size, device, shards=3):
    whole = make_head(device, labels=labels, fan_in=fan_in, group_size=group_size)
    whole.weight.copy_((whole.weight * 6).round())  # few distinct scores, many ties
    generator = torch.Generator().manual_seed(3)
    feat = torch.randint(-1, 2, (37, FEATURES), generator=generator).float()
    skip_ids, skip_counts = ragged_batch(37, labels, generator, most=40)
    scores = feat.double() @ dense_of(whole)[0].T
    scores[torch.repeat_interleave(torch.arange(37), skip_counts), skip_ids] = -torch.inf
    expected = [
        [label if row[label] > -torch.inf else -1 for label in sorted(range(labels), key=lambda n: (-row[n], n))[:7]]
        for row in scores.tolist()
    ]
    expected = [row + [-1] * (7 - len(row)) for row in expected]
    keys = []
    for rank in range(shards):
        part = make_head(device, labels=labels, fan_in=fan_in, group_size=group_size, ranks=OneOf(rank, shards))
        part.load_labels(range(labels), {"weight": whole.weight})
        keys.append(
            part._backend.head_topk(
                part.tensors(), feat.to(device), 7, skip_ids.to(device) - part.labels.start,
                torch.arange(37, device=device).repeat_interleave(skip_counts.to(device)), tile_labels=1,
            )
        )  # fmt: skip
    score, label = unpack_candidates(torch.cat(keys, 1).topk(7).values)
    assert label.tolist() == expected
    kept = label >= 0
    torch.testing.assert_close(
        score.double().cpu()[kept.cpu()], scores.gather(1, label.cpu().clamp_min(0))[kept.cpu()], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "texts, k, features, labels, fan_in, group_size, dtype",
    [
        (1, 3, 200, 700, None, 1, torch.float32),
        (130, 5, 48, 205, 12, 16, torch.bfloat16),  # blocks of 8 groups, the last one of 13 groups cut short
        (5, 300, 48, 529, 12, 200, torch.float32),  # a group is two blocks; more labels than a block has
        (3, 10, 320, 131, 100, 1, torch.float32),
        (3, 10, 320, 131, 100, 1, torch.bfloat16),
        (2, 150, 272, 150, 130, 16, torch.bfloat16),  # every label; a fan-in larger than a tile
        (131, 4, 33, 129, None, 1, torch.bfloat16),  # padded to 256 texts, one tile
    ],
)
def test_topk_of_odd_shapes_and_of_blocks_that_are_skipped(
    texts, k, features, labels, fan_in, group_size, dtype, device
):
    head = make_head(
        device, features=features, labels=labels, fan_in=fan_in, group_size=group_size, product_dtype=dtype
    )
    head.weight.copy_((head.weight * 6).round().clamp(-3, 3))  # exact sums, many ties
    head.bias.copy_(torch.arange(labels) % 3)
    generator = torch.Generator().manual_seed(4)
    feat = torch.randint(-1, 2, (texts, features), generator=generator).float()
    # The first text skips every label, other even texts the first block or two, odd texts a few labels.
    most = [
        range(labels) if n == 0 and texts > 1 else range(0, 0 if n % 2 else min(labels - 1, 256), 1)
        for n in range(texts)
    ]
    skips = [sorted({*some, *torch.randint(labels, (3,), generator=generator).tolist()}) for some in most]
    skip_ids = torch.tensor([label for some in skips for label in some])
    skip_counts = torch.tensor([len(some) for some in skips])
    for skipping in (False, True):
        scores = feat.double() @ dense_of(head)[0].T + head.bias.double().cpu()
        if skipping:
            scores[torch.repeat_interleave(torch.arange(texts), skip_counts), skip_ids] = -torch.inf
        order = torch.sort(scores, dim=1, descending=True, stable=True)
        expected = torch.where(order.values > -torch.inf, order.indices, -1)[:, :k]
        lists = (skip_ids.to(device), skip_counts.to(device)) if skipping else ()
        score, label = head.topk(feat.to(device), k, *lists)
        expected = torch.nn.functional.pad(expected, (0, k - expected.shape[1]), value=-1)
        assert torch.equal(label.cpu(), expected)
        kept = expected >= 0
        best = scores.gather(1, expected.clamp_min(0))
        assert torch.equal(score.double().cpu()[kept], best[kept])


def test_the_best_of_many_blocks():
    from xmc_trainer.kernels.triton.topk import _best_blocks

    best = torch.randint(-2, 3, (1024, 32), generator=torch.Generator().manual_seed(2)).float()
    best[1000:] = -torch.inf
    for wanted in (1, 3, 9, 700):
        expected = torch.sort(best[:, :21].T, dim=1, descending=True, stable=True).indices[:, :wanted]
        assert torch.equal(_best_blocks(best, 21, wanted), expected)
