"""Measurements for the user's own machine: python -m xmc_trainer.bench.head, and .ranks under torchrun."""
