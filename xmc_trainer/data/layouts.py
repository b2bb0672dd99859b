"""Open a data set: recognise its layout and choose its reader."""

from __future__ import annotations

import os
from pathlib import Path

from xmc_trainer.data.rows import SEPARATOR, rows_source
from xmc_trainer.data.sources import Source, lf_source, raw_source
from xmc_trainer.data.sparse import LABEL_FILES, sparse_source
from xmc_trainer.errors import UserError

# Parameter of `open_source` -> layouts in which it has a meaning.
_MEANT_FOR = {
    "label_text_file": ("raw",),
    "use_filter_eval": ("lf", "sparse"),
    "augment_label_data": ("raw", "lf", "sparse"),
    "test_share": ("rows",),
    "dev_share": ("rows",),
    "group_column": ("rows",),
    "stratify": ("rows",),
    "train_split": ("rows",),
    "text_column": ("rows",),
    "label_column": ("rows",),
    "label_separator": ("rows",),
    "test_split": ("rows", "raw"),
}
_WORDS = {
    "raw": "the raw layout (train_raw_texts.txt, train_labels.txt)",
    "lf": "the label-feature layout (trn.json, lbl.json)",
    "sparse": "sparse label files (trn_X_Y.txt, Y.trn.npz)",
    "rows": "rows with columns (CSV, JSON lines, Parquet, hub data sets)",
}


def layout_of(source: str | Path) -> str:
    """Return "raw", "lf", "sparse" or "rows" for a folder, file or hub id."""
    folder = os.path.expanduser(source)

    def has(*names: str) -> bool:
        return any(os.path.isfile(os.path.join(folder, name)) for name in names)

    if has(*(f"{inner}trn.json{packed}" for inner in ("raw_text/", "") for packed in ("", ".gz"))):
        return "lf"
    if has(*LABEL_FILES["train"]):
        return "sparse"
    return "raw" if has("train_labels.txt") else "rows"


def open_source(
    source: str | None,
    folder: Path,
    *,
    is_lf_data: bool = False,
    train_split: str = "train",
    test_split: str = "test",
    text_column: str = "text",
    label_column: str = "labels",
    label_separator: str = SEPARATOR,
    test_share: float | None = None,
    dev_share: float | None = None,
    group_column: str | None = None,
    stratify: bool = False,
    label_text_file: str | None = None,
    augment_label_data: bool = False,
    use_filter_eval: bool = False,
    split_file: Path | None = None,
) -> Source:
    """Find the files of a data set. Raises UserError if one is missing, or if an option has no meaning for its layout.

    Args:
        source: file, folder or hub id in any layout; None: `folder` has the raw layout, or with `is_lf_data` the
            label-feature layout.
        split_file: divide rows with columns as this file of `Split.save` does, instead of by shares.
    """
    layout = layout_of(source) if source is not None else "lf" if is_lf_data else "raw"
    if is_lf_data and layout not in ("lf", "sparse"):
        raise UserError(f"`source`={source}: has {_WORDS[layout]}; set `is_lf_data`=false")
    given = {
        "label_text_file": label_text_file, "use_filter_eval": use_filter_eval, "augment_label_data": augment_label_data,
        "test_share": test_share, "dev_share": dev_share, "group_column": group_column, "stratify": stratify,
        "train_split": train_split != "train", "test_split": test_split != "test", "text_column": text_column != "text",
        "label_column": label_column != "labels", "label_separator": label_separator != SEPARATOR,
    }  # fmt: skip
    for name, value in given.items():
        if value and layout not in _MEANT_FOR[name]:
            where = " or ".join(_WORDS[each] for each in _MEANT_FOR[name])
            raise UserError(f"`{name}`: applies to {where} only, but the data have {_WORDS[layout]}; remove it")
    if augment_label_data and layout == "raw" and label_text_file is None:
        raise UserError("`augment_label_data`=true: needs label texts; set `label_text_file`")
    folder = Path(os.path.expanduser(source)) if source is not None else folder
    if layout == "raw":
        return raw_source(folder, label_text_file, augment_label_data, test_split)
    if layout == "lf":
        return lf_source(folder, augment_label_data, use_filter_eval)
    if layout == "sparse":
        return sparse_source(folder, augment_label_data, use_filter_eval)
    assert source is not None  # the other layouts read folders
    return rows_source(
        source,
        train_split,
        test_split,
        text_column,
        label_column,
        label_separator,
        test_share=test_share,
        dev_share=dev_share,
        group_column=group_column,
        stratify=stratify,
        split_file=split_file,
    )
