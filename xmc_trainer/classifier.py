"""XMCClassifier: train and use a model from Python, in the manner of scikit-learn."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.sparse import csr_matrix

from xmc_trainer.builders.training import build_trainer
from xmc_trainer.config import load_config
from xmc_trainer.errors import UserError, shown
from xmc_trainer.model import Prediction, XMCModel, checked_texts

_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_Labels = Iterable[str | Sequence[str]]


class XMCClassifier:
    """A text classifier with many labels.

    model = XMCClassifier(fan_in=64).fit(texts, labels)
    model.predict(["how to descale a kettle"], k=3)

    `fit` trains in this process, without DeepSpeed; for several GPUs use `xmc-trainer train`. Parameters follow
    scikit-learn's rules: the constructor stores them unchanged, and `get_params`, `set_params` and `score` mean what
    they mean there.

    Args:
        encoder: Hugging Face model: hub id or folder.
        fan_in: features that each label reads.
        settings: more settings of a training, name -> value, for example {"training.optimization.epochs": 5}.
        output_dir: folder for the run, `output_dir/run`. An earlier run there is replaced only with training.overwrite in `settings`.
            None: a temporary folder, deleted with this object; see `save_pretrained`.

    Attributes, after `fit` or `from_pretrained`:
        model_: XMCModel.
        classes_: label names, object [L], in the order of the columns of `predict_scores`.
        metrics_: metrics on the texts held out, as fractions; after `fit` alone.
    """

    def __init__(
        self,
        encoder: str = _ENCODER,
        fan_in: int = 64,
        settings: dict[str, Any] | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        self.encoder, self.fan_in, self.settings, self.output_dir = encoder, fan_in, settings, output_dir

    def fit(
        self,
        texts: Iterable[str],
        labels: _Labels,
        eval_set: tuple[Iterable[str], _Labels] | None = None,
    ) -> Self:
        """Train on texts and their labels. Raises UserError for data and settings that do not fit.

        Args:
            labels: for each text a list of label names, or a single name.
            eval_set: texts and labels to evaluate on. None: a tenth of the texts is held out.
        """
        settings = self.settings or {}
        if eval_set is not None and settings.get("data.test_share") is not None:
            raise UserError(
                "settings: data.test_share holds texts out, but there is an eval_set; give only one of them"
            )
        temporary = tempfile.TemporaryDirectory()
        with tempfile.TemporaryDirectory() as data:
            source = _write_rows(Path(data, "train.jsonl"), texts, labels)
            if eval_set is not None:
                _write_rows(Path(data, "test.jsonl"), *eval_set)
                source = Path(data)
            own = {
                "data.source": source,
                "model.encoder.encoder_model": self.encoder,
                "model.ffi.fan_in": self.fan_in,
                "output_dir": self.output_dir or temporary.name,
                "log_fname": "run",
            }
            words = [f"{name}={'null' if value is None else value}" for name, value in (own | settings).items()]
            trainer = build_trainer(load_config(words))
            try:
                trainer.train()
                metrics, saved = trainer.metrics["test"], trainer.run_folder / "model"
            finally:
                trainer.close()
        self._use(XMCModel.load(saved))
        self.metrics_, self._temporary = metrics, temporary  # the folder is deleted with this object
        return self

    def predict(
        self, texts: Iterable[str], k: int = 5, threshold: float | None = None, batch_size: int = 256
    ) -> list[list[str]]:
        """Return the names of the k best labels of each text, best first; with `threshold` those that score at least that."""
        return [
            [label.id for label in found if threshold is None or label.score >= threshold]
            for found in self._best(texts, k, batch_size)
        ]

    def predict_scores(self, texts: Iterable[str], k: int = 100, batch_size: int = 256) -> csr_matrix:
        """Return the scores of the k best labels of each text, float32 [texts, L], sparse."""
        found = self._best(texts, k, batch_size)
        scores = [label.score for labels in found for label in labels]
        columns = [self._column[label.id] for labels in found for label in labels]
        offsets = np.cumsum([0, *map(len, found)])
        return csr_matrix((np.array(scores, np.float32), columns, offsets), (len(found), len(self.classes_)))

    def score(self, texts: Iterable[str], labels: _Labels) -> float:
        """Return P@1: the share of texts whose best label is right."""
        wanted = [set(_names(row, number)) for number, row in enumerate(labels, start=1)]
        best = self.predict(texts, k=1)
        if len(best) != len(wanted):
            raise UserError(f"labels: there are {len(wanted)} for {len(best)} texts; give one for each text")
        return float(np.mean([found[0] in names for found, names in zip(best, wanted)]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the model to a new folder, for `from_pretrained`, `XMCModel.load` and the commands of xmc-trainer."""
        try:
            shutil.copytree(self._fitted().saved.folder, folder)
        except FileExistsError:
            raise UserError(f"{folder}: exists already; name a new folder") from None
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: no such file; the model's folder was removed or replaced; fit again"
            ) from None

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None) -> Self:
        """Load a model folder, of `save_pretrained` or of a training."""
        return cls()._use(XMCModel.load(folder, device))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's parameters."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set parameters of the constructor. Raises ValueError for an unknown name."""
        for name, value in parameters.items():
            if name not in self.get_params():
                raise ValueError(f"{name}: is not a parameter; choose one of {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def _use(self, model: XMCModel) -> Self:
        self.model_ = model
        self.classes_ = np.array(model.saved.label_ids.to_pylist(), dtype=object)
        self._column = {name: column for column, name in enumerate(self.classes_)}
        return self

    def _best(self, texts: Iterable[str], k: int, batch_size: int) -> list[list[Prediction]]:
        model = self._fitted()
        return model.predict(texts, min(k, len(self.classes_)), batch_size)

    def _fitted(self) -> XMCModel:
        if not hasattr(self, "model_"):
            raise UserError("this XMCClassifier has no model; call fit or from_pretrained first")
        return self.model_


def _names(row: Any, number: int) -> list[str]:
    """Return the label names of a text. `number`: from 1, for messages."""
    names = [row] if isinstance(row, str) else row
    if (
        isinstance(names, Mapping)
        or not isinstance(names, Iterable)
        or not all(isinstance(name, str) for name in names)
    ):
        raise UserError(f"labels of text {number}: must be a list of label names or a single name, not {shown(row)}")
    return [str(name) for name in names]


def _write_rows(path: Path, texts: Iterable[str], labels: _Labels) -> Path:
    """Write texts and labels as JSON lines. Raises UserError unless each text has its labels."""
    checked = checked_texts(texts)
    names = [_names(row, number) for number, row in enumerate(labels, start=1)]
    if len(names) != len(checked):
        raise UserError(f"labels: there are {len(names)} for {len(checked)} texts; give one for each text")
    with open(path, "w", encoding="utf-8") as file:
        for text, row in zip(checked, names):
            file.write(json.dumps({"text": text, "labels": row}) + "\n")
    return path
