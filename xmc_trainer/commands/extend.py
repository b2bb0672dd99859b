"""Add labels to a saved model from texts, without training it again.

xmc-trainer extend outputs/mine/model new.csv --output outputs/mine/more
xmc-trainer extend outputs/mine/model new.csv --output outputs/mine/more --background old.csv

new.csv (or .tsv) has a column of texts and one of labels, as data.source takes them. Labels that the model does not
have are appended; all others keep their weights. Each new label reads the features that set its texts apart from the
background best, with the weights of a linear discriminant. It scores on the average of its texts as the best known
label does on a background text, and on the average background text as an average label does. The new model has no
calibration; run `xmc-trainer calibrate` on it.

--background names texts of the known labels, such as a part of the training data; its column of labels is ignored.
Without it the texts of new.csv are the background: name it if they are few or all alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xmc_trainer.checkpoint.folder import CARD, read_manifest
from xmc_trainer.checkpoint.model_manifest import MODEL, facts_of_model, read_label_ids
from xmc_trainer.config import changed_card
from xmc_trainer.data.tables import is_table, table_records
from xmc_trainer.errors import UserError
from xmc_trainer.files import require_new_folder

if TYPE_CHECKING:
    from torch import Tensor

    from xmc_trainer.head import FixedFanInHead
    from xmc_trainer.model import XMCModel

_RIDGE = 0.1  # model.ffi.discriminant_ridge's default
_FEWEST_BACKGROUND = 20  # texts; fewer say too little of the features' spread


class NewLabels(NamedTuple):
    """Texts, and for each its labels among `names`, those that the model does not have; by number, from 0."""

    texts: list[str]
    labels: list[list[int]]
    names: list[str]


def read_new_labels(path: Path, known: set[str], columns: argparse.Namespace) -> NewLabels:
    """Read a table. Raises UserError if it has no new label."""
    numbers: dict[str, int] = {}
    texts, labels = [], []
    for where, record in _records(path, columns):
        names = record.get(columns.label_column)
        if names is None:
            raise UserError(f"{where}: has no column {columns.label_column!r}; name one with --label-column")
        texts.append(record[columns.text_column])
        labels.append(
            [numbers.setdefault(name, len(numbers)) for name in dict.fromkeys(map(str, names)) if name not in known]
        )
    if not numbers:
        raise UserError(f"{path}: has no label that the model does not have; name a file with new labels")
    return NewLabels(texts, labels, list(numbers))


def _records(path: Path, columns: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    if not is_table(path):
        raise UserError(f"{path}: is no table; name a .csv or .tsv file")
    for where, record in table_records(path, columns.label_column, columns.label_separator):
        if columns.text_column not in record:
            raise UserError(f"{where}: has no column {columns.text_column!r}; name one with --text-column")
        yield where, record


def extended_part(model: XMCModel, new: NewLabels, background: list[str]) -> FixedFanInHead:
    """Return the head's last part with the new labels behind its own."""
    import torch

    from xmc_trainer.head import SGD, FixedFanInHead

    features_of = torch.from_numpy(model.embed(new.texts + background, show_progress=True))
    of_background = features_of[len(new.texts) :] if background else features_of
    mean_d, deviation_d = of_background.mean(0), of_background.std(0)
    varies_d = deviation_d > 1e-6 * deviation_d.max()  # encoders have features that are 0 but for rounding
    inverse_d = torch.where(varies_d, 1 / deviation_d, 0.0)
    z = ((of_background - mean_d) * inverse_d).double()
    shrunk_dd = (1 - _RIDGE) * z.T @ z / len(z) + _RIDGE * torch.eye(z.shape[1])
    label_P = torch.tensor([label for labels in new.labels for label in labels])
    row_P = torch.tensor([row for row, labels in enumerate(new.labels) for _ in labels])
    sums_Ld = torch.zeros(len(new.names), len(mean_d)).index_add_(0, label_P, features_of[row_P])
    apart_Ld = (
        sums_Ld / torch.bincount(label_P)[:, None] - mean_d
    )  # what sets a label's texts apart from the background
    part = model.saved.head.parts()[-1][1]
    first, last = part.num_labels, part.num_labels + len(new.names)
    head = FixedFanInHead(
        part.in_features,
        last,
        fan_in=part.fan_in,
        group_size=part.group_size,
        loss=part.loss_name,
        weight_dtype=part.weight.dtype,
        optimizer=SGD(),
        zero_weights=True,
    )
    assert part.bias is not None and head.bias is not None  # `main` refuses others
    own = {"weight": part.weight, "bias": part.bias}
    head.load_labels(range(first), own if part.index is None else own | {"index": part.index})
    # New labels in a group that has known ones read that group's features.
    first_free = -(-first // part.group_size) * part.group_size

    def texts_of(labels: range) -> tuple[Tensor, Tensor]:
        number = torch.arange(labels.start, labels.stop)
        chooses = number >= first_free
        return (apart_Ld * inverse_d)[(number - first).clamp_min(0)] * chooses[:, None], chooses.long()

    head.start_from_texts(texts_of, index=head.index is not None, whitener_dd=torch.linalg.inv(shrunk_dd))
    best, average = _typical_logits(model, of_background)
    for label, apart_d in enumerate(apart_Ld, start=first):
        reads = torch.arange(len(mean_d)) if head.index is None else head.index[label // part.group_size].long()
        apart = (apart_d * inverse_d)[reads]
        weight = torch.linalg.solve(shrunk_dd[reads][:, reads], apart.double()).float()
        weight *= (best - average) / (weight @ apart).clamp_min(1e-12)
        head.weight[label] = weight * inverse_d[reads]
        head.bias[label] = average - head.weight[label].float() @ mean_d[reads]  # the stored weights may be rounded
    return head


def _typical_logits(model: XMCModel, features: Tensor) -> tuple[float, float]:
    """Return, over texts, the mean logit of the best label and the mean logit of all labels."""
    import numpy as np
    import torch

    from xmc_trainer.commands.export import sparse_head

    best = torch.cat([model.saved.head.topk(part, 1)[0] for part in features.split(256)]).mean()
    weight, bias = sparse_head(model.saved)
    return float(best), float(np.asarray(weight.mean(0)).ravel() @ features.mean(0).numpy() + float(bias.mean()))


def write_extended(model: XMCModel, new: NewLabels, background: list[str], out: Path) -> None:
    """Save the model with the new labels. Raises UserError if it cannot be written."""
    from datasets import Dataset

    from xmc_trainer.checkpoint.saved_model import save_model
    from xmc_trainer.head.split import head_of_parts

    saved = model.saved
    parts = [part for _, part in saved.head.parts()]
    head = head_of_parts([*parts[:-1], extended_part(model, new, background)])
    card = saved.folder / CARD
    counts = f"{len(new.names):,} labels from {len(new.texts):,} texts, {saved.head.num_labels + len(new.names):,} labels in all"
    said = f"`xmc-trainer extend` added {counts}."
    save_model(
        out,
        encoder=saved.encoder,
        encoder_state=saved.encoder.state_dict(),
        tokenizer=saved.tokenizer,
        head=head,
        labels=Dataset.from_dict(
            {"id": saved.label_ids.to_pylist() + new.names, "text": saved.label_texts.to_pylist() + new.names}
        ),
        max_len=saved.max_len,
        step=read_manifest(saved.folder, MODEL)["step"],
        config_yaml=(saved.folder / "config.yaml").read_text(encoding="utf-8"),
        card=changed_card(card.read_text(encoding="utf-8"), said) if card.is_file() else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("texts", type=Path, help=".csv or .tsv file with texts of the new labels")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new model; must not exist")
    parser.add_argument("--background", type=Path, help=".csv or .tsv file with texts of known labels")
    parser.add_argument("--text-column", default="text", help="default: text")
    parser.add_argument("--label-column", default="labels", help="default: labels")
    parser.add_argument("--label-separator", default=";", help="between the labels of a text; default ;")
    options = parser.parse_args()
    require_new_folder(options.output)
    if not facts_of_model(options.model).has_biases:
        raise UserError(
            f"{options.model}: its head has no biases, which set the scores of new labels; name another model"
        )
    new = read_new_labels(options.texts, set(read_label_ids(options.model)), options)
    background = (
        [record[options.text_column] for _, record in _records(options.background, options)]
        if options.background
        else []
    )
    if len(background or new.texts) < _FEWEST_BACKGROUND:
        raise UserError(
            f"the background has {len(background or new.texts)} texts; name at least {_FEWEST_BACKGROUND} with --background"
        )

    from xmc_trainer.model import XMCModel  # imports torch and transformers, for which the checks above do not wait

    model = XMCModel.load(options.model, "cpu")
    write_extended(model, new, background, options.output)
    print(f"{options.output}: {len(new.names)} new labels behind {model.saved.head.num_labels}")
