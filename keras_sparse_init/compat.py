"""The only place that knows there are two Kerases: `tf_keras` (Keras 2) and `keras` (Keras 3, on any backend)."""

from __future__ import annotations

import contextlib
import inspect
import random
import types
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
import tf_keras

# Not public anywhere.
from keras.src.activations.activations import ReLU
from keras.src.backend import AutocastScope
from keras.src.ops.nn import Relu, Relu6

from keras_sparse_init.sampling import aligned_zeros

PACKAGE = "keras_sparse_init"

# A tensor that shares the array's memory is worth the trouble from about here; below, a copy costs microseconds.
_SHARE_FROM_BYTES = 2**16

Class = TypeVar("Class", bound=type)

# Inside a `tf.function`, TensorFlow would else rewrite the Python of everything called: 5 s the first time.
not_rewritten = tf.autograph.experimental.do_not_convert


class Initializer(keras.initializers.Initializer, tf_keras.initializers.Initializer):
    """Base of initializers that both Kerases accept."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Initializer:
        """A new initializer with the arguments that `get_config` returned."""
        return cls(**config)


class Constraint(keras.constraints.Constraint, tf_keras.constraints.Constraint):
    """Base of constraints that both Kerases accept."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Constraint:
        """A new constraint with the arguments that `get_config` returned."""
        return cls(**config)


class Callback(keras.callbacks.Callback, tf_keras.callbacks.Callback):
    """Base of callbacks that both Kerases accept; `self.model` is the model with its state, on JAX too."""

    def __init__(self) -> None:
        super().__init__()
        # What tf_keras's constructor sets; its `self.model = None` is not for a Keras 3 callback.
        self.validation_data = None
        self._chief_worker_only = None
        self._supports_tf_logs = False


def register(cls: Class) -> Class:
    """Class decorator: both Kerases find the class when they load a model, and by its name as a string.

    The short name is registered too because tf_keras writes only that into `.h5` files (tf-keras issue 42).
    """
    return register_in(keras, register_in(tf_keras, cls))


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


def library_of_variable(variable: Any) -> Any:
    """The Keras package that a variable belongs to."""
    return tf_keras if isinstance(variable, tf.Variable) else keras


def library(name: str) -> Any:
    """The Keras package of a name, "keras" or "tf_keras"."""
    return {"keras": keras, "tf_keras": tf_keras}[name]


def backend_of(obj: Any) -> str:
    """What a layer or model runs on: "tensorflow", or what Keras 3 is configured for."""
    return "tensorflow" if library_of(obj) is tf_keras else keras.backend.backend()


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
        ValueError: When it has no value yet (a symbolic tensor of a traced function) or is no array; `name` is the
            argument's.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, tf.Variable):
        # Inside a traced function, the lifted scope reads the variable's value instead of a symbol for it.
        with tf.init_scope():
            tensor = value.read_value()
            # NumPy does not take a scalar of bfloat16 as it is; `.numpy()` copies.
            return np.asarray(tensor if tensor.shape.rank else tensor.numpy())
    if isinstance(value, keras.KerasTensor) or (isinstance(value, tf.Tensor) and not hasattr(value, "numpy")):
        raise ValueError(f"`{name}` must have a value when the function or model is traced. Received: {value}")
    if isinstance(value, tf.Tensor):
        return value.numpy()
    if isinstance(value, keras.Variable):
        return to_numpy(name, value.value)
    try:
        return np.asarray(value if isinstance(value, list | tuple) else keras.ops.convert_to_numpy(value))
    except (TypeError, ValueError) as error:  # Rows of unequal length; the symbols of JAX.
        raise ValueError(f"`{name}` must be an array that has a value. Received: {value!r}") from error


def view(value: Any) -> np.ndarray:
    """A tensor as an array that shares its memory where it can, and must not be written to."""
    # `.numpy()` copies; NumPy does not take a scalar of bfloat16 as it is.
    return np.asarray(value) if isinstance(value, tf.Tensor) and value.shape.rank else to_numpy("value", value)


def to_tensor(values: np.ndarray, dtype: Any) -> Any:
    """Freshly drawn values as a tensor of whoever asks: TensorFlow for tf_keras, else Keras 3's backend.

    tf_keras asks with a `tf.DType`, Keras 3 with a name. The array's memory is shared where TensorFlow can.
    """
    if not isinstance(dtype, tf.DType) and keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_tensor(values)
    if tf.executing_eagerly() and values.nbytes >= _SHARE_FROM_BYTES and values.dtype.kind == "f":
        return tf.experimental.dlpack.from_dlpack(values.__dlpack__())
    return tf.convert_to_tensor(values)


