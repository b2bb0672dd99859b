"""Label clusters: sizes, similarity, determinism, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xmc_trainer.clusters import LabelClusters, balanced_order, cluster_bounds, import_npy
from xmc_trainer.errors import UserError


@pytest.mark.parametrize("labels, clusters, align", [(41, 8, 1), (1009, 64, 1), (1009, 3, 1), (1000, 16, 16), (5, 5, 1), (7, 64, 4)])
def test_bounds_are_even_and_aligned(labels, clusters, align):
    bounds = cluster_bounds(labels, clusters, align)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == labels and (sizes > 0).all() and (bounds[:-1] % align == 0).all()
    assert len(sizes) == min(clusters, -(-labels // align))
    power = clusters & (clusters - 1) == 0
    assert sizes.max() - sizes.min() <= (align if power else sizes.min() + 1)


def blobs(count, size, d=24, seed=0):
    """`count` directions with `size` labels around each, shuffled; (vectors, the direction of each)."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(count), size))
    centres = rng.standard_normal((count, d))
    vectors = centres[which] + 0.1 * rng.standard_normal((len(which), d))
    return torch.from_numpy(vectors).float(), which


@pytest.mark.parametrize("rows_at_once", [1 << 17, 50])
def test_neighbours_are_similar(rows_at_once):
    vectors, which = blobs(16, 16)
    order = balanced_order(lambda n: vectors[n], 256, align=16, seed=3, rows_at_once=rows_at_once)
    assert np.array_equal(np.sort(order), np.arange(256))
    together = np.mean([np.bincount(which[row]).max() / 16 for row in order.reshape(16, 16)])
    assert together > 0.8  # at random 0.2
    assert np.array_equal(order, balanced_order(lambda n: vectors[n], 256, align=16, seed=3, rows_at_once=rows_at_once))


def test_two_halves_are_the_best_balanced_cut():
    # Points on an arc: the only sensible balanced halves are the two ends.
    angle = torch.linspace(0, 2.5, 31)[torch.randperm(31, generator=torch.Generator().manual_seed(5))]
    order = balanced_order(lambda n: torch.stack([angle[n].cos(), angle[n].sin()], 1), 31)
    first, second = angle[order[:16]], angle[order[16:]]
    assert first.max() < second.min() or second.max() < first.min()


def test_labels_without_texts_and_single_labels():
    order = balanced_order(lambda n: torch.zeros(len(n), 3), 9)
    assert sorted(order) == list(range(9))
    assert balanced_order(lambda n: torch.ones(len(n), 3), 1).tolist() == [0]


def test_files_remember_their_labels(tmp_path):
    ids = [f"l{n}" for n in range(10)]
    made = LabelClusters(np.arange(10)[::-1].astype(np.int32), np.array([0, 4, 10]))
    made.save(tmp_path / "c.safetensors", ids)
    again = LabelClusters.load(tmp_path / "c.safetensors", ids)
    assert np.array_equal(again.order, made.order) and np.array_equal(again.offsets, made.offsets)
    assert again.cluster_of.tolist() == [1] * 6 + [0] * 4
    assert b"pickle" not in (tmp_path / "c.safetensors").read_bytes()
    for path, labels, message in [
        ("c.safetensors", ids[::-1], "other labels"),
        ("none.safetensors", ids, "no such label clusters"),
    ]:
        with pytest.raises(UserError, match=message):
            LabelClusters.load(tmp_path / path, labels)
    (tmp_path / "c.safetensors").write_bytes(b"not clusters")
    with pytest.raises(UserError, match="not a file of label clusters"):
        LabelClusters.load(tmp_path / "c.safetensors", ids)


def test_the_seeds_files_are_imported(tmp_path):
    groups = np.empty(3, dtype=object)
    groups[:] = [np.array([4, 0]), [1], np.array([2, 3])]
    np.save(tmp_path / "g.npy", groups, allow_pickle=True)
    clusters = import_npy(tmp_path / "g.npy", 5)
    assert clusters.order.tolist() == [4, 0, 1, 2, 3] and clusters.cluster_of.tolist() == [0, 1, 2, 2, 0]
    with pytest.raises(UserError, match="each of the data set's 6 labels"):
        import_npy(tmp_path / "g.npy", 6)
