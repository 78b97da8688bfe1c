"""The spectrum of the Hessian of a run's loss, over the weights that are not masked."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice, check_seed, is_integer
from keras_sparse_init.figures import add_legend, literal, new_figure, style
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.table import format_table
from keras_sparse_init.training import run_dir
from keras_sparse_init.training.data import Data
from keras_sparse_init.training.run_model import Checkpoint, RunModel, load_run

METHODS = ("auto", "exact", "lanczos")
# Up to so many weights "auto" finds all eigenvalues: the matrix has their square of entries.
_EXACT = 3000
# Rows of the Hessian that one call of the traced function makes.
_CHUNK = 64
# What is less than this part of the largest eigenvalue counts as 0.
_NEGLIGIBLE = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a Hessian, or points that stand for them.

    Attributes:
        checkpoint: The step of the checkpoint, or "end".
        method: "exact" or "lanczos".
        size: How many weights are not masked: how many eigenvalues there are.
        eigenvalues: In ascending order, float64: all of them, or the Ritz values of Lanczos's method.
        weights: The part of all eigenvalues that each stands for; they add up to 1.
        loss: The loss at these weights.
    """

    checkpoint: Checkpoint
    method: str
    size: int
    eigenvalues: np.ndarray
    weights: np.ndarray
    loss: float

    @property
    def positive(self) -> float | None:
        """The part of the eigenvalues that is positive: above 1e-4 of the largest in size; None unless exact."""
        return self._part(self.eigenvalues > self._negligible)

    @property
    def negative(self) -> float | None:
        """The part of the eigenvalues that is negative: below -1e-4 of the largest in size; None unless exact."""
        return self._part(self.eigenvalues < -self._negligible)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues; unless exact, an estimate."""
        return float(self.size * (self.weights @ self.eigenvalues))

    @property
    def _negligible(self) -> float:
        return _NEGLIGIBLE * float(np.abs(self.eigenvalues).max())

    def _part(self, chosen: np.ndarray) -> float | None:
        # Where many eigenvalues are near 0, one Ritz value stands for all of them, on this side or that.
        return float(self.weights[chosen].sum()) if self.method == "exact" else None

    def row(self) -> dict[str, Any]:
        """The numbers that sum it up."""
        return {
            "checkpoint": self.checkpoint,
            "method": self.method,
            "size": self.size,
            "loss": self.loss,
            "smallest": float(self.eigenvalues[0]),
            "largest": float(self.eigenvalues[-1]),
            "positive": self.positive,
            "negative": self.negative,
            "trace": self.trace,
        }


@dataclasses.dataclass(frozen=True)
class HessianReport:
    """The spectra of a run's checkpoints; `str()` is a table to read.

    Attributes:
        settings: What was asked for.
        spectra: One for each checkpoint.
    """

    settings: dict[str, Any]
    spectra: list[Spectrum]

    def write(self, directory: str | os.PathLike[str]) -> str | None:
        """Writes eigenvalues.csv, results.json and hessian.png.

        Args:
            directory: A new or empty directory.

        Returns:
            Why there is no plot, where matplotlib is not installed; None when there is.

        Raises:
            FileExistsError: When the directory holds anything.
        """
        directory = run_dir.make_new_dir(directory)
        with (directory / "eigenvalues.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["checkpoint", "eigenvalue", "weight"])
            for spectrum in self.spectra:
                pairs = zip(spectrum.eigenvalues.tolist(), spectrum.weights.tolist(), strict=True)
                writer.writerows([spectrum.checkpoint, *pair] for pair in pairs)
        rows = [spectrum.row() for spectrum in self.spectra]
        run_dir.write_results(directory, {"experiment": "hessian", **self.settings, "spectra": rows})
        try:
            self.figure().savefig(directory / "hessian.png", dpi=100)
        except ImportError as error:
            return str(error)
        return None

    def figure(self) -> Any:
        """A matplotlib figure: how many eigenvalues are about as large, on logarithmic axes, by their sign."""
        figure = new_figure(10, 4.5)
        largest = max(float(np.abs(spectrum.eigenvalues).max()) for spectrum in self.spectra)
        edges = np.geomspace(1e-6 * largest, 1.001 * largest, 40)
        for axes, sign in zip(figure.subplots(1, 2, sharey=True), (-1, 1), strict=True):
            for i, spectrum in enumerate(self.spectra):
                counts, _ = np.histogram(sign * spectrum.eigenvalues, edges, weights=spectrum.weights * spectrum.size)
                axes.stairs(counts, edges, label=literal(_name(spectrum)), **style(i))
            axes.set(xscale="log", xlabel="-λ" if sign < 0 else "λ")
            axes.set_title(f"{'negative' if sign < 0 else 'positive'} eigenvalues λ above 1e-6 of the largest in size")
            axes.set_yscale("symlog", linthresh=1)
            if sign < 0:
                axes.set_ylabel("number of eigenvalues in each of 39 bins")
        add_legend(figure)
        return figure

    def __str__(self) -> str:
        header = ["checkpoint", "weights", "method", "loss", "smallest", "largest", "positive", "negative", "trace"]
        rows = [
            [_name(s), f"{s.size:,}", s.method, f"{s.loss:.4f}", f"{s.eigenvalues[0]:.3g}", f"{s.eigenvalues[-1]:.3g}"]
            + ["" if part is None else f"{part:.1%}" for part in (s.positive, s.negative)]
            + [f"{'' if s.method == 'exact' else 'about '}{s.trace:.3g}"]
            for s in self.spectra
        ]
        return (
            f"{format_table(header, rows)}\npositive and negative: the part of the eigenvalues beyond "
            f"{_NEGLIGIBLE:g} of the largest in size, which Lanczos's method does not tell"
        )


def hessian(
    directory: str | os.PathLike[str],
    *,
    checkpoints: Sequence[Checkpoint] = ("start", "end"),
    method: Literal["auto", "exact", "lanczos"] = "auto",
    images: int = 512,
    probes: int = 4,
    iterations: int = 90,
    seed: int = 0,
    data: Data | str | os.PathLike[str] | None = None,
) -> HessianReport:
    """Spectra of the Hessian of the mean cross-entropy, restricted to the weights that are not masked.

    Products of the Hessian with vectors v are gradients of g . v, g the gradient of the loss; a traced function makes
    many of them. "exact" finds all eigenvalues of the matrix. "lanczos" runs Lanczos's method from random vectors v of
    signs: sum_k tau_k^2 f(theta_k), tau_k the first entries of the eigenvectors of its tridiagonal matrix and theta_k
    the eigenvalues, estimates v^T f(H) v / n, whose mean over all v is that of f over all eigenvalues. The largest and
    the smallest value are close to the exact ones; the trace is an estimate that probes make better. Many eigenvalues
    near 0 are not told apart: how many are positive or negative is not told.

    Args:
        directory: The directory of a finished run.
        checkpoints: Which weights: "start", "end", or steps of which there is a checkpoint.
        method: "exact", "lanczos", or "auto": exact for up to 3,000 weights.
        images: Number of training images, drawn at random, of the loss.
        probes: Number of random vectors of "lanczos".
        iterations: Number of its products with the Hessian for each.
        seed: Determines images and vectors.
        data: The run's data; None loads them by name.

    Returns:
        A `HessianReport`.

    Raises:
        ValueError: When an argument is out of its range, or a file of the run is damaged.
        FileNotFoundError: When the directory holds no finished run, or there is no such checkpoint.
        FloatingPointError: When the Hessian is not finite.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training import Scratch, hessian, mlp, train
        >>> run = train(lambda *a: mlp(*a, hidden_sizes=(8,)), experiment=Scratch(0.98), steps=2,
        ...             output_dir=tempfile.mkdtemp())
        >>> report = hessian(run.directory, checkpoints=["end"], images=50)
        >>> report.spectra[0].size == len(report.spectra[0].eigenvalues)
        True

    Reference:
        Evci et al. 2020, arXiv:2010.03533, figure 4. Lanczos: Ghorbani et al. 2019, arXiv:1901.10159.
    """
    check_choice("method", method, METHODS)
    for name, value in (("images", images), ("probes", probes), ("iterations", iterations)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")
    check_seed(seed)
    if isinstance(checkpoints, str) or not checkpoints:
        raise ValueError(f"`checkpoints` must be a list of checkpoints. Received: checkpoints={checkpoints!r}")
    spectra = []
    for checkpoint in checkpoints:
        run = load_run(directory, checkpoint, data)
        data = run.data
        spectra.append(_spectrum(run, method, images, probes, iterations, seed))
    settings = {"run": str(directory), "data": run.data.name, "images": min(images, len(run.data.x_train))}
    return HessianReport(settings | {"seed": seed}, spectra)


def _spectrum(run: RunModel, method: str, images: int, probes: int, iterations: int, seed: int) -> Spectrum:
    import tensorflow as tf

    random, data = np.random.default_rng(derive_seed(seed, "images")), run.data
    chosen = random.permutation(len(data.x_train))[:images]
    x, y = tf.constant(data.x_train[chosen]), tf.constant(data.y_train[chosen])
    size = int(sum(mask.sum() for mask in run.masks))
    products = _products(run, x, y)
    if method == "auto":
        method = "exact" if size <= _EXACT else "lanczos"
    if method == "exact":
        eye = np.eye(size, dtype=np.float32)
        matrix = np.concatenate([products(eye[i : i + _CHUNK]) for i in range(0, size, _CHUNK)]).astype(np.float64)
        eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        weights = np.full(size, 1 / size)
    else:
        random = np.random.default_rng(derive_seed(seed, "vectors"))
        starts = random.choice([-1.0, 1.0], (probes, size))
        eigenvalues, weights = lanczos(products, starts, min(iterations, size))
    return Spectrum(run.checkpoint, method, size, eigenvalues, weights, float(run.loss(x, y)))


def _products(run: RunModel, x: Any, y: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function of vectors (k, n) that gives their products with the Hessian, over n weights."""
    import tensorflow as tf

    variables = run.variables
    # Where in a vector of all weights those that are not masked are.
    places = tf.constant(np.flatnonzero(np.concatenate([mask.reshape(-1) for mask in run.masks]))[:, None])
    sizes = [mask.size for mask in run.masks]

    def product(vector: Any) -> Any:
        whole = tf.scatter_nd(places, vector, tf.constant([sum(sizes)], tf.int64))
        parts = [tf.reshape(p, v.shape) for p, v in zip(tf.split(whole, sizes), variables, strict=True)]
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = run.loss(x, y)
            gradients = inner.gradient(loss, variables, unconnected_gradients="zero")
            along = tf.add_n([tf.reduce_sum(g * p) for g, p in zip(gradients, parts, strict=True)])
        rows = outer.gradient(along, variables, unconnected_gradients="zero")
        return tf.gather_nd(tf.concat([tf.reshape(row, [-1]) for row in rows], 0), places)

    # One after the other: on a CPU a batch of vectors takes longer (tf.vectorized_map: 1.3 times for LeNet-5).
    traced = tf.function(lambda vectors: tf.map_fn(product, vectors))

    def products(vectors: np.ndarray) -> np.ndarray:
        found = traced(tf.constant(vectors, tf.float32)).numpy()
        if not np.isfinite(found).all():
            raise FloatingPointError(f"The Hessian of the run {str(run.directory)!r} is not finite")
        return found

    return products


