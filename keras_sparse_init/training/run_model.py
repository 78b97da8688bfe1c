"""The network of a finished run with the weights of one of its checkpoints, its masks, and the loss on its data."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_sparse_init.arguments import is_integer
from keras_sparse_init.training import checkpoints, run_dir
from keras_sparse_init.training.data import Data, load_data

Checkpoint = str | int
# Images in a batch where a loss over many is summed up.
_BATCH = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class RunModel:
    """A network of a run, plain: without wrappers, its masked weights 0.

    Attributes:
        directory: The run's directory.
        checkpoint: Which weights it has: "end", or the step of a checkpoint.
        model: The model, of the run's Keras.
        masks: For each of `variables` its boolean mask then; ones for what has none.
        data: The data that the run was trained on.
    """

    directory: Path
    checkpoint: Checkpoint
    model: Any
    masks: list[np.ndarray]
    data: Data

    @property
    def variables(self) -> list[Any]:
        """The trainable variables as TensorFlow's."""
        import tensorflow as tf

        return [v if isinstance(v, tf.Variable) else v.value for v in self.model.trainable_variables]

    @property
    def others(self) -> list[Any]:
        """The other variables, such as the statistics of batch normalization."""
        import tensorflow as tf

        found = [v if isinstance(v, tf.Variable) else v.value for v in self.model.non_trainable_variables]
        return [variable for variable in found if variable.dtype.is_floating]

    def loss(self, x: Any, y: Any) -> Any:
        """The mean cross-entropy on images, as at prediction, as a tensor."""
        import tensorflow as tf

        logits = tf.cast(self.model(x, training=False), tf.float32)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))

    def evaluator(self) -> Any:
        """A function of (images, labels) that gives mean loss and accuracy with the weights that the model has then."""
        import tensorflow as tf

        @tf.function
        def sums(x: Any, y: Any) -> Any:
            logits = tf.cast(self.model(x, training=False), tf.float32)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), y)
            return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(right, tf.int32))

        def evaluate(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
            loss = right = 0.0
            for start in range(0, len(x), _BATCH):
                part = sums(tf.constant(x[start : start + _BATCH]), tf.constant(y[start : start + _BATCH]))
                loss, right = loss + float(part[0]), right + int(part[1])
            return loss / len(x), right / len(x)

        return evaluate


def load_run(
    directory: str | os.PathLike[str], checkpoint: Checkpoint = "end", data: Data | str | os.PathLike[str] | None = None
) -> RunModel:
    """Loads the network of a finished run.

    Args:
        directory: The run's directory.
        checkpoint: "end", the trained weights; "start", those of step 0; or a step of which there is a checkpoint.
            Runs keep the checkpoints of step 0 and the newest two.
        data: The run's data; None loads them by the name in its summary.

    Raises:
        FileNotFoundError: When the directory holds no finished run, or there is no such checkpoint.
        ValueError: When something of it is damaged, or a checkpoint's weights are not those of the plain model (of a
            network with `WeightNorm`, say), or its Keras does not run on TensorFlow.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training import Scratch, mlp, train
        >>> from keras_sparse_init.training.run_model import load_run
        >>> run = train(mlp, "digits", Scratch(0.9), steps=2, output_dir=tempfile.mkdtemp())
        >>> loaded = load_run(run.directory, "start")
        >>> int(sum(mask.sum() for mask in loaded.masks)), loaded.checkpoint
        (27031, 0)
    """
    from keras_sparse_init import compat

    directory = Path(directory)
    summary = run_dir.read_summary(directory)
    if checkpoint == "start":
        checkpoint = 0
    if checkpoint != "end" and not (is_integer(checkpoint) and checkpoint >= 0):
        raise ValueError(f"`checkpoint` must be 'end', 'start' or a step. Received: checkpoint={checkpoint!r}")
    model = compat.library(summary["keras"]).models.load_model(directory / "model.keras", compile=False)
    if compat.backend_of(model) != "tensorflow":
        raise ValueError(
            f"Keras must run on TensorFlow to load the run {str(directory)!r}: set KERAS_BACKEND=tensorflow"
        )
    names = checkpoints.names(model)
    if checkpoint == "end":
        with np.load(directory / run_dir.MASKS, allow_pickle=False) as archive:
            known = {name: archive[name].astype(bool) for name in archive.files}
    else:
        path = checkpoints.of_step(directory, int(checkpoint))
        known = checkpoints.masks(path)  # They may have changed since.
        for variable, value in zip(checkpoints.plain_variables(model), checkpoints.weights(path, model), strict=True):
            compat.assign(variable, value)
    masks = []
    for variable in model.trainable_variables:
        mask = known.pop(names[id(variable)], np.ones(variable.shape, bool))
        masks.append(mask)
        # A checkpoint may hold weights off the mask that the next forward pass would have masked.
        value = compat.to_numpy("weight", variable)
        compat.assign(variable, np.where(mask, value, np.zeros((), value.dtype)))
    if known:
        raise ValueError(f"The masks of the run {str(directory)!r} are not those of its model: {', '.join(known)}")
    return RunModel(directory, checkpoint, model, masks, _data(summary, data))


def _data(summary: dict[str, Any], data: Data | str | os.PathLike[str] | None) -> Data:
    return data if isinstance(data, Data) else load_data(summary["data"] if data is None else data)
