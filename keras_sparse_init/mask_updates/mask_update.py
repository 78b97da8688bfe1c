"""`MaskUpdate`: SET, RigL and RigLInverted during `fit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init.arguments import is_integer
from keras_sparse_init.mask_updates.base_callback import MaskCallback, require_masked
from keras_sparse_init.mask_updates.unmasked_gradients import DenseGradients
from keras_sparse_init.mask_updates.updaters import MaskUpdater
from keras_sparse_init.masked_kernel import trainable_kernels
from keras_sparse_init.samples import Samples
from keras_sparse_init.sampling import derive_seed


class MaskUpdate(MaskCallback):
    """Callback that changes the masks of a sparse model during `fit`, in both Kerases and on every backend of Keras 3.

    The masks are those of `Masked` layers and of the static tfmot wrappers that `sparsify` makes. Step s is the s-th
    update of the optimizer; the masks change right before it. The step is the optimizer's, so that a run continued with
    its optimizer goes on where it was. With `steps_per_execution` above 1 an update that is due inside an execution
    follows it; of several that are due, the last one is made.

    A callback has no gradients at hand. Those that `RigL` and `RigLInverted` need are taken of the loss that the model
    is compiled with, on a batch of the data that the callback is given: for that, one more forward and backward pass is
    made at each update. Give it the training data. Class weights of `fit` do not count in it.

    Other callbacks and the history find the fraction of zeros of the masks in `logs["sparsity"]` at the end of each
    epoch, which stays the same.

    Args:
        updater: A `SET`, `RigL` or `RigLInverted`.
        x: Inputs, an array or a list, tuple or dict of arrays: at each update, random samples of them are the batch.
            They follow from the updater's seed and the step. Or a `tf.data.Dataset` of batches `(x, y)` or
            `(x, y, sample_weight)`, which are taken in turn; of a run that is continued, from the first one on.
            `SET` needs no data.
        y: Targets; not with a dataset.
        batch_size: How many samples of arrays the batch has.

    Raises:
        ValueError: When the updater needs data and there are none; in `fit`, when the model is not compiled, has no
            trainable masked kernel, or tfmot prunes it by itself.
        TypeError: When `updater` is none.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, MaskUpdate, RigL
        >>> x, y = np.random.default_rng(0).normal(size=(80, 20)), np.ones((80, 10))
        >>> model = keras.Sequential([keras.layers.Input((20,)), Masked(keras.layers.Dense(10), sparsity=0.75)])
        >>> model.compile("adam", "mse")
        >>> update = MaskUpdate(RigL(end_step=15, frequency=5), x, y, batch_size=32)
        >>> history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[update])
        >>> history.history["sparsity"]
        [0.75, 0.75]
    """

    def __init__(self, updater: MaskUpdater, x: Any = None, y: Any = None, batch_size: int = 128) -> None:
        super().__init__()
        if not isinstance(updater, MaskUpdater):
            raise TypeError(f"`updater` must be a SET, RigL or RigLInverted. Received: updater={updater!r}")
        if updater.needs_gradients and x is None:
            raise ValueError(
                f"`x` must be given: {type(updater).__name__} needs gradients on a batch of data, such as the training "
                "data: arrays x and y, or a tf.data.Dataset of batches (x, y). Received: x=None"
            )
        if isinstance(x, tf.data.Dataset) and y is not None:
            raise ValueError("`y` must be None when `x` is a dataset, whose batches have targets. Received both")
        if not is_integer(batch_size) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive int. Received: batch_size={batch_size!r}")
        self.updater = updater
        self._x, self._y, self._batch_size = x, y, int(batch_size)

    def check(self) -> None:
        """Checks that there are masks to change, that new connections can be drawn, that samples and targets fit."""
        self.updater.check(trainable_kernels(self.model, require_masked(self.model)))
        if self.updater.needs_gradients and self._gradients is None:
            self._gradients = DenseGradients(self.model)
            if isinstance(self._x, tf.data.Dataset):
                self._source = _forever(self._x)
            else:
                loss = None if self._y is None else self.model.compute_loss
                self._source = Samples(self.model, self._x, self._y, loss, self._batch_size)

    def due(self, step: int) -> bool | None:
        """True at a step that is due."""
        return self.updater.is_due(step) or None

    def change_masks(self, step: int, due: bool) -> None:
        """Updates the masks."""
        gradients = None
        if self.updater.needs_gradients:
            self.check()
            gradients = self._gradients(*self._batch(step))
        self.updater.update(self.model, step, gradients)

    def _start(self) -> None:
        super()._start()
        # Made for a fit: the model may be compiled anew before the next.
        self._gradients: DenseGradients | None = None
        self._source: Any = None

    def _batch(self, step: int) -> tuple[Any, ...]:
        if isinstance(self._x, tf.data.Dataset):
            batch = next(self._source)
            return batch if isinstance(batch, tuple) else (batch,)
        rng = np.random.default_rng(derive_seed(self.updater.seed, f"batch/{step}"))
        count = self._source.count
        return self._source.at(np.sort(rng.choice(count, min(self._batch_size, count), replace=False)))


def _forever(dataset: tf.data.Dataset) -> Iterator[Any]:
    while True:
        empty = True
        for batch in dataset:
            empty = False
            yield batch
        if empty:
            raise ValueError("`x` must have batches. Received: an empty dataset")
