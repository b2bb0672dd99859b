"""The commands of `xmc-trainer`, one module each."""
