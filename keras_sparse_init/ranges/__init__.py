"""Guaranteed bounds of a ReLU network's outputs over a box of inputs."""
