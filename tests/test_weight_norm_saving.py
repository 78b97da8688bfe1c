"""`WeightNorm` saved, loaded, cloned and folded, in every format of both Kerases, bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import CASES, arguments, data, number, predicted, subclassed

from keras_sparse_init import SparseHeNormal, WeightNorm, fold_weight_norm

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
X, Y = data(8, 6, 5), data(8, 2, seed=1)


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(0)


def network(library, built=True):
    layers = library.layers
    return library.Sequential(
        [
            *([library.Input((6, 5))] if built else []),
            WeightNorm(layers.SeparableConv1D(4, 3, padding="same"), weight_names=["pointwise_kernel"]),
            # In Keras 3, not of an `RNN` of cells: clones of those have names that no h5 can hold, plain ones too.
            WeightNorm(layers.SimpleRNN(4)),
            WeightNorm(layers.Dense(8, kernel_regularizer="l2"), use_scale=False, init_scale=0.5),
            WeightNorm(layers.Dense(2, use_bias=False), feature_axes=-2, name="last"),
        ]
    )


@functools.cache
def trained(library):
    """A model that was built by `fit`; no test changes it."""
    keras.utils.set_random_seed(0)
    model = network(library, built=False)
    model.compile(library.optimizers.Adam(0.01), library.losses.MeanSquaredError())
    model.fit(X, Y, batch_size=4, verbose=0)
    return model


def assert_same(model, other):
    for layer, same in zip(model.layers, other.layers, strict=True):
        for option in ("weight_names", "feature_axes", "use_scale", "init_scale"):
            assert getattr(layer, option) == getattr(same, option)
    assert len(model.get_weights()) == len(other.get_weights())
    for weight, other_weight in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other_weight)
    np.testing.assert_array_equal(predicted(other, X), predicted(model, X))
    np.testing.assert_array_equal(float(sum(other.losses)), float(sum(model.losses)))
    assert float(sum(model.losses)) > 0


@either_keras
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved_model", "weights.weights.h5", "clone", "deepcopy"])
@pytest.mark.parametrize("state", ["new", "built by fit"])
def test_a_model_comes_back_bit_for_bit_and_trains_on(library, name, state, tmp_path):
    if library is keras and name == "saved_model":
        pytest.skip("Keras 3 exports to SavedModel only, see below")
    model = network(library) if state == "new" else trained(library)
    if (state, name) == ("built by fit", "deepcopy"):
        model = trained.__wrapped__(library)  # Keras 3 itself copies no compiled model that was once saved as h5.
    path = tmp_path / name
    if name == "clone":
        other = library.models.clone_model(model)
        other.set_weights(model.get_weights())
    elif name == "deepcopy":
        other = copy.deepcopy(model)
    elif "weights" in name:
        model.save_weights(path)
        other = network(library)
        other.load_weights(path)
    else:
        model.save(path, **({"save_format": "tf"} if name == "saved_model" else {}))
        other = library.models.load_model(path)
    assert_same(model, other)
    before = model.get_weights()
    traced = state == "new" and name in ("model.keras", "saved_model")  # To trace takes a second.
    other.compile(library.optimizers.Adam(0.01), "mse", run_eagerly=not traced)
    other.fit(X, Y, verbose=0)
    for weight, same, moved in zip(before, model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, same)
        assert (moved != weight).any()


@either_keras
@pytest.mark.parametrize("built", [True, False])
def test_a_checkpoint_comes_back_also_into_a_model_that_is_not_built(library, built, tmp_path):
    if library is keras and not built:
        pytest.skip("checkpoints of Keras 3 need the variables")
    model = trained(library)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    other = network(library, built)
    status = tf.train.Checkpoint(model=other).restore(path)
    other(X)
    status.assert_existing_objects_matched()
    assert_same(model, other)


@either_keras
def test_an_exported_model_gives_the_same_predictions_and_gradients(library, tmp_path):
    model = trained(library)
    if library is keras:
        model.export(tmp_path / "exported", verbose=False)
        exported = tf.saved_model.load(tmp_path / "exported")
        run = exported.serve
    else:
        tf.saved_model.save(model, tmp_path / "exported")
        exported = tf.saved_model.load(tmp_path / "exported")
        run = functools.partial(exported, training=False)
    gradients = []
    for function in (run, lambda x: model(x, training=False)):
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = function(x)
        gradients.append((output, tape.gradient(output, x)))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # Of the loaded weights too: the gradient of w = g v / ||v|| is written out, and saved with the function.
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(run(tf.constant(X)) ** 2)
    loaded = tape.gradient(value, exported.trainable_variables)
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(model(tf.constant(X), training=False) ** 2)
    variables = [weight.value if library is keras else weight for weight in model.trainable_weights]
    for one, other in zip(loaded, tape.gradient(value, variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@either_keras
def test_the_config_of_a_layer_that_is_not_built_has_every_option(library):
    layer = WeightNorm(
        library.layers.Dense(3), weight_names=["kernel"], feature_axes=0, use_scale=False, init_scale=2.0, name="mine"
    )
    config = json.loads(json.dumps(layer.get_config()))
    other = type(layer).from_config(config)
    assert json.loads(json.dumps(other.get_config())) == config
    assert {key: config[key] for key in ("weight_names", "feature_axes", "use_scale", "init_scale", "name")} == {
        "weight_names": ["kernel"],
        "feature_axes": [0],
        "use_scale": False,
        "init_scale": 2.0,
        "name": "mine",
    }


LOADING = """
import sys
import numpy as np, keras, tf_keras

def check(name, library):
    for ending in ("keras", "h5"):
        model = library.models.load_model(f"{name}.{ending}")
        np.testing.assert_array_equal(np.asarray(model(np.load("x.npy"), training=False)), np.load(f"{name}.npy"))
    return model

