"""Measurements for the user's own machine: xmc-trainer bench head, ranks, train."""
