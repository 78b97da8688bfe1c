"""The contract of every exported initializer, in both Kerases; what is random about the values is in test_sampling."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras.src.initializers.random_initializers import compute_fans
from statistical import assert_distribution, assert_mean_0_and_variance_1

import keras_sparse_init
from keras_sparse_init import SparseHeNormal, SparseScaledInit, masks
from keras_sparse_init.fans import KernelLayout, fans
from keras_sparse_init.sampling import DISTRIBUTIONS, derive_seed
from keras_sparse_init.variance import weight_std

LIBRARIES = {"keras": keras, "tf_keras": tf_keras}
INITIALIZERS = {
    name: getattr(keras_sparse_init, name)
    for name in keras_sparse_init.__all__
    if name.startswith("Sparse") and name != "SparseMuP"
}
KERAS_NAMES = {name: name.removeprefix("Sparse") for name in INITIALIZERS if name != "SparseScaledInit"}

MASK = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])

either_keras = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
every_initializer = pytest.mark.parametrize("cls", INITIALIZERS.values(), ids=INITIALIZERS)


@keras.saving.register_keras_serializable("tests")
class Diagonal:
    """A user's own rule: no subclass of anything."""

    def __init__(self, width=1):
        self.width = width

    def __call__(self, shape, seed, kernel_layout=None):
        rows, columns = np.indices(shape)
        return np.abs(rows - columns) < self.width

    def get_config(self):
        return {"width": self.width}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("tests")
class Upper(masks.MaskRule):
    """A user's own subclass of the package's rules."""

    def __call__(self, shape, seed, kernel_layout=None):
        return np.triu(np.ones(shape, np.uint8))


SETTINGS = {
    "nothing": {},
    "sparsity": {"sparsity": 0.6},
    "granularity": {"sparsity": 0.6, "granularity": "layer"},
    "array": {"mask": MASK.astype(np.float32)},
    "list": {"mask": MASK.tolist()},
    "rule": {"mask": masks.ConstantFanIn(0.5)},
    "n:m": {"mask": masks.NM(1, 4, axis=-1)},
    "block": {"mask": masks.Block(0.5, (1, 2))},
    "own rule": {"mask": Diagonal(2)},
    "own subclass": {"mask": Upper()},
    "layout by name": {"sparsity": 0.6, "kernel_layout": "lstm"},
    "equation": {"sparsity": 0.6, "kernel_layout": "ab,bc->ac"},
    "layout": {"sparsity": 0.6, "kernel_layout": KernelLayout("mine", 2, (1,), (0,), (1,))},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def values(init, shape=(5, 4), library=keras, dtype="float32", **kwargs):
    """What a layer of that Keras gets: tf_keras asks with a `tf.DType`, Keras 3 with a name."""
    tensor = init(shape, dtype=getattr(tf, dtype) if library is tf_keras else dtype, **kwargs)
    assert tf.is_tensor(tensor)
    assert tensor.shape == shape and tensor.dtype.name == dtype
    return tensor.numpy()


def config_of(init):
    """The config as it comes back from a file."""
    return json.loads(json.dumps(init.get_config()))


# Config.


def test_the_exported_initializers_are_those_of_the_design():
    named = {f"Sparse{who}{law}" for who in ("He", "Glorot", "Lecun") for law in ("Normal", "Uniform")}
    assert set(INITIALIZERS) == {"SparseScaledInit", *named}


@every_initializer
@every_setting
def test_an_initializer_made_from_its_config_gives_the_same_values(cls, settings):
    init = cls(seed=1, **settings)
    copy = cls.from_config(config_of(init))
    assert type(copy) is cls
    assert config_of(copy) == config_of(init)
    np.testing.assert_array_equal(values(copy), values(init))


@every_initializer
@every_setting
@either_keras
def test_kerass_own_serialization_gives_the_same_values(cls, settings, library):
    init = cls(seed=1, **settings)
    config = json.loads(json.dumps(library.saving.serialize_keras_object(init)))
    copy = library.saving.deserialize_keras_object(config)
    assert type(copy) is cls
    np.testing.assert_array_equal(values(copy, library=library), values(init, library=library))


@every_initializer
def test_a_config_holds_every_argument_of_the_constructor(cls):
    arguments = set(inspect.signature(cls).parameters)
    assert arguments == set(cls(seed=1).get_config())


def test_scale_mode_distribution_and_slope_survive_the_config():
    init = SparseScaledInit(0.3, "fan_avg", "uniform", "dense", seed=1)
    assert config_of(init) == {
        "scale": 0.3,
        "mode": "fan_avg",
        "distribution": "uniform",
        "granularity": "dense",
        "mask": None,
        "sparsity": None,
        "seed": 1,
        "kernel_layout": None,
    }
    slanted = SparseHeNormal(negative_slope=0.2, seed=1)
    assert SparseHeNormal.from_config(config_of(slanted)).scale == slanted.scale == 2 / 1.04


@pytest.mark.parametrize(
    ("alias", "distribution"),
    [("normal", "truncated_normal"), ("Truncated_Normal", "truncated_normal"), ("UNIFORM", "uniform")],
)
def test_distributions_may_be_spelled_as_keras_accepts_them(alias, distribution):
    assert SparseScaledInit(distribution=alias).distribution == distribution


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_an_initializer_and_the_owner_of_its_mask_do_not_see_each_others_changes(dtype):
    mask = MASK.astype(dtype)
    init = SparseScaledInit(mask=mask, seed=0)
    before = values(init)
    np.testing.assert_array_equal(mask, MASK)
    mask[...] = 1
    np.testing.assert_array_equal(values(init), before)


# Values.


@every_initializer
@either_keras
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (3, 3, 5, 4), (2, 3, 1, 5, 4)])
def test_shape_and_dtype_are_those_asked_for(cls, library, dtype, shape):
    kernel = values(cls(seed=1), shape, library, dtype)
    assert np.isfinite(kernel.astype(np.float64)).all()
    assert np.count_nonzero(kernel) == math.prod(shape)


