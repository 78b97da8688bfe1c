import contextlib
import random

import keras
import numpy as np
import pytest
import tf_keras
from tensorflow_model_optimization.sparsity.keras import PrunableLayer

from keras_sparse_init import (
    SparseHeNormal,
    SparseScaledInit,
    layer_sparsities,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsify,
    sparsity_table,
    strip,
)
from keras_sparse_init.sparse_model import apply_masks
from keras_sparse_init.tfmot import is_wrapper

layers = tf_keras.layers
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# Models, each with an input and what its masked kernels are: name -> kind, see `fans_of`.


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(24, name="in_list"), layers.BatchNormalization(name="norm")]
        self.by_key = {"head": layers.Dense(20, name="in_dict")}
        self.inner = tf_keras.Sequential([layers.Dense(16, name="nested")], name="inner")
        self.last = layers.Dense(12, name="last")

    def call(self, x, training=None):
        for layer in self.blocks:
            x = layer(x)
        return self.last(self.inner(self.by_key["head"](x)))


@tf_keras.saving.register_keras_serializable("test_sparse_model")
class Block(layers.Layer):
    """A custom layer whose config does not tell of the layers inside it."""

    def __init__(self, units=16, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.parts = [layers.Dense(units, name="first"), layers.Dense(units, name="second")]
        self.scale = self.add_weight("scale", shape=(units,), initializer="ones")

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x * self.scale

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@tf_keras.saving.register_keras_serializable("test_sparse_model")
class Mixing(layers.Layer, PrunableLayer):
    """A custom layer that says itself what can be pruned; one weight is held by no attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.many = []

    def build(self, shape):
        self.kernel = self.add_weight("kernel", (shape[-1], 24), initializer="he_normal")
        self.many.append(self.add_weight("late", (24, 18), initializer="he_normal"))
        self.shift = self.add_weight("shift", (18,), initializer="ones")
        super().build(shape)

    def call(self, x):
        return x @ self.kernel @ self.many[0] + self.shift

    def get_prunable_weights(self):
        return [self.kernel, self.many[0]]


def functional(inputs, outputs, name=None):
    return tf_keras.Model(inputs, outputs, name=name)


def nested(depth):
    """Functional in Sequential in functional, `depth` models in all."""
    inputs = layers.Input((20,))
    model = functional(inputs, layers.Dense(18, name="bottom")(inputs), name="level0")
    for level in range(1, depth):
        if level % 2:
            model = tf_keras.Sequential([layers.Input((20,)), model, layers.Dense(20, name="d")], name=f"level{level}")
        else:
            inputs = layers.Input((20,))
            model = functional(inputs, layers.Dense(20, name="d")(model(inputs)), name=f"level{level}")
    return model


def shared():
    first, second = layers.Input((20,)), layers.Input((20,))
    dense = layers.Dense(20, name="shared")
    inner = functional(first, dense(first), name="inner")
    return functional([first, second], layers.Dense(8, name="out")(inner(dense(first)) + dense(second)))


def attention():
    query, value = layers.Input((4, 16)), layers.Input((5, 12))
    return functional([query, value], layers.MultiHeadAttention(3, 8, name="mha")(query, value))


def sequential(shape, *stack):
    return tf_keras.Sequential([layers.Input(shape), *stack])


def subclassed_in_functional():
    inputs = layers.Input((20,))
    return functional(inputs, Subclassed()(inputs))


def subclassed():
    model = Subclassed()
    model(normal(2, 20))
    return model


X = normal(2, 20)
SERIES = normal(2, 6, 10)
IMAGE = normal(2, 8, 8, 6)
SUBCLASSED = {
    "in_list/kernel": "dense",
    "in_dict/kernel": "dense",
    "inner/nested/kernel": "dense",
    "last/kernel": "dense",
}
MODELS = {
    "sequential": (
        lambda: sequential((20,), layers.Dense(24, name="a"), layers.Dense(16, use_bias=False, name="b")),
        X,
        {"a/kernel": "dense", "b/kernel": "dense"},
    ),
    "convolutions": (
        lambda: sequential(
            (8, 8, 6),
            layers.Conv2D(12, 3, groups=2, name="grouped"),
            layers.BatchNormalization(),
            layers.Conv2DTranspose(10, 3, name="transpose"),
            layers.SeparableConv2D(14, 3, name="separable"),
            layers.Conv2D(9, (2, 3), use_bias=False, name="conv"),
        ),
        IMAGE,
        {
            "grouped/kernel": "grouped",
            "transpose/kernel": "transpose",
            "separable/pointwise_kernel": "conv",
            "conv/kernel": "conv",
        },
    ),
    "nested": (
        lambda: nested(2),
        X,
        {"level0/bottom/kernel": "dense", "d/kernel": "dense"},
    ),
    "nested_twice": (
        lambda: nested(3),
        X,
        {"level1/level0/bottom/kernel": "dense", "level1/d/kernel": "dense", "d/kernel": "dense"},
    ),
    "shared": (shared, [X, X], {"shared/kernel": "dense", "out/kernel": "dense"}),
    "recurrent": (
        lambda: sequential(
            (6, 10),
            layers.LSTM(14, return_sequences=True, name="lstm"),
            layers.GRU(12, return_sequences=True, use_bias=False, name="gru"),
            layers.RNN([layers.LSTMCell(9, name="c0"), layers.GRUCell(16, name="c1")], name="stack"),
        ),
        SERIES,
        {
            "lstm/lstm_cell/kernel": "lstm",
            "lstm/lstm_cell/recurrent_kernel": "lstm",
            "gru/gru_cell/kernel": "gru",
            "gru/gru_cell/recurrent_kernel": "gru",
            "stack/stacked_rnn_cells/c0/kernel": "lstm",
            "stack/stacked_rnn_cells/c0/recurrent_kernel": "lstm",
            "stack/stacked_rnn_cells/c1/kernel": "gru",
            "stack/stacked_rnn_cells/c1/recurrent_kernel": "gru",
        },
    ),
    "bidirectional": (
        lambda: sequential((6, 10), layers.Bidirectional(layers.LSTM(14, name="lstm"), name="both")),
        SERIES,
        {
            "both/forward_lstm/lstm_cell/kernel": "lstm",
            "both/forward_lstm/lstm_cell/recurrent_kernel": "lstm",
            "both/backward_lstm/lstm_cell/kernel": "lstm",
            "both/backward_lstm/lstm_cell/recurrent_kernel": "lstm",
        },
    ),
    "inside_layers": (
        lambda: sequential(
            (6, 10), layers.TimeDistributed(layers.Dense(16, name="timed"), name="td"), Block(name="block")
        ),
        SERIES,
        {"td/timed/kernel": "dense", "block/first/kernel": "dense", "block/second/kernel": "dense"},
    ),
    "attention": (
        attention,
        [normal(2, 4, 16), normal(2, 5, 12)],
        {
            "mha/query/kernel": "projection",
            "mha/key/kernel": "projection",
            "mha/value/kernel": "projection",
            "mha/attention_output/kernel": "output_projection",
        },
    ),
    "embedding": (
        lambda: sequential(
            (6,), layers.Embedding(30, 16, mask_zero=True, name="emb"), layers.SimpleRNN(18, name="rnn")
        ),
        RNG.integers(0, 30, (2, 6)),
        {
            "emb/embeddings": "embedding",
            "rnn/simple_rnn_cell/kernel": "dense",
            "rnn/simple_rnn_cell/recurrent_kernel": "dense",
        },
    ),
    "prunable": (
        lambda: sequential((20,), Mixing(name="mixing")),
        X,
        {"mixing/kernel": "dense", "mixing/late": "dense"},
    ),
    "subclassed": (subclassed, X, SUBCLASSED),
    "subclassed_in_functional": (
        subclassed_in_functional,
        X,
        {f"subclassed/{name}": kind for name, kind in SUBCLASSED.items()},
    ),
}


def fans_of(kind, mask):
    """Fan-in and fan-out of each weight, counted here again for every kind of kernel, without `fans`."""
    count = mask.astype(np.float64)

    def total(*axes):
        return count.sum(axis=axes, keepdims=True) * np.ones(mask.shape)

    if kind in ("lstm", "gru", "grouped"):
        parts = {"lstm": 4, "gru": 3, "grouped": 2}[kind]
        outputs = [part.sum(axis=-1, keepdims=True) * np.ones(part.shape) for part in np.split(count, parts, -1)]
        outputs = np.concatenate(outputs, -1)
        if kind == "grouped":
            outputs = outputs.sum(axis=(0, 1), keepdims=True) * np.ones(mask.shape)
        return total(*range(mask.ndim - 1)), outputs
    return {
        "dense": lambda: (total(0), total(1)),
        "conv": lambda: (total(0, 1, 2), total(0, 1, 3)),
        "transpose": lambda: (total(0, 1, 3), total(0, 1, 2)),
        "projection": lambda: (total(0), total(1, 2)),
        "output_projection": lambda: (total(0, 1), total(2)),
        "embedding": lambda: (np.ones(mask.shape), total(1)),
    }[kind]()


def run(model, x):
    return model(x, training=False).numpy()


def value(variable):
    return np.asarray(variable.read_value())


def build(name):
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    return MODELS[name][0]()


def snapshot(model):
    return {k.name: (value(k.kernel), k.mask_value()) for k in masked_kernels(model)}


def assert_equal(first, second):
    assert list(first) == list(second)
    for name in first:
        np.testing.assert_array_equal(first[name][0], second[name][0], err_msg=name)
        np.testing.assert_array_equal(first[name][1], second[name][1], err_msg=name)


def small():
    return sequential((20,), layers.Dense(24, name="a"), layers.Dense(16, name="b"))


# Every structure.


@pytest.fixture(scope="module", params=MODELS)
def sparse(request):
    """A dense model, its sparse version, an input and the kinds of its kernels."""
    dense = build(request.param)
    _, x, kinds = MODELS[request.param]
    weights = [value(weight) for weight in dense.weights]
    outputs = run(dense, x)
    model = sparsify(dense, 0.5, method="uniform", initializer=SparseScaledInit(distribution="uniform"), seed=0)
    if request.param != "subclassed":
        for before, weight in zip(weights, dense.weights, strict=True):
            np.testing.assert_array_equal(before, value(weight))
        np.testing.assert_array_equal(outputs, run(dense, x))
        assert not any(is_wrapper(layer) for layer in dense._flatten_layers())
    return request.param, model, x, kinds, weights


def test_every_kernel_is_found_once_in_model_order(sparse):
    _, model, _, kinds, _ = sparse
    assert [k.name for k in masked_kernels(model)] == list(kinds)
    for k in masked_kernels(model):
        assert k.shape == tuple(k.kernel.shape) == tuple(k.mask.shape)
        assert any(attribute is k.kernel for attribute in vars(k.layer).values()) or k.name == "mixing/late"


def test_the_budget_is_met_to_rounding_and_weights_off_the_masks_are_0(sparse):
    _, model, x, _, _ = sparse
    for name, (kernel, mask) in snapshot(model).items():
        assert mask.sum() == mask.size - mask.size // 2, name
        np.testing.assert_array_equal(kernel != 0, mask, err_msg=name)
    run(model, x)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_every_kernel_is_scaled_by_the_fans_of_its_layer(sparse, mode):
    """|w| <= sqrt(3 / fan) for each weight, and the largest weight comes close: 0.97^size < 1e-6 is its chance not to.

    On a random mask of a kernel that is not square, the fan of any other axis is exceeded somewhere or not reached.
    """
    _, model, _, kinds, _ = sparse
    reinitialize(model, SparseScaledInit(mode=mode, distribution="uniform"), seed=1)
    for name, (kernel, mask) in snapshot(model).items():
        fan = np.maximum(fans_of(kinds[name], mask)[mode == "fan_out"], 1)
        relative = np.abs(kernel) / np.sqrt(3 / fan)
        assert 0.95 < relative.max() <= 1 + 1e-6, (name, relative.max())
        # The same within each half of the fans, so that one constant fan cannot pass.
        for half in (fan <= np.median(fan), fan >= np.median(fan)):
            assert 0.9 < relative[half].max(), name


def test_weights_that_are_not_masked_stay(sparse):
    _, model, _, _, weights = sparse
    kernels = {id(getattr(k.kernel, "_variable", k.kernel)) for k in masked_kernels(model)}
    others = [v for v in strip_names(model) if id(getattr(v, "_variable", v)) not in kernels]
    before = [w for w in weights if w.ndim < 2 or w.shape == (3, 3, 10, 1)]  # Biases, norms, a depthwise kernel.
    after = [value(v) for v in others if v.shape.rank < 2 or tuple(v.shape) == (3, 3, 10, 1)]
    assert sorted((w.tolist() for w in before), key=str) == sorted((w.tolist() for w in after), key=str)


def strip_names(model):
    """The model's weights without masks, thresholds and steps."""
    own = {id(v) for layer in model._flatten_layers() if is_wrapper(layer) for v in layer._non_trainable_weights}
    return [v for v in model.weights if id(v) not in own]


def test_the_same_seed_gives_the_same_bits_when_the_model_is_built_again_in_the_process(sparse):
    name, model, _, _, _ = sparse
    reinitialize(model, SparseHeNormal(), seed=5)
    set_masks(model, masks.Random(0.5), seed=4)
    reinitialize(model, SparseHeNormal(), seed=5)
    # No clear_session: the layers that have no name of their own get other numbers.
    other = sparsify(MODELS[name][0](), 0.5, method="uniform", initializer=SparseHeNormal(), seed=3)
    set_masks(other, masks.Random(0.5), seed=4)
    reinitialize(other, SparseHeNormal(), seed=5)
    for first, second in zip(snapshot(model).values(), snapshot(other).values(), strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


def test_kernels_of_one_seed_differ(sparse):
    _, model, _, _, _ = sparse
    reinitialize(model, SparseHeNormal(), seed=0)
    # Kernels of one stream would share the signs, whatever their fans; two others share 30 with a chance of 1e-9.
    seen = {np.sign(value(k.kernel)[k.mask_value()][:30]).tobytes() for k in masked_kernels(model)}
    assert len(seen) == len(masked_kernels(model)) > 1


def test_stripping_gives_the_plain_model_with_the_zeros(sparse, tmp_path):
    name, model, x, kinds, _ = sparse
    if name == "subclassed":
        pytest.skip("is changed in place: below")
    kernels = snapshot(model)
    plain = strip(model)
    assert not any(is_wrapper(layer) for layer in plain._flatten_layers())
    assert is_wrapper_inside(model)
    np.testing.assert_array_equal(run(plain, x), run(model, x))
    assert len(plain.weights) == len(MODELS[name][0]().weights)
    found = {v.name.split("/")[-1].split(":")[0] + str(v.shape): value(v) for v in plain.weights}
    for k in masked_kernels(model):
        match = found[k.kernel.name.split("/")[-1].split(":")[0] + str(k.kernel.shape)]
        assert 0 < np.count_nonzero(match) <= kernels[k.name][1].sum()
    config = str(plain.get_config()) if name != "subclassed_in_functional" else ""
    assert "keras_sparse_init" not in config and "model_optimization" not in config and "Prune" not in config


def is_wrapper_inside(model):
    return any(is_wrapper(layer) for layer in model._flatten_layers())


def test_training_keeps_masks_and_zeros_without_a_callback(sparse):
    _, model, x, _, _ = sparse
    set_masks(model, masks.Random(0.5), seed=4)
    before = snapshot(model)
    outputs = run(model, x)
    model.compile(tf_keras.optimizers.Adam(1e-3), "mse", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(x, outputs + 1)
    for name, (kernel, mask) in snapshot(model).items():
        np.testing.assert_array_equal(mask, before[name][1], err_msg=name)
        assert not kernel[~mask].any(), name
        assert (kernel != before[name][0])[mask].any(), name
    apply_masks(model)


# Seeds.


def test_explicit_names_make_kernels_independent_of_other_layers():
    def model(*extra):
        return sequential((20,), layers.Dense(20, name="a"), *extra, layers.Dense(16, name="b"))

    plain = snapshot(sparsify(model(), 0.5, method="uniform", seed=0))
    longer = snapshot(sparsify(model(layers.Dense(20, name="new")), 0.5, method="uniform", seed=0))
    assert_equal(plain, {name: longer[name] for name in plain})


def test_another_seed_gives_other_masks_and_kernels():
    first, second = (snapshot(sparsify(small(), 0.5, seed=seed)) for seed in (0, 1))
    for name in first:
        assert (first[name][0] != second[name][0]).any() and (first[name][1] != second[name][1]).any()


def test_without_a_seed_every_call_draws_anew_and_set_random_seed_repeats_it():
    model = sparsify(small(), 0.5)
    first = snapshot(model)
    reinitialize(model)
    assert (snapshot(model)["a/kernel"][0] != first["a/kernel"][0]).any()
    results = []
    for _ in range(2):
        tf_keras.utils.set_random_seed(7)
        results.append(snapshot(sparsify(small(), 0.5)))
    assert_equal(*results)


def test_the_seed_of_an_initializer_is_taken_when_no_other_is_given():
    results = []
    for _ in range(2):
        model = sparsify(small(), 0.5, seed=0)
        reinitialize(model, SparseHeNormal(seed=3))
        results.append(snapshot(model))
    assert_equal(*results)
    reinitialize(model, SparseHeNormal(seed=3), seed=4)
    assert (snapshot(model)["a/kernel"][0] != results[0]["a/kernel"][0]).any()


def test_two_layers_of_the_same_name_are_told_apart():
    class Twins(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(20, name="twin")
            self.second = layers.Dense(20, name="twin")

        def call(self, x):
            return self.second(self.first(x))

    model = Twins()
    model(X)
    model = sparsify(model, 0.5, seed=0)
    found = snapshot(model)
    assert list(found) == ["twin/kernel", "twin/kernel_1"]
    assert (found["twin/kernel"][1] != found["twin/kernel_1"][1]).any()
    assert sparsity_table(model).total.nonzeros == 400


# sparsify.


def test_layers_of_different_sizes_share_the_budget_as_the_method_says():
    model = sequential((100,), layers.Dense(200, name="a"), layers.Dense(10, name="b"))
    table = sparsity_table(sparsify(model, 0.9, method="erk", seed=0))
    levels = layer_sparsities({"a/kernel": (100, 200), "b/kernel": (200, 10)}, 0.9, "erk")
    assert {row.name: row.nonzeros for row in table.rows} == {
        name: size - int(levels[name] * size) for name, size in (("a/kernel", 20000), ("b/kernel", 2000))
    }
    assert table.total.sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_rule_can_be_a_class_or_an_instance():
    for rule in (masks.ConstantFanIn, masks.ConstantFanIn(0.1)):
        table = sparsity_table(sparsify(small(), 0.5, method="uniform", rule=rule, seed=0))
        assert [(row.fan_in_min, row.fan_in_max) for row in table.rows] == [(10, 10), (12, 12)]


def test_skipped_layers_stay_dense_and_keep_their_weights():
    for skip in (["b"], "b", lambda layer: layer.name == "b"):
        dense = small()
        model = sparsify(dense, 0.5, skip=skip, seed=0)
        assert [k.name for k in masked_kernels(model)] == ["a/kernel"]
        np.testing.assert_array_equal(value(model.layers[1].kernel), value(dense.layers[1].kernel))


def test_skipping_a_layer_or_model_skips_what_is_inside_it():
    block = build("inside_layers")
    assert [k.name for k in masked_kernels(sparsify(block, 0.5, skip=["block"], seed=0))] == ["td/timed/kernel"]
    assert [k.name for k in masked_kernels(sparsify(nested(2), 0.5, skip=["level0"], seed=0))] == ["d/kernel"]
    model = sparsify(build("subclassed"), 0.5, skip=["inner", "in_list"], seed=0)
    assert [k.name for k in masked_kernels(model)] == ["in_dict/kernel", "last/kernel"]
    assert "first" in str([k.name for k in masked_kernels(sparsify(block, 0.5, skip=["second"], seed=0))])
    assert "second" not in str([k.name for k in masked_kernels(sparsify(block, 0.5, skip=["second"], seed=0))])


def test_layers_that_tfmot_cannot_wrap_are_named_in_a_warning_unless_skipped():
    def model():
        return sequential(
            (8, 8, 6),
            layers.DepthwiseConv2D(3, name="deep"),
            layers.Conv2D(4, 3),
            layers.EinsumDense("abcd,de->abce", (None, None, 5), name="einsum"),
        )

    with pytest.warns(UserWarning, match="stay dense: deep, einsum") as record:
        sparsify(model(), 0.5, seed=0)
    assert record[0].filename == __file__
    sparsify(model(), 0.5, skip=["deep", "einsum"], seed=0)


def test_frozen_layers_stay_frozen():
    dense = build("inside_layers")
    dense.layers[1].parts[0].trainable = False
    dense.layers[0].trainable = False
    model = sparsify(dense, 0.5, seed=0)
    assert len(model.trainable_weights) == len(dense.trainable_weights) == 3
    assert len(strip(model).trainable_weights) == 3


def test_a_sparse_model_can_be_made_sparse_again():
    model = sparsify(build("inside_layers"), 0.5, seed=0)
    again = sparsify(model, 0.75, seed=1)
    assert sparsity_table(again).total.sparsity == pytest.approx(0.75, abs=0.01)
    assert sparsity_table(model).total.sparsity == pytest.approx(0.5, abs=0.01)
    assert [k.name for k in masked_kernels(again)] == [k.name for k in masked_kernels(model)]
    twice = sparsify(sparsify(build("subclassed"), 0.5, seed=0), 0.75, seed=1)
    assert [k.name for k in masked_kernels(twice)] == list(SUBCLASSED)


def test_own_initializers_are_used_with_their_settings():
    model = sequential(
        (100,),
        layers.Dense(50, name="he", kernel_initializer=tf_keras.initializers.HeUniform()),
        layers.Dense(50, name="ours", kernel_initializer=SparseScaledInit(9.0, distribution="uniform")),
    )
    model = sparsify(model, 0.5, method="uniform", rule=masks.ConstantFanIn, seed=0)
    he, ours = (np.abs(value(k.kernel)).max() for k in masked_kernels(model))
    assert 0.99 < he / np.sqrt(6 / 50) <= 1 + 1e-6
    assert 0.99 < ours / np.sqrt(27 / 25) <= 1 + 1e-6


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), "half", None])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises((ValueError, TypeError), match="sparsity"):
        sparsify(small(), sparsity)


def test_bad_arguments_are_refused_before_anything_is_changed():
    model = subclassed()
    for arguments, error, message in (
        ({"wrapper": "other"}, ValueError, "wrapper"),
        ({"method": "other"}, ValueError, "method"),
        ({"skip": ["nobody"]}, ValueError, "unknown layers.*nobody"),
        ({"rule": "random"}, (TypeError, ValueError), "rule"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"initializer": "zeros"}, ValueError, "variance"),
    ):
        with pytest.raises(error, match=message):
            sparsify(model, 0.5, **arguments)
        assert not is_wrapper_inside(model), arguments


