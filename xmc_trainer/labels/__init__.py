"""Label statistics computed before training: sums of text features, and label clusters."""
