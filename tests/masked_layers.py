"""Layers to mask, for both Kerases and every backend, and what `Masked` must make of them."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from keras_sparse_init import Masked, masked_kernels

_random = np.random.default_rng(0)


def _normal(*shape):
    return _random.normal(size=shape).astype(np.float32)


VECTORS, SEQUENCES, IMAGES, VOLUMES = _normal(3, 5), _normal(2, 6, 4), _normal(2, 7, 7, 4), _normal(2, 4, 4, 4, 2)
QUERIES, VALUES, KEYS = _normal(2, 5, 6), _normal(2, 7, 4), _normal(2, 7, 3)
STATES, FRAMES, TOKENS = _normal(2, 3), _normal(2, 3, 5, 5, 2), np.array([[1, 2, 0], [3, 9, 3]])

# name: (layer of a Keras's `layers`, positional arguments of its call, arguments by name, number of kernels)
CASES = {
    "dense": (lambda L: L.Dense(4, activation="tanh"), [VECTORS], {}, 1),
    "conv1d": (lambda L: L.Conv1D(4, 3), [SEQUENCES], {}, 1),
    "conv2d_grouped": (lambda L: L.Conv2D(6, 3, groups=2, padding="same"), [IMAGES], {}, 1),
    "conv2d_dilated": (lambda L: L.Conv2D(3, 3, dilation_rate=2), [IMAGES], {}, 1),
    "conv3d": (lambda L: L.Conv3D(3, 2), [VOLUMES], {}, 1),
    "conv1d_transpose": (lambda L: L.Conv1DTranspose(3, 3, strides=2), [SEQUENCES], {}, 1),
    "conv2d_transpose": (lambda L: L.Conv2DTranspose(3, 3, strides=2), [IMAGES], {}, 1),
    "conv3d_transpose": (lambda L: L.Conv3DTranspose(3, 2), [VOLUMES], {}, 1),
    "depthwise_conv1d": (lambda L: L.DepthwiseConv1D(3, depth_multiplier=2), [SEQUENCES], {}, 1),
    "depthwise_conv2d": (lambda L: L.DepthwiseConv2D(3, depth_multiplier=2), [IMAGES], {}, 1),
    "separable_conv1d": (lambda L: L.SeparableConv1D(3, 3), [SEQUENCES], {}, 2),
    "separable_conv2d": (lambda L: L.SeparableConv2D(3, 3), [IMAGES], {}, 2),
    "lstm": (lambda L: L.LSTM(3, return_sequences=True, return_state=True), [SEQUENCES], {}, 2),
    "lstm_from_states": (lambda L: L.LSTM(3), [SEQUENCES], {"initial_state": [STATES, STATES]}, 2),
    "gru": (lambda L: L.GRU(3), [SEQUENCES], {}, 2),
    "gru_from_state": (lambda L: L.GRU(3), [SEQUENCES, STATES], {}, 2),
    "simple_rnn": (lambda L: L.SimpleRNN(3, go_backwards=True), [SEQUENCES], {}, 2),
    "rnn_of_cell": (lambda L: L.RNN(L.GRUCell(3)), [SEQUENCES], {}, 2),
    "rnn_of_cells": (lambda L: L.RNN(L.StackedRNNCells([L.LSTMCell(3), L.GRUCell(2)])), [SEQUENCES], {}, 4),
    "conv_lstm2d": (lambda L: L.ConvLSTM2D(2, 3), [FRAMES], {}, 2),
    "bidirectional": (lambda L: L.Bidirectional(L.LSTM(3)), [SEQUENCES], {}, 4),
    "time_distributed": (lambda L: L.TimeDistributed(L.Dense(3)), [SEQUENCES], {}, 1),
    "attention_to_itself": (lambda L: L.MultiHeadAttention(2, 3), [QUERIES, QUERIES], {}, 4),
    "attention_by_position": (lambda L: L.MultiHeadAttention(2, 3), [QUERIES, VALUES, KEYS], {}, 4),
    "attention_by_name": (
        lambda L: L.MultiHeadAttention(2, 3),
        [QUERIES],
        {"value": VALUES, "key": KEYS, "return_attention_scores": True},
        4,
    ),
    "einsum_dense": (
        lambda L: L.EinsumDense("abc,cde->abde", output_shape=(None, 3, 2), bias_axes="e"),
        [SEQUENCES],
        {},
        1,
    ),
    "embedding": (lambda L: L.Embedding(10, 4), [TOKENS], {}, 1),
    "model": (lambda L: sequential(L, [L.Dense(4), L.BatchNormalization(), L.Dense(2)]), [VECTORS], {}, 2),
}


def sequential(layers, parts):
    return (keras if layers is keras.layers else tf_keras).Sequential(parts)


def number(value):
    """A variable or tensor of either Keras as an array."""
    return value.numpy() if isinstance(value, tf.Variable | tf.Tensor) else keras.ops.convert_to_numpy(value)


def predicted(model, x):
    """What a model on TensorFlow predicts; by a call, since `predict` traces a function for each model."""
    return number(model(tf.nest.map_structure(tf.constant, x), training=False))


def arguments(library, name):
    """What a case's layer is called with: tensors of its Keras."""
    _, args, kwargs, _ = CASES[name]
    tensor = tf.convert_to_tensor if library is tf_keras else keras.ops.convert_to_tensor

    def convert(value):
        return [convert(v) for v in value] if isinstance(value, list) else value if value is True else tensor(value)

    return [convert(value) for value in args], {key: convert(value) for key, value in kwargs.items()}


def masked_case(library, name):
    """A masked layer with weights that are not 0 off the mask either, and the plain layer with kernel * mask.

    Returns both, and the masks as arrays: one for each weight that training changes, None for a bias.
    """
    make, _, _, count = CASES[name]
    args, kwargs = arguments(library, name)
    layer, plain = make(library.layers), make(library.layers)
    masked = Masked(layer, sparsity=0.5, seed=1)
    masked(*args, **kwargs)
    plain(*args, **kwargs)
    masks = {id(kernel.kernel): number(kernel.mask) for kernel in masked_kernels(masked)}
    assert len(masks) == count
    assert all(0 < mask.mean() < 1 for mask in masks.values())
    random = np.random.default_rng(2)
    layer.set_weights([random.uniform(0.5, 1.5, tuple(weight.shape)) for weight in layer.weights])
    plain.set_weights([number(weight) * masks.get(id(weight), 1) for weight in layer.weights])
    return masked, plain, [masks.get(id(weight)) for weight in masked.trainable_weights]


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def half(*shape, seed=0):
    """A mask with about half of its entries 1."""
    return (np.random.default_rng(seed).random(shape) < 0.5).astype(np.float32)


def weights_and_masks(model):
    kernels = masked_kernels(model)
    assert kernels
    return [(number(kernel.kernel), number(kernel.mask)) for kernel in kernels]


def assert_sparse(model):
    for kernel, mask in weights_and_masks(model):
        assert 0 < mask.mean() < 1
        assert not kernel[mask == 0].any()
        assert kernel[mask == 1].any()


def subclassed(library, wrap=lambda layer: Masked(layer, sparsity=0.5, seed=0)):
    class Model(library.Model):
        def __init__(self):
            super().__init__()
            self.first = wrap(library.layers.Dense(6, activation="tanh"))
            self.blocks = [wrap(library.layers.Dense(6)) for _ in range(2)]
            self.last = library.layers.Dense(2)

        def call(self, inputs):
            outputs = self.first(inputs)
            for block in self.blocks:
                outputs = outputs + block(outputs)
            return self.last(outputs)

    return Model()
