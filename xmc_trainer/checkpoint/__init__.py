"""Saved models and checkpoints: folders that appear whole, survive a power failure and vouch for themselves."""
