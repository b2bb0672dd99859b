"""Plans and batches: each text occurs once, steps do not depend on the number of ranks, and padding has no effect."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader

from xmc_trainer.data import MicroBatch, Ragged, TextBatches, plan_epoch, plan_eval, sample_rows
from xmc_trainer.errors import UserError

LENGTHS = np.random.default_rng(1).integers(3, 129, 1009).astype(np.int32)
PLAN = {"batch_size": 12, "accumulation": 3, "world_size": 1, "seed": 5, "epoch": 0, "length_grouped": True}


def joined(steps: list[list[MicroBatch]]) -> list[list[list[int]]]:
    """Return the rows of each micro-batch of each step, over all ranks in rank order."""
    return [[np.concatenate(micro.rows).tolist() for micro in step] for step in steps]


def in_order(steps: list[list[MicroBatch]]) -> list[int]:
    return sum((sum(step, []) for step in joined(steps)), [])


@pytest.mark.parametrize("length_grouped", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_row_once_and_equal_shares(length_grouped, accumulation):
    options = PLAN | {"length_grouped": length_grouped, "accumulation": accumulation, "world_size": 4}
    steps = plan_epoch(LENGTHS, **options)
    assert sorted(in_order(steps)) == list(range(1009))
    step_size = 12 * accumulation
    assert len(steps) == -(-1009 // step_size)
    short = 0
    for step in steps:
        total = sum(len(rows) for micro in step for rows in micro.rows)
        assert len(step) == accumulation and {micro.rows_in_step for micro in step} == {total}
        shares = [len(rows) for micro in step for rows in micro.rows]
        assert all(rows.dtype == np.int64 for micro in step for rows in micro.rows)
        if total == step_size:
            assert set(shares) == {3}
        else:
            short += 1
            micro_sizes = [sum(len(rows) for rows in micro.rows) for micro in step]
            assert total == 1009 % step_size and max(micro_sizes) - min(micro_sizes) <= 1
            assert all(max(map(len, m.rows)) - min(map(len, m.rows)) <= 1 for m in step)
    assert short == 1


@pytest.mark.parametrize("length_grouped", [False, True])
def test_steps_do_not_depend_on_the_number_of_ranks(length_grouped):
    plans = [
        joined(plan_epoch(LENGTHS, **(PLAN | {"world_size": ranks, "length_grouped": length_grouped})))
        for ranks in (1, 2, 3, 12)
    ]
    assert plans[0] == plans[1] == plans[2] == plans[3]


def test_the_rows_of_a_step_do_not_depend_on_its_micro_batches():
    one = [
        sorted(sum(step, [])) for step in joined(plan_epoch(LENGTHS, **(PLAN | {"batch_size": 36, "accumulation": 1})))
    ]
    three = [sorted(sum(step, [])) for step in joined(plan_epoch(LENGTHS, **PLAN))]
    assert one == three


def test_a_step_of_fewer_rows_than_ranks_leaves_some_without():
    (step,) = plan_epoch(LENGTHS[:4], **(PLAN | {"world_size": 3}))
    assert [[len(rows) for rows in micro.rows] for micro in step] == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    (step,) = plan_epoch(LENGTHS[:2], **PLAN)
    assert [len(micro.rows[0]) for micro in step] == [1, 1, 0] and step[2].rows_in_step == 2


def test_order_is_a_function_of_seed_and_epoch():
    plans = {
        (seed, epoch): in_order(plan_epoch(LENGTHS, **(PLAN | {"seed": seed, "epoch": epoch})))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(plan) for plan in plans.values()}) == 4
    np.random.seed(3)
    assert in_order(plan_epoch(LENGTHS, **(PLAN | {"seed": 1, "epoch": 1}))) == plans[1, 1]


def padding(steps) -> float:
    rows = [np.concatenate(micro.rows) for step in steps for micro in step]
    return sum(LENGTHS[part].max() * len(part) for part in rows if len(part)) / LENGTHS.sum()


def test_length_groups_need_little_padding_and_are_shuffled():
    grouped = plan_epoch(LENGTHS, **PLAN)
    plain = plan_epoch(LENGTHS, **(PLAN | {"length_grouped": False}))
    assert padding(grouped) < 1.1 < 1.6 < padding(plain)
    means = [LENGTHS[sum(step, [])].mean() for step in joined(grouped)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_a_sample_of_the_rows():
    rows = sample_rows(1009, 100, seed=7)
    assert len(rows) == 100 and (np.diff(rows) > 0).all() and 0 <= rows[0] and rows[-1] < 1009
    assert (rows == sample_rows(1009, 100, seed=7)).all() and not (rows == sample_rows(1009, 100, seed=8)).all()
    assert sorted(in_order(plan_epoch(LENGTHS, **PLAN, rows=rows))) == rows.tolist()
    assert sample_rows(10, None, seed=0) is None
    assert sample_rows(10, 10, seed=0).tolist() == list(range(10))
    with pytest.raises(UserError, match="`size`=11: there are only 10 training texts; lower"):
        sample_rows(10, 11, seed=0)


def test_batch_size_must_divide_by_the_ranks():
    with pytest.raises(UserError, match="`batch_size`=12: is not divisible by the 5 processes; change"):
        plan_epoch(LENGTHS, **(PLAN | {"world_size": 5}))


@pytest.mark.parametrize("world_size", [1, 3, 4, 12])
def test_evaluation_starts_with_the_longest_texts(world_size):
    plan = plan_eval(LENGTHS, batch_size=100, world_size=world_size)
    order = np.concatenate([rows for micro in plan for rows in micro.rows])
    assert sorted(order.tolist()) == list(range(1009)) and len(plan) == 11
    assert (np.diff(LENGTHS[order]) <= 0).all()
    assert [micro.rows_in_step for micro in plan] == [100] * 10 + [9]
    sizes = [[len(rows) for rows in micro.rows] for micro in plan]
    assert all(max(parts) - min(parts) <= 1 for parts in sizes) and (0 in sizes[-1]) == (world_size > 9)
    some = plan_eval(LENGTHS, batch_size=4, world_size=1, rows=np.array([3, 1, 2]))
    assert sorted(some[0].rows[0].tolist()) == [1, 2, 3] and len(some) == 1


# Batches --------------------------------------------------------------------------------------------------------------

PAD = 99


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return (rows as Python lists, the same rows as a memory-mapped data set of several chunks)."""
    rng = np.random.default_rng(2)
    rows = {
        "input_ids": [rng.integers(0, 1000, n).tolist() for n in rng.integers(1, 20, 101)],
        "labels": [np.unique(rng.integers(0, 50, n)).tolist() for n in rng.integers(0, 6, 101)],
    }
    rows["length"] = [len(ids) for ids in rows["input_ids"]]
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
    folder = tmp_path_factory.mktemp("data")
    Dataset.from_dict(rows, features=features).save_to_disk(folder, num_shards=3)
    return rows, Dataset.load_from_disk(str(folder))


