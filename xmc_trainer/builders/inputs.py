"""Find what a training or the evaluation of a model reads, and refuse mistakes in it within seconds.

Importing torch and transformers takes many times as long as these checks, so this module does without.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from xmc_trainer.checkpoint.model_manifest import facts_of_model
from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data.layouts import open_source
from xmc_trainer.data.sources import Source, check_num_labels, no_texts
from xmc_trainer.encoder.adapters import require_peft
from xmc_trainer.errors import UserError, naming, reason
from xmc_trainer.run_folder import SPLIT

# Parameter of the data package -> its setting, for error messages.
NAMES = SETTINGS | {"folder": "dataset_path or data.folder", "layout": "data.is_lf_data"}
_SMALL = 1 << 22  # bytes of data that are read twice, the first time to find mistakes
_HUB_SECONDS = 2.0
_WEIGHTS = (".safetensors", ".bin", ".index.json")
# Names of an encoder's width in config.json.
_WIDTHS = ("hidden_size", "dim", "d_model")


def names_in(config: Config) -> AbstractContextManager[None]:
    """Inside, errors of the data package name settings in place of parameters."""
    return naming(NAMES | ({"folder": "data.source", "layout": "the names of its files"} if config.data.source else {}))


def source_of(config: Config, split_file: Path | None = None) -> Source:
    """Find the files of the data that a configuration names. Raises UserError if they are missing.

    Args:
        split_file: hold out the texts that this file names, see `data.open_source`.
    """
    data = config.data
    if data.source is None and not config.data_folder.is_dir():
        raise UserError(f"{config.data_folder}: no such folder; set dataset_path or data.folder")
    with names_in(config):
        return open_source(
            data.source,
            config.data_folder,
            is_lf_data=data.is_lf_data,
            train_split=data.train_split,
            test_split=data.test_split,
            text_column=data.text_column,
            label_column=data.label_column,
            label_separator=data.label_separator,
            test_share=data.test_share,
            dev_share=data.dev_share,
            group_column=data.group_column,
            stratify=data.stratify,
            label_text_file=data.label_text_file,
            augment_label_data=data.augment_label_data,
            use_filter_eval=data.use_filter_eval,
            split_file=split_file,
        )


def held_out_file(model: Path) -> Path | None:
    """Return the file that says which texts the run of a saved model held out; None if there is none."""
    file = model.resolve().parent / SPLIT
    return file if file.is_file() else None


def check_number_of_labels(config: Config, found: int, of_model: int) -> None:
    """Raise UserError if the data have another number of labels than a saved model."""
    if found != of_model:
        raise UserError(f"{config.data_name}: has {found} labels, the model {of_model}; {set_the_data_of(config)}")


def set_the_data_of(config: Config) -> str:
    """Return the remedy for data that are not those of the model."""
    name = "data.source" if config.data.source else "dataset_path or data.folder"
    return f"set {name} to the data set that it was trained on"


def require_data(config: Config, model: Path | None = None) -> None:
    """Raise UserError if data are missing or wrong. Small data are read whole, large ones are only opened.

    Args:
        model: folder of a saved model that shall be evaluated on the data; None for a training.
    """
    if config.data.source is not None and _is_hub_id(config.data.source):
        _require_on_hub(config.data.source, "README.md", f"data.source={config.data.source}", "dataset")
    source = source_of(config, None if model is None else held_out_file(model))
    if source.files and sum(map(os.path.getsize, source.files)) <= _SMALL:
        with names_in(config):
            contents = source.read()
            check_num_labels(config.data.num_labels, len(contents.labels))
            if model is not None:
                check_number_of_labels(config, len(contents.labels), facts_of_model(model).labels)
            for split, rows in (("train", contents.train()), ("test", contents.test())):
                if not sum(1 for _ in rows):
                    raise no_texts(source, split)


def require_clusters(config: Config) -> None:
    """Raise UserError if a training needs label clusters that are missing."""
    if config.needs_clusters and not config.cluster_file.is_file():
        raise UserError(
            f"{config.cluster_file}: no such label clusters; create it by xmc-trainer clusters with the settings of this run"
        )


def require_encoder(config: Config) -> None:
    """Raise UserError if encoder or tokenizer are missing, or if the encoder's config.json contradicts the settings."""
    chosen = config.model.encoder
    where = f"model.encoder.encoder_model={chosen.encoder_model}"
    if chosen.lora_rank:
        with naming(SETTINGS):
            require_peft()
    facts = _facts_of_model(chosen.encoder_model, where)
    if chosen.encoder_tokenizer != chosen.encoder_model:
        require_tokenizer(config)
    if chosen.use_ngame_encoder_weights and not os.path.isfile(chosen.ngame_checkpoint or ""):
        raise UserError(f"model.encoder.ngame_checkpoint={chosen.ngame_checkpoint}: no such file; correct the path")
    width = next((facts[name] for name in _WIDTHS if isinstance(facts.get(name), int)), None)
    if width is not None and not config.model.penultimate.use_penultimate_layer:
        config.check_fan_in(width * chosen.feature_layers)
    longest = facts.get("max_position_embeddings")
    if isinstance(longest, int) and 0 < longest < config.data.max_len:
        raise UserError(f"data.max_len={config.data.max_len}: the encoder reads at most {longest} tokens; lower it")


