"""The head's inner loops: one module for each backend. `reference` is the plain version that tests compare the others to."""
