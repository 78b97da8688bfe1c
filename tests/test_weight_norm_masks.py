"""`WeightNorm` together with masks: `Masked` inside and outside it, tfmot around it, and functions of whole models."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import CASES, arguments, data, half, number, predicted, subclassed, weights_and_masks

from keras_sparse_init import (
    ConstantSparsity,
    MagnitudePruning,
    Masked,
    SparseHeNormal,
    UpdatePruningStep,
    WeightNorm,
    fold_weight_norm,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsify,
    static_wrapper,
    strip,
)

LIBRARIES, ORDERS = [keras, tf_keras], ["Masked(WeightNorm)", "WeightNorm(Masked)"]
either_keras = pytest.mark.parametrize("library", LIBRARIES, ids=["keras", "tf_keras"])
either_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(0)


def both(order, layer, **options):
    if order == "Masked(WeightNorm)":
        return Masked(WeightNorm(layer), **options)
    return WeightNorm(Masked(layer, **options))


def weight_norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, WeightNorm)]


def expected_w(v, mask, g):
    v = (v * mask).astype(np.float64)
    length = np.linalg.norm(v, axis=0)
    return np.where(length > 0, g / np.where(length > 0, length, 1), 0) * v


@either_keras
@either_order
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_the_norm_is_that_of_the_active_weights_whatever_is_off_the_mask(library, order, policy):
    layer = library.layers.Dense(4, use_bias=False, dtype=policy)
    model = both(order, layer, mask=half(6, 4))
    model.build((None, 6))
    v, g, x = data(6, 4), np.array([1.0, -2.0, 0.5, 3.0], np.float32), data(3, 6)
    layer.kernel.assign(v)  # Off the mask, too.
    (wrapper,) = weight_norms(model)
    wrapper.kernel_g.assign(g)
    kernel = layer.kernel if library is tf_keras else layer.kernel.value
    with tf.GradientTape() as tape:
        output = model(tf.constant(x))
    gradient = tf.convert_to_tensor(tape.gradient(output, kernel)).numpy()
    assert output.dtype == model.compute_dtype
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.03}[policy]
    expected = x @ expected_w(v, half(6, 4), g)
    np.testing.assert_allclose(tf.cast(output, "float32"), expected, rtol=tolerance, atol=tolerance)
    assert not gradient[half(6, 4) == 0].any()
    assert gradient.any()
    assert any(value is layer.kernel for value in vars(layer).values())


# Every layer in both Kerases and in both orders.
@pytest.mark.parametrize(
    ("library", "order", "name"),
    [(library, ORDERS[(i + j) % 2], name) for i, name in enumerate(CASES) for j, library in enumerate(LIBRARIES)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_both_orders_run_on_every_layer_and_give_the_folded_outputs(library, order, name):
    args, kwargs = arguments(library, name)
    model = both(order, CASES[name][0](library.layers), sparsity=0.5, seed=1)
    outputs = tf.nest.flatten(model(*args, **kwargs))
    kernels = masked_kernels(model)
    assert len(kernels) == CASES[name][3]
    twin = Masked(CASES[name][0](library.layers), sparsity=0.5, seed=1)
    expected = tf.nest.flatten(twin(*args, **kwargs))
    # Masks and seeds are named alike, so that the same kernels are drawn, and g makes w what was drawn.
    for kernel, other in zip(kernels, masked_kernels(twin), strict=True):
        assert kernel.layout == other.layout
        np.testing.assert_array_equal(number(kernel.mask), number(other.mask))
        np.testing.assert_array_equal(number(kernel.kernel), number(other.kernel))
    for w, kernel in zip(weight_norms(model)[0].effective_weights(), kernels, strict=True):
        np.testing.assert_allclose(number(w), number(kernel.kernel), rtol=1e-5, atol=1e-7)
    assert len(expected) == len(outputs)
    folded = weight_norms(model)[0].fold()
    for output, other in zip(tf.nest.flatten(folded(*args, **kwargs)), outputs, strict=True):
        np.testing.assert_allclose(number(output), number(other), rtol=1e-5, atol=1e-6)


def network(library, order, built=True):
    layers = library.layers
    return library.Sequential(
        [
            *([library.Input((6, 4))] if built else []),
            both(order, layers.Conv1D(6, 3, activation="tanh", kernel_regularizer="l2"), sparsity=0.5, seed=1),
            layers.Flatten(),
            both(order, layers.Dense(4, kernel_initializer="he_normal"), sparsity=0.5, seed=2),
        ]
    )


@pytest.mark.parametrize(
    ("library", "order", "built"),
    [(keras, ORDERS[0], True), (keras, ORDERS[1], False), (tf_keras, ORDERS[1], True), (tf_keras, ORDERS[0], False)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_training_keeps_weights_off_the_mask_at_0(library, order, built):
    model = network(library, order, built)
    x, y = data(8, 6, 4), data(8, 4)
    if not built:
        model.compile(library.optimizers.SGD(0.0), "mse")
        model.fit(x, y, verbose=0)
    before = weights_and_masks(model)
    for wrapper, (kernel, _) in zip(weight_norms(model), before, strict=True):
        # g was taken from the kernels that were drawn for the masks.
        np.testing.assert_allclose(number(wrapper.effective_weights()[0]), kernel, rtol=1e-5, atol=1e-7)
    model.compile(library.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    for (kernel, mask), (old, old_mask) in zip(weights_and_masks(model), before, strict=True):
        np.testing.assert_array_equal(mask, old_mask)
        assert not kernel[mask == 0].any()
        assert (kernel[mask == 1] != old[mask == 1]).all()


@either_keras
@either_order
def test_new_masks_keep_g_and_new_kernels_make_it_their_norm(library, order):
    model = network(library, order)
    scales = [number(wrapper.kernel_g) for wrapper in weight_norms(model)]
    set_masks(model, masks.ConstantFanIn(0.75), seed=3)
    for wrapper, g in zip(weight_norms(model), scales, strict=True):
        np.testing.assert_array_equal(number(wrapper.kernel_g), g)
        (w,) = wrapper.effective_weights()
        np.testing.assert_allclose(np.linalg.norm(number(w).reshape(-1, len(g)), axis=0), g, rtol=1e-5)
    reinitialize(model, SparseHeNormal(), seed=4)
    for wrapper, (kernel, mask), g in zip(weight_norms(model), weights_and_masks(model), scales, strict=True):
        np.testing.assert_allclose(number(wrapper.effective_weights()[0]), kernel, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(kernel != 0, mask)
        assert (number(wrapper.kernel_g) != g).all()


@either_keras
@either_order
@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_stripping_then_folding_gives_a_plain_sparse_model(library, order, kind):
    if kind == "sequential":
        model, x = network(library, order), data(5, 6, 4)
    else:
        model = subclassed(library, lambda layer: both(order, layer, sparsity=0.5, seed=0))
        x = data(5, 5)
    before = predicted(model, x)
    for wrapper in weight_norms(model):
        wrapper.kernel_g.assign(number(wrapper.kernel_g) * 2)
        (v,) = wrapper.get_prunable_weights()
        v.assign(number(v) * 3)
    expected = predicted(model, x)
    assert (np.abs(expected - before) > 1e-3).any()
    sparsities = [1 - mask.mean() for _, mask in weights_and_masks(model)]
    if order == "Masked(WeightNorm)":
        with pytest.raises(ValueError, match=r"fold_weight_norm\(strip\(model\)\)"):
            fold_weight_norm(model)
    plain = fold_weight_norm(strip(model))
    assert not any(isinstance(layer, Masked | WeightNorm) for layer in plain._flatten_layers())
    np.testing.assert_allclose(predicted(plain, x), expected, rtol=1e-4, atol=1e-5)
    kernels = [weight for weight in map(number, plain.weights) if weight.ndim > 1]
    assert [1 - np.count_nonzero(kernel) / kernel.size for kernel in kernels[: len(sparsities)]] == sparsities


@functools.cache
def trained(library, order):
    model = network(library, order)
    model.compile("adam", library.losses.MeanSquaredError())
    model.fit(data(5, 6, 4), data(5, 4), verbose=0)
    return model


@either_keras
@either_order
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "weights.weights.h5", "clone"])
def test_nested_wrappers_come_back_bit_for_bit(library, order, name, tmp_path):
    model, x = trained(library, order), data(5, 6, 4)
    if name == "clone":
        other = library.models.clone_model(model)
        other.set_weights(model.get_weights())
    elif "weights" in name:
        model.save_weights(tmp_path / name)
        other = network(library, order)
        other.load_weights(tmp_path / name)
    else:
        model.save(tmp_path / name)
        other = library.models.load_model(tmp_path / name)
    np.testing.assert_array_equal(predicted(other, x), predicted(model, x))
    for weight, same in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, same)


@either_keras
@pytest.mark.parametrize("wrapper", ["masked", "tfmot"])
def test_a_model_with_weight_norm_is_made_sparse(library, wrapper):
    if (library, wrapper) == (keras, "tfmot"):
        pytest.skip("tfmot takes tf_keras only")
    model = library.Sequential(
        [library.Input((20,)), WeightNorm(library.layers.Dense(10)), WeightNorm(library.layers.Dense(3))]
    )
    sparse = sparsify(model, 0.5, initializer=SparseHeNormal(), wrapper=wrapper, seed=0)
    assert [kernel.name.split("/")[-1] for kernel in masked_kernels(sparse)] == ["kernel", "kernel"]
    assert len(weight_norms(sparse)) == 2
    for layer, (kernel, mask) in zip(weight_norms(sparse), weights_and_masks(sparse), strict=True):
        np.testing.assert_array_equal(kernel != 0, mask)
        np.testing.assert_allclose(number(layer.effective_weights()[0]), kernel, rtol=1e-5, atol=1e-7)
    sparse.compile("adam", "mse")
    sparse.fit(data(8, 20), data(8, 3), verbose=0)
    expected = predicted(sparse, data(8, 20))
    plain = fold_weight_norm(strip(sparse))
    assert not weight_norms(plain)
    np.testing.assert_allclose(predicted(plain, data(8, 20)), expected, rtol=1e-4, atol=1e-5)


@either_keras
def test_pruning_by_the_magnitude_of_w_after_canonicalizing(library):
    model = library.Sequential([library.Input((6,)), Masked(WeightNorm(library.layers.Dense(4)))])
    (layer,) = weight_norms(model)
    layer.layer.kernel.assign(data(6, 4) * [1, 10, 100, 1000])
    w = number(layer.effective_weights()[0])
    layer.canonicalize()
    model.compile(library.optimizers.SGD(0.0), "mse")
    model.fit(
        data(8, 6),
        data(8, 4),
        verbose=0,
        callbacks=[MagnitudePruning(ConstantSparsity(0.5, begin_step=0, frequency=1))],
    )
    ((_, mask),) = weights_and_masks(model)
    np.testing.assert_array_equal(mask == 1, np.abs(w) > np.median(np.abs(w)))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_tfmot_prunes_v_and_a_pruned_unit_keeps_its_scale(policy):
    from tensorflow_model_optimization.sparsity import keras as sparsity

    layer = WeightNorm(tf_keras.layers.Dense(4, use_bias=False, dtype=policy))
    schedule = sparsity.ConstantSparsity(0.5, begin_step=0, frequency=1)
    model = tf_keras.Sequential([tf_keras.layers.Input((6,)), sparsity.prune_low_magnitude(layer, schedule)])
    g = number(layer.kernel_g)
    model.compile(tf_keras.optimizers.SGD(0.0), "mse")
    model.fit(data(8, 6), data(8, 4), verbose=0, callbacks=[UpdatePruningStep()])
    v, w = number(layer.layer.kernel), number(layer.effective_weights()[0])
    assert np.count_nonzero(v) == np.count_nonzero(w) == 12
    lengths = np.linalg.norm(w, axis=0)
    alive = np.abs(v).max(axis=0) > 0
    np.testing.assert_allclose(lengths[alive], g[alive], rtol=1e-3)
    plain = fold_weight_norm(sparsity.strip_pruning(model))
    np.testing.assert_allclose(predicted(plain, data(8, 6)), predicted(model, data(8, 6)), rtol=0.01, atol=0.01)


def test_static_masks_of_tfmot_around_weight_norm():
    layer = WeightNorm(tf_keras.layers.Dense(4, kernel_initializer=SparseHeNormal(sparsity=0.5, seed=1)))
    model = tf_keras.Sequential([tf_keras.layers.Input((6,)), static_wrapper(layer)])
    model.compile(tf_keras.optimizers.Adam(0.01), "mse")
    model.fit(data(8, 6), data(8, 4), epochs=2, verbose=0)
    ((kernel, mask),) = weights_and_masks(model)
    assert mask.sum() == 12
    np.testing.assert_array_equal(kernel != 0, mask)


def test_tfmot_inside_weight_norm_is_refused():
    with pytest.raises(ValueError, match=r"prune_low_magnitude\(WeightNorm\(layer\)\)"):
        WeightNorm(static_wrapper(tf_keras.layers.Dense(4)))
