"""Training, evaluating and using extreme multi-label classifiers with a sharded fixed fan-in head."""

__version__ = "0.1.0"
