"""The training job: data, a network, an experiment, compiled steps, and everything that is kept of the run.

Configuration by gin is elsewhere (gin_registry.py): here are plain Python arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from keras_sparse_init.arguments import check_choice, is_integer
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.training import checkpoints, run_dir
from keras_sparse_init.training.data import Data, load_data
from keras_sparse_init.training.distribution import STRATEGIES, Devices, Strategy
from keras_sparse_init.training.experiments import Scratch
from keras_sparse_init.training.networks import LIBRARIES, Library
from keras_sparse_init.training.optimizers import OPTIMIZERS

# In place of a step: the chief has been refused the output directory.
_REFUSED = -2
_METHODS = ("prepare", "callbacks", "describe")


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
        model: A function of (input_shape, classes) that returns a model of either Keras from images to logits, such as
            `networks.lenet5`; or such a model. A function with a parameter `keras` is told which Keras to use.
        data: A `Data`, or what `load_data` takes: a name or the path of an .npz file.
        experiment: What is done to the model before training: see `experiments`. None is `Scratch(sparsity=0.95)`.
        steps: The number of training steps.
        batch: The number of images in a step.
        learning_rate: The first learning rate. It falls to 0 along a half cosine over all steps.
        optimizer: "momentum" (stochastic gradient descent with momentum), "sgd" (without), "adam" or "rmsprop".
        momentum: The momentum of "momentum" and "rmsprop".
        weight_decay: Decoupled weight decay of the kernels, as in AdamW; it is multiplied by the learning rate.
        clip_norm: Gradients are scaled down to this norm over all variables. None does not.
        gradient_penalty: Training minimizes the loss plus half of this times the squared norm of its gradient, over all
            weights that are not masked. On one device, with TensorFlow, and a `train_step` of Keras's own.
        init_noise: Standard deviation of normal noise that is added to all trainable weights at the beginning, save
            those off a mask.
        seed: Determines masks, kernels, noise and the order of the images.
        log_every: Steps between two rows of metrics.csv.
        checkpoint_every: Steps between two checkpoints. Each is written with the next row of metrics.csv.
        keras: "tf_keras": masks in the wrappers of tfmot, which prunes. "keras": Keras 3 on the backend that it is
            configured for, masks in `Masked` layers, pruned by `MagnitudePruning`. None: that of the model; of a
            function that takes either, tf_keras.
        strategy: "mirrored" trains on all GPUs of this machine, or all of its logical CPU devices where it has none,
            each with its part of every batch. None trains on one, or as the scope of a `tf.distribute.MirroredStrategy`
            says in which job and model are made and run. "multi_worker", for tf_keras: on all machines that TF_CONFIG
            names, as for a `tf.distribute.MultiWorkerMirroredStrategy`; every one of them runs this job, with the same
            output directory, which all must see. The first one alone writes there. Masks and weights are the same on
            all; the results are those of one device up to rounding.

    Raises:
        ValueError: When an argument is out of its range, or model and data do not fit together.
        TypeError: When the model is none of Keras.
        FileNotFoundError: When there is no such data file.
        RuntimeError: When TensorFlow has been used before in this process, with "multi_worker".

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
        gradient_penalty: float = 0.0,
        init_noise: float = 0.0,
        seed: int = 0,
        log_every: int = 100,
        checkpoint_every: int = 500,
        keras: Library | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        counts = {"steps": steps, "batch": batch, "log_every": log_every, "checkpoint_every": checkpoint_every}
        for name, value in counts.items():
            _check(is_integer(value) and value > 0, name, value, "a positive integer")
        _check(is_integer(seed) and seed >= 0, "seed", seed, "an integer of at least 0")
        _check(_is_real(learning_rate) and learning_rate > 0, "learning_rate", learning_rate, "a positive number")
        _check(_is_real(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        known = isinstance(optimizer, str) and optimizer in OPTIMIZERS
        _check(known, "optimizer", optimizer, f"one of {', '.join(map(repr, OPTIMIZERS))}")
        _check(_is_real(weight_decay) and weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
        for name, value in {"gradient_penalty": gradient_penalty, "init_noise": init_noise}.items():
            _check(_is_real(value) and value >= 0, name, value, "a number of at least 0")
        valid = clip_norm is None or (_is_real(clip_norm) and clip_norm > 0)
        _check(valid, "clip_norm", clip_norm, "a positive number or None")
        if keras is not None:
            check_choice("keras", keras, LIBRARIES)
        if strategy is not None:
            check_choice("strategy", strategy, STRATEGIES)
        # Before anything of TensorFlow, for the sake of several workers.
        self._devices = Devices(strategy)
        self.data = data if isinstance(data, Data) else load_data(data)
        self.experiment = Scratch(sparsity=0.95) if experiment is None else experiment
        if isinstance(experiment, type) or not all(hasattr(self.experiment, name) for name in _METHODS):
            raise TypeError(f"`experiment` must be an experiment such as Scratch(0.9). Received: {experiment!r}")
        self.settings = {
            **{name: int(value) for name, value in counts.items()},
            "optimizer": optimizer,
            "learning_rate": float(learning_rate),
            "momentum": float(momentum),
            "weight_decay": float(weight_decay),
            "clip_norm": None if clip_norm is None else float(clip_norm),
            "gradient_penalty": float(gradient_penalty),
            "init_noise": float(init_noise),
            "seed": int(seed),
        }
        from keras_sparse_init import compat

        replicas = self._devices.replicas
        if replicas > 1:
            self.settings["replicas"] = replicas
            _check(batch % replicas == 0, "batch", batch, f"a multiple of the number of devices, {replicas}")
        with self._devices.scope():
            network = _network(model, self.data, keras)
            _check_fit(network, self.data)
            if self._devices.workers > 1 and compat.library_of(network).__name__ == "keras":
                raise ValueError(
                    "`keras` must be 'tf_keras' with strategy='multi_worker': Keras 3 does not train on several "
                    f"workers. Received: the model {network.name!r} of Keras 3"
                )
            self.settings |= {"keras": compat.library_of(network).__name__, "backend": compat.backend_of(network)}
            self.network, self.directory, self._has_run = _name(network, model), None, False
            self._architecture = {
                "weight_norm": _weight_norm(network),
                "parameters": network.count_params(),
                "architecture": _architecture(network),
            }
            asked = {name: self.settings[name] for name in ("seed", "steps")}
            self.model = self.experiment.prepare(network, **asked, data=self.data)
            if gradient_penalty:
                _check_penalty(self.model, replicas, gradient_penalty)
            if init_noise:
                _add_noise(self.model, init_noise, derive_seed(seed, "init_noise"))

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the results: the only one, or the first of several workers."""
        return self._devices.is_chief

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
        images = f"{len(self.data.x_train)} train, {len(self.data.x_test)} test images"
        what, sparsity = self.experiment.describe(), self.table().total.sparsity
        final = self._final_sparsity()
        pruned = f", pruned to {final:.1%}" if round(final, 2) > round(sparsity, 2) else ""
        sparse = f"{sparsity:.1%} sparse by {what['method']}{pruned}"
        steps = f"init {what['init']}, {self.settings['steps']} steps of {self.settings['batch']}"
        return f"{self.network} in {self.settings['keras']} on {self.data.name} ({images}), {sparse}, {steps}"

    def _final_sparsity(self) -> float:
        """What the experiment asks for; that of the masks when these are of another run, or there are none."""
        asked = getattr(self.experiment, "sparsity", None)
        return self.table().total.sparsity if asked is None else asked

    def run(self, output_dir: str | os.PathLike[str] | None = None, config: str | None = None) -> TrainResult:
        """Trains, and writes the results into a directory of the run.

        - metrics.csv has a row for step 0 and every `log_every` steps: step, loss and training accuracy since the row
          before, test accuracy, norm of the gradient. The last is that of the loss on 256 training images over all
          weights that are not masked, as at prediction; its square is the gradient flow of Evci et al. 2020,
          arXiv:2010.03533. Of step 0, loss and training accuracy are those of these images. tensorboard/ has the same.
        - summary.json has the results of the end, the settings, the layers, and the versions of what was used.
        - model.keras is a plain model that loads without this package; masks.npz has the mask of each kernel by its
          name; checkpoints/ has the weights of the beginning and of the last checkpoints; job.json says what the
          numbers depend on.

        A run that was interrupted goes on from its last checkpoint, and ends with the weights of one that was not (in
        tf_keras only a model without Dropout or noise layers, whose random state it does not give away).

        Args:
            output_dir: Where to write: a new or empty directory, or that of an unfinished run of this very job. None
                makes a directory under runs/.
            config: The text of operative_config.gin. None writes no such file.

        Returns:
            A `TrainResult`.

        Raises:
            FileExistsError: When the directory holds anything else, or another process is running there.
            FloatingPointError: When the loss becomes NaN or infinite.
            KeyboardInterrupt: When it was interrupted; a checkpoint is written first.
            RuntimeError: When the job has run before; on another worker, when the first cannot use the directory.
            ValueError: When the last checkpoint is damaged.
        """
        if self._has_run:
            raise RuntimeError("A job runs once: its model is trained. Make another `Job`")
        with contextlib.ExitStack() as stack:
            if self._devices.is_chief:
                try:
                    directory = self._claim(output_dir, config)
                    stack.enter_context(run_dir.sole_use(directory))
                    if config is not None:
                        (directory / "operative_config.gin").write_text(config, encoding="utf-8")
                    last = checkpoints.last(directory)
                except OSError:
                    self._devices.from_chief(_REFUSED)
                    raise
                start = self._devices.from_chief(-1 if last is None else checkpoints.step_of(last))
            else:
                # What every worker does alike writes somewhere: the others' is thrown away.
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                start, last = self._devices.from_chief(0), None
                if start == _REFUSED:
                    raise RuntimeError("The first worker cannot use the output directory: see there")
                if start >= 0:
                    last = checkpoints.of_step(Path(str(output_dir)), start)
            self._has_run = True
            with self._devices.scope():
                return self._finish(directory, last)

    def _claim(self, output_dir: str | os.PathLike[str] | None, config: str | None) -> Path:
        """The directory of this run, claimed."""
        if output_dir is None:
            described = self.experiment.describe()
            output_dir = run_dir.default_output_dir(
                self.network,
                described["experiment"],
                described["init"],
                f"{round(self._final_sparsity(), 3):g}",
                f"seed{self.settings['seed']}",
            )
        self.directory = run_dir.claim(output_dir, self._identity(config))
        return self.directory

    def _finish(self, directory: Path, checkpoint: Path | None) -> TrainResult:
        """Makes the steps that are left after a checkpoint, and writes what stands at the end."""
        from keras_sparse_init.training.fit import Fit

        asked = {name: self.settings[name] for name in ("seed", "steps", "learning_rate")}
        callbacks = self.experiment.callbacks(self.model, **asked, data=self.data)
        fit = Fit(self.model, self.data, self.settings, callbacks, self._devices)
        from keras_sparse_init.folding import fold_weight_norm
        from keras_sparse_init.sparse_model import apply_masks, masked_kernels, strip

        before = self._state()  # A run that goes on has begun with the same.
        rows, seconds = fit.run(directory, checkpoint)
        apply_masks(self.model)  # The last step has moved weights that the next forward pass would have masked.
        test_loss, test_accuracy = fit.evaluate()
        table, norms = self.table(), [row["gradient_norm"] for row in rows]
        # By names that do not depend on what the process has made before: another run may take the masks.
        masks = {kernel.seed_name: kernel.mask_value() for kernel in masked_kernels(self.model)}
        np.savez_compressed(directory / run_dir.MASKS, **masks)
        plain = fold_weight_norm(strip(self.model))
        plain.save(directory / "model.keras")
        summary = {
            "network": self.network,
            **self._architecture,
            **self.experiment.describe(),
            "sparsity": table.total.sparsity,
            "data": self.data.name,
            "test_images": len(self.data.x_test),
            "early": {name: rows[1][name] for name in ("step", "test_accuracy")},
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "loss": rows[-1]["loss"],
            "train_accuracy": rows[-1]["train_accuracy"],
            "gradient_norm": {"initial": norms[0], "mean": float(np.mean(norms[1:]))},
            **_changes(before, self._state()),
            **self.settings,
            "seconds": round(seconds, 2),
            "table": table.to_dict(),
            "versions": run_dir.versions(),
        }
        run_dir.write_summary(directory, summary)
        return TrainResult(directory, plain, table, summary)

    def _state(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Copies of the trainable weights, and of the masks."""
        from keras_sparse_init import compat
        from keras_sparse_init.sparse_model import masked_kernels

        weights = [np.array(compat.to_numpy("weight", v), np.float64) for v in self.model.trainable_variables]
        return weights, [kernel.mask_value().copy() for kernel in masked_kernels(self.model)]

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
        model: A model of either Keras from images to logits, or a function of (input_shape, classes) that returns one,
            such as `networks.lenet5`.
        data: A `Data`, the name of a data set such as `"digits"`, or the path of an .npz file.
        experiment: What is done to the model before training. None is `Scratch(sparsity=0.95)`.
        output_dir: Where to write the results: a new or empty directory, or that of an unfinished run of the same job,
            which then goes on from its last checkpoint. None makes a directory under runs/.
        **settings: steps, batch, learning_rate, optimizer, seed, keras and more: see `Job`.

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
        ['checkpoints', 'job.json', 'masks.npz', 'metrics.csv', 'model.keras', 'summary.json', 'tensorboard']
    """
    if output_dir is not None:
        run_dir.check_output_dir(output_dir)
    return Job(model, data, experiment, **settings).run(output_dir)


def _changes(before: tuple[list[np.ndarray], list[np.ndarray]], after: tuple[list[np.ndarray], ...]) -> dict[str, Any]:
    """How far training has moved the weights, and the part of the last connections that were not there at first."""
    length = math.sqrt(sum(float(np.sum(w**2)) for w in before[0]))
    moved = math.sqrt(sum(float(np.sum((w - v) ** 2)) for v, w in zip(before[0], after[0], strict=True)))
    new = sum(int(np.count_nonzero(m & ~n)) for n, m in zip(before[1], after[1], strict=True))
    connections = sum(int(np.count_nonzero(mask)) for mask in after[1])
    return {
        "distance_from_init": {"absolute": moved, "relative": moved / length if length else None},
        "mask_churn": new / connections if connections else 0.0,
    }


def _digest(arrays: list[np.ndarray]) -> str:
    """A text that differs when any of the arrays does."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _is_real(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float | np.floating) and math.isfinite(value))


def _check(valid: bool, name: str, value: Any, meaning: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` must be {meaning}. Received: {name}={value!r}")


def _network(model: Any, data: Data, keras: str | None) -> Any:
    """The model itself, or what a function of (input_shape, classes) makes of the data's."""
    from keras_sparse_init import compat

    if not hasattr(model, "layers"):
        if not callable(model):
            raise TypeError(f"`model` must be a Keras model or a function that makes one. Received: model={model!r}")
        told = {"keras": keras or LIBRARIES[0]} if "keras" in inspect.signature(model).parameters else {}
        model = model(data.input_shape, data.classes, **told)
    library = compat.library_of(model).__name__
    if not model.built:
        raise ValueError(f"The model {model.name!r} must be built: call it on images first, or give it an input shape")
    if keras is not None and library != keras:
        raise ValueError(f"`keras` must be that of the model, {library!r}. Received: keras={keras!r}")
    return model


def _check_penalty(model: Any, replicas: int, penalty: float) -> None:
    from keras_sparse_init import compat

    keras_own = type(model).train_step is compat.library_of(model).Model.train_step
    if compat.backend_of(model) != "tensorflow" or replicas > 1 or not keras_own:
        raise ValueError(
            "`gradient_penalty` must be 0 but on one device, with TensorFlow and a `train_step` of Keras's own. "
            f"Received: gradient_penalty={penalty!r}, {replicas} devices, {compat.backend_of(model)}, "
            f"a {type(model).__name__}"
        )


def _add_noise(model: Any, stddev: float, seed: int) -> None:
    """Adds N(0, stddev^2) to the trainable weights of a model, save those off a mask."""
    from keras_sparse_init import compat
    from keras_sparse_init.sparse_model import apply_masks

    names = checkpoints.names(model)
    for variable in model.trainable_variables:
        values = compat.to_numpy("weight", variable)
        random = np.random.default_rng(derive_seed(seed, names[id(variable)]))
        compat.assign(variable, values + stddev * random.standard_normal(values.shape).astype(values.dtype))
    apply_masks(model)


def _name(network: Any, maker: Any) -> str:
    """The network's name; where Keras has given it by itself, that of the function, or it without Keras's number."""
    automatic = re.fullmatch(r"(sequential|functional|model)(_\d+)?", network.name)
    if automatic is None:
        return network.name
    return automatic[1] if maker is network else getattr(maker, "__name__", automatic[1])


def _architecture(network: Any) -> str:
    """A text that two networks share when their layers and these layers' settings are the same but for names and seeds.

    Names count as far as they are not Keras's own, whose numbers depend on what the process has made before.
    """
    from keras_sparse_init import traversal

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(v) for key, v in value.items() if key not in ("name", "seed")}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value if isinstance(value, str | int | float | bool | None) else type(value).__name__

    parts = []
    for _, canonical, layer in traversal.walk(network):
        try:
            config = {} if hasattr(layer, "layers") else layer.get_config()  # Those of a model's layers follow.
        except NotImplementedError:  # A layer of the user's own need not have one.
            config = {}
        parts.append((canonical, type(layer).__name__, plain(config)))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _weight_norm(network: Any) -> str | None:
    """How a network's weights are normalized: by name as `networks` call it, or None."""
    from keras_sparse_init import traversal
    from keras_sparse_init.constraints import WeightNormConstraint
    from keras_sparse_init.layers import WeightNorm

    if any(isinstance(layer, WeightNorm) for _, _, layer in traversal.walk(network)):
        return "reparam"
    constrained = any(isinstance(v.constraint, WeightNormConstraint) for v in network.trainable_variables)
    return "constraint" if constrained else None


