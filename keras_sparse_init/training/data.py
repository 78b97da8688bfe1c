"""Image data sets for the training job: the embedded digits, those of keras.datasets, or arrays in an .npz file.

Importing this needs NumPy only; Keras is imported when one of its data sets is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_DIGITS = Path(__file__).with_name("digits.npz")
_DIGITS_SIZE = 28

# What Keras looks for in its directory of data sets. Older releases (3.5) have another name for CIFAR-10's archive.
_KERAS_DATASETS = {
    "mnist": ["mnist.npz"],
    "fashion_mnist": [
        f"fashion-mnist/{part}-ubyte.gz"
        for part in ("train-labels-idx1", "train-images-idx3", "t10k-labels-idx1", "t10k-images-idx3")
    ],
    "cifar10": ["cifar-10-batches-py-target_archive"],
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Images and integer labels, for training and for testing.

    Attributes:
        name: Where the data come from: a data set's name or a path.
        x_train: float32 images of shape (n, height, width, channels).
        y_train: int32 labels of shape (n,), from 0 to `classes` - 1.
        x_test: As `x_train`.
        y_test: As `y_train`.
        classes: The number of classes.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image: (height, width, channels)."""
        return self.x_train.shape[1:]


def load_data(name_or_path: str | os.PathLike[str]) -> Data:
    """Loads a data set by its name, or arrays from an .npz file.

    `"digits"` are 1,797 handwritten digits of 8x8 pixels, resized to 28x28x1 and scaled to [0, 1]; every fifth image of
    each class is for testing (1,437 and 360 images). They come with the package: neither scikit-learn nor a network is
    needed. `"mnist"`, `"fashion_mnist"` and `"cifar10"` are those of `keras.datasets`, scaled to [0, 1]: Keras takes
    them from its cache (`~/.keras/datasets`, or `$KERAS_HOME/datasets`), or downloads them there.

    Args:
        name_or_path: `"digits"`, `"mnist"`, `"fashion_mnist"`, `"cifar10"`, or the path of an .npz file with the arrays
            x_train, y_train, x_test and y_test (see `make_data` for what they may hold). Pickled objects are not
            loaded.

    Returns:
        A `Data`.

    Raises:
        FileNotFoundError: When there is no file at the path, or Keras neither has the data set nor can download it.
        ValueError: When the name is unknown, the file is not an .npz, arrays are missing or do not fit together, or
            Keras cannot read what is in its cache.

    Example:
        >>> from keras_sparse_init.training.data import load_data
        >>> data = load_data("digits")
        >>> data.x_train.shape, data.x_test.shape, data.classes
        ((1437, 28, 28, 1), (360, 28, 28, 1), 10)
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"`data` must be a Data, a name or the path of an .npz file. Received: data={name_or_path!r}")
    name = os.fspath(name_or_path)
    if name in _DATASETS:
        return _DATASETS[name]()
    if name in _KERAS_DATASETS:
        return _from_keras(name)
    if not name.endswith(".npz"):
        raise ValueError(
            f"`data` must be one of {', '.join(map(repr, [*_DATASETS, *_KERAS_DATASETS]))} or the path of an .npz file "
            f"with the arrays {', '.join(_KEYS)}. Received: {name!r}"
        )
    return _from_npz(name)


def make_data(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Data:
    """Checks and converts arrays to a `Data`.

    Args:
        name: What to call the data in results and messages.
        x_train: Images of shape (n, height, width, channels) or (n, height, width). uint8 images are divided by 255;
            floating-point ones are taken as they are and must be finite.
        y_train: Integer labels of shape (n,) or (n, 1), from 0. The number of classes is their maximum plus 1.
        x_test: Images of the same shape and scale as `x_train`.
        y_test: Labels of `x_test`, among the classes of `y_train`.

    Returns:
        A `Data`.

    Raises:
        ValueError: When an array is empty, has another rank or type, holds values that are not finite, lengths or image
            shapes differ, or labels are negative or outside the classes.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.training.data import make_data
        >>> x, y = np.full((4, 8, 8), 255, np.uint8), np.array([0, 1, 2, 1])
        >>> data = make_data("mine", x, y, x, y)
        >>> data.input_shape, data.classes, float(data.x_train.max())
        ((8, 8, 1), 3, 1.0)
    """
    x_train, x_test = _images(name, "x_train", x_train), _images(name, "x_test", x_test)
    y_train, y_test = _labels(name, "y_train", y_train), _labels(name, "y_test", y_test)
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise ValueError(
                f"{name}: x_{part} and y_{part} must have the same length. Received: {len(x)} images, {len(y)} labels"
            )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{name}: the images of x_train and x_test must have the same shape. "
            f"Received: {x_train.shape[1:]} and {x_test.shape[1:]}"
        )
    classes = int(y_train.max()) + 1
    if classes < 2:
        raise ValueError(f"{name}: y_train must have at least two classes. Received: only the label 0")
    if y_test.max() >= classes:
        raise ValueError(
            f"{name}: labels of y_test must be among the classes of y_train, 0 to {classes - 1}. "
            f"Received: a label {y_test.max()}"
        )
    return Data(name, x_train, y_train, x_test, y_test, classes)


def _images(name: str, key: str, x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name}: {key} must have shape (images, height, width) or (images, height, width, channels). "
            f"Received: shape {x.shape}"
        )
    if x.size == 0:
        raise ValueError(f"{name}: {key} must not be empty. Received: shape {x.shape}")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        # The scale of other integers (0 to 255? 0 to 16?) would be a guess.
        raise ValueError(f"{name}: {key} must be uint8 (0 to 255) or floating point. Received: {x.dtype}")
    # One float32 array: CIFAR-10 takes 600 MB. In the order of its axes: Keras gives a transposed view of it.
    x = np.divide(x, 255, dtype=np.float32, order="C") if x.dtype == np.uint8 else x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: {key} must be finite in float32. Received: NaN or infinite values")
    return x[..., np.newaxis] if x.ndim == 3 else x


def _labels(name: str, key: str, y: Any) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:  # As keras.datasets gives those of CIFAR-10.
        y = y[:, 0]
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{name}: {key} must be integer labels of shape (images,). Received: {y.dtype} of shape {y.shape}"
        )
    if y.size == 0:
        raise ValueError(f"{name}: {key} must not be empty")
    if y.min() < 0:
        raise ValueError(f"{name}: labels of {key} must not be negative. Received: a label {y.min()}")
    return y.astype(np.int32)


def _from_keras(name: str) -> Data:
    import keras

    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a bare one when it cannot download, others for damaged files.
        paths = [os.path.join(_keras_cache(), file) for file in _KERAS_DATASETS[name]]
        missing = [path for path in paths if not os.path.exists(path)]
        if not missing:
            raise ValueError(
                f"Keras cannot load the data set {name!r} from {', '.join(map(repr, paths))}: {error!r}. If a file is "
                "damaged, delete it: Keras then downloads it again"
            ) from error
        raise FileNotFoundError(
            f"The data set {name!r} cannot be had: Keras looked for {', '.join(map(repr, missing))} and answers: "
            f'{error!r}. Offline, take DATA = "digits", which is embedded, or the path of an .npz file with '
            f"{', '.join(_KEYS)}"
        ) from error
    return make_data(name, x_train, y_train, x_test, y_test)


def _keras_cache() -> str:
    """Where Keras looks for data sets: its `get_file` tells the path only when it succeeds."""
    from keras.src.backend.config import keras_home  # Not public. Keras reads KERAS_HOME only when it is imported.

    home = os.path.expanduser(keras_home())
    if not os.access(home, os.W_OK):
        home = os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), ".keras")
    return os.path.join(home, "datasets")


def _from_npz(path: str) -> Data:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No data file {path!r} (looked for {os.path.abspath(path)})")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in _KEYS if key in archive}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # NumPy answers damaged files, pickles and bare .npy files with any of these.
        raise ValueError(f"{path!r} is not a readable .npz file of plain arrays: {error}") from error
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path!r} must have the arrays {', '.join(_KEYS)}. Missing: {', '.join(missing)}")
    return make_data(path, **arrays)


def _digits() -> Data:
    with np.load(_DIGITS, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    weights = _bilinear(images.shape[1], _DIGITS_SIZE)
    x = weights @ (images.astype(np.float32) / 16) @ weights.T
    test = np.zeros(len(labels), bool)
    test[np.argsort(labels, kind="stable")[::5]] = True  # No randomness: the same split under every NumPy.
    return make_data("digits", x[~test], labels[~test], x[test], labels[test])


def _bilinear(size: int, new_size: int) -> np.ndarray:
    """The (new_size, size) matrix of bilinear interpolation at pixel centres along one axis, clamped at the edges."""
    position = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size))).astype(np.float32)


_DATASETS = {"digits": _digits}
