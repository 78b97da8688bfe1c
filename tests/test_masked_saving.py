"""`Masked` saved, loaded, restored, cloned and copied, in every format of both Kerases, bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import CASES, arguments, data, half, number, predicted, weights_and_masks

from keras_sparse_init import Masked, SparseHeNormal, masked_kernels, masks, set_masks

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(0)


TIMES, FEATURES = 6, 5
X, Y = data(8, TIMES, FEATURES), data(8, 2, seed=1)
FORMATS = ["model.keras", "model.h5", "saved_model"]


def network(library, built=True, **settings):
    """Masked layers of several kinds, with masks that no config knows: they come from the kernel or are drawn anew."""
    layers = library.layers
    return library.Sequential(
        [
            *([library.Input((TIMES, FEATURES))] if built else []),
            Masked(layers.SeparableConv1D(4, 3, padding="same"), sparsity=0.5, **settings),
            Masked(layers.Bidirectional(layers.RNN(layers.GRUCell(5))), mask=masks.ConstantFanIn(0.5), **settings),
            Masked(layers.Dense(8, kernel_initializer=SparseHeNormal(sparsity=0.5))),
            Masked(layers.Dense(2, use_bias=False), sparsity=0.5, dtype="float32", name="last", **settings),
        ]
    )


def attention(library):
    layers = library.layers
    queries, values = library.Input((4, 3), name="queries"), library.Input((7, 5), name="values")
    attended = Masked(layers.MultiHeadAttention(2, 3), sparsity=0.5)(queries, value=values)
    return library.Model([queries, values], Masked(layers.Dense(2), sparsity=0.5)(attended))


def trained(library, changed=False, built=True):
    model = network(library, built)
    # By its name, Keras 3 does not find a loss that it has read from h5.
    model.compile(library.optimizers.Adam(0.01), library.losses.MeanSquaredError())
    model.fit(X, Y, batch_size=4, verbose=0)
    if changed:
        set_masks(model, masks.Random(0.75), seed=9)
        model.fit(X, Y, batch_size=4, verbose=0)
    return model


@functools.cache
def trained_once(library):
    library.utils.set_random_seed(0)
    return trained(library, changed=True)


@pytest.fixture(params=[keras, tf_keras], ids=["keras", "tf_keras"])
def model(request):
    return request.param, trained_once(request.param)


def assert_same(model, other, optimizer=False):
    assert len(weights_and_masks(model)) == len(masked_kernels(other)) > 1
    for (kernel, mask), (other_kernel, other_mask) in zip(
        weights_and_masks(model), weights_and_masks(other), strict=True
    ):
        np.testing.assert_array_equal(mask, other_mask)
        np.testing.assert_array_equal(kernel, other_kernel)
        assert not kernel[mask == 0].any()
    for weight, other_weight in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other_weight)
    if optimizer:
        variables, others = model.optimizer.variables, other.optimizer.variables
        variables, others = (v() if callable(v) else v for v in (variables, others))
        assert len(variables) == len(others) > 5
        for variable, other_variable in zip(variables, others, strict=True):
            np.testing.assert_array_equal(number(variable), number(other_variable))


def save(library, model, path):
    if path.name == "saved_model":
        model.save(path, save_format="tf")
    else:
        model.save(path)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_trained_model_comes_back_with_its_optimizer_and_trains_on_alike(model, tmp_path, name):
    library, saved = model
    if library is keras and name == "saved_model":
        pytest.skip("Keras 3 exports to SavedModel only, see below")
    loaded = library.models.load_model(save(library, saved, tmp_path / name))
    # The optimizer's variables of plain models come back from these alone, too.
    assert_same(saved, loaded, optimizer=name == "model.keras" or (library, name) == (tf_keras, "model.h5"))
    np.testing.assert_allclose(predicted(loaded, X), predicted(saved, X), rtol=1e-5, atol=1e-6)
    assert type(loaded.layers[0]) is type(saved.layers[0])
    before = weights_and_masks(loaded)
    if (library, name) == (keras, "model.h5"):
        # Keras 3 has given the optimizer no variables, for plain models as well.
        loaded.compile("adam", "mse")
    # To trace takes seconds.
    loaded.run_eagerly = (library, name) not in ((keras, "model.keras"), (tf_keras, "saved_model"))
    loaded.fit(X, Y, verbose=0)
    changed = []
    for (old_kernel, old_mask), (kernel, mask) in zip(before, weights_and_masks(loaded), strict=True):
        np.testing.assert_array_equal(mask, old_mask)
        assert not kernel[mask == 0].any()
        changed.append((kernel != old_kernel).any())
    assert sum(changed) >= len(changed) / 2


@pytest.mark.parametrize("name", ["model.weights.h5", "model.h5", "checkpoint"])
def test_weights_alone_come_back(model, tmp_path, name):
    library, saved = model
    if library is keras and name != "model.weights.h5":
        pytest.skip("Keras 3 saves weights in one format only")
    saved.save_weights(tmp_path / name)
    fresh = network(library, seed=3)
    assert all((a[1] != b[1]).any() for a, b in zip(weights_and_masks(saved), weights_and_masks(fresh), strict=True))
    fresh.load_weights(tmp_path / name)
    assert_same(saved, fresh)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_checkpoint_comes_back_also_into_a_model_that_is_not_built(model, tmp_path, built, with_optimizer):
    library, saved = model
    if library is keras and not built:
        pytest.skip("checkpoints of Keras 3 need the variables")
    optimizer = {"optimizer": saved.optimizer} if with_optimizer else {}
    path = tf.train.Checkpoint(model=saved, **optimizer).save(str(tmp_path / "checkpoint"))
    other = network(library, built, seed=3)
    other.compile(library.optimizers.Adam(0.01), "mse")
    optimizer = {"optimizer": other.optimizer} if with_optimizer else {}
    status = tf.train.Checkpoint(model=other, **optimizer).restore(path)
    if built and library is keras and with_optimizer:
        other.optimizer.build(other.trainable_variables)
        status = tf.train.Checkpoint(model=other, **optimizer).restore(path)
    other(X)
    status.assert_existing_objects_matched()
    assert_same(saved, other)


@pytest.mark.parametrize("name", ["cloned", "json"])
def test_a_copy_made_from_the_config_has_the_masks_and_kernels_drawn_for_them(model, name):
    library, saved = model
    if name == "json":
        text = saved.to_json()
        json.loads(text)
        copied = library.models.model_from_json(text)
    else:
        copied = library.models.clone_model(saved)
    for (kernel, mask), (other_kernel, other_mask) in zip(
        weights_and_masks(saved), weights_and_masks(copied), strict=True
    ):
        np.testing.assert_array_equal(mask, other_mask)
        np.testing.assert_array_equal(other_kernel != 0, mask)
        assert (kernel != other_kernel).any()
    copied.set_weights(saved.get_weights())
    assert_same(saved, copied)


@either_keras
def test_kernels_of_a_clone_have_the_standard_deviations_of_their_masks(library):
    model = library.Sequential(
        [library.Input((50,)), Masked(library.layers.Dense(40, kernel_initializer="he_normal"), sparsity=0.9, seed=5)]
    )
    for clone in (library.models.clone_model(model), library.models.model_from_json(model.to_json())):
        np.testing.assert_array_equal(weights_and_masks(clone)[0], weights_and_masks(model)[0])
    unseeded = library.Sequential(
        [library.Input((50,)), Masked(library.layers.Dense(40, kernel_initializer="he_normal"), sparsity=0.9)]
    )
    ((kernel, mask),) = weights_and_masks(library.models.clone_model(unseeded))
    # 200 weights of variance about 2/5; drawn without the mask they would have 2/50. The bounds are 6 deviations away.
    assert 0.2 < kernel[mask == 1].var() < 0.9


@either_keras
def test_the_config_of_a_layer_that_is_not_built_makes_one_alike(library):
    rule = {"kernel": masks.Random(0.5), "recurrent_kernel": half(3, 12)}
    layer = Masked(library.layers.LSTM(3), mask=rule, seed=4, weight_names=["kernel", "recurrent_kernel"], name="mine")
    config = layer.get_config()
    json.dumps(config)
    other = type(layer).from_config(json.loads(json.dumps(config)))
    assert other.name == "mine"
    assert not other.built
    x = tf.constant(data(2, 5, 4))
    layer(x)
    other(x)
    for first, second in zip(weights_and_masks(layer), weights_and_masks(other), strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


@either_keras
def test_a_layer_that_was_built_before_it_was_wrapped_is_saved_and_cloned(library, tmp_path):
    dense = library.layers.Dense(3)
    dense.build((None, 5))
    masked = Masked(dense, mask=half(5, 3))
    masked.build()
    model = library.Sequential([library.Input((5,)), masked])
    x = data(4, 5)
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        loaded = library.models.load_model(tmp_path / name)
        np.testing.assert_array_equal(weights_and_masks(loaded), weights_and_masks(model))
        np.testing.assert_allclose(predicted(loaded, x), predicted(model, x), rtol=1e-5)
    np.testing.assert_array_equal(weights_and_masks(library.models.clone_model(model))[0][1], half(5, 3))


@either_keras
def test_a_copy_of_a_layer_that_was_built_before_has_kernels_drawn_for_the_masks(library):
    dense = library.layers.Dense(3)
    dense.build((None, 5))
    masked = Masked(dense, mask=half(5, 3), seed=6)
    masked.build()
    model = library.Sequential([library.Input((5,)), masked])
    fresh = Masked(library.layers.Dense(3), mask=half(5, 3), seed=6)
    fresh.build((None, 5))
    for copied in (library.models.model_from_json(model.to_json()), library.models.clone_model(model)):
        np.testing.assert_array_equal(weights_and_masks(copied), weights_and_masks(fresh))
    assert (weights_and_masks(fresh)[0][0] != weights_and_masks(model)[0][0]).any()


@either_keras
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "clone", "checkpoint", "export"])
def test_attention_to_values_of_another_width(library, tmp_path, name):
    model = attention(library)
    set_masks(model, masks.Random(0.6), seed=2)
    x = [data(2, 4, 3), data(2, 7, 5)]
    expected = predicted(model, x)
    if name == "export":
        if library is tf_keras:
            model.save(tmp_path / name, save_format="tf")
            output = predicted(tf_keras.models.load_model(tmp_path / name), x)
        else:
            model.export(tmp_path / name, verbose=False)
            exported = tf.saved_model.load(tmp_path / name)
            output = exported.serve([tf.constant(value) for value in x])
    else:
        if name == "clone":
            other = library.models.clone_model(model)
            other.set_weights(model.get_weights())
        elif name == "checkpoint":
            other = attention(library)
            path = tf.train.Checkpoint(model).write(str(tmp_path / name))
            tf.train.Checkpoint(other).read(path).assert_existing_objects_matched()
        else:
            model.save(tmp_path / name)
            other = library.models.load_model(tmp_path / name)
        assert_same(model, other)
        output = predicted(other, x)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@either_keras
def test_an_exported_model_gives_the_same_predictions(library, tmp_path):
    model = trained_once(library)
    if library is keras:
        model.export(tmp_path / "exported", verbose=False)
        exported = tf.saved_model.load(tmp_path / "exported")
        output = exported.serve(tf.constant(X))
    else:
        tf.saved_model.save(model, tmp_path / "exported")
        exported = tf.saved_model.load(tmp_path / "exported")
        output = exported(tf.constant(X), training=False)
    np.testing.assert_allclose(output, predicted(model, X), rtol=1e-5, atol=1e-6)


@either_keras
@pytest.mark.parametrize("part", ["layer", "model"])
def test_a_deep_copy_has_weights_of_its_own(library, part):
    model = network(library)
    set_masks(model, masks.ConstantFanIn(0.5), seed=2)
    original = model if part == "model" else model.layers[-1]
    copied = copy.deepcopy(original)
    x = X if part == "model" else data(3, 8)
    before = number(original(tf.constant(x)))
    np.testing.assert_array_equal(number(copied(tf.constant(x))), before)
    for kernel in masked_kernels(copied):
        kernel.kernel.assign(np.zeros(kernel.shape))
    np.testing.assert_array_equal(number(original(tf.constant(x))), before)
    assert all(number(kernel.kernel).any() for kernel in masked_kernels(original))


LOADING = """
import json, sys
import numpy as np
import keras
import keras_sparse_init
assert not {{"tf_keras", "keras_sparse_init.layers"}} & set(sys.modules)
import tf_keras
results = {{}}
for name in {names}:
    library = globals()[name.split("/")[0]]
    model = library.models.load_model(name)
    assert type(model.layers[0]).__name__ == "Masked"
    assert isinstance(model.layers[0], library.layers.Layer)
    outputs = np.asarray(model(np.load("x.npy"), training=False))
    kernels = keras_sparse_init.masked_kernels(model)
    results[name] = [outputs.tolist(), [kernel.mask_value().tolist() for kernel in kernels]]
