"""The sums of `layer_sums`, made by TensorFlow inside the traced pass, so that nothing of a layer's size leaves it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat
from keras_sparse_init.signal.layer_sums import NotSeenError, Parts, has_zeros, sample_shape
from keras_sparse_init.signal.moments import HUGE, TINY, Directions, Moments, Zeros, is_kept
from keras_sparse_init.signal.probe import Place


class UnfitError(Exception):
    """Says that these values cannot be summed here: float32 has no room for their squares, or a shape is not known."""


class _Tensor(NamedTuple):
    """What is summed of a tensor, and where it is in the results; `error` says why nothing is."""

    sample_shape: tuple[int, ...] = ()
    columns: slice = slice(0)
    lengths: int | None = None
    directions: slice = slice(0)
    zeros: slice | None = None
    error: NotSeenError | None = None


class _Layout(NamedTuple):
    """What is where in the results of a trace.

    Attributes:
        tensors: Of each value.
        gradients: The row of each gradient, None for none.
        outputs: The numbers of the values that are outputs.
    """

    tensors: list[_Tensor]
    gradients: list[int | None]
    outputs: list[int]


class GraphSums:
    """Sums tensors of a pass when it is traced, and finds the results in what it returns when it runs.

    A few long tensors go from one to the other: to fetch hundreds of short ones takes longer than to sum.
    """

    def __init__(self) -> None:
        # By the number of samples: each has its trace, and what can be summed depends on it.
        self._layouts: dict[int, _Layout] = {}

    def pack(
        self, count: int, places: list[Place], values: list[Any], gradients: list[Any], outputs: list[Any]
    ) -> dict[str, Any]:
        """The sums, for tensors of `count` samples: `values`, `gradients` for those at `places`, and `outputs`.

        Raises:
            UnfitError: When something of a tensor is not known before it runs.
        """
        values = list(values)
        numbers = {id(value): i for i, value in enumerate(values)}
        for output in outputs:
            if compat.is_floating(output) and id(output) not in numbers:
                numbers[id(output)] = len(values)
                values.append(output)
        layout = self._layouts[count] = _Layout(
            [], [], [numbers[id(output)] for output in outputs if compat.is_floating(output)]
        )
        first = {place.post if place.pre is None else place.pre for place in places}
        with_zeros = {place.post for place in places if has_zeros(place)}
        found: dict[str, list[Any]] = {name: [] for name in ("sums", "squares", "lengths", "directions", "zeros")}
        ends = dict.fromkeys(found, 0)
        ones = tf.ones((count,))

        def append(name: str, row: Any) -> slice:
            found[name].append(row)
            start, ends[name] = ends[name], ends[name] + row.shape[-1]
            return slice(start, ends[name])

        for i, value in enumerate(values):
            try:
                shape, matrix = _matrix(value, count)
            except NotSeenError as error:
                layout.tensors.append(_Tensor(error=error))
                continue
            squared = tf.square(matrix)
            columns = append("sums", _over_samples(matrix, ones))
            append("squares", _over_samples(squared, ones))
            lengths, directions, zeros = None, slice(0), None
            if i in first:
                length = tf.sqrt(tf.reduce_sum(squared, axis=1))
                lengths = len(found["lengths"])
                append("lengths", length)
                directions = append("directions", _over_samples(matrix, tf.math.divide_no_nan(1.0, length)))
            if i in with_zeros:
                zeros = append("zeros", _over_samples(tf.cast(tf.equal(matrix, 0.0), tf.float32), ones))
            layout.tensors.append(_Tensor(shape, columns, lengths, directions, zeros))

        packed = {name: tf.concat(rows, axis=0) if rows else tf.zeros((0,)) for name, rows in found.items()}
        packed["lengths"] = tf.reshape(packed["lengths"], (-1, count))
        rows: list[Any] = []
        for gradient in gradients:
            layout.gradients.append(None if gradient is None else len(rows))
            if gradient is not None:
                if not gradient.shape.is_fully_defined():
                    raise UnfitError
                gradient = tf.cast(gradient, tf.float32)
                size = tf.constant(gradient.shape.num_elements(), tf.float32)
                rows.append([size, tf.reduce_sum(gradient), 2 * tf.nn.l2_loss(gradient)])
        packed["gradients"] = tf.stack(rows) if rows else tf.zeros((0, 3))
        return packed

    def unpack(self, packed: dict[str, Any]) -> tuple[list[Any], list[Moments | None], list[Moments]]:
        """Of each value `Parts` or an error, of each gradient and each output moments.

        Raises:
            UnfitError: When float32 had no room.
            NotSeenError: When an output is not one of samples.
        """
        arrays = {name: tensor.numpy() for name, tensor in packed.items()}
        lengths, count = arrays["lengths"], arrays["lengths"].shape[1]
        layout = self._layouts[count]
        mean, squares = arrays["sums"].astype(np.float64) / count, arrays["squares"].astype(np.float64)
        seen = [tensor for tensor in layout.tensors if tensor.error is None]
        size, total, flow = arrays["gradients"].astype(np.float64).T
        with np.errstate(all="ignore"):
            # What is 0 here may be too small for float32, and what is not finite too large.
            sizes = [lengths, np.sqrt(flow / size)]
            if seen:
                sizes.append(np.sqrt(np.maximum.reduceat(squares / count, [tensor.columns.start for tensor in seen])))
            mean_of_gradient = total / size
            # One number does not differ from its mean.
            squares = np.where(count > 1, squares - count * mean * mean, 0.0)
            flow = np.where(size > 1, flow - size * mean_of_gradient**2, 0.0)
            fit = all(((found > TINY) & (found < HUGE)).all() for found in sizes)
            kept = (count == 1) | is_kept(squares, count, mean)
            if not (fit and kept.all() and ((size == 1) | is_kept(flow, size, mean_of_gradient)).all()):
                raise UnfitError
        parts: list[Any] = []
        for tensor in layout.tensors:
            if tensor.error is not None:
                parts.append(tensor.error)
                continue
            directions = zeros = None
            if tensor.lengths is not None:
                directions = Directions(count, arrays["directions"][tensor.directions].astype(np.float64))
            if tensor.zeros is not None:
                zeros = Zeros(count, np.rint(arrays["zeros"][tensor.zeros]).astype(np.int64))
            moments = Moments(count, mean[tensor.columns], squares[tensor.columns])
            parts.append(Parts(tensor.sample_shape, moments, directions, zeros))
        found = [
            None if row is None else Moments(int(size[row]), mean_of_gradient[row : row + 1], flow[row : row + 1])
            for row in layout.gradients
        ]
        outputs = [parts[i] for i in layout.outputs]
        for output in outputs:
            if isinstance(output, NotSeenError):
                raise output
        return parts, found, [output.moments for output in outputs]


def _over_samples(matrix: Any, weights: Any) -> Any:
    """The weighted sum of the rows, as a product: BLAS sums columns faster than TensorFlow's reductions."""
    return tf.linalg.matvec(matrix, weights, transpose_a=True)


def _matrix(value: Any, count: int) -> tuple[tuple[int, ...], Any]:
    """The shape of a sample, and a tensor of shape (samples, positions)."""
    if not value.shape.is_fully_defined() or value.dtype == tf.float64:
        raise UnfitError
    if not value.dtype.is_floating:
        raise NotSeenError(f"its output has the dtype {value.dtype.name}")
    return sample_shape(tuple(value.shape), count), tf.reshape(tf.cast(value, tf.float32), (count, -1))