def lanczos(
    products: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights that stand for the spectrum of a symmetric matrix.

    Args:
        products: A function of vectors (k, n) that gives their products with the matrix.
        starts: Vectors (k, n) to begin with.
        iterations: Products for each of them, at most n.

    Returns:
        Values in ascending order, and the part of the spectrum that each stands for, both of size k * iterations, or
        less where a vector has reached all of its invariant subspace.

    Reference:
        Ghorbani et al. 2019, arXiv:1901.10159, section 2.2.
    """
    count, size = starts.shape
    basis = np.zeros((count, iterations, size))
    diagonal, beside = np.zeros((count, iterations)), np.zeros((count, iterations))
    length = np.full(count, iterations)
    current = starts / np.linalg.norm(starts, axis=1, keepdims=True)
    for j in range(iterations):
        basis[:, j] = current
        product = products(current.astype(np.float32)).astype(np.float64)
        diagonal[:, j] = np.einsum("kn,kn->k", current, product)
        # Orthogonal to all before, twice: rounding brings them back otherwise, and copies of eigenvalues with them.
        for _ in range(2):
            product -= np.einsum("kj,kjn->kn", np.einsum("kjn,kn->kj", basis, product), basis)
        beside[:, j] = np.linalg.norm(product, axis=1)
        # What is left is rounding: the subspace is whole.
        ended = (beside[:, j] <= 1e-6 * np.abs(diagonal[:, : j + 1]).max(axis=1)) & (length == iterations)
        length[ended] = j + 1
        if (length <= j + 1).all():
            break
        current = np.divide(product, beside[:, j, None], out=np.zeros_like(product), where=beside[:, j, None] > 0)
    values, weights = [], []
    for k, m in enumerate(length):
        theta, vectors = np.linalg.eigh(
            np.diag(diagonal[k, :m]) + np.diag(beside[k, : m - 1], 1) + np.diag(beside[k, : m - 1], -1)
        )
        values.append(theta)
        weights.append(vectors[0] ** 2 / count)
    values, weights = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(values)
    return values[order], weights[order]


def _name(spectrum: Spectrum) -> str:
    return "end" if spectrum.checkpoint == "end" else f"step {spectrum.checkpoint}"
