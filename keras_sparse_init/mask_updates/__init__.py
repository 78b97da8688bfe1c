"""Masks that change or are found: drop and grow in training, magnitude pruning, one-shot pruning at initialization."""