@every_initializer
def test_the_dtype_is_the_default_float_type_when_not_given(cls):
    assert cls(seed=1)((5, 4)).dtype.name == keras.config.floatx() == "float32"


@every_initializer
@every_setting
@either_keras
@pytest.mark.parametrize("seed", [1, None])
def test_calls_are_pure(cls, settings, library, seed):
    init = cls(seed=seed, **settings)
    before = config_of(init)
    first, _, second = values(init, library=library), init((2, 8), mask=np.ones((2, 8))), values(init, library=library)
    np.testing.assert_array_equal(first, second)
    assert config_of(init) == before


@every_initializer
@every_setting
def test_both_kerases_get_the_same_values(cls, settings):
    init = cls(seed=1, **settings)
    np.testing.assert_array_equal(values(init, library=keras), values(init, library=tf_keras))


@every_initializer
@every_setting
def test_different_seeds_give_different_values(cls, settings):
    first, second = values(cls(seed=1, **settings)), values(cls(seed=2, **settings))
    both = (first != 0) & (second != 0)
    assert not (first == second)[both].any()


def standardized(init, mask=None, **std_settings):
    """The kernel over the std that its mask calls for, on the mask."""
    kernel = values(init, mask.shape, mask=mask).astype(np.float64)
    assert not kernel[~mask].any()
    return (kernel / weight_std(mask.shape, mask, **std_settings))[mask]


def uneven_mask(rows=300, columns=200):
    """Columns between 5% and 95% dense, rows between 0 and 100%, so that the granularities differ a lot."""
    rng = np.random.default_rng(0)
    return rng.random((rows, columns)) < np.linspace(0.05, 0.95, columns) * np.linspace(0, 2, rows)[:, None]


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("granularity", ["unit", "effective", "layer", "dense"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_arguments_reach_the_values(scale, mode, granularity, distribution):
    init = SparseScaledInit(scale, mode, distribution, granularity, seed=1)
    settings = {"scale": scale, "mode": mode, "granularity": granularity}
    assert_distribution(standardized(init, uneven_mask(), **settings), distribution)


def test_the_unit_scaled_variance_of_every_unit_is_scale_over_its_fan_in():
    """Written out without the package's fans: columns times the root of their number of nonzeros."""
    mask = uneven_mask()
    kernel = values(SparseHeNormal(seed=1), mask.shape, mask=mask)
    columns = kernel * np.sqrt(mask.sum(axis=0) / 2)
    assert_distribution(columns[mask], "truncated_normal")


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda init, mask: init(mask.shape) * mask, id="masked dense"),
        pytest.param(SparseHeNormal(granularity="layer", seed=1), id="layer"),
        pytest.param(SparseScaledInit(2.0, "fan_out", seed=1), id="fan_out"),
        pytest.param(SparseScaledInit(1.0, seed=1), id="scale 1"),
        pytest.param(lambda init, mask: init(mask.shape, mask=np.roll(mask, 1, axis=1)), id="its neighbour's fan"),
    ],
)
def test_a_wrong_initializer_fails_the_test_of_the_unit_scaled_variance(wrong):
    mask = uneven_mask()
    right = SparseHeNormal(seed=1)
    kernel = wrong(mask.shape, mask=mask) if isinstance(wrong, SparseScaledInit) else wrong(right, mask)
    with pytest.raises(AssertionError):
        assert_mean_0_and_variance_1((np.asarray(kernel) * np.sqrt(mask.sum(axis=0) / 2))[mask], "truncated_normal")


