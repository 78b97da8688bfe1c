"""`WeightNormConstraint` and `apply_constraints`, in both Kerases."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from keras_sparse_init import (
    Masked,
    UpdatePruningStep,
    WeightNormConstraint,
    apply_constraints,
    compat,
    masked_kernels,
    masks,
    set_masks,
    sparsify,
)
from keras_sparse_init.constraints import unit_axes

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def _norms(kernel, axis):
    kernel = compat.to_numpy("kernel", kernel).astype(np.float64)
    return np.sqrt(np.sum(kernel**2, axis=axis))


def _convnet(library, constraint=None):
    layers = library.layers
    initializer = library.initializers.HeNormal(seed=1)
    conv = layers.Conv2D(16, 3, kernel_initializer=initializer, kernel_constraint=constraint)
    model = library.Sequential([layers.Input((8, 8, 3)), conv, layers.GlobalAveragePooling2D()])
    model.compile(library.optimizers.SGD(0.1), "mse")
    return model, conv


@BOTH
def test_after_a_step_a_convolution_has_unit_filters_parallel_to_the_unconstrained_ones(library):
    """The test case of the question that this answers: 16 norms of 1, not one norm of 4."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(4, 8, 8, 3)).astype("float32"), random.normal(size=(4, 16)).astype("float32")
    model, conv = _convnet(library, WeightNormConstraint())
    free, free_conv = _convnet(library)
    before = compat.to_numpy("kernel", conv.kernel).copy()
    np.testing.assert_array_equal(before, compat.to_numpy("kernel", free_conv.kernel))  # Nothing before the step.
    assert np.ptp(_norms(before, (0, 1, 2))) > 0.1
    for m in (model, free):
        m.train_on_batch(x, y)
    np.testing.assert_allclose(_norms(conv.kernel, (0, 1, 2)), np.ones(16), rtol=1e-6)
    expected = compat.to_numpy("kernel", free_conv.kernel)
    expected = expected / np.sqrt(np.sum(expected**2, axis=(0, 1, 2)))
    np.testing.assert_allclose(compat.to_numpy("kernel", conv.kernel), expected, rtol=1e-5, atol=1e-7)
    assert np.abs(expected - before / np.sqrt(np.sum(before**2, axis=(0, 1, 2)))).max() > 1e-3


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), [0, 2], (0, 1, 2, 3)])
def test_the_projection_is_that_of_the_formula(axis):
    w = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    summed = (0, 1, 2) if axis is None else tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    length = np.sqrt(np.sum(w.astype(np.float64) ** 2, axis=summed, keepdims=True))
    for epsilon in (0.0, 0.5):
        expected = 2.5 * w / (length + epsilon)
        for tensor in (tf.constant(w), keras.ops.convert_to_tensor(w), keras.Variable(w), tf.Variable(w)):
            found = WeightNormConstraint(2.5, axis, epsilon)(tensor)
            np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 3e-5, 1.0, 1e30])
def test_the_result_does_not_depend_on_the_scale_and_is_idempotent(scale):
    w = np.random.default_rng(0).uniform(0.5, 1, size=(50, 4)).astype(np.float32)
    constraint = WeightNormConstraint()
    once = np.asarray(constraint(tf.constant(w * np.float32(scale))))
    np.testing.assert_allclose(once, np.asarray(constraint(tf.constant(w))), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(constraint(tf.constant(once))), once, rtol=2e-7)
    np.testing.assert_allclose(_norms(once, 0), 1, rtol=1e-6)


def test_the_unit_norm_of_keras_depends_on_the_scale():
    """What the docstring says of it: its result for |w| = 3e-5 has norm 0.9967."""
    w = tf.fill((1, 1), 3e-5)
    assert float(tf_keras.constraints.UnitNorm()(w)[0, 0]) == pytest.approx(0.9967, abs=1e-4)
    assert float(WeightNormConstraint()(w)[0, 0]) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_half_types_are_normalized_in_float32_and_keep_their_dtype(dtype):
    w = tf.cast(tf.constant(np.random.default_rng(0).normal(size=(4096, 3))), dtype)
    projected = WeightNormConstraint()(w)
    assert projected.dtype == w.dtype
    exact = np.asarray(tf.cast(w, "float64")) / _norms(np.asarray(tf.cast(w, "float64")), 0)
    # Rounding to the dtype is a relative error of half its step (or an absolute one, of numbers below float16's
    # normal ones); in float32 and float64 the sum over 4096 squares adds a few of these.
    step = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-20, "float64": 2**-49}[dtype]
    np.testing.assert_allclose(
        np.asarray(tf.cast(projected, "float64")), exact, rtol=step * 1.01, atol=2**-25 if dtype == "float16" else 0
    )
    if dtype == "float16":
        np.testing.assert_allclose(_norms(np.asarray(projected), 0), 1, atol=1e-3)


