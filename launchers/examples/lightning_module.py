"""The head in a LightningModule.

pip install lightning; python launchers/examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from toy import FEATURES, LABELS, Encoder, Texts, collate, precision

from xmc_trainer import FixedFanInHead
from xmc_trainer.head import AdamW, exclude_from_ddp


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def configure_model(self) -> None:
        """Make the head when the process group exists: it then holds this process's labels alone."""
        self.head = FixedFanInHead(FEATURES, LABELS, fan_in=32, optimizer=AdamW(), lr=0.05)
        exclude_from_ddp(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.encoder.parameters(), lr=0.02)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        divisor = float(self.trainer.world_size)  # over which Lightning averages the encoder's gradients
        return self.head(
            self.encoder(batch["words"]), batch["label_ids"], batch["label_counts"], engine_divisor=divisor
        )


def main(epochs: int = 4) -> float:
    """Train, and return P@1 on new texts."""
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(Texts(4000), 128, shuffle=True, collate_fn=collate))
    batch = collate([*Texts(200, seed=1)])
    with torch.no_grad():
        return precision(model.head, model.encoder(batch["words"]), batch)


if __name__ == "__main__":
    print(f"P@1 {main():.2f}")
