"""The data of the training job."""

import gzip
import importlib
import os
import pickle
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_sparse_init.training import data as data_module
from keras_sparse_init.training.data import load_data, make_data


def _arrays(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (6, 8, 8, 1), np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.integers(0, 256, (3, 8, 8, 1), np.uint8),
        "y_test": np.array([2, 1, 0]),
    }
    return arrays | changes


def test_embedded_digits_are_those_of_scikit_learn_bit_for_bit():
    expected = load_digits()
    with np.load(data_module._DIGITS) as archive:
        np.testing.assert_array_equal(archive["images"], expected.images)
        np.testing.assert_array_equal(archive["labels"], expected.target)
    assert data_module._DIGITS.stat().st_size < 100_000


def test_digits_are_resized_bilinearly_as_tensorflow_does():
    digits = load_data("digits")
    source = load_digits()
    resized = tf.image.resize(source.images[..., None] / 16, (28, 28), method="bilinear").numpy()
    found = np.concatenate([digits.x_train, digits.x_test])
    assert found.shape == resized.shape and found.dtype == np.float32
    # The split has moved the images: compared as sets, by their order along a fixed random projection.
    projection = np.random.default_rng(0).normal(size=28 * 28)
    order, expected_order = (np.argsort(x.reshape(len(x), -1) @ projection) for x in (found, resized))
    np.testing.assert_allclose(found[order], resized[expected_order], atol=1e-6)
    labels = np.concatenate([digits.y_train, digits.y_test])
    np.testing.assert_array_equal(labels[order], source.target[expected_order])


def test_digits_lie_between_0_and_1_and_are_split_by_class():
    digits = load_data("digits")
    assert digits.x_train.min() == 0 and digits.x_train.max() == 1
    assert (len(digits.x_train), len(digits.x_test), digits.classes) == (1437, 360, 10)
    train, test = np.bincount(digits.y_train), np.bincount(digits.y_test)
    assert np.all(np.abs(test - (train + test) / 5) < 1)


def test_no_digit_is_both_in_training_and_test():
    digits = load_data("digits")
    distinct = {image.tobytes() for image in np.concatenate([digits.x_train, digits.x_test])}
    assert len(distinct) == len({image.tobytes() for image in load_digits().images}) == 1797


def test_npz_with_uint8_images_is_scaled_and_with_floats_taken_as_it_is(tmp_path):
    arrays = _arrays(x_test=np.linspace(-2, 3, 3 * 64).reshape(3, 8, 8, 1))
    np.savez(tmp_path / "mine.npz", **arrays)
    data = load_data(tmp_path / "mine.npz")
    np.testing.assert_allclose(data.x_train, arrays["x_train"] / 255, rtol=1e-6)
    np.testing.assert_allclose(data.x_test, arrays["x_test"], rtol=1e-6)
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert (data.classes, data.input_shape) == (3, (8, 8, 1))


def test_images_without_channels_get_one_and_labels_may_be_a_column():
    arrays = _arrays()
    data = make_data(
        "mine",
        x_train=arrays["x_train"][..., 0],
        y_train=arrays["y_train"][:, None],
        x_test=arrays["x_test"],
        y_test=arrays["y_test"],
    )
    assert data.x_train.shape == (6, 8, 8, 1) and data.y_train.shape == (6,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.array([0, 1])}, "x_train and y_train must have the same length.*6 images, 2 labels"),
        ({"y_test": np.array([0])}, "x_test and y_test must have the same length"),
        ({"y_test": np.array([0, 1, 3])}, "among the classes of y_train, 0 to 2.*3"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -2])}, "labels of y_train must not be negative.*-2"),
        ({"y_train": np.array([0, 1, 2, 0, 1, 2.0])}, "y_train must be integer labels.*float64"),
        ({"y_train": np.eye(6, dtype=int)}, r"y_train must be integer labels.*\(6, 6\)"),
        ({"y_train": np.zeros(6, int), "y_test": np.zeros(3, int)}, "at least two classes"),
        ({"x_train": np.zeros((6, 64))}, r"x_train must have shape.*\(6, 64\)"),
        ({"x_test": np.zeros((3, 9, 8, 1))}, "must have the same shape"),
        ({"x_train": np.zeros((0, 8, 8, 1)), "y_train": np.zeros(0, int)}, "x_train must not be empty"),
        ({"y_test": np.zeros(0, int)}, "y_test must not be empty"),
        ({"x_test": np.full((3, 8, 8, 1), np.nan)}, "x_test must be finite"),
        ({"x_train": np.zeros((6, 8, 8, 1), np.int64)}, "x_train must be uint8.*int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_reason(tmp_path, changes, message):
    np.savez(tmp_path / "bad.npz", **_arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path / "bad.npz"))


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "part.npz", x_train=np.zeros((2, 8, 8)), y_test=np.zeros(2, int))
    with pytest.raises(ValueError, match="Missing: y_train, x_test"):
        load_data(str(tmp_path / "part.npz"))


def test_a_missing_file_is_a_file_not_found_error():
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        load_data("nowhere.npz")


def test_an_unknown_name_lists_the_names_and_the_other_choice():
    with pytest.raises(ValueError, match=r"'digits', .*'cifar10' or the path of an \.npz file.*'imagenet'"):
        load_data("imagenet")