def batch_of(dataset, rows, **options):
    micro = MicroBatch((np.array([], dtype=np.int64), np.array(rows, dtype=np.int64)), 17)
    return TextBatches(dataset, [micro], rank=1, pad_token_id=PAD, **options)[0]


@pytest.mark.parametrize("chosen", [[5], [5, 5], [100, 0, 50, 50], list(range(101))])
def test_a_batch_holds_padded_texts_labels_and_the_sizes_of_all_ranks(data, chosen):
    rows, dataset = data
    batch = batch_of(dataset, chosen)
    ids = [rows["input_ids"][row] for row in chosen]
    longest = max(map(len, rows["input_ids"]))
    assert longest % 8
    width = next((n for n in range(8, longest, 8) if n >= max(map(len, ids))), longest)
    assert batch["input_ids"].tolist() == [text + [PAD] * (width - len(text)) for text in ids]
    assert batch["attention_mask"].tolist() == [[1] * len(text) + [0] * (width - len(text)) for text in ids]
    assert batch["label_ids"].tolist() == sum((rows["labels"][row] for row in chosen), [])
    assert batch["label_counts"].tolist() == [len(rows["labels"][row]) for row in chosen]
    assert batch["rows"].tolist() == chosen and batch["rows_in_step"] == 17
    assert batch["rank_sizes"] == ([0, len(chosen)], [0, len(batch["label_ids"])])
    dtypes = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert dtypes == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "label_ids": torch.int32,
        "label_counts": torch.int32,
        "rows": torch.int64,
    }


