"""`WeightNorm` in both Kerases: what it computes, its gradients, training and errors. Saving has its own file."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import CASES, arguments, data, number, predicted, subclassed

from keras_sparse_init import Masked, WeightNorm

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(0)


# The axes of the units of each kernel, by hand.
UNITS = {
    **dict.fromkeys(["dense", "time_distributed"], [(1,)]),
    "conv1d": [(2,)],
    **dict.fromkeys(["conv2d_grouped", "conv2d_dilated"], [(3,)]),
    "conv3d": [(4,)],
    "conv1d_transpose": [(1,)],
    "conv2d_transpose": [(2,)],
    "conv3d_transpose": [(3,)],
    "depthwise_conv1d": [(1, 2)],
    "depthwise_conv2d": [(2, 3)],
    "separable_conv1d": [(1, 2), (2,)],
    "separable_conv2d": [(2, 3), (3,)],
    "conv_lstm2d": [(3,), (3,)],
    **dict.fromkeys(["rnn_of_cells", "bidirectional"], [(1,)] * 4),
    **dict.fromkeys(
        ["attention_to_itself", "attention_by_position", "attention_by_name"], [(1, 2), (1, 2), (1, 2), (2,)]
    ),
    "einsum_dense": [(1, 2)],
    "embedding": [(0,)],
}


def units_of(name):
    return UNITS.get(name, [(1,), (1,)])


def norm(value, units):
    summed = tuple(axis for axis in range(value.ndim) if axis not in units)
    return np.sqrt((value.astype(np.float64) ** 2).sum(axis=summed, keepdims=True))


def broadcast(g, value, units):
    return g.reshape([n if axis in units else 1 for axis, n in enumerate(value.shape)])


def scales_of(layer):
    """The variables g, in the order of the kernels."""
    own = layer.trainable_weights
    return [weight for weight in own if not any(weight is inner for inner in layer.layer.weights)]


def shapes(variables):
    return [tuple(variable.shape) for variable in variables]


def normalized_case(library, name):
    """A layer with random v and g in a `WeightNorm`, and the plain layer with w, computed here."""
    args, kwargs = arguments(library, name)
    layer, plain = CASES[name][0](library.layers), CASES[name][0](library.layers)
    wrapped = WeightNorm(layer)
    wrapped(*args, **kwargs)
    plain(*args, **kwargs)
    random = np.random.default_rng(2)
    for weight in wrapped.trainable_weights:
        size = tuple(weight.shape)
        weight.assign(random.uniform(0.5, 1.5, size) * random.choice([-1, 1], size))
    w = {}
    for v, g, units in zip(wrapped.get_prunable_weights(), scales_of(wrapped), units_of(name), strict=True):
        v_, g_ = number(v), number(g)
        assert g_.shape == tuple(v_.shape[axis] for axis in units)
        w[id(v)] = broadcast(g_, v_, units) * v_ / norm(v_, units)
    plain.set_weights([w.get(id(weight), number(weight)) for weight in layer.weights])
    return wrapped, plain


def outputs_and_gradients(layer, variables, args, kwargs):
    variables = [variable if isinstance(variable, tf.Variable) else variable.value for variable in variables]
    with tf.GradientTape() as tape:
        outputs = tf.nest.flatten(layer(*args, **kwargs))
        loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs)
    gradients = tape.gradient(loss, variables)
    return outputs, [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


def assert_variables(layer):
    """Every kernel attribute holds the variable again."""
    for kernel in layer.get_prunable_weights():
        holders = [value for part in layer.layer._flatten_layers() for value in vars(part).values()]
        assert any(value is kernel for value in holders)


def dense(library, *, v=None, g=None, inputs=5, **options):
    layer = WeightNorm(library.layers.Dense(4, use_bias=False), **options)
    layer.build((None, inputs))
    if v is not None:
        layer.layer.kernel.assign(v)
    if g is not None:
        layer.kernel_g.assign(g)
    return layer


# What it computes.


@either_keras
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_equations_2_and_3(library, name):
    wrapped, plain = normalized_case(library, name)
    args, kwargs = arguments(library, name)
    vs, gs = wrapped.get_prunable_weights(), scales_of(wrapped)
    outputs, gradients = outputs_and_gradients(wrapped, [*vs, *gs], args, kwargs)
    positions = [next(i for i, weight in enumerate(wrapped.layer.weights) if weight is v) for v in vs]
    expected, plain_gradients = outputs_and_gradients(plain, [plain.weights[i] for i in positions], args, kwargs)
    for output, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, other, rtol=1e-4, atol=1e-5)
    for v, g, dv, dg, dw, units in zip(
        map(number, vs), map(number, gs), gradients, gradients[len(vs) :], plain_gradients, units_of(name), strict=False
    ):
        length, summed = norm(v, units), tuple(axis for axis in range(v.ndim) if axis not in units)
        expected_dg = (dw * v).sum(axis=summed, keepdims=True) / length
        expected_dv = broadcast(g, v, units) / length * (dw - expected_dg * v / length)
        size = np.abs(dw).max()
        np.testing.assert_allclose(dg, expected_dg.reshape(dg.shape), rtol=1e-3, atol=1e-5 * size * length.max())
        np.testing.assert_allclose(dv, expected_dv, rtol=1e-3, atol=1e-5 * size)
        orthogonal = np.abs((dv * v).sum(axis=summed)) / (np.abs(dv * v).sum(axis=summed) + 1e-6 * size)
        assert orthogonal.max() < 1e-3
        assert dg.any()
        assert dv.any() or v.ndim == len(units)
    assert_variables(wrapped)


# Every layer in both Kerases, and built before and after it is wrapped.
@pytest.mark.parametrize(
    ("library", "name", "built"),
    [(library, name, i % 2 == j) for i, name in enumerate(CASES) for j, library in enumerate((keras, tf_keras))],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrapping_changes_no_output_and_adds_one_scale_for_each_kernel(library, name, built):
    args, kwargs = arguments(library, name)
    make, _, _, count = CASES[name]
    layer, plain = make(library.layers), make(library.layers)
    if built:
        before = [number(output) for output in tf.nest.flatten(layer(*args, **kwargs))]
    wrapped = WeightNorm(layer)
    after = [number(output) for output in tf.nest.flatten(wrapped(*args, **kwargs))]
    plain(*args, **kwargs)
    plain.set_weights(layer.get_weights())
    if not built:
        before = [number(output) for output in tf.nest.flatten(plain(*args, **kwargs))]
    for output, other in zip(after, before, strict=True):
        np.testing.assert_allclose(output, other, rtol=1e-5, atol=1e-6)
    assert len(scales_of(wrapped)) == len(wrapped.get_prunable_weights()) == count
    assert shapes(layer.weights) == shapes(plain.weights)
    assert len(wrapped.trainable_weights) == len(plain.trainable_weights) + count
    assert len(wrapped.weights) == len(plain.weights) + count


@either_keras
def test_an_sgd_step_lengthens_v_by_the_length_of_its_gradient(library):
    layer = dense(library)
    model = library.Sequential([library.Input((5,)), layer])
    before = number(layer.layer.kernel).astype(np.float64)
    model.compile(library.optimizers.SGD(0.1), "mse")
    model.fit(data(8, 5), data(8, 4), batch_size=8, verbose=0)
    after = number(layer.layer.kernel).astype(np.float64)
    gradient = (before - after) / 0.1
    assert (np.abs(gradient).max(axis=0) > 1e-3).all()
    np.testing.assert_allclose((after**2).sum(0), (before**2).sum(0) + 0.01 * (gradient**2).sum(0), rtol=1e-6)


@either_keras
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_the_scale_of_v_does_not_matter(library, scale):
    v, g = data(5, 4), np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    x = tf.constant(data(3, 5, seed=1))
    expected, dw = outputs_and_gradients(one := dense(library, v=v, g=g), one.trainable_weights, [x], {})
    outputs, gradients = outputs_and_gradients(
        other := dense(library, v=v * np.float32(scale), g=g), other.trainable_weights, [x], {}
    )
    np.testing.assert_allclose(outputs[0], expected[0], rtol=1e-5)
    by_shape = {gradient.shape: gradient for gradient in gradients}
    for gradient in dw:
        factor = 1 / scale if gradient.shape == (5, 4) else 1
        np.testing.assert_allclose(by_shape[gradient.shape], gradient * factor, rtol=1e-4, atol=1e-6 * factor)


@either_keras
def test_norms_of_half_precision_weights_are_summed_in_single_precision(library):
    layer = WeightNorm(library.layers.Dense(2, use_bias=False, dtype="float16"), use_scale=False)
    layer.build((None, 4096))
    layer.layer.kernel.assign(np.full((4096, 2), 5.0))
    (w,) = layer.effective_weights()
    assert w.dtype == "float16"
    np.testing.assert_allclose(np.linalg.norm(number(w).astype(np.float64), axis=0), [1, 1], rtol=1e-3)
    layer = WeightNorm(library.layers.Dense(2, dtype="float64"))
    layer.build((None, 5))
    v = data(5, 2).astype(np.float64)
    layer.layer.kernel.assign(v)
    layer.kernel_g.assign([1.0, 3.0])
    np.testing.assert_allclose(number(layer.effective_weights()[0]), [1, 3] * v / np.linalg.norm(v, axis=0), rtol=1e-14)


@either_keras
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_computes_w_in_single_precision(library, policy):
    layer = WeightNorm(library.layers.Dense(4, use_bias=False, dtype=policy))
    x = tf.constant(data(3, 5))
    assert layer(x).dtype == policy.removeprefix("mixed_")
    (w,) = layer.effective_weights()
    assert w.dtype == "float32"
    half = tf.cast(x, policy.removeprefix("mixed_")) @ tf.cast(number(w), policy.removeprefix("mixed_"))
    np.testing.assert_array_equal(tf.cast(layer(x), "float32"), tf.cast(half, "float32"))


@either_keras
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_unit_of_zeros_stays_0_and_leaves_the_others_alone(library, policy):
    def trained(v):
        layer = WeightNorm(library.layers.Dense(4, use_bias=False, dtype=policy))
        model = library.Sequential([library.Input((5,)), layer])
        layer.layer.kernel.assign(v)
        layer.kernel_g.assign([1.0, 2.0, -1.0, 0.5])
        model.compile(library.optimizers.Adam(0.01), "mse")
        model.fit(data(20, 5), np.zeros((20, 4)), batch_size=1, shuffle=False, verbose=0)
        return number(layer.layer.kernel), number(layer.kernel_g), number(layer.effective_weights()[0])

    v = data(5, 4, seed=3)
    alive = trained(v)
    v[:, 1] = 0
    dead = trained(v)
    assert not dead[0][:, 1].any()
    assert not dead[2][:, 1].any()
    assert dead[1][1] == 2.0
    for one, other in zip(alive, dead, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_array_equal(np.delete(one, 1, -1), np.delete(other, 1, -1))
    assert (alive[0] != data(5, 4, seed=3)).all()


@either_keras
def test_gradients_of_a_unit_of_zeros_are_exactly_0_and_others_unchanged(library):
    v, x = data(5, 4), tf.constant(data(3, 5, seed=1))
    layer = dense(library, v=v, g=np.ones(4))
    variables = [layer.layer.kernel, layer.kernel_g]
    _, (dv, dg) = outputs_and_gradients(layer, variables, [x], {})
    layer.layer.kernel.assign(v * [1, 0, 1, 1])
    _, (dead_dv, dead_dg) = outputs_and_gradients(layer, variables, [x], {})
    np.testing.assert_array_equal(dead_dv, dv * [1, 0, 1, 1])
    np.testing.assert_array_equal(dead_dg, dg * [1, 0, 1, 1])


# Options.


@either_keras
def test_without_a_scale_units_have_norm_1(library):
    layer = dense(library, use_scale=False)
    assert shapes(layer.weights) == [(5, 4)]
    x = data(3, 5)
    np.testing.assert_allclose(
        layer(tf.constant(x)), x @ (number(layer.layer.kernel) / norm(number(layer.layer.kernel), (1,))), rtol=1e-5
    )


@either_keras
@pytest.mark.parametrize("axes, shape", [(0, (5,)), ([-2], (5,)), ([], ()), (-1, (4,))])
def test_feature_axes_say_which_units_there_are(library, axes, shape):
    layer = dense(library, feature_axes=axes)
    v = number(layer.layer.kernel)
    units = (axes,) if isinstance(axes, int) else tuple(axes)
    assert tuple(layer.kernel_g.shape) == shape
    np.testing.assert_allclose(number(layer.kernel_g), norm(v, [a % 2 for a in units]).reshape(shape), rtol=1e-6)
    np.testing.assert_allclose(number(layer.effective_weights()[0]), v, rtol=1e-6)


@either_keras
def test_only_the_weights_that_are_named_are_normalized(library):
    layer = WeightNorm(library.layers.LSTM(3), weight_names=("recurrent_kernel",))
    layer.build((None, 6, 4))
    assert [tuple(v.shape) for v in layer.get_prunable_weights()] == [(3, 12)]
    assert shapes(scales_of(layer)) == [(12,)]
    both = WeightNorm(library.layers.LSTM(3), weight_names=("kernel", "recurrent_kernel"))
    both.build((None, 6, 4))
    assert shapes(scales_of(both)) == [(12,), (12,)]


@either_keras
def test_a_regularizer_acts_on_w(library):
    regularizer = library.regularizers.L2(0.1)
    layer = WeightNorm(library.layers.Dense(4, kernel_regularizer=regularizer, bias_regularizer="l1"))
    model = library.Sequential([library.Input((5,)), layer])
    w = number(layer.effective_weights()[0])
    np.testing.assert_allclose(float(sum(model.losses)), 0.1 * (w**2).sum(), rtol=1e-5)
    layer.layer.kernel.assign(number(layer.layer.kernel) * 10)
    np.testing.assert_allclose(float(sum(model.losses)), 0.1 * (w**2).sum(), rtol=1e-5)
    layer.kernel_g.assign(number(layer.kernel_g) * 2)
    np.testing.assert_allclose(float(sum(model.losses)), 0.4 * (w**2).sum(), rtol=1e-5)
    before = number(layer.kernel_g)
    model.compile(library.optimizers.SGD(0.5), "mse")
    model.fit(np.zeros((2, 5)), np.zeros((2, 4)), verbose=0)
    # d/dg 0.1 g^2 = 0.2 g.
    np.testing.assert_allclose(number(layer.kernel_g), before * 0.9, rtol=1e-5)
    config = layer.get_config()["layer"]["config"]["kernel_regularizer"]
    assert config == library.regularizers.serialize(regularizer) or "L2" in str(config)
    plain = layer.fold()
    assert type(plain.kernel_regularizer) is type(regularizer)
    np.testing.assert_allclose(float(sum(plain.losses)), float(sum(layer.losses)), rtol=1e-5)


@either_keras
def test_canonicalizing_changes_no_output(library):
    layer = dense(library, v=data(5, 4) * 7, g=[1.0, -2.0, 0.5, 3.0])
    x = tf.constant(data(3, 5, seed=1))
    before, w = layer(x).numpy(), number(layer.effective_weights()[0])
    layer.canonicalize()
    np.testing.assert_allclose(layer(x), before, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(number(layer.layer.kernel), w)
    np.testing.assert_array_equal(number(layer.kernel_g), [1.0, 2.0, 0.5, 3.0])
    np.testing.assert_allclose(norm(number(layer.layer.kernel), (1,))[0], [1.0, 2.0, 0.5, 3.0], rtol=1e-6)


# Calls of every kind.


@either_keras
def test_traced_functions_and_while_loops_leave_no_tensor_behind(library):
    layer = WeightNorm(library.layers.Dense(4, use_bias=False))
    traced = tf.function(layer)
    x = tf.constant(data(2, 4))
    traced(x)
    assert_variables(layer)
    w = number(layer.effective_weights()[0])

    @tf.function
    def loop(start):
        with tf.GradientTape() as tape:
            result = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, layer(y)), (0, start))[1]
        g = layer.kernel_g
        return result, tape.gradient(result, g if library is tf_keras else g.value)

    result, gradient = loop(x)
    np.testing.assert_allclose(result, x @ w @ w @ w, rtol=1e-4, atol=1e-5)
    assert gradient.numpy().all()
    assert_variables(layer)
    layer.kernel_g.assign(number(layer.kernel_g) * 2)
    np.testing.assert_allclose(traced(x), layer(x), rtol=1e-5)
    np.testing.assert_allclose(traced(x), x @ w * 2, rtol=1e-4, atol=1e-5)


@either_keras
def test_the_kernel_is_the_variable_again_after_an_exception(library):
    class Failing(library.layers.Dense):
        def call(self, inputs):
            raise RuntimeError("in the middle of a call")

    layer = WeightNorm(Failing(4))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            layer(tf.constant(data(2, 5)))
        assert_variables(layer)


@either_keras
@pytest.mark.parametrize(
    "settings", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
def test_every_way_of_fitting_trains_v_and_g(library, settings):
    model = subclassed(library, wrap=WeightNorm)
    model.compile(library.optimizers.SGD(0.0), "mse", **settings)
    model.fit(data(8, 5), data(8, 2), batch_size=4, verbose=0)
    before = [number(weight) for weight in model.trainable_weights]
    model.compile("adam", "mse", **settings)
    model.fit(data(8, 5), data(8, 2), batch_size=4, verbose=0)
    assert len(before) == 3 * 3 + 2
    assert all((number(new) != old).any() for new, old in zip(model.trainable_weights, before, strict=True))
    for layer in (model.first, *model.blocks):
        assert_variables(layer)


@either_keras
@pytest.mark.parametrize("built", [True, False], ids=["built", "not built"])
def test_of_a_frozen_layer_nothing_is_trained(library, built):
    layer = library.layers.Dense(3, trainable=False)
    if built:
        layer.build((None, 5))
    wrapped = WeightNorm(layer)
    model = library.Sequential([library.Input((5,)), wrapped, library.layers.Dense(1)])
    assert shapes(model.trainable_weights) == [(3, 1), (1,)]
    assert shapes(library.models.clone_model(model).trainable_weights) == [(3, 1), (1,)]
    wrapped.trainable = True
    assert len(model.trainable_weights) == 5


@either_keras
@pytest.mark.parametrize(
    "wrap",
    [
        lambda L: L.TimeDistributed(L.Dense(3, trainable=False)),
        lambda L: Masked(L.TimeDistributed(L.Dense(3, trainable=False)), sparsity=0.5, seed=0),
        lambda L: L.Bidirectional(L.LSTM(3, trainable=False)),
        lambda L: L.RNN(L.GRUCell(3, trainable=False)),
    ],
    ids=["time distributed", "masked", "bidirectional", "cell"],
)
def test_of_a_frozen_layer_inside_a_wrapper_nothing_is_trained(library, wrap):
    model = library.Sequential([library.Input((6, 4)), WeightNorm(wrap(library.layers))])
    assert model.weights
    assert not model.trainable_weights


@either_keras
@pytest.mark.parametrize("wrapper", [WeightNorm, Masked])
def test_of_a_wrapper_made_frozen_nothing_is_trained_either(library, wrapper):
    wrapped = wrapper(library.layers.Dense(3), trainable=False)
    model = library.Sequential([library.Input((5,)), wrapped, library.layers.Dense(1)])
    assert shapes(model.trainable_weights) == [(3, 1), (1,)]
    assert shapes(library.models.clone_model(model).trainable_weights) == [(3, 1), (1,)]
    wrapped.trainable = True
    assert len(model.trainable_weights) == len(model.weights) - (wrapper is Masked)


@either_keras
def test_of_a_layer_that_is_frozen_in_part_the_rest_is_trained(library):
    layers = library.layers
    parts = WeightNorm(layers.TimeDistributed(library.Sequential([layers.Dense(3, trainable=False), layers.Dense(2)])))
    parts(tf.constant(data(2, 3, 4)))
    assert {(3, 2), (2,)} <= set(shapes(parts.trainable_weights))
    assert (4, 3) not in shapes(parts.trainable_weights)


@either_keras
def test_inside_other_layers_and_shared(library):
    layers = library.layers
    shared = WeightNorm(layers.Dense(4))
    a, b = library.Input((3, 4)), library.Input((3, 4))
    both = layers.Concatenate()([layers.TimeDistributed(shared)(a), shared(b)])
    model = library.Model([a, b], WeightNorm(layers.Bidirectional(layers.SimpleRNN(2)))(both))
    assert len(model.trainable_weights) == 3 + 6 + 4
    x = [data(2, 3, 4), data(2, 3, 4, seed=1)]
    before = predicted(model, x)
    shared.kernel_g.assign(number(shared.kernel_g) * 2)
    assert (np.abs(predicted(model, x) - before) > 1e-5).any()
    model.compile("adam", "mse")
    model.fit(x, data(2, 4), verbose=0)
    assert_variables(shared)


# Errors.


@either_keras
def test_a_constraint_is_refused_and_the_error_says_why(library):
    layer = WeightNorm(library.layers.Dense(4, kernel_constraint="non_neg", name="out"))
    with pytest.raises(ValueError, match="'out' has a constraint on 'kernel', which would act on v and not on w"):
        layer.build((None, 5))
    WeightNorm(library.layers.Dense(4, bias_constraint="non_neg")).build((None, 5))


@either_keras
@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_axes": 2}, "`feature_axes` must be different axes of 'kernel'"),
        ({"feature_axes": [0, 1]}, "but not all"),
        ({"feature_axes": [1, -1]}, "different axes"),
        ({"feature_axes": "last"}, "`feature_axes` must be an int"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"weight_names": "kernel"}, "must be a list of names"),
        ({"weight_names": ["kernels"]}, "must have a kernel"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(library, options, message):
    with pytest.raises(ValueError, match=message):
        dense(library, **options)


@either_keras
def test_layers_that_cannot_be_normalized_are_refused(library):
    with pytest.raises(ValueError, match="normalized already"):
        WeightNorm(library.layers.TimeDistributed(WeightNorm(library.layers.Dense(4))))
    with pytest.raises(ValueError, match="must have a kernel to be normalized"):
        WeightNorm(library.layers.BatchNormalization()).build((None, 4))
    with pytest.raises(TypeError, match="layer"):
        WeightNorm(None)
    for method in ("effective_weights", "fold", "canonicalize", "get_prunable_weights"):
        with pytest.raises(ValueError, match="no weights yet because it is not built"):
            getattr(WeightNorm(library.layers.Dense(4)), method)()