def test_models_that_cannot_be_made_sparse_are_refused():
    with pytest.raises(TypeError, match="tf_keras"):
        sparsify(keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)]), 0.5, wrapper="tfmot")
    with pytest.raises(ValueError, match="built"):
        sparsify(tf_keras.Sequential([layers.Dense(2)]), 0.5)
    with pytest.raises(ValueError, match="kernel"):
        sparsify(sequential((4,), layers.BatchNormalization()), 0.5)
    with pytest.raises(TypeError, match="layer or model"):
        sparsify("model", 0.5)


# set_masks and reinitialize.


@pytest.fixture
def model():
    return sparsify(small(), 0.5, seed=0)


def test_masks_can_be_a_rule_a_list_or_a_mapping(model):
    set_masks(model, masks.Random(0.75), seed=0)
    assert [row.nonzeros for row in sparsity_table(model).rows] == [120, 96]
    a, b = RNG.integers(0, 2, (20, 24)), RNG.integers(0, 2, (24, 16)).astype(bool)
    set_masks(model, [a, b.tolist()])
    kernels = masked_kernels(model)
    np.testing.assert_array_equal(kernels[0].mask_value(), a != 0)
    np.testing.assert_array_equal(kernels[1].mask_value(), b)
    set_masks(model, {"b/kernel": masks.Random(0.0)}, seed=0)
    np.testing.assert_array_equal(kernels[0].mask_value(), a != 0)
    assert kernels[1].mask_value().all()
    set_masks(model, [masks.ConstantFanIn(0.5), 1 - b], seed=0)
    np.testing.assert_array_equal(kernels[1].mask_value(), ~b)


