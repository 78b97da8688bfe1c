"""Fans against a count of connections one by one, and against what a real layer's outputs depend on."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras
from keras.src.initializers.random_initializers import compute_fans as keras_fans
from tf_keras.src.initializers.initializers import _compute_fans as tf_keras_fans

from keras_sparse_init.fans import KernelLayout, as_mask, check_shape, dense_fans, fan_in, fan_out, fans, kernel_layout

LIBRARIES = {"keras": keras, "tf_keras": tf_keras}

Unit = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and for each entry of its kernel the two units that it connects.

    A unit is an index into the trailing axes of the layer's input or output; the leading ones are positions.
    """

    make: Callable[[Any], Any]
    input_shape: tuple[int, ...]
    units: Callable[[tuple[int, ...]], tuple[Unit, Unit]]
    layout_name: str | None
    weight: str = "kernel"
    groups: int = 1
    libraries: tuple[str, ...] = ("keras", "tf_keras")


def dense(index):
    i, j = index
    return (i,), (j,)


def conv(index):
    *_, i, j = index
    return (i,), (j,)


def conv_of_two_groups(index):
    # 4 input channels, 6 filters: the first three filters see the first two channels.
    *_, i, j = index
    return (i + 2 * (j // 3),), (j,)


def conv_transpose(index):
    *_, j, i = index
    return (i,), (j,)


def depthwise(index):
    # The multiplier is 2: channel i gives the outputs 2 i and 2 i + 1.
    *_, i, m = index
    return (i,), (2 * i + m,)


def _identity_pointwise(channels):
    return lambda shape, dtype=None: np.eye(channels, dtype="float32").reshape(shape)


def _delta_depthwise(shape, dtype=None):
    kernel = np.zeros(shape, "float32")
    kernel[tuple(n // 2 for n in shape[:-2])] = 1
    return kernel


class _Subclasses:
    """User subclasses of layers, made for either Keras."""

    @staticmethod
    def dense(library):
        class Wide(library.layers.Dense):
            pass

        return Wide(4, use_bias=False)

    @staticmethod
    def depthwise(library):
        class Middle(library.layers.DepthwiseConv2D):
            pass

        class Blur(Middle):
            pass

        return Blur(3, depth_multiplier=2, use_bias=False)


CASES = {
    "Dense": Case(lambda k: k.layers.Dense(4, use_bias=False), (5,), dense, "dense"),
    "Dense on sequences": Case(lambda k: k.layers.Dense(4, use_bias=False), (3, 5), dense, "dense"),
    "Dense subclass": Case(_Subclasses.dense, (5,), dense, "dense"),
    "Conv1D": Case(lambda k: k.layers.Conv1D(4, 3, use_bias=False), (7, 3), conv, "conv"),
    "Conv2D": Case(lambda k: k.layers.Conv2D(4, 3, use_bias=False), (7, 7, 3), conv, "conv"),
    "Conv2D 1x3": Case(lambda k: k.layers.Conv2D(4, (1, 3), use_bias=False), (7, 7, 3), conv, "conv"),
    "Conv3D": Case(lambda k: k.layers.Conv3D(3, 3, use_bias=False), (5, 5, 5, 2), conv, "conv"),
    "dilated Conv1D": Case(lambda k: k.layers.Conv1D(4, 3, dilation_rate=2, use_bias=False), (9, 3), conv, "conv"),
    "dilated Conv2D": Case(lambda k: k.layers.Conv2D(4, 3, dilation_rate=2, use_bias=False), (9, 9, 2), conv, "conv"),
    "grouped Conv1D": Case(
        lambda k: k.layers.Conv1D(6, 3, groups=2, use_bias=False), (7, 4), conv_of_two_groups, "conv", groups=2
    ),
    "grouped Conv2D": Case(
        lambda k: k.layers.Conv2D(6, 3, groups=2, use_bias=False), (7, 7, 4), conv_of_two_groups, "conv", groups=2
    ),
    "Conv1DTranspose": Case(
        lambda k: k.layers.Conv1DTranspose(4, 3, use_bias=False), (7, 3), conv_transpose, "conv_transpose"
    ),
    "Conv2DTranspose": Case(
        lambda k: k.layers.Conv2DTranspose(4, 3, use_bias=False), (7, 7, 3), conv_transpose, "conv_transpose"
    ),
    "Conv3DTranspose": Case(
        lambda k: k.layers.Conv3DTranspose(3, 3, use_bias=False), (5, 5, 5, 2), conv_transpose, "conv_transpose"
    ),
    "DepthwiseConv1D": Case(
        lambda k: k.layers.DepthwiseConv1D(3, depth_multiplier=2, use_bias=False),
        (7, 3),
        depthwise,
        "depthwise",
        weight="depthwise",
    ),
    "DepthwiseConv2D": Case(
        lambda k: k.layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
        (7, 7, 3),
        depthwise,
        "depthwise",
        weight="depthwise",
    ),
    "DepthwiseConv2D subclass": Case(_Subclasses.depthwise, (7, 7, 3), depthwise, "depthwise", weight="depthwise"),
    "SeparableConv1D, depthwise": Case(
        lambda k: k.layers.SeparableConv1D(
            6, 3, depth_multiplier=2, use_bias=False, pointwise_initializer=_identity_pointwise(6)
        ),
        (7, 3),
        depthwise,
        "depthwise",
        weight="depthwise_kernel",
    ),
    "SeparableConv2D, depthwise": Case(
        lambda k: k.layers.SeparableConv2D(
            6, 3, depth_multiplier=2, use_bias=False, pointwise_initializer=_identity_pointwise(6)
        ),
        (7, 7, 3),
        depthwise,
        "depthwise",
        weight="depthwise_kernel",
    ),
    "SeparableConv1D, pointwise": Case(
        lambda k: k.layers.SeparableConv1D(4, 3, use_bias=False, depthwise_initializer=_delta_depthwise),
        (7, 3),
        conv,
        "conv",
        weight="pointwise_kernel",
    ),
    "SeparableConv2D, pointwise": Case(
        lambda k: k.layers.SeparableConv2D(4, 3, use_bias=False, depthwise_initializer=_delta_depthwise),
        (7, 7, 3),
        conv,
        "conv",
        weight="pointwise_kernel",
    ),
    "EinsumDense ab,bc->ac": Case(
        lambda k: k.layers.EinsumDense("ab,bc->ac", output_shape=4), (5,), dense, "ab,bc->ac"
    ),
    "EinsumDense ...x,xy->...y": Case(
        lambda k: k.layers.EinsumDense("...x,xy->...y", output_shape=4), (3, 5), dense, "...x,xy->...y"
    ),
    "EinsumDense query": Case(
        lambda k: k.layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3)),
        (4, 5),
        lambda index: ((index[0],), (index[1], index[2])),
        "abc,cde->abde",
    ),
    "EinsumDense attention output": Case(
        lambda k: k.layers.EinsumDense("abcd,cde->abe", output_shape=(None, 5)),
        (4, 2, 3),
        lambda index: ((index[0], index[1]), (index[2],)),
        "abcd,cde->abe",
    ),
    "EinsumDense transposed kernel": Case(
        lambda k: k.layers.EinsumDense("abc,dc->abd", output_shape=(None, 4)),
        (3, 5),
        lambda index: ((index[1],), (index[0],)),
        "abc,dc->abd",
    ),
    "EinsumDense, a kernel for each head": Case(
        lambda k: k.layers.EinsumDense("abc,bcd->abd", output_shape=(3, 4)),
        (3, 5),
        lambda index: ((index[0], index[1]), (index[0], index[2])),
        "abc,bcd->abd",
    ),
}

EVERY_CASE = [
    pytest.param(LIBRARIES[library], case, id=f"{name}, {library}")
    for name, case in CASES.items()
    for library in case.libraries
]


def build(library, case):
    """The built layer, its kernel variable and the layout read from it."""
    layer = case.make(library)
    layer.build((None, *case.input_shape))
    weight = case.weight
    if weight == "depthwise":
        # Keras 3 calls it `kernel`.
        weight = "depthwise_kernel" if hasattr(layer, "depthwise_kernel") else "kernel"
    kernel = getattr(layer, weight)
    return layer, kernel, kernel_layout(layer, tuple(kernel.shape), weight_name=weight)


def random_mask(shape, seed=0):
    """Unstructured, a third dense, with one empty slice along each axis that is long enough."""
    mask = np.random.default_rng(seed).random(shape) < 1 / 3
    for axis, length in enumerate(shape):
        if length > 3:
            mask[(slice(None),) * axis + (1,)] = False
    return mask


def counted_fans(mask, units):
    """The definition: each nonzero is one connection into its output unit and one out of its input unit."""
    into, out_of = collections.Counter(), collections.Counter()
    for index in np.ndindex(mask.shape):
        source, target = units(index)
        into[target] += int(mask[index])
        out_of[source] += int(mask[index])
    fan_in, fan_out = np.empty(mask.shape), np.empty(mask.shape)
    for index in np.ndindex(mask.shape):
        source, target = units(index)
        fan_in[index], fan_out[index] = into[target], out_of[source]
    return fan_in, fan_out


def full_fans(mask, layout):
    return [np.broadcast_to(fan, mask.shape) for fan in fans(mask, layout)]


def assert_same_fans(mask, layout, expected):
    for name, got, want in zip(("fan-in", "fan-out"), full_fans(mask, layout), expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


def masked_values(mask, seed=1):
    """Values of one sign, so that no two paths cancel."""
    return (mask * np.random.default_rng(seed).uniform(0.5, 1.5, mask.shape)).astype("float32")


@pytest.mark.parametrize(("library", "case"), EVERY_CASE)
def test_fans_count_every_units_connections(library, case):
    _, kernel, layout = build(library, case)
    mask = random_mask(tuple(kernel.shape))
    assert_same_fans(mask, layout, counted_fans(mask, case.units))


@pytest.mark.parametrize(("library", "case"), EVERY_CASE)
def test_fans_are_the_numbers_of_inputs_and_outputs_that_depend_on_each_other(library, case):
    """The layer is linear: its response to a basis of the inputs, taken at interior positions, is the truth."""
    layer, kernel, layout = build(library, case)
    mask = random_mask(tuple(kernel.shape))
    kernel.assign(masked_values(mask))
    size = int(np.prod(case.input_shape))
    responses = np.asarray(layer(np.eye(size, dtype="float32").reshape(size, *case.input_shape)))
    connected = (responses != 0).reshape(*case.input_shape, *responses.shape[1:])
    n = len(case.input_shape)

    def centre(shape, unit):
        return tuple(length // 2 for length in shape[: len(shape) - len(unit)]) + unit

    expected_in, expected_out = np.empty(mask.shape), np.empty(mask.shape)
    for index in np.ndindex(mask.shape):
        source, target = case.units(index)
        expected_in[index] = connected[(slice(None),) * n + centre(responses.shape[1:], target)].sum()
        expected_out[index] = connected[centre(case.input_shape, source)].sum()
    assert_same_fans(mask, layout, (expected_in, expected_out))


@pytest.mark.parametrize(("library", "case"), EVERY_CASE)
def test_dense_fans_are_the_fans_of_an_all_ones_mask(library, case):
    _, kernel, layout = build(library, case)
    shape = tuple(kernel.shape)
    ones = np.ones(shape)
    assert_same_fans(ones, layout, [np.full(shape, fan) for fan in dense_fans(shape, layout)])
    assert_same_fans(ones, layout, counted_fans(ones, case.units))


@pytest.mark.parametrize(("library", "case"), EVERY_CASE)
def test_a_layouts_name_gives_the_fans_of_the_layer(library, case):
    _, kernel, layout = build(library, case)
    shape = tuple(kernel.shape)
    named = kernel_layout(case.layout_name, shape, groups=case.groups)
    assert dataclasses.replace(named, name=layout.name) == layout


@pytest.mark.parametrize(("library", "case"), EVERY_CASE)
def test_the_layout_of_a_layer_does_not_wait_for_its_build(library, case):
    _, kernel, layout = build(library, case)
    weight = "depthwise_kernel" if case.weight.startswith("depthwise") else case.weight
    assert kernel_layout(case.make(library), tuple(kernel.shape), weight_name=weight) == layout


@pytest.mark.parametrize(("library", "case"), EVERY_CASE)
def test_input_and_output_axes_index_the_units(library, case):
    """Moving along an output axis changes the output unit, along another it does not; likewise for the input."""
    _, kernel, layout = build(library, case)
    shape = tuple(kernel.shape)
    origin = (0,) * len(shape)
    for axis, length in enumerate(shape):
        moved = origin[:axis] + (length - 1,) + origin[axis + 1 :]
        if length == 1:
            continue
        (source, target), (new_source, new_target) = case.units(origin), case.units(moved)
        assert (axis in layout.output_axes) == (target != new_target)
        if case.groups == 1:
            assert (axis in layout.input_axes) == (source != new_source and target == new_target)


# Recurrent kernels: the columns fall into gates, each with output units of its own.

GATES = {"SimpleRNN": 1, "GRU": 3, "LSTM": 4}
UNITS = 3


def gated(index):
    *_, i, column = index
    return (column // UNITS, i), (column // UNITS, column % UNITS)


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("weight", ["kernel", "recurrent_kernel"])
def test_recurrent_fans_are_counted_gate_by_gate(library, kind, weight):
    layer = getattr(library.layers, kind)(UNITS)
    layer.build((None, 2, 5))
    shape = tuple(getattr(layer.cell, weight).shape)
    assert shape == (5 if weight == "kernel" else UNITS, GATES[kind] * UNITS)
    mask = random_mask(shape)
    for owner in (layer, layer.cell, kind.lower().replace("rnn", "_rnn")):
        assert_same_fans(mask, kernel_layout(owner, shape), counted_fans(mask, gated))


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize(
    ("kind", "weight"),
    [(kind, "kernel") for kind in GATES] + [("SimpleRNN", "recurrent_kernel"), ("LSTM", "recurrent_kernel")],
)
def test_each_gate_of_a_recurrent_layer_depends_on_as_many_inputs_as_its_fans_say(library, kind, weight):
    """One time step with one gate's weights alone, from a generic state: which outputs move with which inputs."""
    rng = np.random.default_rng(0)
    layer = getattr(library.layers, kind)(UNITS, activation="sigmoid")
    layer.build((None, 1, 5))
    kernels = {name: getattr(layer.cell, name) for name in ("kernel", "recurrent_kernel")}
    shape = tuple(kernels[weight].shape)
    mask = random_mask(shape)
    fan_in, fan_out = full_fans(mask, kernel_layout(layer, shape))
    layer.cell.bias.assign(rng.uniform(0.5, 1.5, tuple(layer.cell.bias.shape)))
    for gate in range(GATES[kind]):
        columns = slice(gate * UNITS, (gate + 1) * UNITS)
        only = np.zeros(shape, bool)
        only[:, columns] = mask[:, columns]
        for name, kernel in kernels.items():
            kernel.assign(masked_values(only) if name == weight else np.zeros(tuple(kernel.shape), "float32"))
        rows = shape[0]
        moves = np.concatenate([np.zeros((1, rows)), np.eye(rows)])
        still = np.full((rows + 1, UNITS), 0.3)
        inputs = moves[:, None] if weight == "kernel" else np.zeros((rows + 1, 1, 5))
        state = still if weight == "kernel" else still + moves
        states = [state, still + 0.4] if kind == "LSTM" else [state]
        with_moves = np.asarray(
            layer(inputs.astype("float32"), initial_state=[keras.ops.cast(s, "float32") for s in states])
        )
        moved = np.abs(with_moves[1:] - with_moves[0]) > 1e-6
        np.testing.assert_array_equal(fan_in[:, columns], np.tile(moved.sum(axis=0), (rows, 1)))
        np.testing.assert_array_equal(fan_out[:, columns], np.tile(moved.sum(axis=1)[:, None], UNITS))


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("weight", ["kernel", "recurrent_kernel"])
def test_conv_lstm_fans_are_counted_gate_by_gate_over_the_receptive_field(library, dims, weight):
    layer = getattr(library.layers, f"ConvLSTM{dims}D")(UNITS, 2)
    layer.build((1, 2) + (4,) * dims + (5,))
    shape = tuple(getattr(layer.cell, weight).shape)
    assert shape == (2,) * dims + (5 if weight == "kernel" else UNITS, 4 * UNITS)
    mask = random_mask(shape)
    for owner in (layer, layer.cell):
        assert_same_fans(mask, kernel_layout(owner, shape), counted_fans(mask, gated))


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_an_embedding_has_fan_in_1_and_a_tokens_nonzeros_as_fan_out(library):
    layer = library.layers.Embedding(6, 4)
    layer.build((None, 2))
    mask = random_mask((6, 4))
    layer.embeddings.assign(masked_values(mask))
    layout = kernel_layout(layer, (6, 4))
    per_token = (np.asarray(layer(np.arange(6))) != 0).sum(axis=1)
    assert_same_fans(mask, layout, (np.ones((6, 4)), np.tile(per_token[:, None], 4)))
    assert dense_fans((6, 4), layout) == (1.0, 4.0)


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_the_projections_of_multi_head_attention_have_the_fans_of_their_equations(library):
    layer = library.layers.MultiHeadAttention(2, 3)
    x = np.zeros((1, 4, 5), "float32")
    layer(x, x)
    for projection, units in {
        "_query_dense": lambda index: ((index[0],), index[1:]),
        "_key_dense": lambda index: ((index[0],), index[1:]),
        "_value_dense": lambda index: ((index[0],), index[1:]),
        "_output_dense": lambda index: (index[:2], (index[2],)),
    }.items():
        dense_layer = getattr(layer, projection)
        shape = tuple(dense_layer.kernel.shape)
        mask = random_mask(shape)
        assert_same_fans(mask, kernel_layout(dense_layer, shape), counted_fans(mask, units))


@pytest.mark.parametrize("dims", [1, 2])
def test_locally_connected_units_count_the_inputs_of_their_own_window(dims):
    layer = getattr(tf_keras.layers, f"LocallyConnected{dims}D")(4, 3, use_bias=False)
    input_shape = (5,) * dims + (2,)
    layer.build((None, *input_shape))
    shape = tuple(layer.kernel.shape)
    assert shape == (3**dims, 3**dims * 2, 4)
    mask = random_mask(shape)
    layer.kernel.assign(masked_values(mask))
    size = int(np.prod(input_shape))
    responses = np.asarray(layer(np.eye(size, dtype="float32").reshape(size, *input_shape)))
    inputs_of_units = (responses != 0).reshape(size, shape[0], 4).sum(axis=0)
    expected_in = np.broadcast_to(inputs_of_units[:, None], shape)
    expected_out = np.broadcast_to(mask.sum(axis=2, keepdims=True), shape)
    assert_same_fans(mask, kernel_layout(layer, shape), (expected_in, expected_out))


def test_locally_connected_layers_of_other_implementations_are_refused():
    layer = tf_keras.layers.LocallyConnected1D(4, 3, implementation=2, padding="same")
    with pytest.raises(ValueError, match="implementation=2"):
        kernel_layout(layer, (5, 2, 5, 4))


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_the_two_kernels_of_a_separable_convolution_are_told_apart_by_shape(library):
    layer = library.layers.SeparableConv2D(4, 3)
    assert kernel_layout(layer, (3, 3, 5, 1)).name == "depthwise"
    assert kernel_layout(layer, (1, 1, 5, 4)).name == "conv"


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_the_two_kernels_of_a_1x1_separable_convolution_need_their_names(library):
    layer = library.layers.SeparableConv2D(1, 1, name="separable")
    with pytest.raises(ValueError, match="'separable'.*`weight_name`"):
        kernel_layout(layer, (1, 1, 5, 1))
    assert kernel_layout(layer, (1, 1, 5, 1), weight_name="depthwise_kernel").name == "depthwise"
    assert kernel_layout(layer, (1, 1, 5, 1), weight_name="pointwise_kernel").name == "conv"


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_a_layer_of_an_unknown_class_follows_kerass_convention_for_its_rank(library):
    class Mine(library.layers.Layer):
        def call(self, x):
            return x

    assert kernel_layout(Mine(), (5, 4)) == kernel_layout("dense", (5, 4))
    assert kernel_layout(Mine(), (3, 5, 4)) == kernel_layout("conv", (3, 5, 4))


def test_a_users_class_that_is_merely_called_like_a_keras_layer_is_not_taken_for_it():
    class Embedding(keras.layers.Layer):
        def call(self, x):
            return x

    assert kernel_layout(Embedding(), (5, 4)).name == "dense"


# Without a layer.


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (3, 5, 4), (3, 2, 5, 4), (3, 2, 2, 5, 4)])
def test_dense_fans_by_rank_are_those_of_both_kerases(shape):
    assert dense_fans(shape) == tuple(map(float, keras_fans(shape))) == tuple(map(float, tf_keras_fans(shape)))


@pytest.mark.parametrize("shape", [(3, 3, 16, 4), (5, 1, 256, 1)])
def test_the_fan_in_of_a_depthwise_kernel_is_its_receptive_field_unlike_kerass(shape):
    right = (float(np.prod(shape[:-2])), float(np.prod(shape[:-2]) * shape[-1]))
    assert dense_fans(shape, "depthwise") == right
    assert keras_fans(shape)[0] == right[0] * shape[-2]


def test_the_fans_of_a_transposed_convolution_are_kerass_interchanged():
    assert dense_fans((3, 3, 16, 6), "conv_transpose") == keras_fans((3, 3, 16, 6))[::-1]


def test_fans_of_a_vector_or_scalar_count_all_of_its_entries():
    assert [int(fan.squeeze()) for fan in fans([1, 0, 1, 1, 0])] == [3, 3]
    assert [float(fan) for fan in fans(np.array(1))] == [1, 1]


@pytest.mark.parametrize("rows", [1, 254, 255, 256, 509, 510, 511, 1000])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_counts_do_not_overflow(rows, dtype):
    """The counting adds bytes in runs of 255."""
    fan_in, fan_out = fans(np.ones((2, rows, 3), dtype))
    assert fan_in.tolist() == [[[2 * rows] * 3]]
    np.testing.assert_array_equal(fan_out, np.full((1, rows, 1), 6))


@pytest.mark.parametrize("layout", ["conv", "conv_transpose", "depthwise", "lstm"])
def test_fans_do_not_depend_on_a_masks_memory_order_or_dtype(layout):
    mask = random_mask((300, 3, 8))
    expected = full_fans(mask, layout)
    variants = [np.asfortranarray(mask), np.repeat(mask, 2, axis=0)[::2], mask[::-1][::-1], mask.tolist()]
    variants += [mask.astype(dtype) for dtype in ("uint8", "int8", "int64", "float16", "float64", "complex64")]
    for variant in variants:
        assert_same_fans(mask, layout, [np.broadcast_to(fan, mask.shape) for fan in fans(variant, layout)])
    assert np.array_equal(expected, full_fans(mask, layout))


def test_fan_in_and_fan_out_are_the_two_of_fans():
    mask = random_mask((3, 5, 8))
    for layout in ("conv", "conv_transpose", "depthwise", "lstm"):
        both = fans(mask, layout)
        np.testing.assert_array_equal(fan_in(mask, layout), both[0])
        np.testing.assert_array_equal(fan_out(mask, layout), both[1])


def test_counting_leaves_the_mask_as_it_was():
    mask = random_mask((300, 5)).astype(np.uint8)
    before = mask.copy()
    fans(mask)
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("name", ["dense", "conv", "conv_transpose", "depthwise", "simple_rnn", "gru", "lstm"])
def test_a_layout_survives_json(name):
    layout = kernel_layout(name, (5, 12) if name == "dense" else (3, 5, 12))
    assert KernelLayout.from_config(json.loads(json.dumps(layout.get_config()))) == layout


def test_a_layout_given_as_a_layout_is_returned():
    layout = kernel_layout("depthwise", (3, 3, 5, 2))
    assert kernel_layout(layout, (3, 3, 7, 1)) is layout


# Bad input.


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("convolution", (3, 3, 5, 4), "`kernel_layout` must be one of 'dense', .*kernel_layout='convolution'"),
        ("", (5, 4), "kernel_layout=''"),
        ("dense", (3, 5, 4), r"'dense'.*shape=\(3, 5, 4\)"),
        ("dense", (5,), r"'dense'.*shape=\(5,\)"),
        ("embedding", (3, 5, 4), r"'embedding'.*shape=\(3, 5, 4\)"),
        ("conv", (5, 4), r"'conv'.*shape=\(5, 4\)"),
        ("depthwise", (5, 4), r"'depthwise'.*shape=\(5, 4\)"),
        ("lstm", (5, 6), r"'lstm'.*4 groups or gates.*shape=\(5, 6\)"),
        ("gru", (5, 4), r"'gru'.*3 groups or gates.*shape=\(5, 4\)"),
        ("ab,bc->ac", (3, 5, 4), "rank 3.*kernel_layout='ab,bc->ac'"),
        ("ab->ac", (5, 4), "kernel_layout='ab->ac'"),
        (7, (5, 4), "`layer_or_name` must be .*7 of type int"),
        (keras.layers.Dense, (5, 4), "`layer_or_name` must be .*Dense"),
        (kernel_layout("conv", (3, 5, 4)), (5, 4), r"rank 2.*shape=\(5, 4\)"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error_that_names_it(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        kernel_layout(layout, shape)


@pytest.mark.parametrize("groups", [0, -1, 3, 1.5])
def test_groups_that_do_not_divide_the_filters_are_an_error(groups):
    with pytest.raises(ValueError, match=re.escape(f"{groups} groups")):
        kernel_layout("conv", (3, 5, 4), groups=groups)


@pytest.mark.parametrize("shape", [(0, 3), (3, None), (3, -1), (2.5, 3), "ab"])
def test_a_shape_without_positive_integer_dimensions_is_an_error_that_names_it(shape):
    with pytest.raises(ValueError, match="`shape`.*shape=" + re.escape(str(tuple(shape)))):
        check_shape(shape)


def test_a_shape_may_be_anything_that_lists_dimensions():
    import tensorflow as tf

    for shape in ((2, 3), [2, 3], np.array([2, 3]), tf.TensorShape([2, 3])):
        assert check_shape(shape) == (2, 3)
    assert check_shape(7) == (7,)


@pytest.mark.parametrize(
    ("dtype", "entry"),
    [("uint8", 2), ("int8", 2), ("int8", -1)]
    + [(dtype, entry) for dtype in ("float16", "float32", "float64") for entry in (2.0, -1.0, 0.5, np.nan, np.inf)],
)
def test_a_mask_entry_other_than_0_and_1_is_an_error_that_names_it(dtype, entry):
    mask = np.ones((300, 4), dtype)
    mask[299, 3] = entry
    with pytest.raises(ValueError, match=f"`mask` must consist of 0 and 1.*{re.escape(str(entry))}"):
        as_mask(mask)


@pytest.mark.parametrize("mask", ["ones", ["a", "b"], [None, 1], np.array([1, 0], object)])
def test_a_mask_that_is_not_of_numbers_is_an_error(mask):
    with pytest.raises(TypeError, match="`mask` must be an array of numbers.*dtype"):
        as_mask(mask)


def test_a_mask_of_another_shape_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"`mask`.*\(3, 4\).*\(4, 3\)"):
        as_mask(np.ones((4, 3)), (3, 4))