def test_files_that_are_no_archives_and_pickles_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    np.savez(tmp_path / "pickle.npz", **_arrays(y_train=np.array([0, 1, 2, 0, 1, None], object)))
    for name in ("text.npz", "single.npz", "pickle.npz"):
        with pytest.raises(ValueError, match="not a readable .npz"):
            load_data(tmp_path / name)


def _write_mnist(folder, arrays):
    np.savez(folder / "mnist.npz", **arrays)


def _write_fashion_mnist(folder, arrays):
    (folder / "fashion-mnist").mkdir()
    for name, part in (("train", "train"), ("t10k", "test")):
        for kind, key, offset in (("labels-idx1", "y", 8), ("images-idx3", "x", 16)):
            content = bytes(offset) + arrays[f"{key}_{part}"].tobytes()
            (folder / "fashion-mnist" / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def _write_cifar10(folder, arrays):
    (folder / "cifar-10-batches-py-target_archive").touch()
    batches = folder / "cifar-10-batches-py-target" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    x, y = (np.split(arrays[key], 5) for key in ("x_train", "y_train"))
    parts = [(f"data_batch_{i + 1}", x[i], y[i]) for i in range(5)]
    for name, images, labels in [*parts, ("test_batch", arrays["x_test"], arrays["y_test"])]:
        content = {b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), b"labels": labels.tolist()}
        (batches / name).write_bytes(pickle.dumps(content))


_KERAS = {
    "mnist": ((28, 28), _write_mnist, ["mnist.npz"]),
    "fashion_mnist": (
        (28, 28),
        _write_fashion_mnist,
        [
            f"fashion-mnist/{name}-ubyte.gz"
            for name in ("train-labels-idx1", "train-images-idx3", "t10k-labels-idx1", "t10k-images-idx3")
        ],
    ),
    "cifar10": ((32, 32, 3), _write_cifar10, ["cifar-10-batches-py-target_archive"]),
}


@pytest.fixture
def keras_cache(tmp_path, monkeypatch):
    """Keras's folder of data sets, empty: its real `get_file`, without hashes, archives and a network."""
    from keras.src.utils import file_utils

    def fail(url, *_):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(importlib.import_module("keras.src.backend.config"), "_KERAS_DIR", str(tmp_path))
    monkeypatch.setattr(file_utils, "urlretrieve", fail)
    monkeypatch.setattr(file_utils, "validate_file", lambda *_, **__: True)
    monkeypatch.setattr(file_utils, "extract_archive", lambda *_: True)
    folder = tmp_path / "datasets"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", _KERAS)
def test_the_data_sets_of_keras_are_read_from_its_cache(name, keras_cache, monkeypatch):
    shape, write, files = _KERAS[name]
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 5), ("test", 3)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"y_{part}"] = (np.arange(count) % 5).astype(np.uint8)
    write(keras_cache, arrays)
    if name == "cifar10":  # Keras makes 10,000 images of each file, which here are all its only one.
        make = data_module.make_data
        monkeypatch.setattr(
            data_module, "make_data", lambda name, x, y, *test: make(name, x[::10_000], y[::10_000], *test)
        )
    before = {path: path.read_bytes() for path in keras_cache.rglob("*") if path.is_file()}
    data = load_data(name)
    assert (data.name, data.classes, data.input_shape) == (name, 5, (*shape, 1)[:3])
    for part in ("train", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        np.testing.assert_array_equal(x.reshape(-1, *shape), arrays[f"x_{part}"].astype(np.float32) / 255)
        np.testing.assert_array_equal(y, arrays[f"y_{part}"])
        assert (x.dtype, y.dtype) == (np.float32, np.int32) and x.flags.c_contiguous
    assert before == {path: path.read_bytes() for path in keras_cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", _KERAS)
def test_a_data_set_that_cannot_be_downloaded_is_one_clear_error(name, keras_cache):
    with pytest.raises(FileNotFoundError, match=f"{name!r} cannot be had.*URL fetch failure on https://") as raised:
        load_data(name)
    message = str(raised.value)
    assert all(str(keras_cache / file) in message for file in _KERAS[name][2])
    assert 'DATA = "digits"' in message and "x_train, y_train, x_test, y_test" in message and "\n" not in message


def test_only_the_files_that_are_missing_are_named(keras_cache):
    shape, write, files = _KERAS["fashion_mnist"]
    write(keras_cache, {f"{key}_{part}": np.zeros(4, np.uint8) for key in "xy" for part in ("train", "test")})
    (keras_cache / files[2]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte.gz' and answers"):
        load_data("fashion_mnist")


def test_a_damaged_file_in_the_cache_of_keras_is_named_and_kept(keras_cache):
    (keras_cache / "mnist.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot load the data set 'mnist' from '.*mnist.npz'.*delete it"):
        load_data("mnist")
    assert (keras_cache / "mnist.npz").read_bytes() == b"damaged"


def test_without_a_writable_cache_the_folder_that_keras_takes_instead_is_named(keras_cache, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: None)
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path))
    with pytest.raises(FileNotFoundError) as raised:
        load_data("mnist")
    assert f"looked for {asked[0]!r}" in str(raised.value) and str(keras_cache) not in str(raised.value)


def test_the_module_imports_without_keras():
    run = f"runpy.run_path({data_module.__file__!r})"
    code = f"import runpy, sys; {run}; sys.exit(len({{'keras', 'tf_keras', 'tensorflow'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
