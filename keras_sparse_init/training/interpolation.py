"""The loss between two trained networks: along the straight line, and along a curve that is learned."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice, check_finite, check_positive, check_seed, is_integer
from keras_sparse_init.figures import add_legend, new_figure, style
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.table import format_table
from keras_sparse_init.training import run_dir
from keras_sparse_init.training.data import Data
from keras_sparse_init.training.run_model import Checkpoint, RunModel, load_run

MASKS = ("none", "first", "second")


@dataclasses.dataclass(frozen=True)
class Point:
    """A network on a path.

    Attributes:
        path: "line" or "curve".
        t: Where on it: 0 is the first network, 1 the second.
        train_loss: Mean cross-entropy on all training images.
        train_accuracy: On these.
        test_loss: The same on the test images.
        test_accuracy: On these.
    """

    path: str
    t: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """The points of the paths between two networks; `str()` is a table to read.

    Attributes:
        settings: What was asked for.
        points: All points, path by path.
    """

    settings: dict[str, Any]
    points: list[Point]

    def barrier(self, path: str) -> float:
        """The most by which the training loss on a path lies above the line between its values at both ends."""
        points = [point for point in self.points if point.path == path and 0 <= point.t <= 1]
        losses, t = np.array([p.train_loss for p in points]), np.array([p.t for p in points])
        return float(np.max(losses - np.interp(t, t[[0, -1]], losses[[0, -1]])))

    def write(self, directory: str | os.PathLike[str]) -> str | None:
        """Writes interpolation.csv, results.json and interpolation.png.

        Args:
            directory: A new or empty directory.

        Returns:
            Why there is no plot, where matplotlib is not installed; None when there is.

        Raises:
            FileExistsError: When the directory holds anything.
        """
        directory = run_dir.make_new_dir(directory)
        with (directory / "interpolation.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Point)])
            writer.writeheader()
            writer.writerows(map(dataclasses.asdict, self.points))
        barriers = {path: self.barrier(path) for path in self._paths()}
        run_dir.write_results(
            directory,
            {
                "experiment": "interpolate",
                **self.settings,
                "barriers": barriers,
                "points": [dataclasses.asdict(point) for point in self.points],
            },
        )
        try:
            self.figure().savefig(directory / "interpolation.png", dpi=100)
        except ImportError as error:
            return str(error)
        return None

    def figure(self) -> Any:
        """A matplotlib figure: loss and accuracy along the paths."""
        figure = new_figure(12, 4.5)
        for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for i, path in enumerate(self._paths()):
                points = [point for point in self.points if point.path == path]
                for part, line in (("train", "-"), ("test", ":")):
                    values = [getattr(point, f"{part}_{measure}") for point in points]
                    label = f"{path}, {part} images"
                    axes.plot([p.t for p in points], values, label=label, **{**style(i), "linestyle": line})
            axes.set(xlabel="from the first network (0) to the second (1)", title=measure)
        add_legend(figure)
        return figure

    def _paths(self) -> list[str]:
        return list(dict.fromkeys(point.path for point in self.points))

    def __str__(self) -> str:
        header = ["path", "t", "train loss", "train accuracy", "test loss", "test accuracy"]
        rows = [
            [p.path, f"{p.t:z.2f}", f"{p.train_loss:.4f}", f"{p.train_accuracy:.2%}"]
            + [f"{p.test_loss:.4f}", f"{p.test_accuracy:.2%}"]
            for p in self.points
        ]
        said = ", ".join(f"{self.barrier(path):.4f} on the {path}" for path in self._paths())
        first, second = self.settings["first"], self.settings["second"]
        masks = {"none": "weights are 0 where both are", "first": "with the mask of 0", "second": "with the mask of 1"}
        return (
            f"0 is {first}, 1 is {second}; {masks[self.settings['mask']]}\n{format_table(header, rows)}\n"
            f"barrier, the most by which the training loss lies above the line between both ends: {said}"
        )


def interpolate(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    checkpoints: Sequence[Checkpoint] = ("end", "end"),
    mask: Literal["none", "first", "second"] = "none",
    points: int = 29,
    lower: float = -0.2,
    upper: float = 1.2,
    curve_steps: int = 500,
    learning_rate: float = 0.01,
    batch: int = 64,
    seed: int = 0,
    data: Data | str | os.PathLike[str] | None = None,
) -> Interpolation:
    """Loss and accuracy on paths from the network of one run to that of another.

    The line is w(t) = (1 - t) a + t b. The curve is the quadratic Bezier curve

        w(t) = (1 - t)^2 a + 2 t (1 - t) c + t^2 b,  t in [0, 1],

    whose c, at first (a + b) / 2, is trained to make E[loss(w(t))] small, t uniform in [0, 1], by Adam. a and b are
    all trainable weights, biases too. Statistics of batch normalization are interpolated along the line on both paths.

    Args:
        first: The directory of a finished run.
        second: That of another, or the same, of the same network.
        checkpoints: Which weights of each: "end", "start", or a step of which there is a checkpoint.
        mask: Which mask the networks between get, and both ends: "first", "second", or "none": weights are 0 where
            both are.
        points: Number of points of the line, to which both networks are added, and of the curve.
        lower: The first t of the line.
        upper: The last one.
        curve_steps: Steps of training of the curve. 0: no curve.
        learning_rate: That of Adam.
        batch: Images in a step.
        seed: Determines t and the images of each step.
        data: The data; None takes those of the first run.

    Returns:
        An `Interpolation`.

    Raises:
        ValueError: When an argument is out of its range, the networks differ, or a file of a run is damaged.
        FileNotFoundError: When a directory holds no finished run, or there is no such checkpoint.
        FloatingPointError: When the training of the curve diverges.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training import Scratch, interpolate, mlp, train
        >>> run = train(mlp, "digits", Scratch(0.95), steps=20, output_dir=tempfile.mkdtemp())
        >>> found = interpolate(run.directory, run.directory, checkpoints=("start", "end"), points=3, curve_steps=0)
        >>> [round(point.t, 1) for point in found.points], found.points[1].train_loss > found.points[3].train_loss
        ([-0.2, 0.0, 0.5, 1.0, 1.2], True)

    Reference:
        Evci et al. 2020, arXiv:2010.03533, section 4.2; the curve: Garipov et al. 2018, arXiv:1802.10026.
    """
    check_choice("mask", mask, MASKS)
    for name, value, least in (("points", points, 2), ("curve_steps", curve_steps, 0), ("batch", batch, 1)):
        if not is_integer(value) or value < least:
            raise ValueError(f"`{name}` must be an int of at least {least}. Received: {name}={value!r}")
    if not check_finite("lower", lower) < check_finite("upper", upper):
        raise ValueError(f"`lower` must be less than `upper`. Received: lower={lower}, upper={upper}")
    check_positive("learning_rate", learning_rate)
    check_seed(seed)
    if len(checkpoints) != 2:
        raise ValueError(f"`checkpoints` must be two. Received: checkpoints={checkpoints!r}")
    ends = [load_run(first, checkpoints[0], data)]
    ends.append(load_run(second, checkpoints[1], ends[0].data))
    _check_same(*ends)
    path = _Path(*ends, mask)
    settings = {"first": str(first), "second": str(second), "checkpoints": [end.checkpoint for end in ends]}
    settings |= {"data": ends[0].data.name, "mask": mask, "seed": seed, "curve_steps": curve_steps}
    settings |= {"learning_rate": learning_rate, "batch": batch}
    # With both networks, where they are on it; rounded, so that 0 and 1 are what they are.
    both = [t for t in (0.0, 1.0) if lower <= t <= upper]
    found = [path.point("line", float(t)) for t in np.union1d(np.linspace(lower, upper, points).round(12), both)]
    if curve_steps:
        path.learn(curve_steps, learning_rate, batch, seed)
        found += [path.point("curve", float(t)) for t in np.linspace(0, 1, points)]
    return Interpolation(settings, found)


class _Path:
    """The networks between two, in the model of the first."""

    def __init__(self, first: RunModel, second: RunModel, mask: str) -> None:
        import tensorflow as tf

        self._run = first
        masks = {"first": first.masks, "second": second.masks, "none": [np.ones(m.shape, bool) for m in first.masks]}
        self._masks = [tf.constant(m, v.dtype) for m, v in zip(masks[mask], first.variables, strict=True)]
        pairs = zip(first.variables, second.variables, self._masks, strict=True)
        self._ends = [(a.numpy() * m, b.numpy() * m) for a, b, m in pairs]
        self._others = [(a.numpy(), b.numpy()) for a, b in zip(first.others, second.others, strict=True)]
        self._control = [tf.Variable((a + b) / 2) for a, b in self._ends]
        self._evaluate = first.evaluator()

    def point(self, path: str, t: float) -> Point:
        """Evaluates the network at t."""
        self._place(path, t)
        data = self._run.data
        return Point(path, t, *self._evaluate(data.x_train, data.y_train), *self._evaluate(data.x_test, data.y_test))

    def _place(self, path: str, t: Any) -> None:
        for variable, (a, b), c in zip(self._run.variables, self._ends, self._control, strict=True):
            if path == "line":
                variable.assign((1 - t) * a + t * b)
            else:
                variable.assign((1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b)
        for variable, (a, b) in zip(self._run.others, self._others, strict=True):
            variable.assign((1 - t) * a + t * b)

    def learn(self, steps: int, learning_rate: float, batch: int, seed: int) -> None:
        """Trains the control point."""
        import tensorflow as tf
        import tf_keras

        optimizer = tf_keras.optimizers.Adam(learning_rate)
        optimizer.build(self._control)
        variables, data = self._run.variables, self._run.data
        x, y = tf.constant(data.x_train), tf.constant(data.y_train)

        @tf.function
        def step(t: Any, images: Any) -> Any:
            self._place("curve", t)
            with tf.GradientTape() as tape:
                loss = self._run.loss(tf.gather(x, images), tf.gather(y, images))
            gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
            # dw/dc = 2 t (1 - t).
            chain = 2 * t * (1 - t)
            pairs = zip(gradients, self._masks, self._control, strict=True)
            optimizer.apply_gradients([(chain * g * m, c) for g, m, c in pairs])
            return loss

        random = np.random.default_rng(derive_seed(seed, "curve"))
        for number in range(steps):
            images = random.choice(len(data.x_train), min(batch, len(data.x_train)), replace=False)
            loss = float(step(tf.constant(random.uniform(), tf.float32), tf.constant(images)))
            if not np.isfinite(loss):
                raise FloatingPointError(f"The loss on the curve became {loss} in step {number + 1} of its training")


def _check_same(first: RunModel, second: RunModel) -> None:
    shapes = [[tuple(variable.shape) for variable in run.variables + run.others] for run in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The runs must be of the same network. Received: {str(first.directory)!r} with weights of shapes "
            f"{shapes[0]}, {str(second.directory)!r} with {shapes[1]}"
        )
