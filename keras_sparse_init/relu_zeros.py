"""Zeros of ReLUs: how many, of which units, and how many patterns of them a data set has."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat
from keras_sparse_init.arguments import is_integer
from keras_sparse_init.batches import batches
from keras_sparse_init.rectifiers import rectifiers
from keras_sparse_init.table import laid_out
from keras_sparse_init.watching import Watched, left_as_it_is, watch

# The most ones that a sum of 8 bits can hold.
_ROWS = 255

# What bounds a batch when its size is not given: outputs of all ReLUs, and samples.
_OUTPUTS, _SAMPLES = 2**24, 1024


@dataclasses.dataclass(frozen=True, eq=False)
class ReluZeros:
    """Zeros of a model's ReLUs on a data set; `str()` lays them out for reading.

    A unit is an output of a dense layer, a channel of a convolution: the last axis of a layer's output, the first after
    the samples in a layer with `data_format="channels_first"`. Its outputs at all positions (pixels, time steps) and in
    all calls of its layer count. When a layer without weights (a shared `ReLU()`) is called on several numbers of
    units, these stand one after the other.

    Attributes:
        samples: Number of samples.
        patterns: Number of distinct activation patterns among the samples: two samples have the same pattern when each
            output of each ReLU is 0 for both or for neither.
        per_unit: Layer name to number of zeros of each of its units.
        outputs_per_unit: Layer name to number of outputs of each of its units, zeros and others.
        not_counted: Layer name to what it is, for layers with other activations and those that cannot be seen.
    """

    samples: int
    patterns: int
    per_unit: dict[str, np.ndarray]
    outputs_per_unit: dict[str, np.ndarray]
    not_counted: dict[str, str]

    @property
    def per_layer(self) -> dict[str, int]:
        """Layer name to number of zeros."""
        return {name: int(zeros.sum()) for name, zeros in self.per_unit.items()}

    @property
    def outputs(self) -> dict[str, int]:
        """Layer name to number of outputs, zeros and others."""
        return {name: int(outputs.sum()) for name, outputs in self.outputs_per_unit.items()}

    @property
    def total(self) -> int:
        """Number of zeros of all layers."""
        return sum(self.per_layer.values())

    @property
    def fraction(self) -> float:
        """Zeros of all layers divided by their outputs."""
        return self.total / sum(self.outputs.values())

    @property
    def fraction_per_layer(self) -> dict[str, float]:
        """Layer name to zeros divided by outputs."""
        return {name: zeros / self.outputs[name] for name, zeros in self.per_layer.items()}

    @property
    def dead_units(self) -> dict[str, int]:
        """Layer name to number of units that are 0 for all samples."""
        return {name: int((zeros == self.outputs_per_unit[name]).sum()) for name, zeros in self.per_unit.items()}

    @property
    def always_on_units(self) -> dict[str, int]:
        """Layer name to number of units that are 0 for no sample."""
        return {name: int((zeros == 0).sum()) for name, zeros in self.per_unit.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable values."""
        layers = {
            name: {
                "zeros": self.per_layer[name],
                "outputs": self.outputs[name],
                "fraction": self.fraction_per_layer[name],
                "units": zeros.size,
                "dead_units": self.dead_units[name],
                "always_on_units": self.always_on_units[name],
                "zeros_per_unit": zeros.tolist(),
            }
            for name, zeros in self.per_unit.items()
        }
        return {
            "samples": self.samples,
            "patterns": self.patterns,
            "total": self.total,
            "fraction": self.fraction,
            "layers": layers,
            "not_counted": dict(self.not_counted),
        }

    def __repr__(self) -> str:
        return f"ReluZeros(samples={self.samples}, total={self.total}, patterns={self.patterns})"

    def __str__(self) -> str:
        table = [("layer", "units", "outputs", "zeros", "fraction", "dead units", "always on")]
        for name, row in self.to_dict()["layers"].items():
            counts = (f"{row[key]:,}" for key in ("units", "outputs", "zeros"))
            shares = (f"{row['fraction']:.2%}", f"{row['dead_units']:,}", f"{row['always_on_units']:,}")
            table.append((name, *counts, *shares))
        units = sum(zeros.size for zeros in self.per_unit.values())
        counts = (f"{number:,}" for number in (units, sum(self.outputs.values()), self.total))
        dead, always = sum(self.dead_units.values()), sum(self.always_on_units.values())
        table.append(("total", *counts, f"{self.fraction:.2%}", f"{dead:,}", f"{always:,}"))
        lines = [laid_out(table), f"{self.patterns:,} activation patterns of {self.samples:,} samples"]
        lines += [f"not counted: {name} ({what})" for name, what in self.not_counted.items()]
        return "\n".join(lines)


