"""The training of a job's model: compiled steps, measurements, checkpoints, and going on after an interruption."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.comparison.gradients import gradient_function, gradient_norm
from keras_sparse_init.mask_updates.base_callback import MaskCallback
from keras_sparse_init.signal.event_log import EventLog
from keras_sparse_init.training import checkpoints
from keras_sparse_init.training.data import Data
from keras_sparse_init.training.distribution import Devices
from keras_sparse_init.training.optimizers import make_optimizer
from keras_sparse_init.training.penalty import penalized_step
from keras_sparse_init.training.progress import COLUMNS, Progress
from keras_sparse_init.training.steps import as_dataset, train_in_blocks

# Small models spend most of a step on the way into TensorFlow: see benchmarks/train.py.
_STEPS_PER_EXECUTION = 25
_TEST_BATCH = 500
_PROBE = 256


class Fit:
    """Trains a model once, from a checkpoint if there is one.

    Args:
        model: The model to train; it is compiled here.
        data: Its data.
        settings: The settings of a `Job`, by name.
        callbacks: Keras callbacks of the experiment.
        devices: The `Devices` of the job; None for one device.
    """

    def __init__(
        self,
        model: Any,
        data: Data,
        settings: dict[str, Any],
        callbacks: Sequence[Any] = (),
        devices: Devices | None = None,
    ) -> None:
        self._model, self._data, self._settings, self._callbacks = model, data, settings, callbacks
        self._devices = Devices(None) if devices is None else devices
        library = compat.library_of(model)
        names = ("learning_rate", "steps", "momentum", "weight_decay", "clip_norm")
        self._loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
        # Between executions only can such a callback change masks, and it is to do so at the steps of its schedule.
        self._scheduled = [callback for callback in callbacks if isinstance(callback, MaskCallback)]
        # Several devices share a batch, which is Keras's to do; other backends have compiled functions of their own.
        several = self._devices.replicas > 1
        self._in_blocks = not several and compat.backend_of(model) == "tensorflow"
        # Keras 3 does not run several steps in one execution on several devices: TensorFlow misses a placeholder.
        single = self._in_blocks or self._scheduled or (several and settings["keras"] == "keras")
        self._per_execution = 1 if single else min(_STEPS_PER_EXECUTION, settings["log_every"])
        model.compile(
            optimizer=make_optimizer(
                settings["optimizer"], variables=model.trainable_variables, **{name: settings[name] for name in names}
            ),
            loss=self._loss,
            metrics=[library.metrics.SparseCategoricalAccuracy(name="accuracy")],
            steps_per_execution=self._per_execution,
            # What Keras 3 would choose makes convolutions on a CPU half as fast; JAX does not go without.
            jit_compile=compat.backend_of(model) == "jax",
        )
        if settings.get("gradient_penalty"):
            model.train_step = penalized_step(model, settings["gradient_penalty"])
        if several and settings["keras"] == "tf_keras":
            # Each device knows the means of all, which tf_keras would add up.
            model.distribute_reduction_method = "first"
        # Images that are not a run's first: those of a file may be in the order of their classes.
        chosen = np.sort(np.random.default_rng(0).permutation(len(data.x_train))[:_PROBE])
        self._probe = data.x_train[chosen], data.y_train[chosen]
        self._gradients = gradient_function(model, self._loss)

    def run(self, directory: Path, checkpoint: Path | None = None) -> tuple[list[dict[str, float]], float]:
        """Trains to the last step.

        Args:
            directory: The run's directory, where metrics.csv, tensorboard/ and checkpoints/ are.
            checkpoint: The one to go on from; None begins.

        Returns:
            The rows of metrics.csv, and the seconds of all processes that took part.

        Raises:
            FloatingPointError: When the loss becomes NaN or infinite.
            KeyboardInterrupt: When it was interrupted; a checkpoint is written first where that is possible.
            ValueError: When the last checkpoint is damaged.
        """
        model, steps, log_every = self._model, self._settings["steps"], self._settings["log_every"]
        if checkpoint is None:
            reached: dict[str, Any] = {"step": 0, "seconds": 0.0, "rows": [self._first_row()]}
        else:
            reached = checkpoints.restore(checkpoint, model)
        saved, seconds_before = int(reached.pop("step")), float(reached.pop("seconds"))
        started = time.perf_counter()
        log = EventLog(directory / "tensorboard")
        progress = Progress(
            directory / "metrics.csv",
            steps,
            log_every,
            self._measure,
            model.reset_metrics,
            log,
            step=saved,
            quiet=not self._devices.is_chief,
            **reached,
        )

        def save() -> None:
            nonlocal saved
            saved = progress.step
            rows = np.array(progress.rows).reshape(-1, len(COLUMNS))
            seconds = seconds_before + time.perf_counter() - started
            checkpoints.save(directory, model, saved, seconds=seconds, rows=rows, pending=progress.pending)

        def follow(step: int, logs: dict[str, Any]) -> None:
            wrote, every = progress.on_step(step, logs), self._settings["checkpoint_every"]
            if wrote and (step // every > saved // every or step == steps):
                save()

        with progress:
            if checkpoint is None:
                save()
            try:
                if saved < steps:
                    self._train(saved, follow)
            except KeyboardInterrupt:
                # JAX may have given up the variables of an interrupted step: the checkpoint before stands then.
                with contextlib.suppress(RuntimeError):
                    # Steps that were made after the last callback would be made again. Of several workers the others
                    # may be elsewhere.
                    at_hand = self._devices.workers == 1 and progress.step == compat.iterations(model)
                    if at_hand and progress.step > saved:
                        save()
                raise
            seconds = seconds_before + time.perf_counter() - started
        return progress.rows_by_name(), seconds

    def _train(self, start: int, follow: Callable[[int, dict[str, Any]], None]) -> None:
        """Makes the steps from `start` on."""
        ends = self._ends(start)
        callbacks = [*self._callbacks, _Following(follow, ends)]
        if self._in_blocks:
            data = self._data
            for callback in self._scheduled:
                callback.most_updates = _STEPS_PER_EXECUTION
            with train_in_blocks(self._model, data.x_train, data.y_train, self._order(), _STEPS_PER_EXECUTION):
                self._model.fit(as_dataset(ends, start), callbacks=callbacks, verbose=0, shuffle=False)
        elif self._devices.workers > 1:
            order, data = self._order()[start:], self._data
            shares = self._devices.shares(order, data.x_train, data.y_train)
            self._model.fit(shares, steps_per_epoch=len(order), callbacks=callbacks, verbose=0, shuffle=False)
        else:
            self._model.fit(self.batches(start), callbacks=callbacks, verbose=0, shuffle=False)

    def _ends(self, start: int) -> list[int]:
        """The steps after which an execution ends."""
        last = self._settings["steps"]
        if not self._in_blocks:
            return [*range(start + self._per_execution, last, self._per_execution), last]
        log_every, longest = self._settings["log_every"], _STEPS_PER_EXECUTION
        due = (n - 1 for n in range(1, last + 1) for c in self._scheduled if c.due(n) is not None)
        ends = {*range(0, last, log_every), *range(0, last, longest), *due, last}
        return sorted(end for end in ends if end > start)

    def evaluate(self) -> tuple[float, float]:
        """The test loss and accuracy."""
        return self._evaluate(self._data.x_test, self._data.y_test)

    def _order(self) -> np.ndarray:
        """For each step the numbers of its images: all in a new order each epoch, no break between epochs."""
        images, steps, batch = len(self._data.x_train), self._settings["steps"], self._settings["batch"]
        # NumPy's generator, not tf.data's shuffle: the order depends on the seed alone, and step n can be found again.
        rng = np.random.default_rng([self._settings["seed"], 1])
        epochs = math.ceil(steps * batch / images)
        order = np.concatenate([rng.permutation(images).astype(np.int32) for _ in range(epochs)])
        return order[: steps * batch].reshape(steps, batch)

    def batches(self, start: int = 0) -> Any:
        """The batches of the steps from `start` on."""
        import tensorflow as tf

        x, y = tf.constant(self._data.x_train), tf.constant(self._data.y_train)
        dataset = tf.data.Dataset.from_tensor_slices(self._order()[start:])
        return dataset.map(lambda rows: (tf.gather(x, rows), tf.gather(y, rows))).prefetch(tf.data.AUTOTUNE)

    def _first_row(self) -> tuple[float, ...]:
        """The row of step 0: loss and accuracy are those of the probe, since no batch has been trained on."""
        return (0, *self._evaluate(*self._probe), *self._measure())

    def _measure(self) -> tuple[float, float]:
        """What is measured anew for a row: the test accuracy, and the norm of the gradient on the probe."""
        return self.evaluate()[1], gradient_norm(self._gradients(*self._probe))

    def _evaluate(self, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        result = self._model.evaluate(x, y, batch_size=_TEST_BATCH, verbose=0, return_dict=True)
        return float(result["loss"]), float(result["accuracy"])


class _Following(compat.Callback):
    """Calls a function with the number of steps made and the running means, after each execution.

    Args:
        follow: The function.
        ends: The steps after which executions end.
    """

    def __init__(self, follow: Callable[[int, dict[str, Any]], None], ends: Sequence[int]) -> None:
        super().__init__()
        self._follow, self._ends = follow, iter(ends)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        """Calls the function."""
        assert self.model is not None  # On JAX, to ask for the model is what brings its variables up to date.
        if missing := [name for name in ("loss", "accuracy") if name not in logs]:
            raise ValueError(f"The model's `train_step` must return 'loss' and 'accuracy'. It lacks {missing}")
        self._follow(next(self._ends), {name: float(value) for name, value in logs.items()})
