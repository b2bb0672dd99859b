"""The model card of a saved model: README.md in the form of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from xmc_trainer.config.schema import Config
from xmc_trainer.config.write import flatten, portable_settings

_CHANGES = "## Changes after training"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(config: Config, metrics: dict[str, dict[str, float]], labels: int, texts: int, step: int) -> str:
    """Return the model card of a training, in Markdown.

    Args:
        metrics: split -> metrics, as fractions, of the latest evaluation; may be empty.
        labels, texts: numbers of labels and of training texts.
        step: optimizer steps made.
    """
    settings, encoder = flatten(portable_settings(config)), config.model.encoder.encoder_model
    defaults = flatten(dataclasses.asdict(Config()))
    changed = [name for name, value in settings.items() if value != defaults.get(name)]
    is_on_hub = _HUB_ID.fullmatch(encoder) and not Path(encoder).exists()
    lines = [
        "---",
        "library_name: xmc_trainer",
        "pipeline_tag: text-classification",
        *([f"base_model: {encoder}"] if is_on_hub else []),
        "tags: [extreme-multi-label-classification, multi-label-classification]",
        "---",
        "",
        "# Multi-label text classifier",
        "",
        f"Ranks {labels:,} labels for a text. A fine-tuned `{settings['model.encoder.encoder_model']}` encodes the text; a "
        "linear layer, in which each label reads some of the encoder's features, scores the labels.",
        "",
        "## Use",
        "",
        "```python",
        "from xmc_trainer import XMCClassifier",
        "",
        'model = XMCClassifier.from_pretrained("this folder, or its hub id")',
        'print(model.predict(["a text"], k=5))',
        "```",
        "",
        f"It reads the first {config.data.max_len} tokens of a text. It cannot predict labels that the training texts did not have.",
        "",
        "## Training",
        "",
        f"{texts:,} texts, {step:,} steps. Settings that differ from the defaults of xmc_trainer:",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| `{name}` | `{_cell(settings[name])}` |" for name in changed),
    ]
    if metrics:
        names = list(next(iter(metrics.values())))
        lines += [
            "",
            "## Metrics",
            "",
            "Per cent.",
            "",
            f"| split | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        lines += [
            f"| {split} | {' | '.join(f'{100 * found[name]:.2f}' for name in names)} |"
            for split, found in metrics.items()
        ]
    return "\n".join(lines) + "\n"


def changed_card(card: str, change: str) -> str:
    """Return the card of a model that was changed after its training.

    Args:
        card: of the model before; its metrics are removed, because the changed model does not have them.
        change: a sentence.
    """
    card = re.sub(r"\n## Metrics\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL).rstrip()
    heading = "" if _CHANGES in card else f"\n{_CHANGES}\n\n"
    return f"{card}\n{heading}- {change}\n"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", " ")