print(json.dumps(results))
"""


def test_importing_the_package_is_enough_to_load_a_model_in_another_process(tmp_path):
    """One Keras is imported before the package, the other after it."""
    models = {"keras": trained_once(keras), "tf_keras": trained_once(tf_keras)}
    names = [f"{library}/{name}" for library in models for name in FORMATS if (library, name) != ("keras", FORMATS[2])]
    for name in names:
        library = name.split("/")[0]
        (tmp_path / library).mkdir(exist_ok=True)
        save(library, models[library], tmp_path / name)
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-W", "ignore", "-c", LOADING.format(names=names)]
    # tfmot, imported by other tests, asks TensorFlow by this variable to import tf_keras.
    environment = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert list(results) == names
    for name, (outputs, loaded_masks) in results.items():
        saved = models[name.split("/")[0]]
        np.testing.assert_allclose(outputs, predicted(saved, X), rtol=1e-5, atol=1e-6)
        for mask, (_, expected) in zip(loaded_masks, weights_and_masks(saved), strict=True):
            np.testing.assert_array_equal(mask, expected)


@either_keras
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_of_every_layer_do_not_depend_on_what_was_built_before(library, name, tmp_path):
    """Names of weights that count the layers of the process would find no match, silently."""
    args, kwargs = arguments(library, name)
    if (library, name) == (keras, "rnn_of_cells"):
        pytest.skip("Keras 3 itself does not put the weights of `StackedRNNCells` into checkpoints")

    def build():
        masked = Masked(CASES[name][0](library.layers), sparsity=0.5)
        masked(*args, **kwargs)
        return masked

    first, second = build(), build()
    path = tf.train.Checkpoint(layer=first).write(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(layer=second).read(path).assert_existing_objects_matched()
    for (kernel, mask), (other_kernel, other_mask) in zip(
        weights_and_masks(first), weights_and_masks(second), strict=True
    ):
        np.testing.assert_array_equal(mask, other_mask)
        np.testing.assert_array_equal(kernel, other_kernel)
