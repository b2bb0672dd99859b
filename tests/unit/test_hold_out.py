"""Texts held out on the spot: by hash, by label strata and by groups; the same ones again when the file has changed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.unit.test_sources import message_of, read_all, read_with_notes
from tests.unit.test_tables import write_lines
from xmc_trainer.data.rows import rows_source
from xmc_trainer.data.sources import Ragged
from xmc_trainer.data.split import DEV, TEST, TRAIN, Split, divided, stratified


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged(np.array([label for row in rows for label in row], np.int32), np.cumsum([0, *map(len, rows)]))


def sechidis(rows: list[list[int]], labels: int, shares: list[float]) -> list[int]:
    """Iterative stratification as the paper's Algorithm 1 has it, with ties broken by the lowest number."""
    part_of: list[int | None] = [None] * len(rows)
    wanted = [share * len(rows) for share in shares]
    lacking = [[share * sum(label in row for row in rows) for share in shares] for label in range(labels)]
    while True:
        left = [(sum(part_of[r] is None and n in row for r, row in enumerate(rows)), n) for n in range(labels)]
        left = [(count, label) for count, label in left if count]
        if not left:
            break
        label = min(left)[1]
        for number, row in enumerate(rows):
            if part_of[number] is None and label in row:
                part = max(range(len(shares)), key=lambda p: (lacking[label][p], wanted[p]))
                part_of[number] = part
                wanted[part] -= 1
                for own in row:
                    lacking[own][part] -= 1
    for number in range(len(rows)):
        if part_of[number] is None:
            part_of[number] = part = max(range(len(shares)), key=wanted.__getitem__)
            wanted[part] -= 1
    return part_of  # type: ignore[return-value]


def test_stratification_is_that_of_the_paper():
    rng = random.Random(0)
    weights = [1 / (n + 1) for n in range(17)]
    rows = [sorted({*rng.choices(range(17), weights, k=rng.randint(0, 4))}) for _ in range(307)]
    found = stratified(ragged(rows), 17, 0.125, 0.25).tolist()
    assert found == sechidis(rows, 17, [0.625, 0.125, 0.25])
    for label in range(17):
        texts = [part for part, row in zip(found, rows) if label in row]
        assert abs(texts.count(DEV) - len(texts) / 4) <= 2 and abs(texts.count(TEST) - len(texts) / 8) <= 2
    assert {TEST} == {*np.unique(stratified(ragged(rows), 17, 0.5, 0.0))} - {TRAIN}  # no dev part