def width_and_positions(config: Config) -> tuple[int, int | None]:
    """Return the encoder's number of features, and how many tokens it can read; None: not limited.

    A hub id's config.json is downloaded. Raises UserError if it does not say the width.
    """
    chosen = config.model.encoder
    where = f"model.encoder.encoder_model={chosen.encoder_model}"
    facts = _facts_of_model(chosen.encoder_model, where)
    if not facts:
        from huggingface_hub import hf_hub_download

        try:
            facts = json.loads(Path(hf_hub_download(chosen.encoder_model, "config.json")).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: its config.json cannot be read ({reason(error)}); try again") from None
    width = chosen.encoder_ftr_dim or next((facts[name] for name in _WIDTHS if isinstance(facts.get(name), int)), None)
    if width is None:
        raise UserError(f"{where}: config.json does not say its width; set model.encoder.encoder_ftr_dim")
    positions = facts.get("max_position_embeddings")
    return width * chosen.feature_layers, positions if isinstance(positions, int) and positions > 0 else None


def require_tokenizer(config: Config) -> None:
    """Raise UserError if there is no tokenizer."""
    chosen = config.model.encoder
    field = "encoder_model" if chosen.encoder_tokenizer == chosen.encoder_model else "encoder_tokenizer"
    where = f"model.encoder.{field}={chosen.encoder_tokenizer}"
    _require_model(chosen.encoder_tokenizer, "tokenizer_config.json", where)


def _facts_of_model(name: str, where: str) -> dict[str, Any]:
    """Return the content of a model's config.json; {} if only the hub has it."""
    _require_model(name, "config.json", where)
    file = Path(name) / "config.json"
    if not file.is_file():
        return {}
    if not any(path.name.endswith(_WEIGHTS) for path in file.parent.iterdir()):
        raise UserError(f"{where}: the folder has no weights (model.safetensors); name the folder of a complete model")
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); copy it again") from None
    return facts if isinstance(facts, dict) else {}


def _require_model(name: str, file: str, where: str) -> None:
    if os.path.isdir(name):
        if file == "config.json" and not os.path.isfile(Path(name) / file):
            raise UserError(f"{where}: the folder has no {file}; name a folder that holds the model, or a hub id")
    elif os.path.exists(name) or not _is_hub_id(name):
        raise UserError(f"{where}: no such folder; name a folder that holds the model, or a hub id")
    else:
        _require_on_hub(name, file, where, "model")


def _is_hub_id(name: str) -> bool:
    """Return whether a name is not a path: a hub id has at most two parts."""
    path = Path(name)
    return not (
        os.path.exists(os.path.expanduser(name)) or path.suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".gz")
    ) and not (path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(path.parts) > 2)


def _require_on_hub(name: str, file: str, where: str, kind: str) -> None:
    """Raise UserError unless a file of a repository is in the local cache, or the hub has it.

    Asking transformers instead would take a minute where the hub cannot be reached.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    # The datasets library keeps what it has prepared in a folder of its own.
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets")) / name.replace("/", "___")
    try:
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str) or (
            kind == "dataset" and prepared.is_dir()
        ):
            return
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and it is not in the local cache"
        else:
            get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=_HUB_SECONDS)
            return
    except errors.HFValidationError:
        why = "it is no hub id"
    except errors.RepositoryNotFoundError:
        why = "the hub does not have it, or you have no access"
    except errors.HfHubHTTPError:
        return  # the hub answers: what is wrong with a single file is seen when it is loaded
    except Exception as error:  # the client's transport has no documented exceptions
        why = f"the hub cannot be reached: {reason(error)}"
    raise UserError(
        f"{where}: no such folder, and {why}; name a folder that holds the {'model' if kind == 'model' else 'data'}, or a hub id "
        "that is reachable or in the local Hugging Face cache"
    )