def test_weights_off_a_new_mask_become_0_and_the_others_stay(model):
    before = snapshot(model)
    set_masks(model, masks.Random(0.5), seed=9)
    for name, (kernel, mask) in snapshot(model).items():
        np.testing.assert_array_equal(kernel, np.where(mask, before[name][0], 0))


def test_equal_shapes_get_different_masks_from_one_rule():
    model = sparsify(sequential((20,), layers.Dense(20, name="a"), layers.Dense(20, name="b")), 0.5, seed=0)
    set_masks(model, masks.Random(0.5), seed=0)
    a, b = (k.mask_value() for k in masked_kernels(model))
    assert (a != b).any()


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ([np.ones((20, 24))], ValueError, "each of the 2 masked kernels. Received: 1"),
        ([np.zeros((20, 24)), np.ones((16, 24))], ValueError, r"'b/kernel' cannot be set: .*\(24, 16\).*\(16, 24\)"),
        ([np.zeros((20, 24)), np.full((24, 16), 0.5)], ValueError, "'b/kernel' cannot be set: .*0 and 1"),
        ([np.zeros((20, 24)), np.full((24, 16), np.nan)], ValueError, "'b/kernel' cannot be set"),
        ([np.zeros((20, 24)), "mask"], (ValueError, TypeError), "'b/kernel' cannot be set"),
        ([np.zeros((20, 24)), None], (ValueError, TypeError), "'b/kernel' cannot be set"),
        ([np.zeros((20, 24)), masks.NM(2, 5)], ValueError, "'b/kernel' cannot be set"),
        ({"a/kernel": np.zeros((20, 24)), "c/kernel": None}, ValueError, "unknown kernels.*c/kernel.*a/kernel"),
        (masks.Random, TypeError, "rule"),
        (0.5, TypeError, "0.5"),
        ("random", TypeError, "random"),
        (None, TypeError, "None"),
    ],
    ids=str,
)
def test_bad_masks_are_refused_and_change_nothing(model, argument, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        set_masks(model, argument)
    assert_equal(before, snapshot(model))


def test_bad_initializers_are_refused_and_change_nothing(model):
    before = snapshot(model)
    for initializer in ("zeros", tf_keras.initializers.Constant(2.0), lambda shape, dtype: None, 3):
        with pytest.raises(ValueError, match="a/kernel.*variance"):
            reinitialize(model, initializer)
    with pytest.raises(ValueError, match="seed"):
        reinitialize(model, SparseHeNormal(), seed=-1)
    assert_equal(before, snapshot(model))


def test_models_without_masks_are_refused():
    for function in (reinitialize, lambda model: set_masks(model, masks.Random(0.5))):
        with pytest.raises(ValueError, match="masked kernels.*sparsify"):
            function(small())
    assert masked_kernels(small()) == [] and sparsity_table(small()).rows == []


def test_a_single_wrapped_layer_is_a_model_too():
    from keras_sparse_init.tfmot import static_wrapper

    wrapper = static_wrapper(layers.Dense(24, name="alone"))
    wrapper.build((None, 20))
    set_masks(wrapper, masks.Random(0.5), seed=0)
    reinitialize(wrapper, seed=0)
    assert [k.name for k in masked_kernels(wrapper)] == ["alone/kernel"]
    assert sparsity_table(wrapper).total.nonzeros == 240


# strip.


@contextlib.contextmanager
def without_package():
    """The tables of custom classes without this package's, as in a process that never imported it."""
    custom = tf_keras.saving.get_custom_objects()
    kept = {k: v for k, v in custom.items() if "sparse_init" not in v.__module__ and "model_opt" not in v.__module__}
    removed = {k: custom.pop(k) for k in list(custom) if k not in kept}
    assert removed
    yield
    custom.update(removed)


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved_model"])
def test_a_stripped_model_loads_without_the_package(tmp_path, name):
    dense = sequential(
        (6, 10),
        layers.Bidirectional(layers.SimpleRNN(4, return_sequences=True, recurrent_initializer=SparseHeNormal(seed=1))),
        layers.TimeDistributed(layers.Dense(8, kernel_initializer=SparseHeNormal(negative_slope=0.2, seed=2))),
        layers.Conv1D(4, 3, kernel_initializer=SparseScaledInit(sparsity=0.5)),
        layers.Flatten(),
        layers.Dense(3, kernel_initializer=SparseScaledInit(3.0, "fan_avg", "uniform"), name="kept_dense"),
    )
    plain = strip(sparsify(dense, 0.5, skip=["kept_dense"], seed=0))
    plain.save(tmp_path / name)
    with without_package():
        loaded = tf_keras.models.load_model(tmp_path / name)
    np.testing.assert_array_equal(run(loaded, SERIES), run(plain, SERIES))
    initializer = loaded.layers[-1].kernel_initializer
    assert type(initializer).__name__ == "VarianceScaling"
    assert (initializer.scale, initializer.mode, initializer.distribution) == (3.0, "fan_avg", "uniform")
    assert isinstance(dense.layers[-1].kernel_initializer, SparseScaledInit)


def test_a_subclassed_model_is_stripped_in_place(tmp_path):
    model = sparsify(build("subclassed"), 0.5, initializer=SparseHeNormal(), seed=0)
    outputs, kernels = run(model, X), snapshot(model)
    order = [layer.name for layer in model.layers]
    assert strip(model) is model
    assert masked_kernels(model) == [] and not is_wrapper_inside(model)
    assert len(model.weights) == 4 * 2 + 4
    np.testing.assert_array_equal(run(model, X), outputs)
    np.testing.assert_array_equal(value(model.last.kernel), kernels["last/kernel"][0])
    assert [name.removeprefix("static_prune_low_magnitude_") for name in order] == [
        layer.name for layer in model.layers
    ]
    model.save_weights(tmp_path / "weights.h5")
    other = subclassed()
    other.load_weights(tmp_path / "weights.h5")
    np.testing.assert_array_equal(run(other, X), outputs)


@pytest.mark.parametrize("name", ["sequential", "inside_layers", "subclassed"])
def test_a_stripped_model_trains_densely(name):
    plain = strip(sparsify(build(name), 0.9, seed=0))
    plain.compile(tf_keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    x = MODELS[name][1]
    plain.train_on_batch(x, run(plain, x) + 1)
    for weight in (weight for weight in plain.trainable_weights if weight.shape.rank > 1):
        assert np.count_nonzero(value(weight)) > 0.5 * value(weight).size, weight.name


def test_a_model_in_place_can_be_trained_made_sparse_and_trained_on():
    model = build("subclassed")
    model.compile("sgd", "mse")
    y = normal(2, 12)
    model.fit(X, y, verbose=0)
    model = sparsify(model, 0.5, seed=0)
    model.compile("sgd", "mse")
    before = snapshot(model)
    model.fit(X, y, verbose=0)
    after = snapshot(model)
    for name in before:
        assert (before[name][0] != after[name][0]).any()
        np.testing.assert_array_equal(after[name][0] != 0, after[name][1])


def test_apply_masks_zeroes_what_is_off_the_masks_and_nothing_else(model):
    k = masked_kernels(model)[0]
    values = normal(20, 24)
    k.kernel.assign(values)
    apply_masks(model)
    np.testing.assert_array_equal(value(k.kernel), np.where(k.mask_value(), values, 0))
    apply_masks(small())


class _Subclassed(tf_keras.Model):
    def __init__(self, initializer="he_normal"):
        super().__init__()
        self.hidden = tf_keras.layers.Dense(10, kernel_initializer=initializer)
        self.out = tf_keras.layers.Dense(3)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


@pytest.mark.parametrize("wrapper", ["tfmot", "masked"])
@pytest.mark.parametrize(
    ("kernel", "rule"), [("he_normal", masks.NM), ("he_normal", masks.Block(0.5, (7, 7))), ("zeros", masks.Random)]
)
def test_sparsify_that_fails_leaves_a_subclassed_model_as_it_was(kernel, rule, wrapper):
    model = _Subclassed(kernel)
    x = np.ones((2, 8), np.float32)
    expected, layers = model(x).numpy(), [model.hidden, model.out]
    with pytest.raises((TypeError, ValueError)):
        sparsify(model, 0.5, rule=rule, wrapper=wrapper, seed=0)
    assert [model.hidden, model.out] == layers and not masked_kernels(model)
    np.testing.assert_array_equal(model(x), expected)


def test_whole_models_draw_nothing_from_the_global_generators_when_they_have_a_seed():
    model = sparsify(MODELS["convolutions"][0](), 0.5, seed=0)
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    set_masks(model, masks.Random(0.5), seed=1)
    reinitialize(model, seed=1)
    reinitialize(model, SparseHeNormal, seed=1)
    reinitialize(model, "glorot_uniform", seed=1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_class_in_place_of_a_rule_or_an_initializer_is_refused_by_name():
    model = sparsify(MODELS["sequential"][0](), 0.5, seed=0)
    name = masked_kernels(model)[0].name
    with pytest.raises(TypeError, match="cannot be set: a rule must be an object such as masks.Random"):
        set_masks(model, {name: masks.Random})
    with pytest.raises(ValueError, match="`initializer` must be an initializer"):
        reinitialize(model, masks.Random)
    with pytest.raises(ValueError, match="unknown kernels"):
        set_masks(model, {3: np.ones(2), "no such": np.ones(2)})