@pytest.mark.parametrize("stratify", [False, True])
def test_parts_of_any_rows(stratify):
    rng = random.Random(stratify)
    for trial in range(30):
        count, labels = rng.randint(2, 60), rng.randint(1, 12)
        keys = np.array([rng.randrange(2, 2 + rng.choice((5, 1 << 60))) for _ in range(count)], np.uint64)
        rows = [rng.sample(range(labels), rng.randint(0, min(3, labels))) for _ in range(count)]
        rows = [[*row] for row in rows]
        split = divided(keys, ragged(rows), labels, 0.3, 0.2, stratify)
        assert all(len({*split.parts[keys == key]}) == 1 for key in keys), trial  # equal keys stay together
        trained = {label for row, part in zip(rows, split.parts) if part == TRAIN for label in row}
        assert trained == {label for row in rows for label in row}, trial
        if not any(rows) and not stratify:
            units = len(np.unique(keys))
            assert len(np.unique(keys[split.parts == TEST])) == -(-3 * units // 10)


def test_dev_test_and_training_part_of_a_file(tmp_path):
    rows = [{"text": f"text {n}", "labels": [f"l{n % 5}"], "who": f"customer {n % 20}"} for n in range(200)]
    path = str(write_lines(tmp_path / "t.jsonl", rows))

    def parts(**options):
        shares = {"test_share": 0.2, "dev_share": 0.1} | options
        by_name = {name: read_with_notes(rows_source(path, test_split=name, **shares)) for name in ("test", "dev")}
        (_, train, test, notes), (_, again, dev, _) = by_name["test"], by_name["dev"]
        assert train == again and sorted(text for text, _ in train + test + dev) == sorted(row["text"] for row in rows)
        return notes, train, test, dev

    notes, *texts = parts()
    assert [len(each) for each in texts] == [
        140,
        40,
        20,
    ] and "of 200 texts: 40 texts as test set and 20 texts as dev set" in notes
    notes, *strata = parts(stratify=True)
    assert "by iterative stratification" in notes
    assert [[[labels for _, labels in part].count([n]) for n in range(5)] for part in strata] == [
        [28] * 5,
        [8] * 5,
        [4] * 5,
    ]
    notes, *groups = parts(group_column="who")
    customers = [{int(text.split()[1]) % 20 for text, _ in part} for part in groups]
    assert [len(each) for each in customers] == [14, 4, 2] and len(set.union(*customers)) == 20
    assert "whole groups of 'who'" in notes
    random.Random(1).shuffle(rows)
    write_lines(tmp_path / "t.jsonl", rows)
    assert [sorted(part) for part in parts(stratify=True)[1:]] == [sorted(part) for part in strata]


@pytest.mark.parametrize("stratify", [False, True])
def test_the_order_of_the_rows_does_not_matter(tmp_path, stratify):
    rng = random.Random(1)
    labels = [[f"l{int(rng.paretovariate(0.7)) % 60}" for _ in range(rng.randint(1, 4))] for _ in range(300)]
    rows = [{"text": f"text {n}", "labels": names} for n, names in enumerate(labels)]

    def held_out() -> list[str]:
        path = str(write_lines(tmp_path / "t.jsonl", rows))
        return sorted(
            text for text, _ in read_all(rows_source(path, test_share=0.2, dev_share=0.1, stratify=stratify))[2]
        )

    first = held_out()
    for _ in range(3):
        rng.shuffle(rows)
        assert held_out() == first


def test_a_changed_file_is_divided_as_before(tmp_path):
    rows = [{"text": f"text {n}", "labels": ["a", f"l{n % 3}"]} for n in range(100)]
    first = rows_source(str(write_lines(tmp_path / "t.jsonl", rows)), test_share=0.2).read()
    assert first.split is not None and np.bincount(first.split.parts).tolist() == [80, 20]
    first.split.save(tmp_path / "split.npz")
    held = {text for text, _ in first.test()}
    more = [{"text": f"more {n}", "labels": ["a"]} for n in range(100)]
    path = str(write_lines(tmp_path / "t.jsonl", [*more, *rows[10:]]))
    kept = rows_source(path, test_share=0.2, split_file=tmp_path / "split.npz")
    assert {text for text, _ in read_all(kept)[2]} == held - {row["text"] for row in rows[:10]}
    assert {text for text, _ in read_all(rows_source(path, test_share=0.2))[2]} != held
    other = str(write_lines(tmp_path / "other.jsonl", more))  # not the texts that were divided
    assert len(read_all(rows_source(other, split_file=tmp_path / "split.npz"))[2]) == 10
    (tmp_path / "split.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"split\.npz: cannot be read"):
        Split.load(tmp_path / "split.npz")


@pytest.mark.parametrize("options, said", [
    ({"group_column": "labels"}, "`group_column`: is also the name of another column"),
    ({"group_column": "where"}, "has no column 'where', only text, labels, who; set `group_column`"),
    ({"group_column": "who"}, "row 3: column 'who' must hold a name or a whole number, not nothing"),
    ({"test_split": "dev"}, "`test_split`=dev: no texts are held out for it; set `dev_share`"),
])  # fmt: skip
def test_what_cannot_be_held_out(tmp_path, options, said):
    (tmp_path / "t.csv").write_text("text,labels,who\na,x,p\nb,x,q\nc,x,\n")
    assert said in message_of(lambda: rows_source(str(tmp_path / "t.csv"), **options).read())


def test_nothing_is_held_out_of_a_folder_with_a_test_file(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}", "labels": ["a"]} for n in range(20)])
    assert "`stratify`: no texts are held out" in message_of(lambda: rows_source(str(tmp_path), stratify=True))
    dev = rows_source(str(tmp_path), test_split="dev", dev_share=0.1)
    assert [len(rows) for rows in read_all(dev)[1:]] == [18, 2]
    test = rows_source(str(tmp_path), dev_share=0.1)
    assert [len(rows) for rows in read_all(test)[1:]] == [18, 20]