def fresh_seed() -> int:
    """A new seed from Python's `random`, as Keras draws one; in a strategy of several workers that of the chief."""
    seed = random.randint(1, 10**9)
    if tf.distribute.has_strategy() and _number_of_workers() > 1:
        with tf.init_scope():
            # The initial value of a variable is what workers agree on.
            seed = int(tf.Variable(seed, dtype=tf.int64, trainable=False).read_value())
    return seed


def _number_of_workers() -> int:
    resolver = tf.distribute.get_strategy().cluster_resolver
    cluster = resolver.cluster_spec().as_dict() if resolver is not None and resolver.cluster_spec() is not None else {}
    return len(cluster.get("chief", [])) + len(cluster.get("worker", []))


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
    _assign(variable, values.astype(numpy_dtype(true_dtype(variable))))


def assign_at(variable: Any, positions: np.ndarray, values: Any) -> None:
    """Changes entries of a variable of either Keras, given by their flat positions; all others stay bit for bit.

    The array with the changes becomes the variable's memory where TensorFlow can share it. To scatter into a
    variable of TensorFlow would take less time once, but would have every later read copy it.
    """
    for part in _copies(variable):
        old = to_numpy("variable", part)
        new = aligned_zeros(old.shape, old.dtype)
        np.copyto(new, old)
        new.reshape(-1)[positions] = values
        part.assign(to_tensor(new, part.dtype))


def _assign(variable: Any, value: Any) -> None:
    for part in _copies(variable):
        part.assign(value)


def _copies(variable: Any) -> Any:
    """A mirrored variable's copies, one by one: a layer that a replica builds reaches the copy of that one alone."""
    variable = getattr(variable, "_variable", variable)
    copies = getattr(variable, "values", None) if isinstance(variable, tf.Variable) else None
    return copies or (variable,)


def kept_value(variable: Any) -> Any:
    """The value of a variable of either Keras as a tensor that keeps it whatever becomes of the variable."""
    value = own_value(variable)
    if isinstance(value, tf.Variable):
        return value.value()  # TensorFlow copies a value that is in use before it writes.
    return value.clone() if hasattr(value, "clone") else value


def kept_values(variable: Any) -> list[tuple[Any, Any]]:
    """A variable with its `kept_value`; of one that replicas have copies of, each copy with its own."""
    own = own_value(variable)
    copies = getattr(own, "values", None) if isinstance(own, tf.Variable) else None
    return [(part, kept_value(part)) for part in copies or (variable,)]


def put_back(variable: Any, value: Any) -> None:
    """Gives a variable a value that `kept_value` returned."""
    _assign(variable, value)


def register_in(library: Any, cls: Class) -> Class:
    """Registers a class with one Keras, by its full and its short name."""
    library.saving.register_keras_serializable(PACKAGE)(cls)
    library.saving.get_custom_objects()[cls.__name__] = cls
    return cls


def dtype_policy(layer: Any) -> Any:
    """The dtype policy of a layer, to make another of the same."""
    return layer.dtype_policy


def eager_scope() -> contextlib.AbstractContextManager[Any]:
    """Lifts what is done inside out of the function that TensorFlow is tracing, if any."""
    return tf.init_scope()


def shape_of(value: Any) -> Any:
    """The shape of a tensor, or of each tensor of a list, tuple or dict."""
    if isinstance(value, list | tuple):
        return [shape_of(item) for item in value]
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    return plain_shape(value.shape)


def has_shape(value: Any) -> bool:
    """Whether a value is a tensor, or a list, tuple or dict of tensors."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return bool(value) and all(has_shape(item) for item in value)
    return hasattr(value, "shape")


def plain_shape(shape: Any) -> Any:
    """A shape, or a nest of shapes, without `tf.TensorShape`: lists of ints and None that go into a config."""
    if isinstance(shape, tf.TensorShape):
        return shape.as_list()
    if isinstance(shape, list | tuple):
        return [plain_shape(item) for item in shape]
    if isinstance(shape, dict):
        return {key: plain_shape(item) for key, item in shape.items()}
    return shape


def layer_shape(layer: Any, shape: Any) -> Any:
    """A shape that `plain_shape` returned as the layer's Keras gives it to `build`: lists mean several inputs there."""
    if isinstance(shape, dict):
        return {key: layer_shape(layer, item) for key, item in shape.items()}
    if not isinstance(shape, list | tuple):
        return shape
    if all(item is None or isinstance(item, int) for item in shape):
        return tf.TensorShape(shape) if isinstance(layer, tf_keras.layers.Layer) else tuple(shape)
    return [layer_shape(layer, item) for item in shape]


