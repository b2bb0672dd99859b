"""Saved models and checkpoints: folders that are written atomically, survive a power failure and carry checksums."""
