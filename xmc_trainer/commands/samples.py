"""Predictions of a saved model for a few texts of its test set, beside the texts' labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from xmc_trainer.builders.saved_model import corpus_of_saved
from xmc_trainer.checkpoint.model_config import config_of_model
from xmc_trainer.commands.report_page import Sample
from xmc_trainer.model import XMCModel


@torch.no_grad()
def samples_of(folder: Path, number: int, k: int = 5) -> list[Sample]:
    """Predict the k best labels of `number` test texts at equal distances. Texts are shown as the model reads them: cut off, and as tokens.

    Raises UserError if the model or its data cannot be read.
    """
    config = config_of_model(folder, [])
    model = XMCModel.load(folder, config.environment.device_name())
    saved, corpus = model.saved, corpus_of_saved(model.saved, config)
    rows = np.unique(np.linspace(0, len(corpus.test) - 1, number).astype(np.int64))
    wanted = corpus.test_labels().rows(rows)
    excluded = None if corpus.filter_pairs is None else corpus.filter_pairs.rows(rows)
    names = [text or name for name, text in zip(saved.label_ids.to_pylist(), saved.label_texts.to_pylist())]
    samples = []
    for place, tokens in enumerate(corpus.test[rows]["input_ids"]):
        ids = torch.tensor([tokens], device=model.device)
        right = wanted.ids[wanted.offsets[place] : wanted.offsets[place + 1]].tolist()
        skip = [] if excluded is None else excluded.ids[excluded.offsets[place] : excluded.offsets[place + 1]].tolist()
        skipped = torch.tensor(skip, dtype=torch.int32), torch.tensor([len(skip)], dtype=torch.int32)
        _, found = saved.head.topk(
            model.encode(ids, torch.ones_like(ids)),
            min(k, len(names)),
            *(tensor.to(model.device) for tensor in skipped),
        )
        predicted = [(names[label], label in right) for label in found[0].tolist() if label >= 0]
        text = str(saved.tokenizer.decode(tokens, skip_special_tokens=True))
        samples.append(Sample(text, [names[label] for label in right], predicted))
    return samples
