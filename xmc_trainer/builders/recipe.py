"""Choose settings that the user left open, from facts about the data, the encoder and the machine.

A value that the command line or the user's YAML file states always wins. docs/choosing-settings.md lists the rules and their
evidence. The chosen values go into the run's config.yaml, from which a resumed run takes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xmc_trainer.builders.inputs import names_in, source_of, width_and_positions
from xmc_trainer.config import Config, flatten, load_config, saved_settings, stated_settings
from xmc_trainer.errors import UserError

_FFI, _OPT = "model.ffi", "training.optimization"
# Settings of recipe=spartex, picked from the six files published with Spartex, which differ.
_SPARTEX: dict[str, Any] = {
    f"{_FFI}.fan_in": 128, f"{_FFI}.rewire_interval": 800, "model.encoder.embed_dropout": 0.6, "data.batch_size": 128,
    f"{_OPT}.loss_fn": "squared_hinge", f"{_OPT}.xmc_optimizer": "adamw", f"{_OPT}.lr": 0.01, f"{_OPT}.encoder_lr": 1e-5,
    f"{_OPT}.epochs": 100, f"{_OPT}.warmup_steps": 1000,
}  # fmt: skip
_AUTO = (
    "data.max_len", "data.batch_size", "data.augment_label_data", "training.amp.enabled", "training.amp.dtype",
    f"{_FFI}.fan_in", f"{_FFI}.index_init", f"{_FFI}.weight_init", f"{_FFI}.rewire_interval", f"{_FFI}.logit_adjustment",
    f"{_OPT}.xmc_optimizer", f"{_OPT}.epochs", f"{_OPT}.max_steps", f"{_OPT}.lr", f"{_OPT}.encoder_lr",
)  # fmt: skip
# A rule's setting -> settings that contradict its choice. If the user states one, the plain default stays.
_GIVES_WAY = {
    f"{_FFI}.index_init": (f"{_OPT}.dense_epochs",),
    f"{_FFI}.weight_init": (f"{_FFI}.centroid_scale",),
    f"{_FFI}.rewire_interval": (f"{_FFI}.growth_mode",),
    f"{_OPT}.xmc_optimizer": (f"{_OPT}.xmc_momentum",),
    "training.amp.dtype": ("training.amp.enabled",),
    f"{_OPT}.max_steps": (f"{_OPT}.epochs",),
}
_ADAPTIVE = ("rowwise_rmsprop", "adamw", "adamw_8bit")  # optimizers whose rates are alike
_CPU_VISITS = 120_000  # texts that a training on a CPU reads, repetitions included


class Choice(NamedTuple):
    value: Any
    why: str


@dataclass(frozen=True)
class Facts:
    """What the rules read."""

    texts: int  # for training
    labels: int
    texts_a_label: float  # mean
    words: int  # 95 of 100 texts have no more
    label_texts: bool  # whether the data name labels by texts to train on
    features: int  # width of the head's input
    positions: int | None  # tokens that the encoder can read; None: not limited
    gpu: bool


def configured(words: list[str]) -> tuple[Config, list[str]]:
    """Build the configuration of a training, with the recipe applied.

    Args:
        words: `key=value`.
    Returns the configuration, whose `recipe` is none because its settings now say everything, and, for each setting that the
    recipe chose, a line "name=value: why". Raises UserError as `load_config` does, and for data that cannot be read.
    """
    stated = stated_settings(words)
    config = load_config(words)
    if config.recipe == "none":
        return config, []
    saved = config.run_folder / "config.yaml"
    if config.training.resume and saved.is_file():
        choices = _of_run(saved)
    elif config.recipe == "spartex":
        choices = {name: Choice(value, "as in Spartex's files") for name, value in _SPARTEX.items()}
    else:
        choices = rules(facts_of(config), config, stated)
    choices = {name: choice for name, choice in choices.items() if name not in stated}
    text = {name: "null" if value is None else str(value).lower() for name, (value, _) in choices.items()}
    words = [word for word in words if not word.startswith("recipe=")]
    config = load_config([*words, "recipe=none", *(f"{name}={value}" for name, value in text.items())])
    return config, [f"{name}={text[name]}: {choice.why}" for name, choice in choices.items()]


def require_applied(config: Config) -> None:
    """Raise UserError if the configuration names a recipe that has not been applied."""
    if config.recipe != "none":
        raise UserError(
            f"recipe={config.recipe}: only train, prepare, clusters and XMCClassifier apply a recipe; write the settings that "
            "xmc-trainer train --print-config shows, or call xmc_trainer.builders.recipe.configured in place of load_config"
        )


def _of_run(file: Path) -> dict[str, Choice]:
    """Return what the recipe of an earlier run chose."""
    saved = saved_settings(file)
    return {name: Choice(saved[name], "as before") for name in {*_AUTO, *_SPARTEX} if name in saved}


def facts_of(config: Config) -> Facts:
    """Read the training texts once, without tokenising them. Raises UserError for data that cannot be read."""
    source = source_of(config)
    with names_in(config):
        contents = source.read()
        counts = np.zeros(len(contents.labels), np.int64)
        lengths, labels = [], []
        for row in contents.train():
            lengths.append(row.text.count(" ") + 1)
            labels += row.labels
            if len(labels) > 1 << 20:
                counts += np.bincount(labels, minlength=len(counts))
                labels.clear()
        counts += np.bincount(np.array(labels, np.int64), minlength=len(counts))
    width, positions = width_and_positions(config)
    penultimate = config.model.penultimate
    named = sum(text not in ("", name) for name, text in contents.labels)
    return Facts(
        texts=len(lengths),
        labels=len(counts),
        texts_a_label=float(counts.mean()) if len(counts) else 0.0,
        words=int(np.percentile(lengths, 95)) if lengths else 0,
        label_texts=source.layout != "hf" and 2 * named > len(counts),
        features=penultimate.penultimate_size if penultimate.use_penultimate_layer else width,
        positions=positions,
        gpu=config.environment.device_name().startswith("cuda"),
    )


def rules(facts: Facts, config: Config, stated: Iterable[str] = ()) -> dict[str, Choice]:
    """Choose the settings of recipe=auto.

    Args:
        config: supplies the values of settings in `stated`.
        stated: names of the settings that the user gave.
    """
    given, stated = flatten(asdict(config)), set(stated)
    found: dict[str, Choice] = {}

    def choose(name: str, value: Any, why: str) -> Any:
        """Note a choice unless the user made it; return the value that holds."""
        if name in stated or stated.intersection(_GIVES_WAY.get(name, ())):
            return given[name]
        found[name] = Choice(value, why)
        return value

    # Results, "Other data sets": labels of few texts are level with dense at a sixth, of 58 texts at half of the features.
    frequent = facts.texts_a_label >= 16
    share = 2 if frequent else 6
    fan_in = min(facts.features, max(16, facts.features // share))
    choose(f"{_FFI}.fan_in", fan_in, f"labels have {facts.texts_a_label:.1f} texts on average")
    index = choose(f"{_FFI}.index_init", "discriminant", "the most accurate start")
    choose(f"{_FFI}.rewire_interval", 0, "rewiring gains nothing from such a start")
    optimizer = choose(f"{_OPT}.xmc_optimizer", "rowwise_rmsprop", "the most accurate one with such a start")
    texts = facts.texts
    if choose("data.augment_label_data", facts.label_texts, f"labels have {'' if facts.label_texts else 'no '}texts"):
        texts += facts.labels
    texts = max(1, min(texts, config.data.train_sample or texts))

    machine = "a GPU" if facts.gpu else "a CPU"
    # A word is about one and a half tokens; two are special.
    longest = min(128 if facts.gpu else 64, facts.positions or 128)
    tokens = 16 * ceil((1.5 * facts.words + 2) / 16)
    choose(
        "data.max_len", max(3, min(tokens, longest)), f"95 % of the texts have up to {facts.words} words, on {machine}"
    )
    # Small data still get about 50 steps an epoch.
    batch = next((size for size in (128, 64, 32) if texts >= 50 * size), 16)
    choose("data.batch_size", batch, f"{texts:,} texts to train on")
    epochs = min(20, max(3, round(3.6e6 / texts))) if facts.gpu else min(20, max(1, _CPU_VISITS // texts))
    epochs = choose(f"{_OPT}.epochs", epochs, f"{texts:,} texts to train on, on {machine}")
    a_step = given["data.batch_size"] if "data.batch_size" in stated else batch
    a_step *= config.training.optimization.grad_accum_step
    limit = None if facts.gpu or texts <= _CPU_VISITS else ceil(_CPU_VISITS / a_step)
    limit = choose(f"{_OPT}.max_steps", limit, f"{texts:,} texts to train on, on {machine}")
    steps = min(epochs * ceil(texts / a_step), limit or epochs * ceil(texts / a_step))

    # Results: 2e-3 in 6,460 and more steps; three epochs of SID-GND-EN, 970 steps, did well with five times that.
    taken = f"{steps:,} optimizer steps"
    if optimizer in _ADAPTIVE:
        choose(f"{_OPT}.lr", float(f"{2e-3 * min(5.0, max(1.0, 6000 / steps)):.2g}"), taken)
    if index != "random":
        choose(f"{_FFI}.weight_init", "zero", "the most accurate one in a long training")
    # After few steps all logits are alike, and an adjustment would rank the rarest labels first.
    choose(f"{_FFI}.logit_adjustment", 0.3 if steps >= 1000 else 0.0, taken)
    if config.model.encoder.lora_rank:
        choose(f"{_OPT}.encoder_lr", 2e-4, "only adapters are trained")
    else:
        width = facts.features if not config.model.penultimate.use_penultimate_layer else 768
        choose(
            f"{_OPT}.encoder_lr", float(f"{2e-4 * min(1.0, 384 / width) ** 2:.2g}"), f"the head reads {width} features"
        )
    if choose("training.amp.enabled", facts.gpu, f"on {machine}"):
        choose("training.amp.dtype", "bfloat16", f"on {machine}")
    return found
