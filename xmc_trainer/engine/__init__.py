"""The engine that trains the encoder (accelerate, DeepSpeed), and the number of micro-batches per step."""
