"""The token cache: its content, when it is reused, and that nothing partial is left in it."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from tokenizers import processors

from tests.data_helpers import CLS, SEP, UNK, instance, json_lines, tiny_tokenizer, write_lf, write_raw
from xmc_trainer.data import Corpus, batch_loader, corpus, load_corpus, open_source, plan_eval, tokenise
from xmc_trainer.data.cache import seal, unseal
from xmc_trainer.data.corpus import flatten_lists
from xmc_trainer.errors import UserError


def load(folder, cache, layout="raw", tokenizer=None, max_len=8, num_labels=None, **options) -> Corpus:
    source = open_source(str(folder) if layout == "rows" else None, folder, is_lf_data=layout == "lf", **options)
    return load_corpus(
        source,
        tokenizer or tiny_tokenizer(),
        max_len=max_len,
        cache_dir=cache,
        num_labels=num_labels,
        progress=False,
    )


def entries(cache) -> list[str]:
    return sorted(os.listdir(cache)) if cache.exists() else []


def test_a_corpus_holds_tokens_labels_and_lengths(tmp_path):
    folder = write_raw(
        tmp_path / "d",
        [("w0 w1", "b a"), ("w0 " * 20, "c"), ("other", "")],
        [("w3", "a z"), ("w9", "z"), ("w5", "c b")],
    )
    found = load(folder, tmp_path / "cache")
    expected = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
    assert found.train.features == found.test.features == expected
    assert found.train[:] == {
        "input_ids": [[CLS, 4, 5, SEP], [CLS] + [4] * 6 + [SEP], [CLS, UNK, SEP]],
        "labels": [[0, 1], [2], []],
        "length": [4, 8, 3],
    }
    assert found.test[:] == {
        "input_ids": [[CLS, 7, SEP], [CLS, 13, SEP], [CLS, 9, SEP]],
        "labels": [[0, 3], [3], [1, 2]],
        "length": [3, 3, 3],
    }
    assert found.labels[:] == {"id": ["a", "b", "c"], "text": ["a", "b", "c"]}
    assert (found.num_labels, found.filter_pairs) == (3, None)
    assert found.lengths("train").tolist() == [4, 8, 3] and found.lengths("test").tolist() == [3, 3, 3]
    assert found.test_labels().ids.tolist() == [0, 1, 2] and found.test_labels().offsets.tolist() == [0, 1, 1, 3]
    assert entries(tmp_path / "cache") == [found.fingerprint]
    assert sorted(os.listdir(tmp_path / "cache" / found.fingerprint)) == [
        "labels.arrow",
        "manifest.json",
        "test.arrow",
        "train.arrow",
    ]


def test_an_empty_text_is_its_special_tokens(tmp_path):
    folder = write_raw(tmp_path / "d", [("w0", "a"), ("", "a b")], [("w3", "a")])
    assert load(folder, tmp_path / "cache").train[:]["input_ids"] == [[CLS, 4, SEP], [CLS, SEP]]
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    found = load(folder, tmp_path / "cache", tokenizer=bare)
    assert found.train[1]["input_ids"] == [UNK] and min(found.lengths("train")) == 1  # the replacement for no token


@pytest.mark.parametrize("layout", ["raw", "lf", "rows"])
def test_byte_order_marks_are_not_text_in_any_layout(tmp_path, layout):
    """Prediction uses the same function."""
    marked = ["\ufeffw0 w1", "w0 w1\r", "\ufeff", "w0 w1"]
    folder = tmp_path / "d"
    if layout == "raw":
        write_raw(folder, [(text, "a") for text in marked], [("w0", "a")])
    elif layout == "lf":
        write_lf(folder, [instance(text, [0]) for text in marked])
    else:
        folder.mkdir()
        lines = json_lines({"text": f"{text}\n", "labels": "a"} for text in marked)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    words, nothing = [CLS, 4, 5, SEP], [CLS, SEP]
    assert load(folder, tmp_path / "c", layout).train["input_ids"][:] == [words, words, nothing, words]


def test_label_feature_content_with_filter_and_augmentation(tmp_path):
    inside = write_lf(tmp_path / "d", test=[instance("w3", [0]), instance("w4", [])])
    (inside / "filter_labels_test.txt").write_text("1 2\n")
    found = load(tmp_path / "d", tmp_path / "c", "lf", augment_label_data=True, use_filter_eval=True)
    assert found.train["labels"][:] == [[0, 1], [2], [0], [1], [2]]
    assert found.train["input_ids"][2:] == [[CLS, 4 + n, SEP] for n in range(3)]
    assert found.test["labels"][:] == [[0], []]
    again = load(tmp_path / "d", tmp_path / "c", "lf", augment_label_data=True, use_filter_eval=True)
    for pairs in (found.filter_pairs, again.filter_pairs):
        assert pairs.ids.tolist() == [2] and pairs.offsets.tolist() == [0, 0, 1]
    plain = load(tmp_path / "d", tmp_path / "c", "lf")
    assert plain.filter_pairs is None and len(plain.train) == 2
    # Propensities count only the real texts, with and without augmentation.
    assert found.texts == again.texts == plain.texts == 2 and len(found.train) == 5
    assert found.label_counts().tolist() == plain.label_counts().tolist() == [1, 1, 1]


def test_hugging_face_content(tmp_path):
    rows = Dataset.from_dict({"body": ["w0", "w1 w2"], "tags": [["b"], ["a"]]})
    DatasetDict(fit=rows, dev=rows).save_to_disk(tmp_path / "d")
    options = {"train_split": "fit", "test_split": "dev", "text_column": "body", "label_column": "tags"}
    found = load(tmp_path / "d", tmp_path / "c", "rows", **options)
    assert found.train["labels"][:] == [[1], [0]] and found.test["length"][:] == [3, 4]


def test_many_rows_in_several_processes_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS_PER_BATCH", 100)
    monkeypatch.setattr(tokenise, "ROWS_PER_BATCH", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 100, rng.integers(1, 12)) for _ in range(1009)]
    labels = [np.unique(rng.integers(0, 37, rng.integers(1, 5))) for _ in words]
    rows = [(" ".join(f"w{w}" for w in ws), " ".join(map(str, ls))) for ws, ls in zip(words, labels)]
    found = load(write_raw(tmp_path / "d", rows, rows[:7]), tmp_path / "c")
    assert found.num_labels == 37  # so names equal numbers
    assert found.train["input_ids"][:] == [[CLS, *(ws[:6] + 4).tolist(), SEP] for ws in words]
    assert found.train["labels"][:] == [ls.tolist() for ls in labels]
    assert found.train["length"][:] == [min(len(ws), 6) + 2 for ws in words]
    assert len(found.train.data.column("labels").chunks) > 1
    counts = found.label_counts()
    assert counts.dtype == np.int64
    assert counts.tolist() == [sum(label in ls for ls in labels) for label in range(37)]


def test_label_counts_include_labels_without_texts(tmp_path):
    write_lf(tmp_path / "d", train=[instance("w0", [2]), instance("w1", [2, 0])])
    assert load(tmp_path / "d", tmp_path / "c", "lf").label_counts().tolist() == [1, 0, 2]


def test_flatten_lists_of_slices_and_chunks():
    lists = [[1], [], [2, 3], [4], [5, 6, 7]]
    whole = pa.array(lists, pa.list_(pa.int32()))
    ragged = flatten_lists(pa.chunked_array([whole.slice(2, 1), whole.slice(0, 2), whole.slice(4, 1)]))
    assert ragged.ids.tolist() == [2, 3, 1, 5, 6, 7] and ragged.offsets.tolist() == [0, 2, 3, 3, 6]
    empty = flatten_lists(pa.chunked_array([], pa.list_(pa.int32())))
    assert empty.ids.tolist() == [] and empty.offsets.tolist() == [0]


# Reuse ---------------------------------------------------------------------------------------------------------------


def test_a_second_call_reads_only_the_cache(tmp_path, monkeypatch):
    folder, tokenizer = write_raw(tmp_path / "d"), tiny_tokenizer()
    first = load(folder, tmp_path / "c", tokenizer=tokenizer)
    monkeypatch.setattr(corpus, "_build", None)
    # Another folder with the same content, a new equal tokenizer, and one that was called with other options.
    tokenizer(["w0"], truncation=True, max_length=3, padding="max_length")
    copy = write_raw(tmp_path / "elsewhere")
    for again in (load(copy, tmp_path / "c", tokenizer=tokenizer), load(folder, tmp_path / "c")):
        assert again.fingerprint == first.fingerprint and again.train[:] == first.train[:]
        assert again.train.cache_files  # memory-mapped


def test_checkpoints_of_earlier_versions_are_known_by_a_slower_hash(tmp_path):
    folder = write_raw(tmp_path / "a", [("w1", "a")], [("w2", "a")])
    found = load(folder, tmp_path / "c")
    former = found.former_fingerprint()
    assert len(former) == 32 and former != found.fingerprint
    assert load(folder, tmp_path / "d").former_fingerprint() == former
    other = write_raw(tmp_path / "b", [("w3", "a")], [("w2", "a")])
    assert load(other, tmp_path / "c").former_fingerprint() != former


def test_each_change_of_content_changes_the_fingerprint(tmp_path):
    folder = write_raw(tmp_path / "d")
    (folder / "names.tsv").write_text("a\tA\n")
    prints = [load(folder, tmp_path / "c").fingerprint]
    prints.append(load(folder, tmp_path / "c", max_len=9).fingerprint)
    prints.append(load(folder, tmp_path / "c", label_text_file="names.tsv").fingerprint)
    prints.append(load(folder, tmp_path / "c", tokenizer=tiny_tokenizer(99)).fingerprint)
    left = tiny_tokenizer()
    left.truncation_side = "left"
    prints.append(load(folder, tmp_path / "c", tokenizer=left).fingerprint)
    for name in ("train_raw_texts.txt", "test_labels.txt", "names.tsv"):
        file = folder / name
        file.write_bytes(file.read_bytes().replace(b"a", b"b").replace(b"w0", b"w8"))
        prints.append(load(folder, tmp_path / "c", label_text_file="names.tsv").fingerprint)
    write_lf(tmp_path / "l")
    for augment in (False, True):
        prints.append(load(tmp_path / "l", tmp_path / "c", "lf", augment_label_data=augment).fingerprint)
    assert len(set(prints)) == len(prints)
    assert entries(tmp_path / "c") == sorted(prints)


def test_number_of_labels_is_checked_with_and_without_cache(tmp_path):
    folder, cache = write_raw(tmp_path / "d"), tmp_path / "c"
    with pytest.raises(UserError, match=r"`num_labels`=4: the data have 3 labels; correct it, or set it to null"):
        load(folder, cache, num_labels=4)
    assert entries(cache) == []
    assert load(folder, cache, num_labels=3).num_labels == 3
    with pytest.raises(UserError, match=r"`num_labels`=4: the data have 3 labels"):
        load(folder, cache, num_labels=4)


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"train": []}, "train_labels.txt: has no labels"),
        ({"test": [("w0", "unseen")]}, "the test set has no texts with labels; check its files"),
    ],
)
def test_bad_data_leave_no_files(tmp_path, options, said):
    folder = write_raw(tmp_path / "d", **options)
    with pytest.raises(UserError) as caught:
        load(folder, tmp_path / "c")
    assert str(folder) in str(caught.value) and said in str(caught.value)
    assert entries(tmp_path / "c") == []
    assert entries(folder) == entries(write_raw(tmp_path / "other"))  # nor in the data folder


def test_truncated_gzip_leaves_no_files(tmp_path):
    file = write_lf(tmp_path / "d", [instance(f"w{n}", [0]) for n in range(99)], zipped=True) / "trn.json.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        UserError, match=r"trn\.json\.gz, after line \d+: damaged or truncated gzip file .* copy it again"
    ):
        load(tmp_path / "d", tmp_path / "c", "lf")
    assert entries(tmp_path / "c") == []


@pytest.mark.parametrize("stage", ["_write_tokens", "os.replace"])
def test_an_interrupted_build_leaves_no_files_and_can_be_repeated(tmp_path, monkeypatch, stage):
    folder = write_raw(tmp_path / "d")
    write_tokens = corpus._write_tokens

    def interrupt(*arguments):
        if stage == "_write_tokens" and arguments[0].name == "train.arrow":  # so that a partial file exists
            return write_tokens(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus if stage == "_write_tokens" else corpus.os, stage.removeprefix("os."), interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(folder, tmp_path / "c")
    assert entries(tmp_path / "c") == []
    assert len(load(folder, tmp_path / "c").train) == 2


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    folder = write_raw(tmp_path / "d")
    with pytest.raises(
        UserError, match=r"`cache_dir`=.*/file/c: cannot be written \(Not a directory\); name a writable folder"
    ):
        load(folder, tmp_path / "file" / "c")
    with pytest.raises(
        UserError, match=r"`cache_dir`=.*: cannot be written \(File name too long\); name a writable folder"
    ):
        load(folder, tmp_path / ("c" * 300))
    for name in ("~nobody-here/c", "a\0b", "\ud800"):
        with pytest.raises(UserError, match=r"`cache_dir`=.*: is not a valid folder name"):
            load(folder, name)


def test_a_full_disk(tmp_path):
    """Simulated by the limit of a process's file size, which fails where a full disk would."""
    folder = write_raw(tmp_path / "d", [(f"w{n}", "a") for n in range(5000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"`cache_dir`=.*/c: cannot be written \(.*\); .* enough space"):
            load(folder, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path / "c") == []


# Several processes ----------------------------------------------------------------------------------------------------


def build_together(folder, cache, barrier, results):
    barrier.wait()
    found = load(folder, cache)
    results.put((found.fingerprint, found.train[:], found.test[:]))


def test_two_processes_at_once(tmp_path):
    rows = [(f"w{n % 100}", str(n % 7)) for n in range(500)]
    folder = write_raw(tmp_path / "d", rows, rows[:9])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=build_together, args=(folder, tmp_path / "c", barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert found[0] == found[1] and found[0][1]["length"] == [3] * 500
    assert entries(tmp_path / "c") == [found[0][0]]


def build_slowly(folder, cache, begun):
    def slow(*arguments):
        begun.set()
        time.sleep(60)

    corpus._write_tokens = slow
    load(folder, cache)


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_leftovers_of_dead_processes_are_removed_and_live_ones_not_disturbed(tmp_path):
    cache, context = tmp_path / "c", multiprocessing.get_context("fork")
    folders = [write_raw(tmp_path / name, [(name, "a")], [(name, "a")]) for name in ("w1", "w2", "w3")]
    builders = []
    for folder in folders[:2]:
        begun = context.Event()
        builders.append(context.Process(target=build_slowly, args=(folder, cache, begun), daemon=True))
        builders[-1].start()
        assert begun.wait(20)
    dead, live = builders
    dead.kill(), dead.join()
    assert len(entries(cache)) == 4  # each has a partial folder and a lock
    found = load(folders[2], cache)
    live_name = next(name.split(".")[0] for name in entries(cache) if name.endswith(".lock"))
    assert [name.split(".")[0] for name in entries(cache)].count(live_name) == 2 and len(entries(cache)) == 3
    live.kill(), live.join()
    assert entries(cache).count(found.fingerprint) == 1
    for folder in folders[:2]:  # the same data
        load(folder, cache)
    assert len(entries(cache)) == 3 and not [name for name in entries(cache) if "." in name]


# Verification ---------------------------------------------------------------------------------------------------------


def content_of(found: Corpus):
    pairs = found.filter_pairs
    return found.train[:], found.test[:], found.labels[:], found.texts, pairs.ids.tolist(), pairs.offsets.tolist()


def test_damaged_entries_are_made_again(tmp_path, caplog):
    inside = write_lf(tmp_path / "d")
    (inside / "filter_labels_test.txt").write_text("1 2\n")

    def again():
        return load(tmp_path / "d", tmp_path / "c", "lf", use_filter_eval=True)

    first = again()
    expected, rng = content_of(first), random.Random(0)
    entry = tmp_path / "c" / first.fingerprint
    good = {file.name: file.read_bytes() for file in entry.iterdir()}
    assert len(good) == 6
    for name, content in good.items():
        for how in [*rng.sample(range(len(content) * 8), 12), "truncated", "longer", "empty", "gone", "a folder"]:
            file = entry / name
            bad = bytearray(content)
            if isinstance(how, int):
                bad[how // 8] ^= 1 << how % 8
            changed = {"truncated": content[:-1], "longer": content + b"\0", "empty": b""}.get(how, bytes(bad))
            file.unlink()  # existing memory maps stay valid
            if how == "a folder":
                file.mkdir()
            elif how != "gone":
                file.write_bytes(changed)
            caplog.clear()
            assert content_of(again()) == expected
            (said,) = caplog.messages
            assert str(file) in said and said.endswith("; the texts are tokenised again")
            assert {file.name: file.read_bytes() for file in entry.iterdir()} == good
            assert entries(tmp_path / "c") == [first.fingerprint]
    caplog.clear()
    assert content_of(again()) == expected and not caplog.messages


def test_a_damaged_cache_that_cannot_be_made_again(tmp_path, monkeypatch):
    folder = write_raw(tmp_path / "d")
    monkeypatch.setattr(corpus, "seal", lambda *arguments: None)  # written files read back differently
    with pytest.raises(UserError, match=r"`cache_dir`=.*manifest.json: No such file or directory just after"):
        load(folder, tmp_path / "c")


def test_labels_that_training_lacks_are_kept_apart(tmp_path):
    folder = write_raw(
        tmp_path / "d", [("w0", "b a"), ("w1", "c")], [("w3", "a z"), ("w4", "z y"), ("w5", "c"), ("w6", "y")]
    )
    found = load(folder, tmp_path / "c")
    for each, a, c in ((found, 0, 2), (found.reordered(np.array([2, 0, 1])), 1, 0)):
        every, known = each.test_labels(unseen=True), each.test_labels()
        # z and y, in the order of their first lines
        assert every.ids.tolist() == [a, 3, 3, 4, c, 4] and every.offsets.tolist() == [0, 2, 4, 5, 6]
        assert known.ids.tolist() == [a, c] and known.offsets.tolist() == [0, 1, 1, 2, 2]
        assert each.test_rows().tolist() == [0, 2] and each.test_rows(unseen=True).tolist() == [0, 1, 2, 3]
        assert each.unseen_labels == 2 and each.label_counts().sum() == 3
        plan = plan_eval(each.lengths("test"), batch_size=4, world_size=1, rows=each.test_rows())
        options = {"rank": 0, "pad_token_id": 0, "workers": 0, "device": torch.device("cpu")}
        (batch,) = batch_loader(each, "test", plan, **options)
        assert batch["label_ids"].tolist() == [a, c] and batch["label_counts"].tolist() == [1, 1]
        assert [*batch["rank_sizes"]] == [[2], [2]]


def test_an_entry_of_an_earlier_version_is_made_again(tmp_path, caplog):
    folder = write_raw(tmp_path / "d", [("w0", "a")], [("w3", "a z")])
    entry = load(folder, tmp_path / "c").fingerprint
    facts = unseal(tmp_path / "c" / entry)
    (tmp_path / "c" / entry / "manifest.json").unlink()
    seal(tmp_path / "c" / entry, {name: value for name, value in facts.items() if name != "unseen_labels"})
    assert load(folder, tmp_path / "c").unseen_labels == 1
    assert "was written by an earlier version; the texts are tokenised again" in caplog.text


def test_notes_of_the_source_are_logged_at_every_start(tmp_path, caplog):
    folder = write_raw(tmp_path / "d", [("w0", "a"), ("", "b")], [("w3", "a z")])
    (folder / "names.tsv").write_text("a\tA\n")
    said = []
    for progress in (False, True, True):
        caplog.clear()
        source = open_source(None, folder, label_text_file="names.tsv")
        load_corpus(source, tiny_tokenizer(), max_len=8, cache_dir=tmp_path / "c", progress=progress)
        said.append(caplog.messages)
    assert said[0] == [] and said[1] == said[2] and len(said[1]) == 3
    assert (
        "1 of 2 labels have a text" in said[1][0]
        and "1 texts are empty" in said[1][1]
        and "1 labels are never seen in training" in said[1][2]
    )