def count_relu_zeros(model: Any, x: Any, batch_size: int | None = None) -> ReluZeros:
    """Counts the outputs of a model's ReLUs that are 0 on a data set, and the patterns that they form.

    zeros_j = #{(sample, position): max(z_j, 0) = 0}

    ReLUs are activations "relu" and "relu6" of layers, the functions of either Keras, TensorFlow, JAX and torch, `ReLU`
    layers without slope or threshold and `Activation` layers of these functions. The model runs once on the data, as at
    prediction, batch after batch; it is left as it was, kernels in tfmot's wrappers too.

    Args:
        model: A built model or layer of either Keras.
        x: The samples: an array; a list or dict of arrays for several inputs; or a `tf.data.Dataset` of batches `x`,
            `(x, y)` or `(x, y, weights)`.
        batch_size: Samples at a time; None for as many as have about 2^24 outputs of ReLUs, but not above 1024. A
            dataset has its own batches.

    Returns:
        A `ReluZeros`.

    Raises:
        TypeError: When `model` is no Keras model or layer.
        ValueError: When it is not built, has no ReLU that can be seen, or `x` has no samples or not the same number in
            all arrays.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import count_relu_zeros
        >>> dense = keras.layers.Dense(2, "relu", kernel_initializer="identity", name="hidden")
        >>> model = keras.Sequential([keras.layers.Input((2,)), dense, keras.layers.Dense(1, name="out")])
        >>> zeros = count_relu_zeros(model, np.array([[1, -1], [2, -2], [-3, -3]]))
        >>> zeros.total, zeros.per_layer, zeros.per_unit["hidden"].tolist(), zeros.patterns
        (4, {'hidden': 4}, [1, 3], 2)
        >>> print(zeros)
        layer   units  outputs  zeros  fraction  dead units  always on
        hidden      2        6      4    66.67%           1          0
        total       2        6      4    66.67%           1          0
        2 activation patterns of 3 samples

    Reference:
        Montufar et al. 2014, On the number of linear regions of deep neural networks, arXiv:1402.1869: patterns.
    """
    found, others = rectifiers(model)
    samples, digests = 0, bytearray()
    counts: dict[tuple[str, int], np.ndarray] = {}
    outputs: dict[tuple[str, int], int] = {}
    for batch in relu_zeros(model, x, batch_size):
        for key, zeros in batch.items():
            count = _zeros_per_unit(zeros)
            if counts.setdefault(key, np.zeros_like(count)).size != count.size:
                raise ValueError(f"{key[0]!r} has {count.size} units in a batch and {counts[key].size} in another")
            counts[key] += count
            outputs[key] = outputs.get(key, 0) + zeros.size // count.size
        packed = [np.packbits(zeros.reshape(len(zeros), -1), axis=1) for zeros in batch.values()]
        for row in np.concatenate(packed, axis=1):
            # 128 bits: among 10^9 samples two different patterns are taken for one with a probability of 10^-21.
            digests += hashlib.blake2b(row, digest_size=16).digest()
        samples += len(packed[0])
    keys = {name: [key for key in counts if key[0] == name] for name, _ in counts}
    return ReluZeros(
        samples=samples,
        patterns=_distinct(np.frombuffer(digests, np.uint64).reshape(-1, 2)),
        per_unit={name: _joined([counts[key] for key in calls]) for name, calls in keys.items()},
        outputs_per_unit={
            name: _joined([np.full_like(counts[key], outputs[key]) for key in calls]) for name, calls in keys.items()
        },
        not_counted=others | {name: "never called, or in a loop or branch" for name, _ in found if name not in keys},
    )


