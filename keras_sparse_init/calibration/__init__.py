"""Initialization from data: weight normalization's gains, biases and weights by quantiles and linear programs."""
