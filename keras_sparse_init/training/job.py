"""The training job: data, a network, an experiment, compiled steps, and everything that is kept of the run.

Configuration by gin is elsewhere (gin_registry.py): here are plain Python arguments.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from keras_sparse_init._version import __version__
from keras_sparse_init.training import run_dir
from keras_sparse_init.training.data import Data, load_data
from keras_sparse_init.training.experiments import Scratch
from keras_sparse_init.training.progress import Progress

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
        momentum: The momentum of stochastic gradient descent.
        seed: Determines masks, kernels and the order of the images.
        log_every: Steps between two rows of metrics.csv.

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
        momentum: float = 0.9,
        seed: int = 0,
        log_every: int = 100,
    ) -> None:
        for name, value in (("steps", steps), ("batch", batch), ("log_every", log_every)):
            _check(_is_int(value) and value > 0, name, value, "a positive integer")
        _check(_is_int(seed) and seed >= 0, "seed", seed, "an integer of at least 0")
        _check(_is_real(learning_rate) and learning_rate > 0, "learning_rate", learning_rate, "a positive number")
        _check(_is_real(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        self.data = data if isinstance(data, Data) else load_data(data)
        self.experiment = Scratch(sparsity=0.95) if experiment is None else experiment
        self.steps, self.batch, self.log_every = int(steps), int(batch), int(log_every)
        self.learning_rate, self.momentum, self.seed = float(learning_rate), float(momentum), int(seed)
        network = model if hasattr(model, "layers") else model(self.data.input_shape, self.data.classes)
        _check_output(network, self.data)
        self.network = network.name
        self.model = self.experiment.prepare(network, seed=self.seed)

    def table(self) -> Any:
        """The `SparsityTable` of the model as it is now."""
        from keras_sparse_init.sparse_model import sparsity_table

        return sparsity_table(self.model)

    def __str__(self) -> str:
        what, images = (
            self.experiment.describe(),
            f"{len(self.data.x_train)} train, {len(self.data.x_test)} test images",
        )
        sparse = f"{self.table().total.sparsity:.1%} sparse by {what['method']}"
        steps = f"init {what['init']}, {self.steps} steps of {self.batch}"
        return f"{self.network} on {self.data.name} ({images}), {sparse}, {steps}"

    def run(self, output_dir: str | os.PathLike[str] | None = None, config: str | None = None) -> TrainResult:
        """Trains, and writes the results: metrics.csv, model.keras, masks.npz, summary.json.

        model.keras is a plain model that loads without this package; masks.npz has the mask of each kernel by its name.

        Args:
            output_dir: Where to write; it must not exist or be empty. None makes a directory under runs/.
            config: The text of operative_config.gin. None writes no such file.

        Returns:
            A `TrainResult`.

        Raises:
            FileExistsError: When the directory holds anything.
            FloatingPointError: When the loss becomes NaN or infinite.
        """
        described, table = self.experiment.describe(), self.table()
        if output_dir is None:
            output_dir = run_dir.default_output_dir(
                self.network, described["experiment"], described["init"], round(table.total.sparsity, 3), self.seed
            )
        directory = run_dir.check_output_dir(output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (directory / "operative_config.gin").write_text(config, encoding="utf-8")
        started = time.perf_counter()
        early, metrics = self._fit(directory / "metrics.csv")
        seconds = time.perf_counter() - started

        from keras_sparse_init.sparse_model import apply_masks, masked_kernels, strip

        apply_masks(self.model)  # The last step has moved weights that the next forward pass would have masked.
        test_loss, test_accuracy = self._evaluate()
        masks = {kernel.name: np.asarray(kernel.mask) != 0 for kernel in masked_kernels(self.model)}
        np.savez_compressed(directory / "masks.npz", **masks)
        plain = strip(self.model)
        plain.save(directory / "model.keras")
        summary = {
            "network": self.network,
            **described,
            "sparsity": table.total.sparsity,
            "seed": self.seed,
            "data": self.data.name,
            "test_images": len(self.data.x_test),
            "early": {"step": early["step"], "test_accuracy": early["test_accuracy"]},
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "loss": metrics["loss"],
            "train_accuracy": metrics["train_accuracy"],
            "steps": self.steps,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
            "seconds": round(seconds, 2),
            "table": table.to_dict(),
            "versions": _versions(),
        }
        run_dir.write_summary(directory, summary)
        return TrainResult(directory, plain, table, summary)

    def _fit(self, metrics_path: Path) -> tuple[dict[str, float], dict[str, float]]:
        """Trains, and returns the first and the last row of the metrics."""
        import tf_keras as keras

        self.model.compile(
            optimizer=keras.optimizers.SGD(
                keras.optimizers.schedules.CosineDecay(self.learning_rate, self.steps), momentum=self.momentum
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=min(_STEPS_PER_EXECUTION, self.log_every),
        )
        with Progress(
            metrics_path, self.steps, self.log_every, lambda: self._evaluate()[1], self.model.reset_metrics
        ) as progress:
            follow = keras.callbacks.LambdaCallback(on_train_batch_end=progress.on_batch_end)
            self.model.fit(self._batches(), callbacks=[follow], verbose=0)
        return progress.first, progress.last

    def _batches(self) -> Any:
        """The batches of all steps: the images in a new order each epoch, without a break between epochs."""
        import tensorflow as tf

        images = len(self.data.x_train)
        # NumPy's generator, not tf.data's shuffle: the order depends on the seed alone, and step n can be found again.
        rng = np.random.default_rng([self.seed, 1])
        epochs = math.ceil(self.steps * self.batch / images)
        order = np.concatenate([rng.permutation(images).astype(np.int32) for _ in range(epochs)])
        order = order[: self.steps * self.batch].reshape(self.steps, self.batch)
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
        output_dir: Where to write the results; it must not exist or be empty. None makes a directory under runs/.
        **settings: steps, batch, learning_rate, momentum, seed, log_every: see `Job`.

    Returns:
        A `TrainResult`.

    Raises:
        ValueError: When an argument is out of its range, or model and data do not fit together.
        FileExistsError: When the output directory holds anything; nothing is loaded then.
        FloatingPointError: When the loss becomes NaN or infinite.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training import Scratch, lenet5, train
        >>> result = train(lenet5, "digits", Scratch(sparsity=0.9), steps=2, output_dir=tempfile.mkdtemp())
        >>> sorted(path.name for path in result.directory.iterdir())
        ['masks.npz', 'metrics.csv', 'model.keras', 'summary.json']
    """
    if output_dir is not None:
        run_dir.check_output_dir(output_dir)
    return Job(model, data, experiment, **settings).run(output_dir)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float | np.floating) and math.isfinite(value))


def _check(valid: bool, name: str, value: Any, meaning: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` must be {meaning}. Received: {name}={value!r}")


def _check_output(model: Any, data: Data) -> None:
    shape = getattr(model, "output_shape", None)  # A model that is not built yet has none to check.
    if isinstance(shape, tuple) and shape[-1] != data.classes:
        raise ValueError(
            f"The model must have one logit for each of the {data.classes} classes of {data.name}. "
            f"Received: a model with output shape {shape}"
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