def relu_zeros(model: Any, x: Any, batch_size: int | None = None) -> Iterator[dict[tuple[str, int], np.ndarray]]:
    """Runs a model and gives for each batch where its ReLUs are 0.

    Args:
        model: As for `count_relu_zeros`.
        x: As for `count_relu_zeros`.
        batch_size: As for `count_relu_zeros`.

    Yields:
        (layer name, number of the call) to a boolean array of shape (samples, positions, units), in the order of calls.

    Raises:
        TypeError: As `count_relu_zeros`.
        ValueError: As `count_relu_zeros`.
    """
    if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
        raise ValueError(f"`batch_size` must be a positive int or None. Received: batch_size={batch_size!r}")
    found, others = rectifiers(model)
    compat.require_built(model, "weights")
    if not found:
        seen = "".join(f"; {name} ({what})" for name, what in others.items())
        raise ValueError(f"`model` must have a ReLU that can be seen. Received: the model {model.name!r} without{seen}")
    layers = [layer for _, layer in found]
    if batch_size is None and not isinstance(x, tf.data.Dataset):
        with left_as_it_is(model):
            zeros = _run(model, layers, *next(batches(x, 1)))
        batch_size = min(max(_OUTPUTS // sum(values.size for values in zeros.values()), 1), _SAMPLES)
    with left_as_it_is(model):
        for samples, inputs in batches(x, batch_size):
            yield _run(model, layers, samples, inputs)


def _run(model: Any, layers: list[Any], samples: int, inputs: Any) -> dict[tuple[str, int], np.ndarray]:
    with watch(model, layers) as items:
        model(inputs, training=False)
    if not items:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"The model {model.name!r} does not call its ReLUs where they can be seen: {names}")
    return {(item.name, item.call): _zeros(item, samples) for item in items}


def _zeros(item: Watched, samples: int) -> np.ndarray:
    zeros = compat.to_numpy(item.name, compat.ops_of(item.post).equal(item.post, 0))
    if getattr(item.layer, "data_format", None) == "channels_first":
        zeros = np.moveaxis(zeros, 1, -1)
    if not zeros.ndim or len(zeros) % samples:
        raise ValueError(
            f"{item.name!r} puts out an array of shape {zeros.shape} for {samples} samples: its first axis must be "
            "that of the samples"
        )
    # TimeDistributed of tf_keras puts the steps of a sample one after the other on the first axis.
    return zeros.reshape(samples, -1, zeros.shape[-1] if zeros.ndim > 1 else len(zeros) // samples)


def _zeros_per_unit(zeros: np.ndarray) -> np.ndarray:
    """From (samples, positions, units)."""
    samples, positions, units = zeros.shape
    rows = zeros.view(np.uint8).reshape(samples, positions * units)
    count = np.zeros(positions * units, np.int64)
    for start in range(0, samples, _ROWS):
        # Sums of single bytes are ten times as fast as others.
        count += rows[start : start + _ROWS].sum(axis=0, dtype=np.uint8)
    return count.reshape(positions, units).sum(axis=0)


def _joined(calls: list[np.ndarray]) -> np.ndarray:
    """What several calls of a layer count: together for the same units."""
    same = len({count.size for count in calls}) == 1
    return np.sum(calls, axis=0) if same else np.concatenate(calls)


def _distinct(rows: np.ndarray) -> int:
    rows = rows[np.lexsort(rows.T)]
    return 1 + int((rows[1:] != rows[:-1]).any(axis=1).sum())
