"""Label clusters: sizes, similarity, determinism, files."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from random import Random

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.fuzz import examples
from xmc_trainer.commands.label_clusters import import_npy
from xmc_trainer.errors import UserError
from xmc_trainer.labels.clusters import LabelClusters, balanced_order, cluster_bounds


@pytest.mark.parametrize(
    "labels, clusters, align", [(41, 8, 1), (1009, 64, 1), (1009, 3, 1), (1000, 16, 16), (5, 5, 1), (7, 64, 4)]
)
def test_bounds_are_even_and_aligned(labels, clusters, align):
    bounds = cluster_bounds(labels, clusters, align)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == labels and (sizes > 0).all() and (bounds[:-1] % align == 0).all()
    assert len(sizes) == min(clusters, -(-labels // align))
    power = clusters & (clusters - 1) == 0
    assert sizes.max() - sizes.min() <= (align if power else sizes.min() + 1)


def blobs(count, size, d=24, seed=0):
    """Return `size` vectors around each of `count` directions, shuffled, and the direction of each."""
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
    assert together > 0.8  # 0.2 for random clusters
    assert np.array_equal(order, balanced_order(lambda n: vectors[n], 256, align=16, seed=3, rows_at_once=rows_at_once))


def test_two_clusters_are_the_best_balanced_halves():
    # Points on an arc: the only sensible balanced halves are the two ends.
    angle = torch.linspace(0, 2.5, 31)[torch.randperm(31, generator=torch.Generator().manual_seed(5))]
    order = balanced_order(lambda n: torch.stack([angle[n].cos(), angle[n].sin()], 1), 31)
    first, second = angle[order[:16]], angle[order[16:]]
    assert first.max() < second.min() or second.max() < first.min()


def test_labels_without_texts_and_single_labels():
    order = balanced_order(lambda n: torch.zeros(len(n), 3), 9)
    assert sorted(order) == list(range(9))
    assert balanced_order(lambda n: torch.ones(len(n), 3), 1).tolist() == [0]


def test_cluster_files_are_tied_to_their_labels(tmp_path):
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
    with pytest.raises(UserError, match="is not a label cluster file"):
        LabelClusters.load(tmp_path / "c.safetensors", ids)


def test_a_flipped_bit_of_a_cluster_file_is_refused_or_changes_nothing(tmp_path):
    ids, random, path = [f"l{n}" for n in range(40)], Random(1), tmp_path / "c.safetensors"
    made = LabelClusters(np.random.default_rng(1).permutation(40).astype(np.int32), np.array([0, 9, 22, 40]))
    made.save(path, ids)
    content = path.read_bytes()
    for _ in range(examples(600)):
        data = bytearray(content)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        try:
            found = LabelClusters.load(path, ids)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert np.array_equal(found.order, made.order) and np.array_equal(found.offsets, made.offsets)


def test_cluster_files_of_the_previous_format_load_if_consistent(tmp_path):
    ids, path = [f"l{n}" for n in range(6)], tmp_path / "c.safetensors"
    digest = hashlib.sha256("\0".join(ids).encode()).hexdigest()
    for order, offsets, message in [
        ([5, 4, 3, 2, 1, 0], [0, 4, 6], None),
        ([5, 4, 3, 2, 1, 1], [0, 4, 6], "does not hold each label exactly once"),
        ([5, 4, 3, 2, 1, 0], [0, 7, 6], "its clusters are empty, overlap"),
        ([5, 4, 3, 2, 1, 0], [0, 4], "its clusters are empty, overlap"),
    ]:
        tensors = {"order": np.array(order, np.int32), "offsets": np.array(offsets, np.int64)}
        save_file(tensors, path, {"format": "1", "labels_sha256": digest})
        with pytest.raises(UserError, match=message) if message else nullcontext():
            assert LabelClusters.load(path, ids).order.tolist() == order


def object_array(*groups):
    made = np.empty(len(groups), dtype=object)
    made[:] = groups
    return made


# Of five labels in the order of their numeric names; as text "10" and "100" come before "9".
IDS = ["3", "9", "10", "20", "100"]


@pytest.mark.parametrize(
    "groups, order, read_as, expected",
    [
        (object_array(["100", "3"], ["9"], ["10", "20"]), None, "names", [4, 0, 1, 2, 3]),
        (object_array(np.array(["100", "3"]), [], ["9"], object_array("10", "20")), None, "names", [4, 0, 1, 2, 3]),
        (object_array(np.array([4, 0]), [1], np.array([2, 3])), "ours", "ours", [4, 0, 1, 2, 3]),
        # sorted as text: 10, 100, 20, 3, 9
        (object_array([4, 0], [np.int32(1)], [2, 3]), "sorted", "sorted", [1, 2, 4, 3, 0]),
    ],
)
def test_spartex_files_are_imported(groups, order, read_as, expected, tmp_path):
    np.save(tmp_path / "g.npy", groups, allow_pickle=True)
    clusters, how = import_npy(tmp_path / "g.npy", IDS, order)
    assert how == read_as and clusters.order.tolist() == expected and clusters.offsets.tolist() == [0, 2, 3, 5]


def test_clusters_of_one_size_are_a_matrix(tmp_path):
    np.save(tmp_path / "g.npy", np.array([["b", "d"], ["c", "a"]]))
    assert import_npy(tmp_path / "g.npy", list("abcd"), None)[0].cluster_of.tolist() == [1, 0, 1, 0]
    np.save(tmp_path / "g.npy", np.array([[1, 3], [2, 0]]))  # sorted names: numbers are unambiguous
    assert import_npy(tmp_path / "g.npy", list("abcd"), None)[0].cluster_of.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "content, said",
    [
        (object_array([4, 0], [1], [2, 3]), "add --npy-order sorted"),
        (object_array(["3", "9"], ["10"], ["20"]), "each of the data set's 5 labels exactly once"),
        (object_array(["3", "9"], ["10", "3"], ["20", "100"]), "each of the data set's 5 labels exactly once"),
        (object_array(["3", "9"], ["10", "20", "7"]), "'7' is not one of the data set's 5 labels"),
        (object_array([4.0, 0.0], [1.0], [2.0, 3.0]), "lists of label names or of whole numbers"),
        (object_array(["3", "9"], ["10", "20", 100]), "lists of label names or of whole numbers"),
        (np.array(["3", "9", "10", "20", "100"]), "lists of label names or of whole numbers"),
        (np.array(5), "lists of label names or of whole numbers"),
        (b"label a\nlabel b\n", "is not a valid .npy file"),
        (None, "No such file"),
    ],
)
def test_other_files_are_refused_in_one_line(content, said, tmp_path):
    file = tmp_path / "g.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(UserError, match=said) as error:
        import_npy(file, IDS, None)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_an_imported_file_runs_no_code(tmp_path):
    hostile = np.empty(1, dtype=object)
    hostile[0] = Trap(str(tmp_path / "caught"))
    np.save(tmp_path / "g.npy", hostile, allow_pickle=True)
    with pytest.raises(UserError, match=r"is not a valid .npy file \(it refers to \w+.open\)"):
        import_npy(tmp_path / "g.npy", IDS, None)
    assert not (tmp_path / "caught").exists()


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")
