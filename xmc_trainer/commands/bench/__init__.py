"""Benchmarks to run on your own machine: xmc-trainer bench head, ranks, train, data."""
