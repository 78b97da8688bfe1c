"""A network, data and settings small enough to train in a second, for the tests of the training job."""

import csv

import numpy as np

from keras_sparse_init.training import make_data, mlp


def small_network(input_shape, classes, keras="tf_keras"):
    return mlp(input_shape, classes, hidden_sizes=(20, 10), seed=0, keras=keras)


def small_settings(**changes):
    return {"steps": 60, "batch": 16, "log_every": 20, "learning_rate": 0.1, "seed": 3} | changes


def small_data():
    """Three classes that a small network can tell apart: each has one bright column."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 3
    x = rng.uniform(0, 0.5, (80, 6, 6)).astype(np.float32)
    x[np.arange(80), :, 2 * y] += 0.5
    return make_data("columns", x[:60], y[:60], x[60:], y[60:])


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))
