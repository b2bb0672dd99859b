"""XMCClassifier: train and use a model from Python, in the manner of scikit-learn and transformers."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.sparse import csr_matrix

from xmc_trainer.builders.recipe import configured
from xmc_trainer.builders.training import build_trainer
from xmc_trainer.data.tables import names_in_cell
from xmc_trainer.errors import UserError, reason, shown
from xmc_trainer.files import require_new_folder, writing
from xmc_trainer.model import XMCModel, checked_texts, device_of

_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class XMCClassifier:
    """A text classifier with many labels.

    model = XMCClassifier(fan_in=64).fit(texts, labels)
    model.predict(["how to descale a kettle"], k=3)

    `fit` trains in this process, without DeepSpeed; for several GPUs use `xmc-trainer train`. Parameters follow
    scikit-learn's rules: the constructor stores them unchanged, and `get_params`, `set_params`, `clone` and `score` mean what
    they mean there. A classifier can be the last step of a Pipeline and the estimator of a GridSearchCV.

    Texts are any iterable of strings: list, generator, numpy array, pandas or polars Series, column of a data set ... Labels are,
    for each text, a list of label names or a single name. A frame (pandas, polars, or a Hugging Face data set) holds both: see
    `fit`.

    Args:
        encoder: Hugging Face model: hub id or folder.
        fan_in: features that each label reads; None: 64, or as the recipe chooses.
        settings: more settings of a training, name -> value, for example {"recipe": "auto"}. Those that the other arguments set are
            refused.
        output_dir: folder for the run, `output_dir/run`. An earlier run there is replaced only with training.overwrite in `settings`.
            None: a temporary folder, deleted with this object; see `save_pretrained`.
        device: cpu, cuda, cuda:1 ...; None for the GPU if there is one.

    Attributes, after `fit` or `from_pretrained`:
        model_: XMCModel.
        classes_: label names, object [L], in the order of the columns of `predict_scores`. A name that several labels of
            the data have occurs several times.
        metrics_: metrics on the texts held out, as fractions; after `fit` alone.
    """

    def __init__(
        self,
        encoder: str = _ENCODER,
        fan_in: int | None = None,
        settings: dict[str, Any] | None = None,
        output_dir: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.encoder, self.fan_in, self.settings = encoder, fan_in, settings
        self.output_dir, self.device = output_dir, device

    # Training -------------------------------------------------------------------------------------------------------

    def fit(self, texts: Any, labels: Iterable[Any] | None = None, eval_set: Any = None) -> Self:
        """Train on texts and their labels. Raises UserError for data and settings that do not fit.

        Args:
            texts: the texts. Without `labels`: a frame with the columns data.text_column and data.label_column of `settings`
                (default text and labels), or an iterable of (text, labels) pairs. In a frame, a string in the column of labels
                is split at data.label_separator (default ;) unless it is a JSON list, and a missing value means no labels.
            eval_set: data to evaluate on: a tuple (texts, labels), or else as `texts` without `labels`. None: a tenth of the texts
                is held out.
        """
        settings = self.settings or {}
        if eval_set is not None and settings.get("data.test_share") is not None:
            raise UserError(
                "settings: data.test_share holds texts out, but there is an eval_set; give only one of them"
            )
        temporary = tempfile.TemporaryDirectory()
        with tempfile.TemporaryDirectory() as data:
            source = _write_rows(Path(data, "train.jsonl"), *self._texts_and_labels(texts, labels))
            if eval_set is not None:
                held_out = eval_set if isinstance(eval_set, tuple) else (eval_set, None)
                _write_rows(Path(data, "test.jsonl"), *self._texts_and_labels(*held_out))
                source = Path(data)
            own = {
                "data.source": source,
                "data.text_column": "text",
                "data.label_column": "labels",
                "model.encoder.encoder_model": self.encoder,
                "output_dir": self.output_dir or temporary.name,
                "log_fname": "run",
            }
            if self.fan_in is not None or "recipe" not in settings:
                own["model.ffi.fan_in"] = 64 if self.fan_in is None else self.fan_in
            if self.device is not None:
                device = device_of(self.device)
                own |= {"environment.device": device.type, "environment.cuda_device_id": device.index or 0}
            more = {name: value for name, value in settings.items() if not name.endswith(_COLUMNS)}
            if taken := own.keys() & more.keys():
                raise UserError(
                    f"settings: {min(taken)} comes from the arguments of XMCClassifier and of fit; give it there"
                )
            words = [f"{name}={'null' if value is None else value}" for name, value in (own | more).items()]
            trainer = build_trainer(configured(words)[0])
            try:
                trainer.train()
                metrics, saved = trainer.metrics["test"], trainer.run_folder / "model"
            finally:
                trainer.close()
        self._use(XMCModel.load(saved, self.device))
        self.metrics_, self._temporary = metrics, temporary  # the folder is deleted with this object
        return self

    # Prediction -----------------------------------------------------------------------------------------------------

    def predict(
        self,
        texts: Any,
        k: int = 5,
        threshold: float | str | None = None,
        batch_size: int = 256,
        show_progress: bool = False,
    ) -> list[list[str]]:
        """Return the names of the k best labels of each text, best first.

        Args:
            threshold: leave out labels with a lower score; "fitted" for the thresholds of `xmc-trainer calibrate`.
        """
        scores, labels = self._topk(texts, k, batch_size, show_progress)
        kept = self._fitted().saved.chosen(scores, labels, threshold)
        return [self.classes_[found[chosen]].tolist() for found, chosen in zip(labels, kept)]

    def predict_scores(
        self, texts: Any, k: int = 100, batch_size: int = 256, show_progress: bool = False
    ) -> csr_matrix:
        """Return the scores of the k best labels of each text, float32 [texts, L], sparse. Other labels have no entry, which reads as 0."""
        scores, labels = self._topk(texts, k, batch_size, show_progress)
        offsets = np.arange(len(scores) + 1) * scores.shape[1]
        return csr_matrix((scores.ravel(), labels.ravel(), offsets), (len(scores), len(self.classes_)))

    def embed(self, texts: Any, batch_size: int = 256, show_progress: bool = False) -> np.ndarray:
        """Return the encoder's features of each text, float32 [texts, d]."""
        return self._fitted().embed(self._texts(texts), batch_size, show_progress)

    def score(self, texts: Any, labels: Iterable[Any] | None = None) -> float:
        """Return P@1: the share of texts whose best label is right. Without `labels`, `texts` is as in `fit`."""
        found, wanted = self._texts_and_labels(texts, labels)
        return float(np.mean([best[0] in names for best, names in zip(self.predict(found, k=1), wanted)]))

    # Files and the hub ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the model to a new folder, for `from_pretrained`, `XMCModel.load` and the commands of xmc-trainer.

        The folder's README.md is a model card, written from the run. Raises UserError if the folder exists or cannot be written.
        """
        source, folder = self._fitted().saved.folder, Path(folder)
        if not source.is_dir():
            raise UserError(f"{source}: no such folder; it was removed or replaced; fit again")
        require_new_folder(folder)
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
                os.replace(shutil.copytree(source, Path(partial, folder.name)), folder)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload the model to the Hugging Face hub, and return its address there.

        Args:
            repo_id: "owner/name". The repository is created if there is none.
            private: of a new repository.
            token: default: of `hf auth login`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        folder = self._fitted().saved.folder
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(address)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | None = None,
        dtype: Any = "float32",
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a model: a folder of `save_pretrained` or of a training, or a hub id. Raises UserError.

        Args:
            device, dtype: as in `XMCModel.load`.
            revision: branch, tag or commit of a hub id.
        """
        folder = name
        if _HUB_ID.fullmatch(str(name)) and not Path(name).exists():
            from huggingface_hub import snapshot_download

            try:
                folder = snapshot_download(str(name), revision=revision, token=token)
            except OSError as error:  # the base of huggingface_hub's errors
                raise UserError(
                    f"{name}: is no folder, and not to be had from the Hugging Face hub ({reason(error)}); correct the name"
                ) from None
        return cls(device=device)._use(XMCModel.load(folder, device, dtype))

    # scikit-learn's conventions -------------------------------------------------------------------------------------

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

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            # Not "classifier": scikit-learn's splitters then expect one class for each row, not a list of names.
            estimator_type=None,
            target_tags=TargetTags(required=True, multi_output=True),
            input_tags=InputTags(two_d_array=False, string=True),
        )

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = (f"{k}={v!r}" for k, v in self.get_params().items() if v != defaults[k].default)
        return f"{type(self).__name__}({', '.join(changed)})"

    # Details --------------------------------------------------------------------------------------------------------

    def _use(self, model: XMCModel) -> Self:
        self.model_ = model
        self.classes_ = np.array(model.saved.label_ids.to_pylist(), dtype=object)
        return self

    def _fitted(self) -> XMCModel:
        if not hasattr(self, "model_"):
            raise UserError("this XMCClassifier has no model; call fit or from_pretrained first")
        return self.model_

    def _topk(self, texts: Any, k: int, batch_size: int, show_progress: bool) -> tuple[np.ndarray, np.ndarray]:
        model = self._fitted()
        k = min(k, len(self.classes_)) if isinstance(k, (int, np.integer)) else k  # `topk` refuses others
        return model.topk(self._texts(texts), k, batch_size, show_progress)

    def _column(self, frame: Any, setting: str, default: str) -> Iterable[Any]:
        """Return the column of a frame that a setting names. Raises UserError if there is none."""
        if hasattr(frame, "collect"):
            raise UserError("the frame is lazy; pass what its collect() returns")
        name = (self.settings or {}).get(setting, default)
        columns = list(frame.columns if hasattr(frame, "columns") else frame.column_names)
        if name not in columns:
            raise UserError(
                f"the frame has no column {name!r}, only {shown(', '.join(map(str, columns)))}; set {setting}"
            )
        return frame[name]

    def _texts(self, texts: Any) -> Iterable[str]:
        return self._column(texts, "data.text_column", "text") if _is_frame(texts) else texts

    def _texts_and_labels(self, texts: Any, labels: Iterable[Any] | None) -> tuple[list[str], list[list[str]]]:
        """Return texts and, for each, its label names. For the arguments see `fit`."""
        if labels is None and _is_frame(texts):
            separator = (self.settings or {}).get("data.label_separator", ";")
            cells = self._column(texts, "data.label_column", "labels")
            labels = [_names_in_cell(cell, separator, number) for number, cell in enumerate(cells, start=1)]
        elif labels is None:
            pairs = list(texts)
            if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
                raise UserError("labels: are missing; give them, or (text, labels) pairs, or a frame with both")
            texts, labels = [text for text, _ in pairs], [names for _, names in pairs]
        checked = checked_texts(self._texts(texts))
        names = [_names(row, number) for number, row in enumerate(labels, start=1)]
        if len(names) != len(checked):
            raise UserError(f"labels: there are {len(names)} for {len(checked)} texts; give one for each text")
        return checked, names