@BOTH
def test_a_vector_of_zeros_stays_and_has_finite_gradients(library):
    w = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    w[:, 1] = 0
    with tf.GradientTape() as tape:
        variable = tf.Variable(w)
        projected = WeightNormConstraint()(variable)
        loss = tf.reduce_sum(projected * tf.constant(np.arange(15, dtype=np.float32).reshape(5, 3)))
    gradient = tape.gradient(loss, variable).numpy()
    assert np.all(projected.numpy()[:, 1] == 0) and np.all(np.isfinite(gradient)) and np.all(gradient[:, 1] == 0)
    # d(w / |w|) c = (c - u (u c)) / |w| of each other column.
    for column in (0, 2):
        length = np.linalg.norm(w[:, column])
        u, c = w[:, column] / length, np.arange(15).reshape(5, 3)[:, column]
        np.testing.assert_allclose(gradient[:, column], (c - u * (u @ c)) / length, rtol=1e-4, atol=1e-6)


LAYERS = {
    "Dense": (lambda L: L.Dense(4), (2, 5), {"kernel": (0,)}),
    "Conv1D": (lambda L: L.Conv1D(4, 3), (2, 8, 3), {"kernel": (0, 1)}),
    "Conv2D grouped": (lambda L: L.Conv2D(6, 3, groups=3), (2, 8, 8, 3), {"kernel": (0, 1, 2)}),
    "Conv1DTranspose": (lambda L: L.Conv1DTranspose(4, 3), (2, 8, 3), {"kernel": (0, 2)}),
    "Conv2DTranspose": (lambda L: L.Conv2DTranspose(4, 3), (2, 8, 8, 3), {"kernel": (0, 1, 3)}),
    "Conv3DTranspose": (lambda L: L.Conv3DTranspose(4, 2), (2, 4, 4, 4, 3), {"kernel": (0, 1, 2, 4)}),
    "DepthwiseConv1D": (lambda L: L.DepthwiseConv1D(3), (2, 8, 3), {"depthwise_kernel": (0,)}),
    "DepthwiseConv2D": (lambda L: L.DepthwiseConv2D(3), (2, 8, 8, 3), {"depthwise_kernel": (0, 1)}),
    "SeparableConv2D": (
        lambda L: L.SeparableConv2D(4, 3),
        (2, 8, 8, 3),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    "Embedding": (lambda L: L.Embedding(7, 3), (2, 4), {"embeddings": (1,)}),
    "EinsumDense": (
        lambda L: L.EinsumDense("abc,cde->abde", output_shape=(None, 3, 2)),
        (2, 5, 4),
        {"kernel": (0,)},
    ),
    "GRUCell": (lambda L: L.GRUCell(3), (2, 4), {"kernel": (0,), "recurrent_kernel": (0,)}),
}


@BOTH
@pytest.mark.parametrize("name", LAYERS)
def test_for_layer_knows_the_axes_of_every_kernel_before_and_after_it_is_built(library, name):
    make, shape, expected = LAYERS[name]
    layer = make(library.layers)
    for state in ("before", "after"):
        if state == "after":
            layer.build(shape)
        for weight, axes in expected.items():
            assert unit_axes(layer, weight) == axes == WeightNormConstraint.for_layer(layer, weight).axis
            if len(expected) == 1:
                assert unit_axes(layer) == axes
    with pytest.raises(ValueError, match="`weight_name` must be that of a kernel.*'bias'"):
        unit_axes(layer, "bias")


def test_for_layer_refuses_what_has_no_kernel_or_two_that_differ():
    with pytest.raises(ValueError, match="kernel of the layer 'flat': none"):
        WeightNormConstraint.for_layer(keras.layers.Flatten(name="flat"))
    with pytest.raises(ValueError, match="must say which kernel.*'depthwise_kernel', 'pointwise_kernel'"):
        WeightNormConstraint.for_layer(keras.layers.SeparableConv2D(4, 3))
    with pytest.raises(TypeError, match="Expected a layer or model"):
        WeightNormConstraint.for_layer("dense")


@BOTH
def test_apply_constraints_projects_at_once_frozen_layers_too_and_nothing_else(library):
    layers = library.layers
    frozen = layers.Dense(4, kernel_constraint=WeightNormConstraint(2.0), name="frozen", trainable=False)
    inner = library.Sequential([layers.Input((4,)), layers.Dense(3, bias_constraint=WeightNormConstraint(axis=0))])
    model = library.Sequential([layers.Input((5,)), frozen, inner, layers.Dense(2)])
    bias = inner.layers[-1].bias
    compat.assign(bias, np.array([3.0, 0.0, 4.0]))
    free = compat.to_numpy("kernel", model.layers[-1].kernel).copy()
    apply_constraints(model)
    np.testing.assert_allclose(_norms(frozen.kernel, 0), 2, rtol=1e-6)
    np.testing.assert_allclose(compat.to_numpy("bias", bias), [0.6, 0, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(compat.to_numpy("kernel", model.layers[-1].kernel), free)


@BOTH
def test_apply_constraints_refuses_a_model_without_weights(library):
    model = library.Sequential([library.layers.Dense(3, kernel_constraint=WeightNormConstraint())])
    with pytest.raises(ValueError, match="has no weights yet because it is not built"):
        apply_constraints(model)


def _sparse_fit(model, library, callbacks=()):
    model.compile(library.optimizers.SGD(0.1, momentum=0.9), "mse")
    random = np.random.default_rng(1)
    x, y = random.normal(size=(40, 20)), random.normal(size=(40, 6))
    model.fit(x, y, batch_size=10, epochs=2, verbose=0, callbacks=list(callbacks))


def _check_active_norms(model):
    for kernel in masked_kernels(model):
        values, mask = compat.to_numpy("kernel", kernel.kernel), kernel.mask_value()
        alive = mask.any(axis=0)
        assert np.all(values[~mask] == 0) and not mask.all()
        np.testing.assert_allclose(_norms(values, 0), alive.astype(float), rtol=1e-6)


@BOTH
def test_under_masks_the_norm_is_that_of_the_active_weights_and_zeros_stay(library):
    dense = library.layers.Dense(6, kernel_constraint=WeightNormConstraint())
    model = library.Sequential([library.layers.Input((20,)), Masked(dense, sparsity=0.9, seed=0)])
    apply_constraints(model)
    _check_active_norms(model)
    _sparse_fit(model, library)
    _check_active_norms(model)


def test_in_static_wrappers_of_tfmot_too():
    dense = tf_keras.layers.Dense(6, kernel_constraint=WeightNormConstraint())
    model = sparsify(tf_keras.Sequential([tf_keras.layers.Input((20,)), dense]), 0.9, seed=0)
    _sparse_fit(model, tf_keras)
    _check_active_norms(model)


def test_in_what_tfmot_prunes_with_this_packages_callback_too():
    dense = tf_keras.layers.Dense(6, kernel_constraint=WeightNormConstraint())
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.8, begin_step=1, frequency=3)
    model = tf_keras.Sequential([tf_keras.layers.Input((20,)), dense])
    model = tfmot.sparsity.keras.prune_low_magnitude(model, schedule)
    _sparse_fit(model, tf_keras, [UpdatePruningStep()])
    _check_active_norms(model)


@BOTH
@pytest.mark.parametrize("form", ["model.keras", "model.h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_it_is_saved_and_loaded_with_the_model(library, form, tmp_path):
    constraint = WeightNormConstraint(1.5, (0,), 0.25)
    dense = library.layers.Dense(3, kernel_constraint=constraint, name="dense")
    model = library.Sequential([library.layers.Input((4,)), dense])
    model.save(tmp_path / form)
    for loaded in (library.models.load_model(tmp_path / form), library.models.clone_model(model)):
        found = loaded.get_layer("dense").kernel_constraint
        assert type(found) is WeightNormConstraint
        assert found.get_config() == constraint.get_config() == {"norm": 1.5, "axis": [0], "epsilon": 0.25}
        assert found.axis == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": 0}, "`norm` must be a positive float"),
        ({"norm": float("nan")}, "`norm` must be a positive float"),
        ({"epsilon": -1e-3}, "`epsilon` must not be negative.*-0.001"),
        ({"epsilon": "small"}, "`epsilon` must be a finite float"),
        ({"axis": 1.5}, "`axis` must be an int, a list of different ints or None.*1.5"),
        ({"axis": ()}, "`axis` must be"),
        ({"axis": (0, 0)}, "`axis` must be"),
        ({"axis": True}, "`axis` must be"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightNormConstraint(**arguments)


def test_an_axis_that_the_weights_have_not_is_refused():
    with pytest.raises(ValueError, match=r"`axis` must be axes of the weights, of shape \(3, 2\).*\(0, 2\)"):
        WeightNormConstraint(axis=(0, 2))(tf.ones((3, 2)))


def test_masks_may_change_under_it():
    dense = keras.layers.Dense(6, kernel_constraint=WeightNormConstraint())
    model = keras.Sequential([keras.layers.Input((20,)), Masked(dense, sparsity=0.5, seed=0)])
    set_masks(model, masks.ConstantFanIn(0.9), seed=1)
    apply_constraints(model)
    _check_active_norms(model)


def test_a_constrained_step_is_a_reparameterized_one_at_another_rate():
    """With g = 1 and ||v|| = 1, eq. (3) of the paper: dv = dw - <w, dw> w. The rate is lr / (1 - lr <w, dw>)."""
    random = np.random.default_rng(0)
    w, dw = random.normal(size=(2, 30, 8))
    w /= np.linalg.norm(w, axis=0)
    rate, along = 0.1, np.sum(w * dw, axis=0)
    constrained = WeightNormConstraint()(tf.constant(w - rate * dw)).numpy()
    v = w - rate / (1 - rate * along) * (dw - along * w)
    np.testing.assert_allclose(constrained, v / np.linalg.norm(v, axis=0), rtol=0, atol=1e-12)
    assert np.abs(constrained - (w - rate * (dw - along * w))).max() > 1e-3  # Not at the same rate.