def build_layer(layer: Any, input_shape: Any, call_shapes: dict[str, Any]) -> None:
    """Builds a layer that another one wraps.

    Args:
        layer: The layer.
        input_shape: Shape of its first input.
        call_shapes: Shapes of its tensor arguments by name, where they are known.
    """
    input_shape, call_shapes = layer_shape(layer, input_shape), layer_shape(layer, call_shapes)
    if isinstance(layer, tf_keras.layers.Layer):
        # Variables get the names of a call: `.h5` files need them to differ.
        with tf.name_scope(layer.name):
            if hasattr(layer, "_build_from_signature"):
                build_attention(layer, input_shape, call_shapes)
            else:
                layer.build(input_shape)
                # As tf_keras's own call does: some layers' build keeps another shape than that of their input.
                tf_keras.layers.Layer.build(layer, input_shape)
        return
    parameters = [
        parameter
        for parameter in inspect.signature(layer.build).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if len(parameters) < 2:
        layer.build(input_shape)
        return
    # Keras 3 names a build's arguments after those of the call: `value_shape` is the shape of `value`.
    shapes = {p.name: call_shapes.get(p.name.removesuffix("_shape")) for p in parameters}
    # Where nothing is known of what a layer needs to know, it is like the first input: attention to itself, say.
    known = {p.name: input_shape if p.default is p.empty else None for p in parameters}
    known.update({name: shape for name, shape in shapes.items() if shape is not None})
    layer.build(**{name: shape for name, shape in known.items() if shape is not None})


def build_attention(layer: Any, input_shape: Any, call_shapes: dict[str, Any]) -> None:
    """Creates the kernels of tf_keras's `MultiHeadAttention`, which otherwise appear at its first call."""
    if layer._query_shape is None:
        # Where nothing is known of the values, the inputs attend to themselves.
        query = call_shapes.get("query", input_shape)
        value = call_shapes.get("value", query)
        layer._build_from_signature(query, value, call_shapes.get("key", value))
    query, key, value = layer._query_shape, layer._key_shape, layer._value_shape
    for dense, shape in (
        (layer._query_dense, query),
        (layer._key_dense, key),
        (layer._value_dense, value),
        (layer._output_dense, query[:-1] + [layer._num_heads, layer._value_dim]),
    ):
        if not dense.built:
            with tf.name_scope(dense.name):
                dense.build(shape)
            dense.built = True
    layer.built = True


def has_value(variable: Any) -> bool:
    """Whether a variable is initialized; those of Keras 3 may wait for the end of a symbolic build."""
    return getattr(variable, "_value", variable) is not None


def is_restored(variable: Any) -> bool:
    """Whether a checkpoint that was read before the variable existed has given it its value."""
    return getattr(variable, "_self_update_uid", -1) >= 0


def initialize(variable: Any, initializer: Callable[..., Any]) -> None:
    """Gives a new variable another initial value: `initializer(shape, dtype)`."""
    if has_value(variable):
        _assign(variable, initializer(tuple(variable.shape), _own_dtype(variable)))
    else:
        variable._initializer = initializer


def mask_initial(variable: Any, mask: np.ndarray) -> None:
    """Sets a variable to 0 where a mask is False; one without a value yet will be, when it gets it."""
    if has_value(variable):
        assign(variable, np.where(mask, to_numpy("variable", variable), 0))
        return
    initializer = variable._initializer
    variable._initializer = lambda shape, dtype: keras.ops.where(mask, initializer(shape, dtype=dtype), 0)


def nonzero_pattern(variable: Any, dtype: Any) -> Any:
    """1 where a variable is not 0, as a tensor; ones when it is 0 everywhere, which says nothing about a mask."""
    if isinstance(variable, tf.Variable):
        nonzero = tf.not_equal(variable, 0)
        return tf.cast(tf.logical_or(nonzero, tf.logical_not(tf.reduce_any(nonzero))), dtype)
    nonzero = keras.ops.not_equal(variable, 0)
    return keras.ops.cast(keras.ops.logical_or(nonzero, keras.ops.logical_not(keras.ops.any(nonzero))), dtype)


def own_value(kernel: Any) -> Any:
    """A variable as a layer reads it where nothing casts it: in the dtype it has; a tensor is given back."""
    if isinstance(kernel, keras.Variable):
        with AutocastScope(None):
            return kernel.value
    # The policy of the layer that is being called casts variables; the one of their own layer may be another.
    return getattr(kernel, "_variable", kernel)


def as_read_by(layer: Any, kernel: Any, value: Any) -> Any:
    """A tensor in the dtype in which a layer would read its kernel inside its call."""
    if isinstance(kernel, tf.Variable):
        return tf.cast(value, layer.compute_dtype) if hasattr(kernel, "_variable") else value
    return keras.ops.cast(value, layer.compute_dtype) if layer.autocast and layer.compute_dtype else value


# By the names of `keras.ops`, which may be those of another backend.
_TENSORFLOW_OPS = types.SimpleNamespace(
    abs=tf.abs,
    cast=tf.cast,
    equal=tf.equal,
    floor=tf.floor,
    log=tf.math.log,
    max=tf.reduce_max,
    mean=tf.reduce_mean,
    minimum=tf.minimum,
    ones=tf.ones,
    ones_like=tf.ones_like,
    power=tf.pow,
    reshape=tf.reshape,
    rsqrt=tf.math.rsqrt,
    sqrt=tf.sqrt,
    square=tf.square,
    stop_gradient=tf.stop_gradient,
    sum=tf.reduce_sum,
    where=tf.where,
    zeros_like=tf.zeros_like,
)


def ops_of(value: Any) -> Any:
    """The operations on a tensor or variable: those of TensorFlow, or of the backend of Keras 3."""
    return _TENSORFLOW_OPS if isinstance(value, tf.Tensor | tf.Variable) else keras.ops


def own_tensor(variable: Any, values: np.ndarray) -> Any:
    """Values as a tensor of what a variable belongs to: TensorFlow for tf_keras, else Keras 3's backend."""
    return tf.convert_to_tensor(values) if isinstance(variable, tf.Variable) else keras.ops.convert_to_tensor(values)


def is_variable(value: Any) -> bool:
    """Whether a value is a variable of either Keras."""
    return isinstance(value, tf.Variable | keras.Variable)


def _own_dtype(variable: Any) -> Any:
    name = true_dtype(variable)
    return tf.dtypes.as_dtype(name) if isinstance(variable, tf.Variable) else name


LAYERS = (keras.layers.Layer, tf_keras.layers.Layer)
LEARNING_RATE_SCHEDULES = tuple(library.optimizers.schedules.LearningRateSchedule for library in (keras, tf_keras))
# The layers of either Keras that put out an activation of their input.
ACTIVATION_LAYERS = tuple(
    getattr(library.layers, name)
    for library in (keras, tf_keras)
    for name in ("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "ThresholdedReLU")
    if hasattr(library.layers, name)
)
# What functions make in functional models of Keras 3: operations that are no layers.
RELU_OPERATIONS = (Relu, Relu6, ReLU)


def is_linear(activation: Any) -> bool:
    """Whether an activation is the one of either Keras that puts out its very input."""
    return activation is keras.activations.linear or activation is tf_keras.activations.linear


def runs_loop(layer: Any) -> bool:
    """Whether a layer calls those inside it in a loop over time."""
    return isinstance(layer, library_of(layer).layers.RNN)


def loops_only_for_safety(layer: Any) -> bool:
    """Whether a layer is tf_keras's TimeDistributed around a layer that tf_keras does not know.

    It runs that in a loop where it knows the number of samples, and on all steps at once where it does not, as in
    `predict`. `_always_use_reshape` tells it to do the latter.
    """
    return isinstance(layer, tf_keras.layers.TimeDistributed) and not getattr(layer.layer, "stateful", False)


def current_trace() -> Any:
    """The graph that TensorFlow is building here, or None: tensors of one have no value in another."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def tensors_of(nest: Any) -> list[Any]:
    """The dense tensors of a nest, of whatever backend, in its order."""
    if isinstance(nest, dict):
        nest = [nest[key] for key in sorted(nest)]
    if isinstance(nest, list | tuple):
        return [tensor for item in nest for tensor in tensors_of(item)]
    return [nest] if isinstance(nest, tf.Tensor) or keras.ops.is_tensor(nest) else []


def divides_by_replicas(loss: Any) -> bool:
    """Whether a loss divides by the number of replicas under a strategy of `tf.distribute`, for the sum over them."""
    return isinstance(loss, keras.losses.Loss)


def is_floating(value: Any) -> bool:
    """Whether a tensor or array of whatever backend is one of floating numbers."""
    return "float" in str(getattr(value.dtype, "name", value.dtype))


def tensors_for(model: Any, nest: Any) -> Any:
    """Arrays, or a nest of them, as tensors of the backend of a model."""
    if library_of(model) is tf_keras:
        return tf.nest.map_structure(tf.convert_to_tensor, nest)
    return keras.tree.map_structure(keras.ops.convert_to_tensor, nest)


def is_input(layer: Any) -> bool:
    """Whether a layer stands for an input of a model."""
    return isinstance(layer, keras.layers.InputLayer | tf_keras.layers.InputLayer)


def unit_axis(layer: Any, rank: int) -> int:
    """The axis of the units in a sample of this rank that a layer puts out, counted from the end."""
    own = getattr(layer, "data_format", None)
    if own is None and rank > 2:
        own = library_of(layer).backend.image_data_format()
    return -rank if own == "channels_first" and rank > 1 else -1


def iterations(model: Any) -> int:
    """How many updates the optimizer of a compiled model has made.

    Raises:
        ValueError: When the model has no optimizer.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(f"`model` must be compiled. Received: the model {model.name!r} without an optimizer")
    return int(to_numpy("iterations", optimizer.iterations))


def loss_scale(model: Any) -> float:
    """By what a compiled model's optimizer multiplies the loss, so that half precision can hold its gradients."""
    optimizer = getattr(model, "optimizer", None)
    if hasattr(optimizer, "get_scaled_loss"):
        return float(optimizer.get_scaled_loss(tf.ones(())))
    if hasattr(optimizer, "scale_loss"):
        return float(to_numpy("scale", optimizer.scale_loss(keras.ops.ones(()))))
    return 1.0


def metric_variables(model: Any) -> list[Any]:
    """The variables of a model's metrics, which a loss may update."""
    return [variable for metric in model.metrics for variable in metric.variables]


def learning_rate(optimizer: Any, step: int | None) -> float | None:
    """The learning rate of an optimizer of either Keras at a step; without one, the rate that it has now.

    None where a step is given and the rate is a number that others set, which has no past.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    rate = getattr(optimizer, "_learning_rate", None)
    if rate is None:
        rate = optimizer.learning_rate
    if isinstance(rate, LEARNING_RATE_SCHEDULES):
        at = int(to_numpy("iterations", optimizer.iterations)) if step is None else step
        return float(to_numpy("learning rate", rate(at)))
    return float(to_numpy("learning rate", rate)) if step is None else None


def graph_of(model: Any) -> tuple[list[Any], list[Any], list[tuple[Any, list[Any], list[Any]]]] | None:
    """The calls that a Sequential or functional model is made of.

    Returns:
        (inputs, outputs, calls). Tensors have keys; a call is (layer, keys of its inputs, keys of its outputs), in the
        order of computation. None for a model with a `call` of its own, or one that is not built.
    """
    if isinstance(model, tf_keras.Sequential | keras.Sequential):
        if not model.built:
            return None
        return [0], [len(model.layers)], [(layer, [i], [i + 1]) for i, layer in enumerate(model.layers)]
    nodes = getattr(model, "_nodes_by_depth", None)
    if not nodes:
        return None
    ordered = [node for depth in sorted(nodes, reverse=True) for node in nodes[depth] if not node.is_input]
    if isinstance(model, tf_keras.Model):
        ends = [[str(id(tensor)) for tensor in tf.nest.flatten(end)] for end in (model.inputs, model.outputs)]
        return *ends, [(node.layer, node.flat_input_ids, node.flat_output_ids) for node in ordered]
    ends = [[id(tensor) for tensor in end] for end in (model._inputs, model._outputs)]
    calls = [
        (node.operation, [id(t) for t in node.arguments.keras_tensors], [id(t) for t in node.outputs])
        for node in ordered
    ]
    return *ends, calls


def require_built(wrapper: Any, missing: str = "mask") -> None:
    """Raises a ValueError that names a wrapper, ours or tfmot's, when it is not built and has no mask, say."""
    if not wrapper.built:
        raise ValueError(
            f"The layer {wrapper.name!r} has no {missing} yet because it is not built. Build the model first: call it "
            "on data, call `model.build(input_shape)`, or give the first layer an input shape."
        )