def _check_fit(model: Any, data: Data) -> None:
    last = model.layers[-1] if getattr(model, "layers", None) else None
    if type(last).__name__ == "Softmax" or getattr(getattr(last, "activation", None), "__name__", "") == "softmax":
        raise ValueError(
            f"The model must return logits: the loss takes the softmax itself. Received: a model whose last layer, "
            f"{last.name!r}, is a softmax"
        )
    taken, given = getattr(model, "input_shape", None), (None, *data.input_shape)
    fits = isinstance(taken, tuple) and len(taken) == len(given)
    if taken is not None and not (fits and all(n in (None, m) for n, m in zip(taken, given, strict=True))):
        raise ValueError(
            f"The model must take images of shape {data.input_shape}, those of {data.name}. "
            f"Received: a model with input shape {taken}"
        )
    # Not what the model says of itself: one that is subclassed says nothing.
    outputs = model(data.x_train[:1], training=False)
    shape = getattr(outputs, "shape", None)
    if shape is None or tuple(shape) != (1, data.classes):
        found = type(outputs).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"The model must have one logit for each of the {data.classes} classes of {data.name}. "
            f"Received: a model whose outputs for one image are of {found}"
        )
    if not model.trainable_variables:
        raise ValueError(f"The model must have trainable weights. Received: the model {model.name!r}, all frozen")
