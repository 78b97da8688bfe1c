"""The networks of the training job."""

import numpy as np
import pytest

from keras_sparse_init import WeightNorm
from keras_sparse_init.training.networks import lenet5, mlp


def _kernels(model):
    return {layer.name: tuple(layer.kernel.shape) for layer in model.layers if hasattr(layer, "kernel")}


def test_lenet5_has_the_layers_of_lenet5():
    model = lenet5((28, 28, 1), 10)
    assert _kernels(model) == {
        "conv1": (5, 5, 1, 6),
        "conv2": (5, 5, 6, 16),
        "dense1": (256, 120),
        "dense2": (120, 84),
        "logits": (84, 10),
    }
    assert model.name == "lenet5" and model.output_shape == (None, 10)


def test_mlp_has_a_layer_for_each_size_and_takes_images():
    model = mlp((8, 8, 3), 4, hidden_sizes=(7, 6, 5))
    assert _kernels(model) == {"dense1": (192, 7), "dense2": (7, 6), "dense3": (6, 5), "logits": (5, 4)}
    assert model.name == "mlp" and model(np.zeros((2, 8, 8, 3), np.float32)).shape == (2, 4)


def test_hidden_layers_use_the_activation_and_logits_are_linear():
    for model in (lenet5((16, 16, 1), 3, activation="tanh"), mlp((16, 16, 1), 3, activation="tanh")):
        activations = [layer.activation.__name__ for layer in model.layers if hasattr(layer, "kernel")]
        assert set(activations[:-1]) == {"tanh"} and activations[-1] == "linear"


@pytest.mark.parametrize("make", [lenet5, mlp])
def test_batch_normalization_stands_between_a_hidden_layer_without_bias_and_its_activation(make):
    model = make((16, 16, 1), 3, activation="tanh", batch_norm=True)
    names = [layer.name for layer in model.layers if not layer.name.startswith(("pool", "flatten"))]
    hidden = [name for name in names if "_" not in name and name != "logits"]
    assert names == [part for n in hidden for part in (n, f"{n}_norm", f"{n}_activation")] + ["logits"]
    for name in hidden:
        layer = model.get_layer(name)
        assert not layer.use_bias and layer.activation.__name__ == "linear"
        assert model.get_layer(f"{name}_activation").activation.__name__ == "tanh"
    assert model.get_layer("logits").use_bias


@pytest.mark.parametrize("make", [lenet5, mlp])
def test_a_network_is_the_same_in_both_kerases(make):
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 1)).astype(np.float32)
    models = [make((16, 16, 1), 3, seed=7, keras=name) for name in ("tf_keras", "keras")]
    assert [type(model).__module__.split(".")[0] for model in models] == ["tf_keras", "keras"]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)
    first, second = (np.asarray(model(x)) for model in models)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
@pytest.mark.parametrize("make", [lenet5, mlp])
def test_weights_are_normalized_by_reparameterization_or_constraint(make, keras):
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 1)).astype(np.float32)
    plain, reparam, constraint = (
        make((16, 16, 1), 3, seed=7, keras=keras, weight_norm=w) for w in (None, "reparam", "constraint")
    )
    np.testing.assert_allclose(np.asarray(reparam(x)), np.asarray(plain(x)), rtol=1e-4, atol=1e-5)
    names = [layer.name for layer in plain.layers if hasattr(layer, "kernel")]
    wrapped = {layer.layer.name: layer for layer in reparam.layers if isinstance(layer, WeightNorm)}
    assert list(wrapped) == names
    for name in names:
        kernel = np.asarray(constraint.get_layer(name).kernel)
        norms = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
        np.testing.assert_allclose(norms, 1, rtol=1e-5)
        ratio = kernel / np.asarray(plain.get_layer(name).kernel)
        np.testing.assert_allclose(
            ratio, np.broadcast_to(ratio.reshape(-1, kernel.shape[-1])[0], ratio.shape), rtol=1e-4
        )


def test_the_seed_determines_the_kernels_and_no_two_of_equal_shape_are_equal():
    first, again, other = (mlp((3, 1, 1), 3, hidden_sizes=(3, 3), seed=seed).get_weights()[::2] for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[1], first[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lenet5((15, 28, 1), 10), r"at least 16x16 pixels.*\(15, 28, 1\)"),
        (lambda: lenet5((28, 28), 10), "`input_shape` must be 3 positive integers"),
        (lambda: lenet5((28, 28, 1), 10, hidden_sizes=(6, 16)), "`hidden_sizes` must be 4 positive integers"),
        (lambda: lenet5((28, 28, 1), 0), "`classes` must be a positive integer.*classes=0"),
        (lambda: mlp((28, 28, 1), 10, hidden_sizes=(300, 0)), "`hidden_sizes` must be positive integers"),
        (lambda: mlp((28, 28, 1), 10, hidden_sizes=(30.5,)), "`hidden_sizes` must be positive integers"),
        (lambda: mlp((28, 28, 1), 10, batch_norm=1), "`batch_norm` must be a bool.*batch_norm=1"),
        (lambda: mlp((28, 28, 1), 10, weight_norm="both"), "`weight_norm` must be one of 'constraint', 'reparam'"),
        (lambda: mlp((28, 28, 1), 10, keras="torch"), "`keras` must be one of 'tf_keras', 'keras'"),
        (lambda: mlp((28, 28, 1), 10, hidden_sizes=()), "`hidden_sizes` must be positive integers"),
    ],
)
def test_sizes_that_make_no_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_smallest_image_of_lenet5_passes():
    assert lenet5((16, 16, 1), 2).output_shape == (None, 2)