def test_filter_pairs_follow_their_rows(data):
    pairs = Ragged(
        np.arange(101, dtype=np.int32), np.minimum(np.arange(102) * 2, 101)
    )  # rows have two pairs, one and none
    batch = batch_of(data[1], [50, 3, 100, 0], filter_pairs=pairs)
    assert batch["filter_counts"].tolist() == [1, 2, 0, 2] and batch["filter_ids"].tolist() == [100, 6, 7, 0, 1]
    assert batch["filter_ids"].dtype == batch["filter_counts"].dtype == torch.int32


def test_a_rank_without_rows_gets_one_dummy_text(data):
    pairs = Ragged(np.zeros(0, dtype=np.int32), np.zeros(102, dtype=np.int64))
    batch = batch_of(data[1], [], filter_pairs=pairs)
    assert batch["input_ids"].tolist() == [[PAD] * 8] and batch["attention_mask"].tolist() == [[1] + [0] * 7]
    for name in ("label_ids", "label_counts", "filter_ids", "filter_counts", "rows"):
        assert batch[name].shape == (0,)
    assert batch["rows_in_step"] == 17 and batch["rows"].dtype == torch.int64


def test_a_short_batch_is_filled_up(data):
    rows, dataset = data
    full, short = batch_of(dataset, [5, 7]), batch_of(dataset, [5, 7], least_rows=4)
    assert torch.equal(short["input_ids"][:2], full["input_ids"]) and (short["input_ids"][2:] == PAD).all()
    assert short["attention_mask"].sum(1).tolist() == [len(rows["input_ids"][5]), len(rows["input_ids"][7]), 1, 1]
    assert torch.equal(short["label_counts"], full["label_counts"]) and short["rank_sizes"] == full["rank_sizes"]
    assert batch_of(dataset, [5, 7], least_rows=1)["input_ids"].shape[0] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_an_epoch_in_order(data, workers):
    rows, dataset = data
    steps = plan_epoch(np.array(rows["length"]), **(PLAN | {"world_size": 2, "batch_size": 4, "accumulation": 2}))
    plan = [micro for step in steps for micro in step]
    seen = []
    for rank in range(2):
        batches = TextBatches(dataset, plan, rank=rank, pad_token_id=PAD)
        assert len(batches) == len(plan)
        for micro, batch in zip(plan, DataLoader(batches, batch_size=None, num_workers=workers), strict=True):
            assert batch["rows"].tolist() == micro.rows[rank].tolist()
            assert batch["label_counts"].tolist() == [len(rows["labels"][row]) for row in batch["rows"]]
            assert batch["rows_in_step"] == micro.rows_in_step
            texts, labels = batch["rank_sizes"]
            assert texts[rank] == len(batch["rows"]) and labels[rank] == len(batch["label_ids"])
            assert sum(labels) == sum(len(rows["labels"][row]) for part in micro.rows for row in part)
            seen += batch["rows"].tolist()
    assert sorted(seen) == list(range(101))


def test_batches_survive_pickling(data):
    batches = TextBatches(
        data[1], plan_eval(np.array(data[0]["length"]), batch_size=8, world_size=1), rank=0, pad_token_id=PAD
    )
    copy = pickle.loads(pickle.dumps(batches))
    for name, value in batches[3].items():
        assert np.array_equal(copy[3][name], value)


def test_a_batch_does_not_share_the_plans_memory(data):
    plan = plan_eval(np.array(data[0]["length"]), batch_size=8, world_size=1)
    batches = TextBatches(data[1], plan, rank=0, pad_token_id=PAD)
    before = plan[0].rows[0].tolist()
    batches[0]["rows"].zero_()
    assert plan[0].rows[0].tolist() == before
