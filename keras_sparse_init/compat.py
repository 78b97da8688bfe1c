"""The only place that knows there are two Kerases: `tf_keras` (Keras 2) and `keras` (Keras 3, on any backend)."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
import tf_keras

PACKAGE = "keras_sparse_init"

# A tensor that shares the array's memory is worth the trouble from about here; below, a copy costs microseconds.
_SHARE_FROM_BYTES = 2**20

Class = TypeVar("Class", bound=type)


class Initializer(keras.initializers.Initializer, tf_keras.initializers.Initializer):
    """Base of initializers that both Kerases accept."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Initializer:
        """A new initializer with the arguments that `get_config` returned."""
        return cls(**config)


def register(cls: Class) -> Class:
    """Class decorator: both Kerases find the class when they load a model, and by its name as a string.

    The short name is registered too because tf_keras writes only that into `.h5` files (tf-keras issue 42).
    """
    for library in (keras, tf_keras):
        library.saving.register_keras_serializable(PACKAGE)(cls)
        library.saving.get_custom_objects()[cls.__name__] = cls
    return cls


def library_of(obj: Any) -> Any:
    """The Keras package, `keras` or `tf_keras`, that a layer or model belongs to.

    Raises:
        TypeError: When it belongs to neither.
    """
    if isinstance(obj, tf_keras.layers.Layer):
        return tf_keras
    if isinstance(obj, keras.layers.Layer):
        return keras
    raise TypeError(f"Expected a layer or model of tf_keras or keras. Received: {obj!r} of type {type(obj).__name__}")


def float_dtype(dtype: Any) -> str:
    """The name of a floating dtype given as either Keras gives it; None is the default float type.

    Raises:
        ValueError: When it is no floating type: kernels are real numbers.
    """
    name = dtype.name if isinstance(dtype, tf.DType) else keras.backend.standardize_dtype(dtype)
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"`dtype` must be a floating type (float16, bfloat16, float32, float64). Received: {dtype}")
    return name


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name that `float_dtype` returned."""
    return np.dtype(tf.dtypes.as_dtype(name).as_numpy_dtype)


def to_numpy(name: str, value: Any) -> np.ndarray:
    """An array, list, tensor or variable of any backend as a NumPy array.

    Raises:
        ValueError: When it has no value yet (a symbolic tensor of a traced function); `name` is the argument's.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, tf.Variable):
        # Inside a traced function, the lifted scope reads the variable's value instead of a symbol for it.
        with tf.init_scope():
            return np.asarray(value.read_value())
    if isinstance(value, tf.Tensor):
        if not hasattr(value, "numpy"):
            raise ValueError(f"`{name}` must have a value when the function is traced. Received: {value}")
        return value.numpy()
    if isinstance(value, keras.Variable):
        return to_numpy(name, value.value)
    if isinstance(value, list | tuple):
        return np.asarray(value)
    return np.asarray(keras.ops.convert_to_numpy(value))


def to_tensor(values: np.ndarray, dtype: Any) -> Any:
    """Freshly drawn values as a tensor of whoever asks: TensorFlow for tf_keras, else Keras 3's backend.

    tf_keras asks with a `tf.DType`, Keras 3 with a name. The array's memory is shared where TensorFlow can.
    """
    if not isinstance(dtype, tf.DType) and keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_tensor(values)
    if tf.executing_eagerly() and values.nbytes >= _SHARE_FROM_BYTES and values.dtype.kind == "f":
        return tf.experimental.dlpack.from_dlpack(values.__dlpack__())
    return tf.convert_to_tensor(values)


def next_seed(generator: Any) -> int:
    """The next seed of a `keras.random.SeedGenerator`, as an int."""
    with tf.init_scope() if keras.backend.backend() == "tensorflow" else contextlib.nullcontext():
        words = np.asarray(keras.ops.convert_to_numpy(generator.next()), dtype=np.uint32)
    return int(words[0]) << 32 | int(words[1])


def true_dtype(variable: Any) -> str:
    """The dtype in which a variable is stored, also where a mixed-precision policy casts it on reading."""
    return tf.dtypes.as_dtype(getattr(variable, "true_dtype", variable.dtype)).name


def assign(variable: Any, values: np.ndarray) -> None:
    """Stores an array of any numeric type in a variable of either Keras."""
    variable.assign(values.astype(numpy_dtype(true_dtype(variable))))
