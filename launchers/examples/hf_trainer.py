"""The head in a model for transformers.Trainer.

python launchers/examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from toy import FEATURES, LABELS, Encoder, Texts, collate, precision
from transformers import Trainer, TrainingArguments

from xmc_trainer import FixedFanInHead
from xmc_trainer.head import AdamW, exclude_from_ddp


class Classifier(nn.Module):
    """Returns the loss in the dict that Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = FixedFanInHead(FEATURES, LABELS, fan_in=32, optimizer=AdamW(), lr=0.05)

    def forward(self, words: Tensor, label_ids: Tensor, label_counts: Tensor) -> dict[str, Tensor]:
        divisor = float(self.head.ranks.size)  # over which Trainer averages the encoder's gradients
        return {"loss": self.head(self.encoder(words), label_ids, label_counts, engine_divisor=divisor)}


def main(epochs: int = 4) -> float:
    """Train, and return P@1 on new texts."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=128,
            learning_rate=0.02,  # of the encoder; `head.lr` is the head's own
            max_grad_norm=0.0,  # clipping would scale the encoder's gradients alone
            gradient_accumulation_steps=1,  # more: pass `end_of_step`, as accelerate_loop.py does
            save_strategy="no",  # Trainer saves rank 0's labels alone; with several processes, save each head.state_dict()
            report_to=[],
            remove_unused_columns=False,
        )
        model = Classifier()
        exclude_from_ddp(model)  # for several processes
        Trainer(model, arguments, train_dataset=Texts(4000), data_collator=collate).train()
    batch = {name: value.to(model.head.weight.device) for name, value in collate([*Texts(200, seed=1)]).items()}
    with torch.no_grad():
        return precision(model.head, model.encoder(batch["words"]), batch)


if __name__ == "__main__":
    print(f"P@1 {main():.2f}")