_COLUMNS = ("text_column", "label_column", "label_separator")  # settings of a frame, which `fit` writes to a file


def _is_frame(data: Any) -> bool:
    """Whether `data` is a table: a pandas or polars frame, or a data set."""
    return any(hasattr(data, name) for name in ("collect", "columns", "column_names"))


def _names_in_cell(cell: Any, separator: str, number: int) -> Any:
    """Return the label names in a cell of a frame. `number`: of its text, from 1, for messages."""
    if isinstance(cell, str):
        return names_in_cell(cell, separator, f"text {number}")
    is_missing = cell is None or type(cell).__name__ == "NAType" or (isinstance(cell, float) and cell != cell)
    return [] if is_missing else cell


def _names(row: Any, number: int) -> list[str]:
    """Return the label names of a text. `number`: from 1, for messages."""
    names = [row] if isinstance(row, str) else row
    if (
        isinstance(names, Mapping)
        or not isinstance(names, Iterable)
        or not all(isinstance(name, str) for name in names)
    ):
        row = row.to_list() if hasattr(row, "to_list") else row  # a Series would be shown over several lines
        raise UserError(f"labels of text {number}: must be a list of label names or a single name, not {shown(row)}")
    return [str(name) for name in names]


def _write_rows(path: Path, texts: list[str], labels: list[list[str]]) -> Path:
    """Write texts and labels as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        for text, names in zip(texts, labels):
            file.write(json.dumps({"text": text, "labels": names}) + "\n")
    return path
