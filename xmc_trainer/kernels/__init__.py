"""The head's step and ranking, one module per backend. `reference` is the plain version that tests compare the others with."""
