"""The encoder: a backbone with pooling, its flat form for the engine, and its compilation."""