for library in (keras, tf_keras):
    check(f"folded_{library.__name__}", library)
assert not any(name.startswith("keras_sparse_init") for name in sys.modules)
import keras_sparse_init
assert "keras_sparse_init.layers" not in sys.modules
for library in (keras, tf_keras):
    model = check(library.__name__, library)
    assert type(model.layers[0]).__name__ == "WeightNorm"
    assert isinstance(model.layers[0], library.layers.Layer)
"""


@pytest.mark.filterwarnings("ignore:.*model was.*compiled")
def test_loading_in_another_process_needs_the_package_and_of_folded_models_not_even_that(tmp_path):
    np.save(tmp_path / "x.npy", X)
    for library in (keras, tf_keras):
        model = trained(library)
        for name, saved in ((library.__name__, model), (f"folded_{library.__name__}", fold_weight_norm(model))):
            for ending in ("keras", "h5"):
                saved.save(tmp_path / f"{name}.{ending}")
            np.save(tmp_path / f"{name}.npy", predicted(saved, X))
    command = [sys.executable, "-W", "ignore", "-c", LOADING]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# Folding.


# Every layer in both Kerases, and built before and after it was wrapped.
@pytest.mark.parametrize(
    ("library", "name", "built"),
    [
        (library, name, i % 2 == built)
        for i, name in enumerate(CASES)
        for built, library in enumerate((keras, tf_keras))
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folded_layer_is_plain_and_has_the_same_outputs(library, name, built):
    args, kwargs = arguments(library, name)
    layer = CASES[name][0](library.layers)
    if built:
        layer(*args, **kwargs)
    wrapped = WeightNorm(layer)
    wrapped(*args, **kwargs)
    random = np.random.default_rng(1)
    wrapped.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in wrapped.get_weights()])
    plain = wrapped.fold()
    assert type(plain) is type(layer)
    assert plain.built
    assert plain.name == layer.name
    assert json.dumps(plain.get_config(), default=str) == json.dumps(layer.get_config(), default=str)
    assert [tuple(w.shape) for w in plain.weights] == [tuple(w.shape) for w in layer.weights]
    assert not {id(w) for w in plain.weights} & {id(w) for w in layer.weights}
    outputs, expected = tf.nest.flatten(plain(*args, **kwargs)), tf.nest.flatten(wrapped(*args, **kwargs))
    for output, other in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(number(output), number(other))
    again = WeightNorm(plain)
    for output, other in zip(tf.nest.flatten(again(*args, **kwargs)), expected, strict=True):
        np.testing.assert_allclose(number(output), number(other), rtol=1e-4, atol=1e-5)


def functional(library):
    layers = library.layers
    shared = WeightNorm(layers.Dense(4, activation="tanh", name="shared", kernel_initializer=SparseHeNormal()))
    a, b = library.Input((4,)), library.Input((4,))
    inner_input = library.Input((8,))
    inner = library.Model(inner_input, WeightNorm(layers.Dense(3, name="inner"))(inner_input), name="nested")
    both = inner(layers.Concatenate()([shared(a), shared(b)]))
    deep = layers.TimeDistributed(WeightNorm(layers.Dense(2)), name="deep")(layers.Reshape((1, 3))(both))
    return library.Model([a, b], deep)


@either_keras
@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
def test_a_folded_model_has_no_weight_norm_left_and_the_same_outputs(library, kind, tmp_path):
    model = {
        "sequential": network,
        "functional": functional,
        "subclassed": lambda library: subclassed(library, WeightNorm),
    }[kind](library)
    x = {"sequential": X, "functional": [data(3, 4), data(3, 4, seed=1)], "subclassed": data(3, 5)}[kind]
    before = predicted(model, x)
    if kind == "sequential":
        model.set_weights(trained(library).get_weights())
        before = predicted(model, x)
    wrappers = [layer for layer in model._flatten_layers() if isinstance(layer, WeightNorm)]
    for wrapper in wrappers:
        for kernel in wrapper.get_prunable_weights():
            kernel.assign(number(kernel) * 3)
    np.testing.assert_allclose(predicted(model, x), before, rtol=1e-4, atol=1e-5)
    before, weights = predicted(model, x), model.get_weights()
    plain = fold_weight_norm(model)
    assert not any(isinstance(layer, WeightNorm) for layer in plain._flatten_layers())
    np.testing.assert_allclose(predicted(plain, x), before, rtol=1e-6, atol=1e-7)
    assert len(plain.weights) == len(weights) - sum(
        wrapper.use_scale * len(wrapper.get_prunable_weights()) for wrapper in wrappers
    )
    if kind == "subclassed":
        assert plain is model
    else:
        np.testing.assert_array_equal(predicted(model, x), before)
    plain.compile("adam", "mse", run_eagerly=True)
    plain.fit(x, np.zeros_like(before), verbose=0)
    if kind != "subclassed":
        plain.save(tmp_path / "model.keras")
        loaded = library.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predicted(loaded, x), predicted(plain, x))


@either_keras
def test_a_subclassed_model_folded_in_place_is_regularized_as_the_plain_one(library):
    model = subclassed(library, lambda layer: WeightNorm(library.layers.Dense(6, kernel_regularizer="l2")))
    model(tf.constant(data(2, 5)))
    model.first.layer.kernel.assign(number(model.first.layer.kernel) * 3)
    before = float(sum(model.losses))
    plain = fold_weight_norm(model)
    np.testing.assert_allclose(float(sum(plain.losses)), before, rtol=1e-5)
    for layer in (plain.first, *plain.blocks):
        layer.kernel.assign(number(layer.kernel) * 2)
    np.testing.assert_allclose(float(sum(plain.losses)), before * 4, rtol=1e-5)
