"""The training job: data, a network, an experiment, compiled steps, and everything that is kept of the run.

Configuration by gin is elsewhere (gin_registry.py): here are plain Python arguments.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from keras_sparse_init._version import __version__
from keras_sparse_init.training import checkpoints, run_dir
from keras_sparse_init.training.data import Data, load_data
from keras_sparse_init.training.experiments import Scratch
from keras_sparse_init.training.optimizers import OPTIMIZERS, make_optimizer
from keras_sparse_init.training.progress import COLUMNS, Progress

# Small models spend most of a step on the way into TensorFlow: 25 steps an execution are 1.05 to 1.9 times as fast.
_STEPS_PER_EXECUTION = 25
_TEST_BATCH = 500


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
        directory: Where everything lies.
        model: The trained model without wrappers, as saved in model.keras: its masked weights are exactly 0.
        table: The layers: shapes, sparsities, fan-ins, dead units.
        summary: The content of summary.json.
    """

    directory: Path
    model: Any
    table: Any
    summary: dict[str, Any]


class Job:
    """A classifier that is ready to be trained: everything is checked, loaded and initialized, nothing written.

    Args:
        model: A function of (input_shape, classes) that returns a tf_keras model from images to logits, such as
            `networks.lenet5`; or such a model.
        data: A `Data`, or what `load_data` takes: a name or the path of an .npz file.
        experiment: What is done to the model before training: see `experiments`. None is `Scratch(sparsity=0.95)`.
        steps: The number of training steps.
        batch: The number of images in a step.
        learning_rate: The first learning rate. It falls to 0 along a half cosine over all steps.
        optimizer: "momentum" (stochastic gradient descent with momentum), "sgd" (without), "adam" or "rmsprop".
        momentum: The momentum of "momentum" and "rmsprop".
        weight_decay: Decoupled weight decay of the kernels, as in AdamW; it is multiplied by the learning rate.
        clip_norm: Gradients are scaled down to this norm over all variables. None does not.
        seed: Determines masks, kernels and the order of the images.
        log_every: Steps between two rows of metrics.csv.
        checkpoint_every: Steps between two checkpoints. Each is written with the next row of metrics.csv.

    Raises:
        ValueError: When an argument is out of its range, or model and data do not fit together.
        TypeError: When the model is not one of tf_keras.
        FileNotFoundError: When there is no such data file.

    Example:
        >>> from keras_sparse_init.training import Job, Scratch, lenet5
        >>> job = Job(lenet5, "digits", Scratch(sparsity=0.95), steps=2000)
        >>> round(job.table().total.sparsity, 2)
        0.95
    """

    def __init__(
        self,
        model: Any,
        data: Data | str | os.PathLike[str] = "digits",
        experiment: Any = None,
        *,
        steps: int = 2000,
        batch: int = 64,
        learning_rate: float = 0.1,
        optimizer: str = "momentum",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        seed: int = 0,
        log_every: int = 100,
        checkpoint_every: int = 500,
    ) -> None:
        counts = {"steps": steps, "batch": batch, "log_every": log_every, "checkpoint_every": checkpoint_every}
        for name, value in counts.items():
            _check(_is_int(value) and value > 0, name, value, "a positive integer")
        _check(_is_int(seed) and seed >= 0, "seed", seed, "an integer of at least 0")
        _check(_is_real(learning_rate) and learning_rate > 0, "learning_rate", learning_rate, "a positive number")
        _check(_is_real(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        known = isinstance(optimizer, str) and optimizer in OPTIMIZERS
        _check(known, "optimizer", optimizer, f"one of {', '.join(map(repr, OPTIMIZERS))}")
        _check(_is_real(weight_decay) and weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
        valid = clip_norm is None or (_is_real(clip_norm) and clip_norm > 0)
        _check(valid, "clip_norm", clip_norm, "a positive number or None")
        self.data = data if isinstance(data, Data) else load_data(data)
        self.experiment = Scratch(sparsity=0.95) if experiment is None else experiment
        self.settings = {
            **{name: int(value) for name, value in counts.items()},
            "optimizer": optimizer,
            "learning_rate": float(learning_rate),
            "momentum": float(momentum),
            "weight_decay": float(weight_decay),
            "clip_norm": None if clip_norm is None else float(clip_norm),
            "seed": int(seed),
        }
        network = model if hasattr(model, "layers") else model(self.data.input_shape, self.data.classes)
        _check_fit(network, self.data)
        self.network, self._has_run = network.name, False
        self.model = self.experiment.prepare(network, seed=self.settings["seed"])

    def table(self) -> Any:
        """The `SparsityTable` of the model as it is now; of all kernels, full ones, when none is masked."""
        from keras_sparse_init import fans, traversal
        from keras_sparse_init.sparse_model import sparsity_table
        from keras_sparse_init.table import SparsityRow, SparsityTable

        table = sparsity_table(self.model)
        if table.rows:
            return table
        rows = []
        for place in traversal.kernels_of(self.model):
            shape = tuple(getattr(place.owner, place.attribute).shape)
            layout = fans.kernel_layout(place.owner, shape, weight_name=place.attribute.removeprefix("_"))
            rows.append(SparsityRow.of(place.name, np.ones(shape, bool), layout))
        return SparsityTable(rows)

    def __str__(self) -> str:
        what, images = (
            self.experiment.describe(),
            f"{len(self.data.x_train)} train, {len(self.data.x_test)} test images",
        )
        sparse = f"{self.table().total.sparsity:.1%} sparse by {what['method']}"
        steps = f"init {what['init']}, {self.settings['steps']} steps of {self.settings['batch']}"
        return f"{self.network} on {self.data.name} ({images}), {sparse}, {steps}"

    def run(self, output_dir: str | os.PathLike[str] | None = None, config: str | None = None) -> TrainResult:
        """Trains, and writes the results: metrics.csv, checkpoints, model.keras, masks.npz, summary.json, job.json.

        model.keras is a plain model that loads without this package; masks.npz has the mask of each kernel by its name;
        job.json says what the numbers depend on. A run that was interrupted goes on from its last checkpoint, and ends
        with the weights of one that was not (in a model without Dropout or noise layers, whose random state tf_keras
        does not give away).

        Args:
            output_dir: Where to write: a new or empty directory, or that of an unfinished run of this very job. None
                makes a directory under runs/.
            config: The text of operative_config.gin. None writes no such file.

        Returns:
            A `TrainResult`.

        Raises:
            FileExistsError: When the directory holds anything else.
            FloatingPointError: When the loss becomes NaN or infinite.
            KeyboardInterrupt: When it was interrupted; a checkpoint is written first.
            RuntimeError: When the job has run before.
            ValueError: When the last checkpoint is damaged.
        """
        if self._has_run:
            raise RuntimeError("A job runs once: its model is trained. Make another `Job`")
        described, table = self.experiment.describe(), self.table()
        if output_dir is None:
            output_dir = run_dir.default_output_dir(
                self.network,
                described["experiment"],
                described["init"],
                round(table.total.sparsity, 3),
                self.settings["seed"],
            )
        directory = run_dir.claim(output_dir, self._identity(config))
        if config is not None:
            (directory / "operative_config.gin").write_text(config, encoding="utf-8")
        self._has_run = True
        early, metrics, seconds = self._fit(directory)

        from keras_sparse_init.sparse_model import apply_masks, masked_kernels, strip

        apply_masks(self.model)  # The last step has moved weights that the next forward pass would have masked.
        test_loss, test_accuracy = self._evaluate()
        masks = {kernel.name: np.asarray(kernel.mask) != 0 for kernel in masked_kernels(self.model)}
        np.savez_compressed(directory / run_dir.MASKS, **masks)
        plain = strip(self.model)
        plain.save(directory / "model.keras")
        summary = {
            "network": self.network,
            **described,
            "sparsity": table.total.sparsity,
            "data": self.data.name,
            "test_images": len(self.data.x_test),
            "early": {"step": early["step"], "test_accuracy": early["test_accuracy"]},
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "loss": metrics["loss"],
            "train_accuracy": metrics["train_accuracy"],
            **self.settings,
            "seconds": round(seconds, 2),
            "table": table.to_dict(),
            "versions": _versions(),
        }
        run_dir.write_summary(directory, summary)
        return TrainResult(directory, plain, table, summary)

    def _identity(self, config: str | None) -> dict[str, Any]:
        """What tells this job from others: a run is never resumed as another."""
        from keras_sparse_init.sparse_model import masked_kernels

        masks = [kernel.mask_value() for kernel in masked_kernels(self.model)]
        arrays = [self.data.x_train, self.data.y_train, self.data.x_test, self.data.y_test]
        return {
            **self.experiment.describe(),
            **self.settings,
            "weights": [list(variable.shape) for variable in self.model.variables],
            "masks": _digest(masks),
            "data": self.data.name,
            "data_digest": _digest(arrays),
            "config": config,
        }

    def _fit(self, directory: Path) -> tuple[dict[str, float], dict[str, float], float]:
        """Trains, from the last checkpoint if there is one; returns the first and the last row and the seconds."""
        import tf_keras as keras

        from keras_sparse_init import compat

        steps, log_every = self.settings["steps"], self.settings["log_every"]
        names = ("learning_rate", "steps", "momentum", "weight_decay", "clip_norm")
        self.model.compile(
            optimizer=make_optimizer(
                self.settings["optimizer"],
                variables=self.model.trainable_variables,
                **{name: self.settings[name] for name in names},
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=min(_STEPS_PER_EXECUTION, log_every),
        )
        checkpoint = checkpoints.last(directory)
        reached = {"step": 0} if checkpoint is None else checkpoints.restore(checkpoint, self.model)
        saved, seconds_before = int(reached.pop("step")), float(reached.pop("seconds", 0.0))
        started = time.perf_counter()
        progress = Progress(
            directory / "metrics.csv",
            steps,
            log_every,
            lambda: self._evaluate()[1],
            self.model.reset_metrics,
            step=saved,
            **reached,
        )

        def seconds() -> float:
            return seconds_before + time.perf_counter() - started

        def save() -> None:
            nonlocal saved
            saved = progress.step
            rows = np.array(progress.rows).reshape(-1, len(COLUMNS))
            checkpoints.save(directory, self.model, saved, seconds=seconds(), rows=rows, pending=progress.pending)

        def follow(batch: int, logs: dict[str, Any]) -> None:
            wrote, every = progress.on_batch_end(batch, logs), self.settings["checkpoint_every"]
            if wrote and (progress.step // every > saved // every or progress.step == steps):
                save()

        with progress:
            if checkpoint is None:
                save()
            try:
                if saved < steps:
                    callback = keras.callbacks.LambdaCallback(on_train_batch_end=follow)
                    self.model.fit(self._batches(saved), callbacks=[callback], verbose=0)
            except KeyboardInterrupt:
                # Steps that were made after the last callback would be made again.
                if progress.step > saved and progress.step == compat.iterations(self.model):
                    save()
                raise
        return progress.row(0), progress.row(-1), seconds()

    def _batches(self, start: int = 0) -> Any:
        """The batches of the steps from `start` on: the images in a new order each epoch, no break between epochs."""
        import tensorflow as tf

        images, steps, batch = len(self.data.x_train), self.settings["steps"], self.settings["batch"]
        # NumPy's generator, not tf.data's shuffle: the order depends on the seed alone, and step n can be found again.
        rng = np.random.default_rng([self.settings["seed"], 1])
        epochs = math.ceil(steps * batch / images)
        order = np.concatenate([rng.permutation(images).astype(np.int32) for _ in range(epochs)])
        order = order[: steps * batch].reshape(steps, batch)[start:]
        x, y = tf.constant(self.data.x_train), tf.constant(self.data.y_train)
        dataset = tf.data.Dataset.from_tensor_slices(order)
        return dataset.map(lambda rows: (tf.gather(x, rows), tf.gather(y, rows))).prefetch(tf.data.AUTOTUNE)

    def _evaluate(self) -> tuple[float, float]:
        """The test loss and accuracy."""
        result = self.model.evaluate(
            self.data.x_test, self.data.y_test, batch_size=_TEST_BATCH, verbose=0, return_dict=True
        )
        return float(result["loss"]), float(result["accuracy"])


def train(
    model: Any,
    data: Data | str | os.PathLike[str] = "digits",
    experiment: Any = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> TrainResult:
    """Trains a classifier as `keras-sparse-init train` does.

    Args:
        model: A tf_keras model, or a function of (input_shape, classes) that returns one, such as `networks.lenet5`.
        data: A `Data`, `"digits"` or the path of an .npz file.
        experiment: What is done to the model before training. None is `Scratch(sparsity=0.95)`.
        output_dir: Where to write the results: a new or empty directory, or that of an unfinished run of the same job,
            which then goes on from its last checkpoint. None makes a directory under runs/.
        **settings: steps, batch, learning_rate, optimizer, seed and more: see `Job`.

    Returns:
        A `TrainResult`.

    Raises:
        ValueError: When an argument is out of its range, or model and data do not fit together.
        FileExistsError: When the output directory holds anything else.
        FloatingPointError: When the loss becomes NaN or infinite.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training import Scratch, lenet5, train
        >>> result = train(lenet5, "digits", Scratch(sparsity=0.9), steps=2, output_dir=tempfile.mkdtemp())
        >>> sorted(path.name for path in result.directory.iterdir())
        ['checkpoints', 'job.json', 'masks.npz', 'metrics.csv', 'model.keras', 'summary.json']
    """
    if output_dir is not None:
        run_dir.check_output_dir(output_dir)
    return Job(model, data, experiment, **settings).run(output_dir)


def _digest(arrays: list[np.ndarray]) -> str:
    """A text that differs when any of the arrays does."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float | np.floating) and math.isfinite(value))


def _check(valid: bool, name: str, value: Any, meaning: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` must be {meaning}. Received: {name}={value!r}")


def _check_fit(model: Any, data: Data) -> None:
    shape = getattr(model, "output_shape", None)  # A model that is not built yet has none to check.
    if shape is not None and (not isinstance(shape, tuple) or shape[-1] != data.classes):
        raise ValueError(
            f"The model must have one logit for each of the {data.classes} classes of {data.name}. "
            f"Received: a model with output shape {shape}"
        )
    taken, given = getattr(model, "input_shape", None), (None, *data.input_shape)
    fits = isinstance(taken, tuple) and len(taken) == len(given)
    if taken is not None and not (fits and all(n in (None, m) for n, m in zip(taken, given, strict=True))):
        raise ValueError(
            f"The model must take images of shape {data.input_shape}, those of {data.name}. "
            f"Received: a model with input shape {taken}"
        )


def _versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    import tensorflow as tf

    packages = {"tf_keras": "tf-keras", "keras": "keras", "tfmot": "tensorflow-model-optimization", "numpy": "numpy"}
    return {
        "keras_sparse_init": __version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,  # Its distribution may be called tensorflow or tensorflow-cpu.
        **{name: importlib.metadata.version(package) for name, package in packages.items()},
    }
