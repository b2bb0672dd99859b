"""accelerate and DeepSpeed around the encoder, and how a step is cut."""
