"""Many training steps in one compiled function of TensorFlow, for `fit` of either Keras.

What Keras does for `steps_per_execution` gets a batch from tf.data in each step, which takes a small model longer than
to train on it. Here all samples are there as a tensor, and a step picks its own by their numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat, tfmot_wrapper, traversal
from keras_sparse_init.training.progress import LOST


def as_dataset(ends: Sequence[int], start: int) -> tf.data.Dataset:
    """What `fit` is given: for each execution its first step and the one after its last."""
    return tf.data.Dataset.from_tensor_slices(np.stack([[start, *ends[:-1]], ends], axis=1).astype(np.int32))


@contextlib.contextmanager
def train_in_blocks(model: Any, x: Any, y: Any, order: np.ndarray, longest: int) -> Iterator[None]:
    """Has `fit` of a compiled model make the steps of a block in each of its executions; see `as_dataset`.

    The steps are those of `model.train_step`, as it is when training begins: callbacks may have replaced it.

    Args:
        model: A compiled model of either Keras on TensorFlow, not distributed.
        x: All samples.
        y: Their targets.
        order: For each step the numbers of the samples of its batch, of shape (steps, batch).
        longest: The most steps that a block has.
    """
    x, y, order, last = tf.constant(x), tf.constant(y), tf.constant(order), len(order) - 1

    def make_train_function(force: bool = False) -> Any:
        if model.train_function is None or force:
            # As either Keras does: control flow in a `train_step` of the user's is TensorFlow's with tf_keras only.
            convert = compat.library_of(model).__name__ == "tf_keras"
            step = model.train_step if convert else tf.autograph.experimental.do_not_convert(model.train_step)

            def picking(start: Any, stop: Any) -> dict[str, Any]:
                lost = tf.constant(-1)
                for number in tf.range(start, stop):
                    rows = order[number]
                    logs = step((tf.gather(x, rows), tf.gather(y, rows)))
                    lost = _first_lost(lost, number, logs)
                return {**logs, LOST: lost}

            @tf.function(jit_compile=True)
            def compiled(batches: Any, targets: Any, start: Any, stop: Any) -> dict[str, Any]:
                lost, number = tf.constant(-1), start
                with _masked_once(model):
                    # XLA would compile anew for each length if it were in a shape or in a `tf.range`, and round a step
                    # that stands before the loop otherwise than those in it.
                    while number < stop:
                        place = number - start
                        logs = step((tf.gather(batches, place), tf.gather(targets, place)))
                        lost = _first_lost(lost, number, logs)
                        number += 1
                return {**logs, LOST: lost}

            def picked(start: Any, stop: Any) -> dict[str, Any]:
                # Outside XLA, which copies what it picks from.
                rows = tf.gather(order, tf.minimum(start + tf.range(longest), last))
                return compiled(tf.gather(x, rows), tf.gather(y, rows), start, stop)

            def run(iterator: Any) -> dict[str, Any]:
                start, stop = tf.unstack(next(iterator))
                return (picked if suits_xla(model) else picking)(start, stop)

            model.train_function = tf.function(run, reduce_retracing=True)
        return model.train_function

    model.make_train_function, model.train_function = make_train_function, None
    try:
        yield
    finally:
        del model.make_train_function
        model.train_function = None


@contextlib.contextmanager
def _masked_once(model: Any) -> Iterator[None]:
    """Static wrappers of tfmot mask their kernels now and not in each step: after each, their optimizer does."""
    with contextlib.ExitStack() as stack:
        for _, _, layer in traversal.walk(model):
            if tfmot_wrapper.is_static(layer):
                stack.enter_context(layer.masked_once())
        yield


# What models are made of that XLA makes faster on a CPU (benchmarks/train.py); convolutions become ten times as slow.
_FOR_XLA = set("InputLayer Dense Flatten Reshape Activation ReLU LeakyReLU BatchNormalization".split())


def suits_xla(model: Any) -> bool:
    """Whether XLA makes training faster: for dense layers and little else, with a `train_step` of Keras's own."""
    library = compat.library_of(model)
    if type(model).train_step is not library.Model.train_step or "train_step" in vars(model):
        return False
    for _, _, layer in traversal.walk(model):
        known = type(layer).__name__ in _FOR_XLA and type(layer).__module__.split(".")[0] == library.__name__
        prunes = tfmot_wrapper.is_wrapper(layer) and not tfmot_wrapper.is_static(layer)
        if not known and not hasattr(layer, "layers") and (prunes or not traversal.is_mask_wrapper(layer)):
            return False
    return True


@tf.autograph.experimental.do_not_convert
def _first_lost(lost: Any, number: Any, logs: dict[str, Any]) -> Any:
    """The first step, counted from 1, whose loss is not finite; the means that Keras gives stay so from there on."""
    if "loss" not in logs:
        return lost
    return tf.where((lost < 0) & ~tf.math.is_finite(logs["loss"]), number + 1, lost)