@pytest.mark.parametrize("name", KERAS_NAMES)
@either_keras
def test_without_a_mask_the_statistics_are_those_of_the_keras_initializer_of_that_name(name, library):
    """Keras's own values have our std and distribution."""
    ours = INITIALIZERS[name](seed=1)
    shape = (512, 600)
    of_keras = np.asarray(getattr(library.initializers, KERAS_NAMES[name])(seed=1)(shape))
    std = weight_std(shape, None, None, ours.scale, ours.mode)
    assert_distribution(of_keras / std, ours.distribution)
    assert_distribution(values(ours, shape) / std, ours.distribution)


@every_initializer
@pytest.mark.parametrize("shape", [(7,), (30, 20), (3, 3, 30, 20)])
def test_an_all_ones_mask_gives_kerass_std_and_the_values_without_a_mask(cls, shape):
    init = cls(seed=1)
    fan_in, fan_out = compute_fans(shape)
    fan = {"fan_in": fan_in, "fan_avg": (fan_in + fan_out) / 2}[init.mode]
    std = weight_std(shape, np.ones(shape), None, init.scale, init.mode)
    np.testing.assert_array_equal(np.broadcast_to(std, shape), np.full(shape, math.sqrt(init.scale / max(1.0, fan))))
    np.testing.assert_array_equal(values(init, shape, mask=np.ones(shape)), values(init, shape))


@pytest.mark.parametrize(("slope", "scale"), [(0.0, 2.0), (0.2, 2 / 1.04), (1, 1.0), (-0.5, 1.6)])
@pytest.mark.parametrize("name", ["SparseHeNormal", "SparseHeUniform"])
def test_he_takes_the_slope_of_leaky_relu(slope, scale, name):
    init = INITIALIZERS[name](negative_slope=slope)
    assert init.scale == pytest.approx(scale, rel=1e-15)


@every_initializer
@pytest.mark.parametrize("granularity", ["unit", "effective", "layer", "dense"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_weights_off_the_mask_are_exactly_0_and_units_without_inputs_are_all_0(cls, granularity, dtype):
    kernel = values(cls(granularity=granularity, seed=1), mask=MASK, dtype=dtype)
    np.testing.assert_array_equal(kernel != 0, MASK)
    assert np.isfinite(kernel.astype(np.float32)).all()


@every_initializer
@pytest.mark.parametrize("granularity", ["unit", "effective", "layer", "dense"])
def test_an_empty_mask_gives_a_kernel_of_zeros(cls, granularity):
    assert not values(cls(granularity=granularity, seed=1), mask=np.zeros((5, 4))).any()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["array", "list", "tensor", "keras variable", "tf variable"])
def test_a_mask_may_have_any_type_that_holds_numbers(dtype, kind):
    make = {
        "array": lambda mask: mask,
        "list": lambda mask: mask.tolist(),
        "tensor": tf.constant,
        "keras variable": lambda mask: keras.Variable(mask, dtype=dtype),
        "tf variable": tf.Variable,
    }[kind]
    init = SparseHeNormal(seed=1)
    mask = make(MASK.astype(dtype))
    np.testing.assert_array_equal(values(init, mask=mask), values(init, mask=MASK))
    np.testing.assert_array_equal(values(SparseHeNormal(mask=mask, seed=1)), values(init, mask=MASK))


def test_sparsity_is_short_for_a_random_mask_whose_seed_derives_from_the_initializers():
    expected = values(SparseHeNormal(mask=masks.Random(0.6), seed=1))
    np.testing.assert_array_equal(values(SparseHeNormal(sparsity=0.6, seed=1)), expected)
    np.testing.assert_array_equal(expected != 0, masks.random_mask((5, 4), 0.6, derive_seed(1, "mask")))


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, np.float32(0.5), 0.99])
def test_a_fraction_of_exactly_sparsity_is_0(sparsity):
    kernel = values(SparseHeNormal(sparsity=sparsity, seed=1), (30, 20))
    assert np.count_nonzero(kernel) == 600 - math.floor(sparsity * 600)


def test_the_scale_fits_the_mask_that_a_rule_makes():
    init = SparseScaledInit(mask=masks.ConstantFanIn(0.9), distribution="uniform", seed=1)
    kernel = values(init, (1000, 200))
    assert (np.count_nonzero(kernel, axis=0) == 100).all()
    assert_distribution(kernel[kernel != 0] * math.sqrt(100), "uniform")


def test_a_mask_of_the_call_wins_over_that_of_the_constructor():
    for settings in ({"sparsity": 0.9}, {"mask": MASK}, {"mask": masks.ConstantFanIn(0.9)}):
        kernel = values(SparseHeNormal(seed=1, **settings), mask=1 - MASK)
        np.testing.assert_array_equal(kernel != 0, 1 - MASK)


def test_a_rule_may_be_given_in_the_call():
    rule = masks.ConstantFanIn(0.5)
    np.testing.assert_array_equal(values(SparseHeNormal(seed=1), mask=rule), values(SparseHeNormal(seed=1, mask=rule)))


