"""The head in a loop of accelerate without DeepSpeed, with gradient accumulation.

python launchers/examples/accelerate_loop.py, or with several processes: accelerate launch launchers/examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from toy import FEATURES, LABELS, Encoder, Texts, collate, precision

from xmc_trainer import FixedFanInHead
from xmc_trainer.head import AdamW

ACCUMULATION = 2


def main(epochs: int = 4) -> float:
    """Train, and return P@1 on new texts."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    encoder = Encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.02)
    loader = DataLoader(Texts(4000), 64 // accelerator.num_processes, shuffle=True, collate_fn=collate)
    # The head stays outside: accelerate would wrap it, and every process owns other labels.
    encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)
    head = FixedFanInHead(FEATURES, LABELS, fan_in=32, optimizer=AdamW(), lr=0.05, device=accelerator.device)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(encoder):
                loss = head(
                    encoder(batch["words"]),
                    batch["label_ids"],
                    batch["label_counts"],
                    end_of_step=accelerator.sync_gradients,  # one update from all micro-batches of a step
                    engine_divisor=float(accelerator.num_processes * ACCUMULATION),  # over which gradients are averaged
                )
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    batch = {name: value.to(accelerator.device) for name, value in collate([*Texts(200, seed=1)]).items()}
    with torch.no_grad():
        return precision(head, encoder(batch["words"]), batch)


if __name__ == "__main__":
    print(f"P@1 {main():.2f}")
