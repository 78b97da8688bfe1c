"""`SignalMonitor`: a callback that measures the signal of a model while it trains."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_sparse_init import compat
from keras_sparse_init.arguments import is_integer
from keras_sparse_init.signal.event_log import EventLog
from keras_sparse_init.signal.measure import Signals
from keras_sparse_init.signal.report import SignalReport


class SignalMonitor(compat.Callback):
    """Callback that measures signals, gradients and masks of the model every n steps of `fit`, in both Kerases.

    At the begin of training, and whenever the optimizer has made `every` further updates, it does what `measure_signal`
    does on the same samples, through one traced function. With several steps in an execution (`steps_per_execution`) a
    measurement that is due inside one follows it. Training itself is not changed: not the weights, nor what is drawn
    by Keras 3's layers.

    Args:
        x: As in `measure_signal`. A few hundred samples are enough.
        y: As in `measure_signal`.
        loss: As in `measure_signal`.
        every: A positive int, the number of steps between two measurements.
        output_dir: A new or empty directory for layers.csv and kernels.csv, a row for each layer or kernel and step,
            and tensorboard/, the same for TensorBoard. None: `reports` alone.
        training: As in `measure_signal`.
        batch_size: As in `measure_signal`.
        seed: As in `measure_signal`.

    Attributes:
        reports: A dict from steps to `SignalReport`.

    Raises:
        ValueError: When `every` is no positive int; in `fit`, as in `measure_signal`.
        FileExistsError: When `output_dir` is not empty: results are never overwritten.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import SignalMonitor
        >>> L = keras.layers
        >>> model = keras.Sequential([L.Input((20,)), L.Dense(10, "relu", name="hidden"), L.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones((80, 20)), np.ones((80, 1))
        >>> monitor = SignalMonitor(x, y, "mse", every=4)
        >>> history = model.fit(x, y, batch_size=8, verbose=0, callbacks=[monitor])
        >>> list(monitor.reports), monitor.reports[4]["hidden"].units
        ([0, 4, 8], 10)
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        loss: Any = None,
        every: int = 100,
        output_dir: str | os.PathLike[str] | None = None,
        training: bool = False,
        *,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not is_integer(every) or every < 1:
            raise ValueError(f"`every` must be a positive int. Received: every={every!r}")
        self.every = int(every)
        self.reports: dict[int, SignalReport] = {}
        self._samples = (x, y, loss, training)
        self._options = {"batch_size": batch_size, "seed": seed}
        self._directory = None if output_dir is None else _empty_directory(output_dir)
        self._log: EventLog | None = None
        self._signals: tuple[Any, Signals] | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Measures the model as training finds it; one that is not built yet, after its first steps."""
        self._read_at = self._last = compat.iterations(self.model)
        self._batches, self._rate, self._begun = 0, 0, 0
        if self.model.built:
            self._measure(self._last)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps the index of the first step of an execution."""
        self._begun = batch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures if it is due."""
        self._batches += max(batch - self._begun, 0) + 1
        # On JAX, asking the model takes time. A `train_step` may make several updates, or some of its own.
        if self._rate and (self._read_at + self._rate * self._batches) // self.every <= self._last // self.every:
            return
        now = compat.iterations(self.model)
        self._rate = max(self._rate, -(-(now - self._read_at) // self._batches), 1)
        self._read_at, self._batches = now, 0
        if now // self.every > self._last // self.every or not self.reports:
            self._measure(now)

    def _measure(self, step: int) -> None:
        self._last = step
        if step in self.reports:
            return  # A further `fit` goes on where the last one has ended.
        model = self.model
        if self._signals is None or self._signals[0] is not model:
            self._signals = model, Signals(model, *self._samples, **self._options, compiled=True)
        report = self.reports[step] = self._signals[1].measure()
        if self._directory is not None:
            self._write(self._directory, step, report)

    def _write(self, directory: Path, step: int, report: SignalReport) -> None:
        if self._log is None:
            directory.mkdir(parents=True, exist_ok=True)
            self._log = EventLog(directory / "tensorboard")
        numbers = {"output_std": report.output_std}
        for part in ("layers", "kernels"):
            rows = [{"step": step, **entry.row()} for entry in getattr(report, part)]
            _append(directory / f"{part}.csv", rows)
            for row in rows:
                name = row.pop("name")
                found = ((k, v) for k, v in row.items() if k != "step" and isinstance(v, int | float))
                numbers.update({f"{name}/{k}": v for k, v in found if not isinstance(v, bool)})
        self._log.write({"step": step, **numbers})


def _empty_directory(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output directory {str(path)!r} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"The output directory {str(path)!r} is not empty; results are never overwritten")
    return path


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file, after a line of their names in a new one; None is an empty cell."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)