def test_a_function_may_be_a_rule():
    init = SparseHeNormal(mask=lambda shape, seed, layout: np.tri(*shape), seed=1)
    np.testing.assert_array_equal(values(init) != 0, np.tri(5, 4))
    np.testing.assert_array_equal(values(SparseHeNormal(seed=1), mask=init.mask), values(init))


def test_a_rule_is_called_with_the_shape_a_seed_of_its_own_and_the_layout():
    calls = []

    def rule(*args):
        calls.append(args)
        return np.ones(args[0])

    SparseHeNormal(mask=rule, seed=1, kernel_layout="lstm")([5, 8])
    [(shape, seed, layout)] = calls
    assert shape == (5, 8) and seed == derive_seed(1, "mask") != 1 and layout.name == "lstm"


@pytest.mark.parametrize("given", ["constructor", "call"])
@pytest.mark.parametrize("layout", ["conv_transpose", "depthwise", "abc,cde->abde", "gru"])
def test_the_layout_of_the_constructor_or_the_call_is_followed(given, layout):
    shape = (20, 60, 90)
    mask = np.random.default_rng(0).random(shape) < np.linspace(0.05, 0.95, 90)
    arguments = {"kernel_layout": layout}
    init = SparseHeNormal(seed=1, **(arguments if given == "constructor" else {"kernel_layout": "conv"}))
    kernel = values(init, shape, mask=mask, **({} if given == "constructor" else arguments))
    fan_in = np.maximum(fans(mask, layout)[0], 1)
    assert_distribution((kernel * np.sqrt(fan_in / 2))[mask], "truncated_normal")


# Seeds.


def digest(init, shape=(300, 200)):
    return hashlib.sha256(values(init, shape).tobytes()).hexdigest()


