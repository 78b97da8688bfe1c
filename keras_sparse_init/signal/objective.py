"""What gradients are taken of: the mean loss over all samples, or outputs with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.samples import Samples
from keras_sparse_init.watching import left_as_it_is


class Objective:
    """A function of (outputs, target) that returns a scalar; the sum over batches is that of all samples.

    Attributes:
        name: What it is, in words.
        factor: By what its gradients are larger than those of the objective, so that half precision can hold them: a
            power of 2, which changes no digit.
    """

    def __init__(self, model: Any, samples: Samples, loss: Any, seed: int) -> None:
        self._model, self._samples, self._seed = model, samples, seed
        self._loss = None if loss is None else _check_loss(model, loss)
        self.name = "a random sum of the outputs" if loss is None else "the loss"
        self.factor = 1.0 if loss is None else 2.0 ** math.ceil(math.log2(samples.count))
        self._shapes: list[tuple[int, ...]] | None = None

    def __call__(self, outputs: Any, target: Any) -> Any:
        """The part of a batch in the objective, times `factor`."""
        if self._loss is None:
            total = 0.0
            for output, weights in zip(_floating(outputs), target, strict=True):
                ops = compat.ops_of(output)
                total = total + ops.sum(ops.cast(output, "float32") * weights)
            return total
        value = self._loss(target["y"], outputs)
        ops = compat.ops_of(value)
        return ops.mean(ops.cast(value, "float32")) * target["weight"]

    def batches(self) -> Iterator[tuple[Any, Any, int]]:
        """(x, target, number of samples) of each batch."""
        if self._loss is None:
            shapes = self._output_shapes()
            # Drawn one sample after the other, whatever the batches.
            random = [np.random.default_rng([self._seed, i]) for i in range(len(shapes))]
        for x, y, count in self._samples.batches():
            if self._loss is None:
                yield (
                    x,
                    [r.standard_normal((count, *s), np.float32) for r, s in zip(random, shapes, strict=True)],
                    count,
                )
            else:
                share = 1.0 if getattr(self._loss, "reduction", None) == "sum" else count / self._samples.count
                yield x, {"y": y, "weight": np.float32(share * self.factor)}, count

    def _output_shapes(self) -> list[tuple[int, ...]]:
        if self._shapes is None:
            x, _, count = next(self._samples.batches())
            with left_as_it_is(self._model):
                outputs = self._model(compat.tensors_for(self._model, x), training=False)
            shapes = [tuple(output.shape) for output in _floating(outputs)]
            for shape in shapes:
                if shape[:1] != (count,):
                    raise ValueError(
                        "`model` must put out arrays whose first axis is that of the samples. Received: an output of "
                        f"shape {shape} for {count} samples"
                    )
            self._shapes = [shape[1:] for shape in shapes]
            if not self._shapes:
                raise ValueError(f"`model` must put out floating numbers. Received: outputs {outputs}")
        return self._shapes


def _check_loss(model: Any, loss: Any) -> Any:
    try:
        found = compat.library_of(model).losses.get(loss() if isinstance(loss, type) else loss)
    except (TypeError, ValueError):
        found = None
    if not callable(found):
        raise ValueError(
            f"`loss` must be a Keras loss, its name, or a function of (y, outputs). Received: loss={loss!r}"
        )
    return found


def _floating(outputs: Any) -> list[Any]:
    return [output for output in compat.tensors_of(outputs) if compat.is_floating(output)]
