"""The head's inner loops. One file a backend; `reference` is the readable twin that the others are tested against."""
