"""What is computed of labels before a training: sums of their texts' features, and clusters."""
