"""`Masked` in both Kerases: where its masks and kernels come from, however it is built, and its errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import assert_sparse, data, half, number, subclassed, weights_and_masks

from keras_sparse_init import Masked, SparseHeNormal, SparseScaledInit, masked_kernels, masks
from keras_sparse_init.fans import kernel_layout
from keras_sparse_init.sampling import derive_seed

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def built(layer, *shape, **kwargs):
    masked = Masked(layer, **kwargs)
    masked.build((None, *shape))
    return masked


def mask_and_kernel(masked):
    ((kernel, mask),) = weights_and_masks(masked)
    return mask, kernel


# Masks.


@either_keras
def test_without_a_mask_the_zeros_of_the_kernel_are_it(library):
    layer = library.layers.Dense(4, kernel_initializer=SparseHeNormal(sparsity=0.5, seed=1))
    mask, kernel = mask_and_kernel(built(layer, 6))
    assert mask.sum() == 12
    np.testing.assert_array_equal(mask, kernel != 0)
    np.testing.assert_array_equal(kernel, SparseHeNormal(sparsity=0.5, seed=1)((6, 4)))


@either_keras
@pytest.mark.parametrize("initializer", ["zeros", "ones", "he_normal"])
def test_without_a_mask_and_without_some_zeros_the_mask_is_ones(library, initializer):
    mask, _ = mask_and_kernel(built(library.layers.Dense(4, kernel_initializer=initializer), 6))
    assert (mask == 1).all()


@either_keras
def test_a_rule_makes_the_mask(library):
    mask, _ = mask_and_kernel(built(library.layers.Dense(4), 8, mask=masks.ConstantFanIn(0.75), seed=3))
    np.testing.assert_array_equal(mask.sum(axis=0), [2, 2, 2, 2])
    expected = masks.ConstantFanIn(0.75)((8, 4), derive_seed(3, "kernel/mask"), kernel_layout(None, (8, 4)))
    np.testing.assert_array_equal(mask, expected)


@either_keras
def test_a_rule_gets_the_layout_of_each_kernel(library):
    masked = built(library.layers.DepthwiseConv2D((2, 2)), 6, 6, 5, mask=masks.ConstantFanIn(0.75), seed=0)
    mask, _ = mask_and_kernel(masked)
    np.testing.assert_array_equal(mask.sum(axis=(0, 1)), np.ones((5, 1)))
    gates = built(library.layers.LSTM(3), 5, 4, mask=masks.ConstantFanIn(0.5), seed=0)
    assert [kernel.layout.blocks for kernel in masked_kernels(gates)] == [4, 4]


@either_keras
@pytest.mark.parametrize("kind", [np.float32, np.uint8, bool, "list", "tensor"])
def test_an_array_is_the_mask(library, kind):
    given = half(6, 4)
    convert = {"list": np.ndarray.tolist, "tensor": tf.convert_to_tensor}
    value = convert[kind](given) if isinstance(kind, str) else given.astype(kind)
    mask, kernel = mask_and_kernel(built(library.layers.Dense(4), 6, mask=value))
    np.testing.assert_array_equal(mask, given)
    np.testing.assert_array_equal(kernel != 0, given)


@either_keras
def test_masks_by_name_and_by_attribute(library):
    given = half(3, 12)
    masked = built(library.layers.LSTM(3), 5, 4, mask={"recurrent_kernel": given, "kernel": masks.Random(0.75)})
    (_, kernel_mask), (_, recurrent_mask) = weights_and_masks(masked)
    assert kernel_mask.sum() == 12
    np.testing.assert_array_equal(recurrent_mask, given)
    by_path = built(library.layers.LSTM(3), 5, 4, mask={"lstm_cell/recurrent_kernel": given})
    (_, kernel_mask), (_, recurrent_mask) = weights_and_masks(by_path)
    np.testing.assert_array_equal(recurrent_mask, given)
    assert (kernel_mask == 1).all()


# Kernels.


def expected_kernel(initializer, mask, seed):
    return initializer.draw(mask.shape, "float32", mask, None, seed)


@either_keras
def test_a_layers_own_initializer_draws_for_the_mask(library):
    layer = library.layers.Dense(30, kernel_initializer=SparseHeNormal(seed=4))
    mask, kernel = mask_and_kernel(built(layer, 40, sparsity=0.8))
    np.testing.assert_array_equal(kernel, expected_kernel(SparseHeNormal(), mask, derive_seed(4, "kernel")))
    layer = library.layers.Dense(30, kernel_initializer=SparseHeNormal(seed=4))
    mask, kernel = mask_and_kernel(built(layer, 40, sparsity=0.8, seed=7))
    np.testing.assert_array_equal(kernel, expected_kernel(SparseHeNormal(), mask, derive_seed(7, "kernel")))


MATCHED = {
    "he_normal": SparseScaledInit(2.0, "fan_in", "truncated_normal"),
    "glorot_uniform": SparseScaledInit(1.0, "fan_avg", "uniform"),
    "lecun_uniform": SparseScaledInit(1.0, "fan_in", "uniform"),
    "orthogonal": SparseScaledInit(1.0, "fan_in", "untruncated_normal"),
}


@either_keras
@pytest.mark.parametrize("name", MATCHED)
def test_another_initializer_is_matched_and_scaled_for_the_mask(library, name):
    mask, kernel = mask_and_kernel(
        built(library.layers.Dense(30, kernel_initializer=name), 40, mask=masks.Random(0.8), seed=7)
    )
    np.testing.assert_array_equal(kernel, expected_kernel(MATCHED[name], mask, derive_seed(7, "kernel")))
    assert len(np.unique(mask.sum(axis=0))) > 1


@either_keras
def test_each_kernel_has_a_seed_and_a_layout_of_its_own(library):
    masked = built(
        library.layers.SeparableConv2D(6, 3, depthwise_initializer="he_normal"), 8, 8, 4, sparsity=0.5, seed=7
    )
    for kernel, attribute, initializer in zip(
        masked_kernels(masked), ["depthwise_kernel", "pointwise_kernel"], ["he_normal", "glorot_uniform"], strict=True
    ):
        layout = kernel_layout(masked.layer, kernel.shape, weight_name=attribute)
        expected = MATCHED[initializer].draw(
            kernel.shape, "float32", number(kernel.mask), layout, derive_seed(7, attribute)
        )
        np.testing.assert_array_equal(number(kernel.kernel), expected)


@either_keras
def test_a_layer_that_is_built_keeps_its_weights_on_the_mask(library):
    layer = library.layers.Dense(4)
    layer.build((None, 6))
    before, given = number(layer.kernel), half(6, 4)
    mask, kernel = mask_and_kernel(built(layer, 6, mask=given, seed=0))
    np.testing.assert_array_equal(kernel, before * given)
    np.testing.assert_array_equal(mask, given)


@either_keras
@pytest.mark.parametrize("initializer", ["zeros", "ones", lambda shape, dtype=None: tf.fill(shape, 3.0)])
def test_values_that_are_not_random_stay(library, initializer):
    given = half(6, 4)
    mask, kernel = mask_and_kernel(built(library.layers.Dense(4, kernel_initializer=initializer), 6, mask=given))
    value = {"zeros": 0, "ones": 1}.get(initializer, 3) if isinstance(initializer, str) else 3
    np.testing.assert_array_equal(kernel, value * given)
    np.testing.assert_array_equal(mask, given)


@either_keras
@pytest.mark.parametrize("name", ["dense", "rnn of a cell", "time distributed", "attention"])
def test_the_same_seed_gives_the_same_bits_whatever_was_built_before(library, name):
    layers = library.layers

    def make(**kwargs):
        layer = {
            "dense": lambda: layers.Dense(4),
            "rnn of a cell": lambda: layers.RNN(layers.GRUCell(4)),
            "time distributed": lambda: layers.TimeDistributed(layers.Dense(4)),
            "attention": lambda: layers.MultiHeadAttention(2, 3),
        }[name]()
        masked = Masked(layer, sparsity=0.5, **kwargs)
        x = tf.constant(data(2, 5, 6))
        masked(x, x) if name == "attention" else masked(x)
        return weights_and_masks(masked)

    def equal(first, second):
        return [np.array_equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)]

    first = make(seed=1)
    assert all(equal(first, make(seed=1)))
    assert not any(equal(first, make(seed=2)))
    assert not any(equal(make(), make()))
    if len(first) > 1:
        assert len({mask.tobytes() for _, mask in first}) == len(first)
    library.utils.set_random_seed(1)
    unseeded = make()
    library.utils.set_random_seed(1)
    assert all(equal(unseeded, make()))


# Building.


BUILDING = {
    "fit": lambda model: None,
    "call": lambda model: model(tf.constant(data(2, 5))),
    "tf.function": lambda model: tf.function(model)(tf.constant(data(2, 5))),
    "predict": lambda model: model.predict(data(2, 5), verbose=0),
}


@either_keras
@pytest.mark.parametrize("how", BUILDING)
def test_an_unbuilt_model_is_built_with_the_same_masks_and_kernels_however_it_comes_about(library, how):
    model = subclassed(library)
    BUILDING[how](model)
    model.compile(library.optimizers.SGD(0.0), "mse")
    model.fit(data(8, 5), data(8, 2), verbose=0)
    assert_sparse(model)
    expected = []
    for i, (layer, inputs) in enumerate([(model.first, 5), (model.blocks[0], 6), (model.blocks[1], 6)]):
        twin = Masked(library.layers.Dense(6), sparsity=0.5, seed=0)
        twin.build((None, inputs))
        expected += weights_and_masks(twin)
        assert weights_and_masks(layer)[0][1].sum() == inputs * 6 / 2, i
    for (kernel, mask), (expected_kernel, expected_mask) in zip(weights_and_masks(model), expected, strict=True):
        np.testing.assert_array_equal(kernel, expected_kernel)
        np.testing.assert_array_equal(mask, expected_mask)


@either_keras
def test_a_sequential_model_is_built_by_its_input_shape(library):
    model = library.Sequential([Masked(library.layers.Dense(4), sparsity=0.5) for _ in range(2)])
    model.build((None, 6))
    assert_sparse(model)
    assert [kernel.shape for kernel in masked_kernels(model)] == [(6, 4), (4, 4)]
    assert model(tf.constant(data(2, 6))).shape == (2, 4)


@either_keras
@pytest.mark.parametrize("own", [SparseHeNormal(sparsity=0.5), "ones", lambda shape, dtype: tf.random.normal(shape)])
def test_a_model_built_by_fit_has_kernels_that_fit_their_masks(library, own):
    """Keras 3 gives variables their values after that build only."""
    given = None if isinstance(own, SparseHeNormal) else masks.Random(0.5)
    model = library.Sequential([Masked(library.layers.Dense(6, kernel_initializer=own), mask=given)])
    model.compile(library.optimizers.SGD(0.0), "mse")
    model.fit(data(8, 5), data(8, 6), verbose=0)
    mask, kernel = mask_and_kernel(model)
    assert mask.sum() == 15
    np.testing.assert_array_equal(kernel != 0, mask)


# Precision.


POLICIES = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16", "float64": "float64", "bfloat16": "bfloat16"}


@either_keras
@pytest.mark.parametrize("policy", POLICIES)
def test_the_layers_precision_is_kept(library, policy):
    layer, plain = (library.layers.Dense(4, dtype=policy, activation="tanh") for _ in range(2))
    masked = built(layer, 6, mask=half(6, 4))
    plain.build((None, 6))
    plain.set_weights(layer.get_weights())
    master = POLICIES[policy] if not policy.startswith("mixed") else "float32"
    for kernel in masked_kernels(masked):
        assert keras.backend.standardize_dtype(getattr(kernel.kernel, "true_dtype", kernel.kernel.dtype)) == master
        assert keras.backend.standardize_dtype(getattr(kernel.mask, "true_dtype", kernel.mask.dtype)) == master
    x = tf.constant(data(3, 6))
    assert masked(x).dtype == plain(x).dtype == POLICIES[policy]
    np.testing.assert_array_equal(tf.cast(masked(x), "float32"), tf.cast(plain(x), "float32"))


@either_keras
@pytest.mark.parametrize("outer, inner", [("mixed_bfloat16", "float32"), ("float32", "mixed_bfloat16")])
def test_each_layer_inside_another_keeps_its_own_precision(library, outer, inner):
    def make():
        class Outer(library.layers.Layer):
            def __init__(self):
                super().__init__(dtype=outer)
                self.dense = library.layers.Dense(4, dtype=inner)

            def build(self, input_shape):
                self.dense.build(input_shape)

            def call(self, inputs):
                return self.dense(inputs)

        return Outer()

    masked, plain = Masked(make(), mask=half(6, 4)), make()
    x = tf.constant(data(3, 6))
    masked(x)
    plain(x)
    plain.set_weights(masked.layer.get_weights())
    assert masked(x).dtype == plain(x).dtype
    np.testing.assert_array_equal(tf.cast(masked(x), "float32"), tf.cast(plain(x), "float32"))


@either_keras
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_small_updates_are_not_lost_in_mixed_precision(library, policy):
    set_policy = getattr(library, "config", None) and library.config.set_dtype_policy
    set_policy = set_policy or library.mixed_precision.set_global_policy
    set_policy(policy)
    try:
        model = library.Sequential(
            [library.Input((6,)), Masked(library.layers.Dense(4, kernel_initializer="ones"), mask=half(6, 4))]
        )
        model.compile(library.optimizers.SGD(1e-4), "mse", run_eagerly=False)
        assert model.layers[0].compute_dtype == policy.removeprefix("mixed_")
    finally:
        set_policy("float32")
    model.fit(np.ones((64, 6)), np.full((64, 4), -10.0), batch_size=1, verbose=0)
    mask, kernel = mask_and_kernel(model)
    assert kernel.dtype == np.float32
    assert not kernel[mask == 0].any()
    # Each update is about 1e-3, below what half precision resolves around 1 for bfloat16.
    assert (1 - kernel[mask == 1]).min() > 0.02


# Errors.


@either_keras
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"mask": np.ones((6, 4)), "sparsity": 0.5}, "either `mask` or `sparsity`"),
        ({"mask": "random"}, "`mask` must be a rule, an array or a mapping"),
        ({"mask": masks.Random}, "`mask` must be a rule, an array or a mapping"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": 0.5, "seed": -1}, "seed"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(library, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Masked(library.layers.Dense(4), **kwargs)


@pytest.mark.parametrize("layer", [None, "dense", tf.Module(), keras.layers.Dense])
def test_what_is_no_layer_is_refused(layer):
    with pytest.raises(TypeError, match="layer"):
        Masked(layer)


@either_keras
@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((4, 6)), r"'kernel' of the layer 'out' cannot be set.*shape \(6, 4\).*\(4, 6\)"),
        (np.full((6, 4), 0.5), "'kernel' of the layer 'out' cannot be set.*0 and 1.*0.5"),
        (np.full((6, 4), np.nan), "'kernel' of the layer 'out' cannot be set.*0 and 1.*nan"),
        ({"kernels": np.ones((6, 4))}, r"unknown kernels \['kernels'\].*\['kernel'\]"),
        (masks.NM(2, 4), "'kernel' of the layer 'out' cannot be set"),
    ],
)
def test_masks_that_do_not_fit_are_refused_when_the_layer_is_built(library, mask, message):
    with pytest.raises(ValueError, match=message):
        built(library.layers.Dense(4, name="out"), 6, mask=mask)


@either_keras
def test_one_array_for_several_kernels_is_refused(library):
    with pytest.raises(ValueError, match="several kernels.*recurrent_kernel.*one array"):
        built(library.layers.LSTM(3), 5, 3, mask=np.ones((3, 12)))


@either_keras
def test_a_layer_without_a_kernel_is_refused(library):
    with pytest.raises(ValueError, match="must have a kernel.*'norm'"):
        built(library.layers.BatchNormalization(name="norm"), 4)
    with pytest.raises(ValueError, match="must have a kernel.*weights.*'dense'"):
        built(library.layers.Dense(3, name="dense"), 4, weight_names=["weights"])


@either_keras
def test_a_layer_that_is_not_built_has_no_masks_and_says_so(library):
    masked = Masked(library.layers.Dense(3), sparsity=0.5, name="not_yet")
    for ask in (masked_kernels, Masked.kernels_and_masks):
        with pytest.raises(ValueError, match="'not_yet'.*not built"):
            ask(masked)


def test_lora_is_refused_before_and_after_wrapping():
    layer = keras.layers.Dense(4)
    layer.build((None, 6))
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA"):
        built(layer, 6, sparsity=0.5)
    masked = built(keras.layers.Dense(4), 6, sparsity=0.5)
    masked.layer.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA"):
        masked(data(2, 6))
    outer = Masked(keras.layers.TimeDistributed(keras.layers.EinsumDense("ab,bc->ac", 4)), sparsity=0.5)
    outer(data(2, 3, 6))
    outer.layer.layer.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA"):
        outer(data(2, 3, 6))


def test_a_quantized_layer_is_refused():
    layer = keras.layers.Dense(4, name="eight")
    layer.build((None, 6))
    layer.quantize("int8")
    with pytest.raises(ValueError, match="'eight' is quantized"):
        built(layer, 6, sparsity=0.5)
    masked = built(keras.layers.Dense(4), 6, sparsity=0.5)
    masked.layer.quantize("int8")
    with pytest.raises(ValueError, match="no longer has the kernel"):
        masked(data(2, 6))