IN_A_NEW_PROCESS = """
import sys, json
sys.path.insert(0, {tests!r})
import keras, tensorflow as tf
tf.config.experimental.enable_op_determinism()
from test_initializers import INITIALIZERS, digest
from keras_sparse_init import SparseHeNormal, masks
keras.utils.set_random_seed(3)
layer = keras.layers.Dense(20, kernel_initializer=SparseHeNormal(sparsity=0.5))
layer.build((None, 30))
result = {{name: digest(cls(sparsity=0.5, seed=1)) for name, cls in INITIALIZERS.items()}}
result["large"] = digest(SparseHeNormal(mask=masks.Block(0.5, 4), seed=1), (1200, 1000))
result["layer"] = layer.kernel.numpy().tolist()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def new_process():
    """Values drawn in a process with another hash seed, one thread and op determinism enabled."""
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    code = IN_A_NEW_PROCESS.format(tests=os.path.dirname(__file__))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_same_seed_gives_the_same_bits_in_a_new_process(new_process):
    for name, cls in INITIALIZERS.items():
        assert new_process[name] == digest(cls(sparsity=0.5, seed=1)), name
    assert new_process["large"] == digest(SparseHeNormal(mask=masks.Block(0.5, 4), seed=1), (1200, 1000))


def test_op_determinism_is_no_obstacle_and_set_random_seed_holds_across_processes(new_process):
    keras.utils.set_random_seed(3)
    layer = keras.layers.Dense(20, kernel_initializer=SparseHeNormal(sparsity=0.5))
    layer.build((None, 30))
    np.testing.assert_array_equal(layer.kernel, np.array(new_process["layer"], np.float32))


@every_initializer
@either_keras
def test_without_a_seed_values_follow_set_random_seed(cls, library):
    def two(seed):
        library.utils.set_random_seed(seed)
        return [values(cls(sparsity=0.5), (30, 20), library) for _ in range(2)]

    first, again, other = two(5), two(5), two(6)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first[0] != other[0]).any()


@every_initializer
def test_without_a_seed_two_initializers_differ_and_so_do_copies_through_the_config(cls):
    init = cls()
    for other in (cls(), cls.from_config(config_of(init))):
        assert (values(init) != values(other)).all()


def test_a_seed_of_numpy_is_a_seed():
    np.testing.assert_array_equal(values(SparseHeNormal(seed=np.int64(3))), values(SparseHeNormal(seed=3)))


def test_a_numpy_seed_survives_json():
    assert config_of(SparseHeNormal(seed=np.int64(3)))["seed"] == 3


@every_initializer
@either_keras
def test_a_seed_generator_gives_new_values_at_each_call_reproducibly(cls, library):
    def two():
        init = cls(seed=keras.random.SeedGenerator(4))
        return [values(init, library=library) for _ in range(2)]

    first, again = two(), two()
    assert (first[0] != first[1]).all()
    np.testing.assert_array_equal(first, again)


@every_initializer
def test_a_seed_generator_survives_the_config(cls):
    init = cls(seed=keras.random.SeedGenerator(4))
    copy = cls.from_config(config_of(init))
    np.testing.assert_array_equal(values(copy), values(init))


# In layers.


@either_keras
@every_initializer
def test_a_layers_kernel_is_what_the_initializer_gives(library, cls):
    init = cls(seed=1, sparsity=0.5)
    layer = library.layers.Dense(4, kernel_initializer=init)
    layer.build((None, 5))
    np.testing.assert_array_equal(layer.kernel, values(init))


@either_keras
@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_name_as_a_string_or_a_config_is_enough(library, name):
    for identifier in (name, f"keras_sparse_init>{name}", {"class_name": name, "config": {"sparsity": 0.5, "seed": 1}}):
        layer = library.layers.Dense(4, kernel_initializer=identifier)
        assert type(layer.kernel_initializer) is INITIALIZERS[name]
        layer.build((None, 5))
    np.testing.assert_array_equal(layer.kernel, values(INITIALIZERS[name](sparsity=0.5, seed=1)))


@either_keras
@pytest.mark.parametrize(
    ("make", "input_shape", "layout"),
    [
        (lambda k, **kw: k.layers.Conv2D(4, 3, **kw), (6, 6, 3), None),
        (lambda k, **kw: k.layers.Conv2DTranspose(4, 3, **kw), (6, 6, 3), "conv_transpose"),
        (lambda k, **kw: k.layers.LSTM(4, **kw), (6, 3), "lstm"),
        (lambda k, **kw: k.layers.GRU(4, **kw), (6, 3), "gru"),
        (lambda k, **kw: k.layers.EinsumDense("abc,cd->abd", (None, 4), **kw), (6, 3), "abc,cd->abd"),
    ],
    ids=["Conv2D", "Conv2DTranspose", "LSTM", "GRU", "EinsumDense"],
)
def test_layers_of_other_kinds_take_the_initializer_with_their_layout(library, make, input_shape, layout):
    init = SparseHeNormal(sparsity=0.5, seed=1, kernel_layout=layout)
    layer = make(library, kernel_initializer=init)
    layer.build((None, *input_shape))
    kernel = layer.cell.kernel if hasattr(layer, "cell") else layer.kernel
    np.testing.assert_array_equal(kernel, values(init, tuple(kernel.shape)))
    layer(np.zeros((1, *input_shape), "float32"))


@either_keras
def test_depthwise_and_embedding_layers_take_the_initializer_by_their_own_argument(library):
    init = SparseHeNormal(sparsity=0.5, seed=1, kernel_layout="depthwise")
    layer = library.layers.DepthwiseConv2D(3, depthwise_initializer=init)
    layer.build((None, 6, 6, 4))
    np.testing.assert_array_equal(layer.weights[0], values(init, (3, 3, 4, 1)))
    init = SparseScaledInit(sparsity=0.5, seed=1, kernel_layout="embedding")
    layer = library.layers.Embedding(7, 4, embeddings_initializer=init)
    layer.build((None, 3))
    np.testing.assert_array_equal(layer.embeddings, values(init, (7, 4)))


@either_keras
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
def test_policies_get_the_type_that_they_store(library, policy):
    init = SparseHeNormal(sparsity=0.5, seed=1)
    layer = library.layers.Dense(4, kernel_initializer=init, dtype=policy)
    layer.build((None, 5))
    stored = "float32" if policy.startswith("mixed") else policy
    kernel = layer.kernel.numpy()
    assert kernel.dtype.name == stored
    np.testing.assert_array_equal(kernel, values(init, dtype=stored))
    output = layer(np.ones((2, 5), "float32"))
    assert tf.as_dtype(output.dtype).name == policy.removeprefix("mixed_")


@either_keras
def test_a_global_mixed_precision_policy_is_followed(library):
    before = library.mixed_precision.global_policy() if library is tf_keras else keras.config.dtype_policy()
    try:
        library.mixed_precision.set_global_policy("mixed_bfloat16")
        model = library.Sequential([library.layers.Dense(4, kernel_initializer=SparseHeNormal(sparsity=0.5, seed=1))])
        model(np.ones((2, 5), "float32"))
        np.testing.assert_array_equal(model.weights[0].numpy(), values(SparseHeNormal(sparsity=0.5, seed=1)))
    finally:
        library.mixed_precision.set_global_policy(before)


@either_keras
def test_an_unbuilt_model_is_initialized_by_its_first_call(library):
    init = SparseHeNormal(sparsity=0.5, seed=1)
    model = library.Sequential([library.layers.Dense(4, kernel_initializer=init)])
    assert not model.built
    model(np.zeros((2, 5), "float32"))
    np.testing.assert_array_equal(model.layers[0].kernel, values(init))


@either_keras
def test_an_unbuilt_model_is_initialized_by_fit(library):
    """Here the layers are built while a function is traced (tf_keras)."""
    init = SparseHeNormal(sparsity=0.5, seed=1)
    model = library.Sequential([library.layers.Dense(4, kernel_initializer=init)])
    model.compile(library.optimizers.SGD(0.0), "mse")
    model.fit(np.ones((2, 5)), np.ones((2, 4)), verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel, values(init))


@either_keras
def test_a_shared_layer_has_one_kernel(library):
    layer = library.layers.Dense(5, kernel_initializer=SparseHeNormal(sparsity=0.5))
    inputs = library.Input((5,))
    model = library.Model(inputs, layer(layer(inputs)))
    [kernel, _] = model.weights
    np.testing.assert_array_equal(kernel.numpy(), values(layer.kernel_initializer, (5, 5)))


@either_keras
def test_the_two_directions_of_bidirectional_differ_without_a_seed(library):
    rnn = library.layers.SimpleRNN(4, kernel_initializer=SparseHeNormal(sparsity=0.5))
    layer = library.layers.Bidirectional(rnn)
    layer.build((None, 6, 5))
    forward, backward = (np.asarray(part.cell.kernel) for part in (layer.forward_layer, layer.backward_layer))
    assert np.count_nonzero(forward) == np.count_nonzero(backward) == 10
    assert (forward != backward)[(forward != 0) & (backward != 0)].all()
    assert (forward != backward).any()


@either_keras
def test_the_projections_of_multi_head_attention_differ_without_a_seed(library):
    layer = library.layers.MultiHeadAttention(
        2, 4, kernel_initializer=SparseHeNormal(sparsity=0.5, kernel_layout="abc,cde->abde")
    )
    layer(np.zeros((1, 3, 8), "float32"), np.zeros((1, 3, 8), "float32"))
    kernels = [np.asarray(getattr(layer, f"_{name}_dense").kernel) for name in ("query", "key", "value")]
    for i in range(3):
        assert np.count_nonzero(kernels[i]) == 32
        assert (kernels[i] != kernels[i - 1]).any()


@pytest.mark.parametrize("shape", [(5, 4), (1200, 1000)], ids=["small", "large"])
@either_keras
def test_inside_a_tf_function_the_values_are_the_same(library, shape):
    init = SparseHeNormal(sparsity=0.5, seed=1)
    dtype = tf.float32 if library is tf_keras else "float32"
    traced = tf.function(lambda: init(shape, dtype=dtype))()
    np.testing.assert_array_equal(traced, values(init, shape))


@pytest.mark.parametrize("make", [lambda mask: mask, tf.constant, tf.Variable], ids=["array", "constant", "variable"])
def test_inside_a_tf_function_a_mask_that_has_a_value_may_be_given(make):
    mask = make(MASK.astype(np.float32))
    init = SparseHeNormal(seed=1)
    np.testing.assert_array_equal(tf.function(lambda: init((5, 4), mask=mask))(), values(init, mask=MASK))


def test_tf_function_does_not_rewrite_the_initializers_python():
    """It takes seconds."""
    status = []

    def rule(shape, seed, layout):
        status.append(tf.__internal__.autograph.control_status_ctx().status.name)
        return MASK

    tf.function(lambda: SparseHeNormal(mask=rule)((5, 4)))()
    assert status == ["DISABLED"]


def test_inside_a_tf_function_a_seed_generator_is_read_when_it_is_traced():
    init = SparseHeNormal(seed=keras.random.SeedGenerator(4))
    expected = values(SparseHeNormal(seed=keras.random.SeedGenerator(4)))
    np.testing.assert_array_equal(tf.function(lambda: init((5, 4)))(), expected)


@either_keras
def test_a_tf_variable_made_inside_a_function_keeps_its_first_values(library):
    init = SparseHeNormal(sparsity=0.5, seed=1)
    made = []

    @tf.function
    def value():
        if not made:
            made.append(tf.Variable(lambda: init((5, 4), dtype=tf.float32)))
        return made[0].read_value()

    np.testing.assert_array_equal(value(), values(init))


# Saving.


def network(library, init):
    layers = library.layers
    inputs = library.Input((5,))
    return library.Model(inputs, layers.Dense(4, kernel_initializer=init, name="sparse")(inputs))


def assert_same_after_loading(library, model, loaded, init):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    np.testing.assert_allclose(np.asarray(loaded(x)), np.asarray(model(x)), rtol=1e-6)
    copy = loaded.get_layer("sparse").kernel_initializer
    assert type(copy) is type(init)
    assert config_of(copy) == config_of(init)
    np.testing.assert_array_equal(values(copy, library=library), values(init, library=library))


@either_keras
@every_initializer
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_every_initializer_is_loaded_with_its_model_without_custom_objects(library, cls, suffix, tmp_path):
    init = cls(sparsity=0.6, seed=1)
    model = network(library, init)
    model.save(tmp_path / f"model{suffix}")
    loaded = library.models.load_model(tmp_path / f"model{suffix}")
    assert_same_after_loading(library, model, loaded, init)


@either_keras
@every_setting
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_every_setting_is_loaded_with_its_model(library, settings, suffix, tmp_path):
    init = SparseScaledInit(seed=1, **settings)
    model = network(library, init)
    model.save(tmp_path / f"model{suffix}")
    loaded = library.models.load_model(tmp_path / f"model{suffix}")
    assert_same_after_loading(library, model, loaded, init)


def test_a_saved_model_of_tf_keras_is_loaded_with_its_initializer(tmp_path):
    init = SparseScaledInit(mask=masks.ConstantFanIn(0.6), seed=1)
    model = network(tf_keras, init)
    model.save(tmp_path / "model", save_format="tf")
    loaded = tf_keras.models.load_model(tmp_path / "model")
    assert_same_after_loading(tf_keras, model, loaded, init)


def test_an_exported_model_of_keras_3_computes_the_same(tmp_path):
    model = network(keras, SparseHeNormal(sparsity=0.6, seed=1))
    model.export(tmp_path / "model", verbose=False)
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-6)


@either_keras
@every_setting
def test_a_cloned_model_is_initialized_alike(library, settings):
    init = SparseScaledInit(seed=1, **settings)
    model = network(library, init)
    model.layers[-1].kernel.assign(np.ones((5, 4)))
    clone = library.models.clone_model(model)
    np.testing.assert_array_equal(clone.get_layer("sparse").kernel, values(init))


@either_keras
def test_a_cloned_model_is_initialized_anew_without_a_seed(library):
    model = network(library, SparseHeNormal())
    clone = library.models.clone_model(model)
    assert (np.asarray(clone.layers[-1].kernel) != np.asarray(model.layers[-1].kernel)).all()


@either_keras
def test_a_model_with_a_seed_generator_is_saved(library, tmp_path):
    model = network(library, SparseHeNormal(seed=keras.random.SeedGenerator(4)))
    model.save(tmp_path / "model.keras")
    loaded = library.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.layers[-1].kernel, model.layers[-1].kernel)
    assert isinstance(loaded.layers[-1].kernel_initializer.get_config()["seed"], dict)


def test_a_lambda_rule_is_refused_by_name_when_it_is_loaded():
    init = SparseHeNormal(mask=lambda shape, seed, layout: np.ones(shape))
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        config = init.get_config()
    with pytest.raises(ValueError, match="deserialization of a Python lambda"):
        SparseHeNormal.from_config(config)


# Bad input.


BAD_ARGUMENTS = [
    ({"sparsity": 1.0}, ValueError, "`sparsity` must be .*sparsity=1.0"),
    ({"sparsity": -0.1}, ValueError, "`sparsity` must be .*sparsity=-0.1"),
    ({"sparsity": math.nan}, ValueError, "`sparsity` must be .*sparsity=nan"),
    ({"sparsity": "0.9"}, ValueError, "`sparsity` must be .*sparsity='0.9'"),
    ({"sparsity": True}, ValueError, "`sparsity` must be .*sparsity=True"),
    ({"granularity": "units"}, ValueError, "`granularity` must be one of 'unit'.*granularity='units'"),
    ({"granularity": None}, ValueError, "`granularity` must be .*granularity=None"),
    ({"mask": "random"}, ValueError, "`mask` must be .*mask='random'"),
    ({"mask": masks.Random}, ValueError, "`mask` must be .*mask=<class .*Random"),
    ({"mask": 2 * MASK}, ValueError, "`mask` must consist of 0 and 1. Received: 2"),
    ({"mask": -MASK}, ValueError, "`mask` must consist of 0 and 1. Received: -1"),
    ({"mask": MASK * 0.5}, ValueError, "`mask` must consist of 0 and 1. Received: 0.5"),
    ({"mask": np.full((5, 4), math.nan)}, ValueError, "`mask` must consist of 0 and 1. Received: nan"),
    ({"mask": [["a", "b"]]}, TypeError, "`mask` must be an array of numbers"),
    ({"mask": [[1, 0], [1]]}, ValueError, r"`mask` must be an array .*\[\[1, 0\], \[1\]\]"),
    ({"mask": {"class_name": "Unknown", "config": {}}}, ValueError, "Unknown"),
    ({"mask": MASK, "sparsity": 0.5}, ValueError, "(?s)`mask` or `sparsity`, not both.*sparsity=0.5"),
    ({"mask": masks.Random(0.5), "sparsity": 0.5}, ValueError, "`mask` or `sparsity`, not both"),
    ({"seed": -1}, ValueError, "`seed` must be a non-negative int.*seed=-1"),
    ({"seed": 1.5}, TypeError, "`seed` must be a non-negative int.*seed=1.5"),
    ({"seed": True}, TypeError, "`seed` must be a non-negative int.*seed=True"),
    ({"seed": "1"}, TypeError, "`seed` must be a non-negative int.*seed='1'"),
    ({"kernel_layout": "convolution"}, ValueError, "`kernel_layout` must be one of 'dense'.*'convolution'"),
    ({"kernel_layout": 2}, ValueError, "`kernel_layout` must be .*kernel_layout=2"),
]


@every_initializer
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_an_error_at_once_that_names_it_and_its_value(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "`scale` must be a positive float. Received: scale=0"),
        ({"scale": -1}, "`scale` must be a positive float. Received: scale=-1"),
        ({"scale": math.nan}, "`scale` must be .*scale=nan"),
        ({"scale": math.inf}, "`scale` must be .*scale=inf"),
        ({"scale": None}, "`scale` must be .*scale=None"),
        ({"scale": "2"}, "`scale` must be .*scale='2'"),
        ({"mode": "fan"}, "`mode` must be one of 'fan_in', 'fan_out', 'fan_avg'. Received: mode='fan'"),
        ({"mode": None}, "`mode` must be .*mode=None"),
        ({"distribution": "gauss"}, "`distribution` must be one of 'truncated_normal'.*distribution='gauss'"),
        ({"distribution": None}, "`distribution` must be .*distribution=None"),
    ],
)
def test_a_bad_scale_mode_or_distribution_is_an_error_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseScaledInit(**arguments)


@pytest.mark.parametrize("slope", [math.nan, math.inf, None, "0.2", True])
@pytest.mark.parametrize("name", ["SparseHeNormal", "SparseHeUniform"])
def test_a_bad_slope_is_an_error_at_once(name, slope):
    with pytest.raises(ValueError, match=f"`negative_slope` must be a finite float.*negative_slope={slope!r}"):
        INITIALIZERS[name](negative_slope=slope)


@every_initializer
@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), (3, None), (3, -1), (3, 1.5), None, 2.5, tf.TensorShape([3, None]), tf.TensorShape(None)]
)
def test_a_shape_without_a_fan_is_an_error_that_names_it(cls, shape):
    with pytest.raises(ValueError, match="`shape` must .*Received: shape="):
        cls(seed=1)(shape)


@every_initializer
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", tf.int32, tf.complex64, tf.bool, np.int64])
def test_a_type_that_is_not_floating_is_an_error_that_names_it(cls, dtype):
    with pytest.raises(ValueError, match="`dtype` must be a floating type .*Received: " + re.escape(str(dtype))):
        cls(seed=1)((5, 4), dtype)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones((4, 5)), ValueError, r"`mask` must have the kernel's shape \(5, 4\).*\(4, 5\)"),
        (np.ones((1, 4)), ValueError, r"`mask` must have the kernel's shape \(5, 4\).*\(1, 4\)"),
        (1, ValueError, r"`mask` must have the kernel's shape \(5, 4\).*\(\)"),
        (2 * MASK, ValueError, "`mask` must consist of 0 and 1. Received: 2"),
        ("ones", ValueError, "`mask` must be .*mask='ones'"),
        (masks.Random, ValueError, "`mask` must be .*mask=<class .*Random"),
        (lambda *_: np.ones((4, 5)), ValueError, r"`mask` must have the kernel's shape \(5, 4\).*\(4, 5\)"),
        (lambda *_: "ones", ValueError, "`mask` must .*shape"),
        (keras.KerasTensor((5, 4)), ValueError, "`mask` must have a value when .*KerasTensor"),
    ],
)
def test_a_bad_mask_in_the_call_is_an_error_that_names_it(mask, error, message):
    with pytest.raises(error, match=message):
        SparseHeNormal(seed=1)((5, 4), mask=mask)


def test_a_mask_of_the_constructor_that_does_not_fit_the_kernel_is_an_error_in_the_call():
    with pytest.raises(ValueError, match=r"`mask` must have the kernel's shape \(4, 5\).*\(5, 4\)"):
        SparseHeNormal(mask=MASK)((4, 5))


@pytest.mark.parametrize("layout", ["convolution", "conv", "depthwise", "abc,cde->abde"])
def test_a_layout_that_does_not_fit_the_kernel_is_an_error_in_the_call(layout):
    with pytest.raises(ValueError, match=f"layout.*{layout}|{layout}.*shape"):
        SparseHeNormal(seed=1)((5, 4), kernel_layout=layout)


def test_a_mask_without_a_value_is_an_error_that_says_so():
    traced = tf.function(lambda mask: SparseHeNormal(seed=1)((5, 4), mask=mask))
    with pytest.raises(ValueError, match="`mask` must have a value when the function .*Received: Tensor"):
        traced(tf.ones((5, 4)))
