"""Callbacks that change masks during `fit`: when a change is due, and zeros that stay zeros."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_sparse_init import compat, tfmot_wrapper, traversal
from keras_sparse_init.masked_kernel import MaskedKernel, masked_kernels


class MaskCallback(compat.Callback):
    """Base of callbacks that change the masks of a model at certain steps of `fit`.

    Step s is the s-th update of the optimizer; masks change right before it. The step is the optimizer's, so that a run
    continued with its optimizer goes on where it was. With `steps_per_execution` above 1 a change that is due inside an
    execution follows it: of several the last one. Weights off the masks are set to 0, should something move them.

    A subclass says what is due at a step, in `due`, and changes the masks, in `change_masks`.

    Attributes:
        most_updates: The most updates that what Keras calls a batch makes. None: the most that were seen so far, right
            as long as each makes as many.
    """

    most_updates: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._start()

    def check(self) -> None:
        """Checks that the model, which is built, has masks that can be changed."""
        raise NotImplementedError

    def due(self, step: int) -> Any | None:
        """What is to be done at a step; None when nothing is."""
        raise NotImplementedError

    def change_masks(self, step: int, due: Any) -> None:
        """Does what is due at a step."""
        raise NotImplementedError

    def _start(self) -> None:
        self._read_at: int | None = None  # The optimizer's iterations when they were last read, which takes time.
        self._batches = 0  # Batches since then.
        # The most updates that a batch can have made; a `train_step` may make several.
        self._rate: int | None = self.most_updates
        self._begun = 0  # Index of the first batch of the execution.
        self._seen = 0  # The last step that `due` was asked about.
        self._due: list[tuple[int, Any]] = []  # What is yet to be done, with its step.
        self._changed = self._moved = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that the model's masks can be changed as asked for."""
        self._start()
        compat.iterations(self.model)
        if self._is_built():
            self.check()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Changes the masks if the step to come is due."""
        self._begun = batch
        if self._read_at is None:
            # What was due before belongs to earlier fits.
            self._seen = self._read()
        self._update(1)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Changes the masks if a step inside the execution was due."""
        self._batches += max(batch - self._begun, 0) + 1
        if self._changed or self._moved:
            self._changed = False
            self._set_to_zero()
        self._update(0)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the sparsity into `logs`."""
        sparsity = self._set_to_zero()
        if logs is not None:
            logs["sparsity"] = sparsity

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Sets weights to 0 that the end of training has moved."""
        self._set_to_zero()

    def _update(self, ahead: int) -> None:
        """Does the latest of what is due up to the current step."""
        bound = self._read_at + (self._rate or 1) * self._batches + ahead
        for step in range(self._seen + 1, bound + 1):
            if (due := self.due(step)) is not None:
                self._due.append((step, due))
        self._seen = max(self._seen, bound)
        if self._rate is not None and not (self._due and self._due[0][0] <= bound):
            return
        step = self._read() + ahead
        ready = [item for item in self._due if item[0] <= step]
        # tf_keras may build the layers in the first batch only; its step then follows it.
        if ready and self._is_built():
            del self._due[: len(ready)]
            self.change_masks(*ready[-1])
            self._changed = True

    def _read(self) -> int:
        now = compat.iterations(self.model)
        if self._batches:
            self._rate = max(self._rate or 1, -(-(now - self._read_at) // self._batches))
        self._read_at, self._batches = now, 0
        return now

    def _set_to_zero(self) -> float:
        """Sets weights off the masks to 0, should something have moved them, and returns the masks' sparsity."""
        ones = size = 0
        for kernel in require_masked(self.model):
            mask = kernel.mask_value()
            weights = compat.to_numpy("kernel", kernel.kernel)
            if np.any(weights[~mask]):
                compat.assign(kernel.kernel, np.where(mask, weights, np.zeros((), weights.dtype)))
                self._moved = True
            ones, size = ones + int(np.count_nonzero(mask)), size + mask.size
        return (size - ones) / size

    def _is_built(self) -> bool:
        model = self.model
        return model.built and all(w.built for _, _, w in traversal.walk(model) if traversal.is_mask_wrapper(w))


def require_masked(model: Any) -> list[MaskedKernel]:
    """The masked kernels of a model whose masks nothing else changes.

    Raises:
        ValueError: When there are none, or tfmot prunes one by a schedule of its own.
    """
    kernels = masked_kernels(model)
    if not kernels:
        raise ValueError(
            f"`model` must have masked kernels. Received: the model {model.name!r} without any; wrap its layers in "
            "`Masked`, or see `sparsify`"
        )
    for _, _, layer in traversal.walk(model):
        if tfmot_wrapper.is_wrapper(layer) and not tfmot_wrapper.is_static(layer):
            raise ValueError(
                f"The layer {layer.name!r} is pruned by tfmot with a schedule of its own. Use tfmot's callback or "
                "`tfmot.UpdatePruningStep`, or wrap the layer in `Masked`"
            )
    return kernels
