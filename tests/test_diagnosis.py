"""What `diagnose` says: nothing of a healthy network, and each fault of one that has it."""

import json

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import Masked, SparseScaledInit, compat, masked_kernels, measure_signal, reinitialize, sparsify

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_X = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)


def _perceptron(library, depth=6, width=100, **options):
    L = library.layers
    hidden = [
        L.Dense(width, "relu", kernel_initializer=SparseScaledInit(2.0, seed=i), name=f"d{i}", **options)
        for i in range(depth)
    ]
    out = L.Dense(10, kernel_initializer=SparseScaledInit(1.0, seed=99), name="out")
    return library.Sequential([L.Input((100,)), *hidden, out])


def _has(sentences, *words):
    return any(all(word in sentence for word in words) for sentence in sentences)


@BOTH
def test_a_healthy_network_has_no_faults_dense_or_sparse(library):
    dense = _perceptron(library)
    assert measure_signal(dense, _X).diagnose() == []
    assert measure_signal(sparsify(dense, 0.8, "uniform", seed=0), _X).diagnose() == []


@BOTH
def test_masked_dense_initialization_is_named_and_reinitialize_cures_it(library):
    # At the narrow end many units would lead nowhere.
    model = sparsify(_perceptron(library), 0.9, "uniform", skip=["out"], seed=0)
    reinitialize(model, SparseScaledInit(2.0, granularity="dense"), seed=0)
    faults = measure_signal(model, _X).diagnose()
    assert _has(faults, "signal shrinks", "from 'd0' to 'out'")
    assert _has(faults, "gradient vanishes", "from 'out' to 'd0'")
    assert _has(faults, "'d0/kernel'", "3 more have the variance of a dense kernel", "reinitialize(model)")
    reinitialize(model, seed=0)
    assert measure_signal(model, _X).diagnose() == []


def test_a_growing_signal_is_named_between_its_layers():
    model = _perceptron(keras)
    for i in (2, 3):
        kernel = model.get_layer(f"d{i}").kernel
        kernel.assign(kernel * 30.0)
    faults = measure_signal(model, _X).diagnose()
    assert _has(faults, "signal grows", "from 'd1' to")
    assert _has(faults, "gradient explodes")
    assert not _has(faults, "variance of a dense kernel")


def test_dead_units_a_dead_output_and_one_direction_are_named():
    model = _perceptron(keras, depth=2)
    model.get_layer("d1").bias.assign(np.where(np.arange(100) < 40, -8, 0))
    report = measure_signal(model, _X)
    assert report.diagnose() == [f"{report['d1'].dead_units} of 100 units of 'd1' are 0 for every sample."]
    assert report["d1"].dead_units >= 40
    model.get_layer("d1").bias.assign(np.full(100, -1e3))
    faults = measure_signal(model, _X).diagnose()
    assert _has(faults, "100 of 100 units of 'd1'")
    assert _has(faults, "The output is the same for all samples")
    model.get_layer("d1").bias.assign(np.full(100, 1e3))
    assert _has(measure_signal(model, _X).diagnose(), "same direction at 'd1' and after", "1.0000")


def test_what_is_not_finite_is_named():
    model = _perceptron(keras, depth=2)
    model.get_layer("d1").bias.assign(np.where(np.arange(100) == 3, np.nan, 0))
    report = measure_signal(model, _X)
    faults = report.diagnose()
    assert _has(faults, "signal of 'd1' is not finite", "1 after it")
    assert "nan" in str(report)
    json.dumps(report.to_dict())


def test_units_on_no_path_are_named():
    mask = np.ones((100, 100), np.uint8)
    mask[:, :30] = 0
    L = keras.layers
    first = Masked(L.Dense(100, "relu", kernel_initializer=SparseScaledInit(2.0, seed=0), name="d0"), mask=mask)
    second = Masked(L.Dense(10, name="out"), mask=np.arange(1000).reshape(100, 10) >= 500)
    faults = measure_signal(keras.Sequential([L.Input((100,)), first, second]), _X).diagnose()
    assert _has(faults, "30 of 100 units of 'd0/kernel' are on no path from an input")
    assert _has(faults, "50 of 100 units of 'd0/kernel' are on no path to an output")


def test_the_scale_of_kernels_is_that_of_their_masks():
    model = sparsify(_perceptron(keras, depth=1), 0.8, "uniform", seed=0, initializer=SparseScaledInit(2.0))
    entry, _ = measure_signal(model, _X[:2]).kernels
    kernel = masked_kernels(model)[0]
    weights = compat.to_numpy("kernel", kernel.kernel).astype(np.float64) * kernel.mask_value()
    assert entry.scale == pytest.approx((weights**2).sum(axis=0).mean(), rel=1e-5)
    assert entry.scale_for_mask == pytest.approx(2.0)  # Of the layer's own initializer.
    assert entry.scale_as_dense == pytest.approx(2.0 * 0.2, rel=0.01)


@BOTH
def test_healthy_networks_with_pooling_or_attention_have_no_fault(library):
    layers = library.layers
    images = layers.Input((16, 16, 1))
    x = images
    for i in range(3):
        conv = layers.Conv2D(16, 3, padding="same", kernel_initializer=SparseScaledInit(2.0, seed=i))
        x = layers.ReLU()(layers.BatchNormalization()(conv(x)))
    head = layers.Dense(10, kernel_initializer=SparseScaledInit(2.0, seed=9))
    pooled = library.Model(images, head(layers.GlobalAveragePooling2D()(x)))
    steps = layers.Input((8, 12))
    attention = layers.MultiHeadAttention(2, 6, kernel_initializer=SparseScaledInit(2.0, seed=1))
    attending = library.Model(
        steps, layers.Dense(3, kernel_initializer=SparseScaledInit(2.0, seed=2))(attention(steps, steps))
    )
    random = np.random.default_rng(0)
    # Images that are alike in their brightness, as photographs are.
    pictures = random.uniform(0, 1, size=(100, 1, 1, 1)) * random.uniform(0, 1, size=(16, 16, 1))
    pictures = pictures + 0.2 * random.normal(size=(100, 16, 16, 1))
    assert measure_signal(pooled, pictures, training=True).diagnose() == []
    assert measure_signal(attending, random.normal(size=(50, 8, 12))).diagnose() == []


def test_a_fault_of_a_model_with_batch_normalization_in_prediction_says_how_to_measure_it():
    layers = keras.layers
    dense = [layers.Dense(50, kernel_initializer=keras.initializers.RandomNormal(0, 0.01, seed=i)) for i in range(3)]
    model = keras.Sequential([layers.Input((50,)), dense[0], layers.BatchNormalization(), dense[1], dense[2]])
    x = np.random.default_rng(0).normal(size=(100, 50))
    assert _has(measure_signal(model, x).diagnose(), "running statistics", "training=True")
    assert not _has(measure_signal(model, x, training=True).diagnose(), "running statistics")


def test_of_one_sample_no_unit_is_called_dead():
    assert measure_signal(_perceptron(keras, depth=2), _X[:1]).diagnose() == []
