"""Initializers side by side on a stack of affine layers: what they do to signal and gradient, at once and later."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.arguments import (
    check_choice,
    check_finite,
    check_positive,
    check_seed,
    check_sparsity,
    is_integer,
)
from keras_sparse_init.comparison.affine_stack import ACTIVATIONS, Function, activation_functions, pass_through
from keras_sparse_init.comparison.report import (
    QUANTITIES,
    Histogram,
    InitializerComparison,
    InitializerRun,
    LayerStatistics,
)
from keras_sparse_init.initializers import SparseHeNormal, SparseScaledInit
from keras_sparse_init.sampling import derive_seed, sample

Activation = Literal["linear", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "silu"]

# With a seed each, which another one replaces: without one they would draw it from Python's `random`.
_INITIALIZERS: dict[str, Callable[[], Any]] = {
    "zeros": keras.initializers.Zeros,
    "normal(1)": lambda: keras.initializers.RandomNormal(stddev=1.0, seed=0),
    "normal(0.01)": lambda: keras.initializers.RandomNormal(stddev=0.01, seed=0),
    "truncated_normal(0.01)": lambda: keras.initializers.TruncatedNormal(stddev=0.01, seed=0),
    "lecun_normal": lambda: keras.initializers.LecunNormal(seed=0),
    "lecun_uniform": lambda: keras.initializers.LecunUniform(seed=0),
    "glorot_normal": lambda: keras.initializers.GlorotNormal(seed=0),
    "glorot_uniform": lambda: keras.initializers.GlorotUniform(seed=0),
    "he_normal": lambda: keras.initializers.HeNormal(seed=0),
    "he_uniform": lambda: keras.initializers.HeUniform(seed=0),
}


def compare_initializers(
    initializers: Sequence[str] | Mapping[str, Any] | None = None,
    sizes: Sequence[int] = (100, 100, 100, 100),
    activation: Activation = "relu",
    *,
    negative_slope: float = 0.2,
    samples: int = 1000,
    epochs: int = 20,
    learning_rate: float = 0.01,
    sparsity: float | None = None,
    seed: int = 0,
) -> InitializerComparison:
    """Measures initializers on a stack of affine layers: means and deviations, forward and backward, layer by layer.

    Layer l computes z_l = a_(l-1) W_l + b_l and a_l = f(z_l), with a_0 = x and b_l = 0 to begin with. Each epoch has
    fresh inputs x ~ N(0, 1), one clean forward and backward pass through float32 values, then one step of SGD on

        loss = mean over samples of 1/2 ||a_L - y||^2,   y = f(x T),   T ~ N(0, 1 / inputs)

    where the targets y, of one layer with the same activation and fixed weights T, are the same for all initializers,
    as are the inputs. Numbers of epoch 0 are those of the initialization.

    Args:
        initializers: Names among "zeros", "normal(1)", "normal(0.01)", "truncated_normal(0.01)", "lecun_normal",
            "lecun_uniform", "glorot_normal" (Xavier's), "glorot_uniform", "he_normal" and "he_uniform" (Keras's
            initializers); or a dict of name -> initializer, of either Keras or this package's. None is all the names.
            The kernel of layer l is drawn with the seed `derive_seed(seed, "layer<l>/kernel")`, which takes the place
            of an initializer's own: that would draw the same kernel for each layer of one shape.
        sizes: The number of inputs, then of the units of each layer.
        activation: "linear", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu" or "silu".
        negative_slope: Slope of "leaky_relu" for negative inputs.
        samples: How many inputs each epoch has.
        epochs: How many epochs, from 1.
        learning_rate: Positive float.
        sparsity: Float in [0, 1). Adds "masked_he_normal", He's initializer with a random mask that it ignores, and
            "sparse_he_normal", `SparseHeNormal` with the same masks. Masks of initializers that have one are kept
            through training. He's scale is that of the negative slope for "leaky_relu".
        seed: Non-negative int, from which all else derives.

    Returns:
        An `InitializerComparison`: `str()` is a table, `.to_dict()`, `.to_pandas()`, `.plot()` and `.histograms` have
        the rest. A run whose numbers become infinite ends with the epoch in which they do, and says so.

    Raises:
        ValueError: When an argument is not one of those allowed, or an initializer cannot make a kernel.
        TypeError: When an initializer is no callable, or the seed no integer.

    Example:
        >>> from keras_sparse_init import compare_initializers
        >>> comparison = compare_initializers(["normal(0.01)", "he_normal"], (100, 80, 60), epochs=2)
        >>> [round(std, 1) for std in comparison["he_normal"].values("pre_activation_std")]
        [1.4, 1.5]
        >>> comparison["normal(0.01)"].verdict()
        'signal shrinks 15.5x, gradient shrinks 15x'

    Reference:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks. He et al.
        2015, Delving Deep into Rectifiers, arXiv:1502.01852.
    """
    sizes = _check_sizes(sizes)
    check_choice("activation", activation, ACTIVATIONS)
    slope = check_finite("negative_slope", negative_slope)
    for name, value in (("samples", samples), ("epochs", epochs)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")
    check_positive("learning_rate", learning_rate)
    seed = check_seed(seed)
    named = _named(initializers)
    if sparsity is not None:
        sparsity = check_sparsity(sparsity)
        he = {"sparsity": sparsity, "negative_slope": slope if activation == "leaky_relu" else 0.0}
        for name, granularity in (("masked_he_normal", "dense"), ("sparse_he_normal", "unit")):
            if name in named:
                raise ValueError(
                    f"`sparsity` adds {name!r}, which `initializers` has too. Give one of them another name"
                )
            named[name] = SparseHeNormal(**he, granularity=granularity, seed=0)
    settings = {
        "initializers": list(named),
        "sizes": list(sizes),
        "activation": activation,
        "negative_slope": slope if activation == "leaky_relu" else None,
        "samples": int(samples),
        "epochs": int(epochs),
        "learning_rate": float(learning_rate),
        "sparsity": sparsity,
        "seed": seed,
    }
    functions = activation_functions(activation, slope)
    runs = [
        _Training(name, *initial_kernels(name, value, sizes, seed), functions, float(learning_rate))
        for name, value in named.items()
    ]
    # Numbers that overflow are reported, in words: they need no warning.
    with np.errstate(all="ignore"):
        for epoch, (x, y) in enumerate(_batches(sizes, samples, epochs, functions[0], seed)):
            for run in runs:
                run.step(epoch, x, y, last=epoch == epochs - 1)
    return InitializerComparison(
        settings, tuple(run.result() for run in runs), tuple(h for run in runs for h in run.histograms)
    )


def initial_kernels(
    name: str, initializer: Any, sizes: Sequence[int], seed: int
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The kernels of a stack before training, with the masks that training keeps (None for a dense kernel).

    Example:
        >>> import keras
        >>> from keras_sparse_init.comparison.compare import initial_kernels
        >>> kernels, masks = initial_kernels("he", keras.initializers.HeNormal(), (4, 3, 2), seed=0)
        >>> [kernel.shape for kernel in kernels], masks
        ([(4, 3), (3, 2)], [None, None])
    """
    kernels, masks = [], []
    for layer, shape in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        seeded = _seeded(initializer, derive_seed(seed, f"layer{layer}/kernel"))
        try:
            made = seeded(shape, dtype="float32")
        except ValueError as error:
            raise ValueError(f"The initializer {name!r} makes no kernel of shape {shape}: {error}") from error
        kernel = np.array(compat.to_numpy(f"initializers[{name!r}]", made), np.float32)
        if kernel.shape != shape:
            raise ValueError(
                f"`initializers` must make kernels of the shape they are given, {shape}. "
                f"Received: {name!r}, which made one of {kernel.shape}"
            )
        sparse = isinstance(seeded, SparseScaledInit) and (seeded.mask is not None or seeded.sparsity is not None)
        kernels.append(kernel)
        masks.append(kernel != 0 if sparse else None)  # Ours draw no 0 where the mask is 1.
    return kernels, masks


def _seeded(initializer: Any, seed: int) -> Any:
    """The same initializer with another seed, when it has one."""
    config = initializer.get_config() if hasattr(initializer, "get_config") else {}
    return type(initializer).from_config({**config, "seed": seed}) if "seed" in config else initializer


def _named(initializers: Any) -> dict[str, Any]:
    if isinstance(initializers, Mapping):
        for name, value in initializers.items():
            if isinstance(value, type) or not callable(value):
                raise TypeError(f"`initializers` must have initializers as its values. Received: {name!r}: {value!r}")
        named = {str(name): value for name, value in initializers.items()}
    else:
        names = list(_INITIALIZERS) if initializers is None else initializers
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(
                f"`initializers` must be a list of names or a dict of initializers. "
                f"Received: initializers={initializers!r}"
            )
        named = {check_choice("initializers", name, tuple(_INITIALIZERS)): _INITIALIZERS[name]() for name in names}
        if len(named) < len(names):
            raise ValueError(f"`initializers` must name each once. Received: initializers={initializers!r}")
    if not named:
        raise ValueError(f"`initializers` must not be empty. Received: initializers={initializers!r}")
    return named


def _check_sizes(sizes: Any) -> tuple[int, ...]:
    several = isinstance(sizes, Sequence) and len(sizes) >= 2
    if not several or not all(is_integer(size) and size >= 1 for size in sizes):
        raise ValueError(
            f"`sizes` must be at least two positive ints: of the inputs, then of each layer. Received: sizes={sizes!r}"
        )
    return tuple(int(size) for size in sizes)


def _batches(
    sizes: Sequence[int], samples: int, epochs: int, function: Function, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each epoch."""
    normal = functools.partial(sample, distribution="untruncated_normal")
    target = normal(sizes[0] ** -0.5, (sizes[0], sizes[-1]), derive_seed(seed, "target"))
    for epoch in range(epochs):
        x = normal(1.0, (samples, sizes[0]), derive_seed(seed, f"inputs{epoch}"))
        yield x, function(x @ target)


class _Training:
    """A stack in training, and what is kept of it."""

    def __init__(
        self,
        name: str,
        kernels: list[np.ndarray],
        masks: list[np.ndarray | None],
        functions: tuple[Function, Function],
        learning_rate: float,
    ):
        self.name, self.functions, self.learning_rate = name, functions, learning_rate
        self.kernels, self.masks = kernels, masks
        self.biases = [np.zeros(kernel.shape[1], np.float32) for kernel in kernels]
        self.losses: list[float] = []
        self.rows: list[LayerStatistics] = []
        self.histograms: list[Histogram] = []
        self.diverged_at: int | None = None

    def step(self, epoch: int, x: np.ndarray, y: np.ndarray, last: bool) -> None:
        """Measures, then updates; nothing when numbers are not finite any more."""
        if self.diverged_at is not None:
            return
        loss, layers = pass_through(self.kernels, self.biases, x, y, *self.functions)
        # Of weights and their gradients what the mask leaves.
        seen = [
            values if mask is None else values | {name: values[name][mask] for name in ("kernel", "kernel_gradient")}
            for values, mask in zip(layers, self.masks, strict=True)
        ]
        rows = [LayerStatistics.of(self.name, epoch, number, values) for number, values in enumerate(seen, 1)]
        self.losses.append(loss)
        self.rows += rows
        if not (math.isfinite(loss) and all(row.is_finite() for row in rows)):
            self.diverged_at = epoch
            return
        if epoch == 0 or last:
            self.histograms += [
                Histogram.of(self.name, epoch, number, quantity, values[quantity])
                for number, values in enumerate(seen, 1)
                for quantity in QUANTITIES
            ]
        for kernel, bias, mask, values in zip(self.kernels, self.biases, self.masks, layers, strict=True):
            update = self.learning_rate * values["kernel_gradient"]
            kernel -= update if mask is None else update * mask
            bias -= self.learning_rate * values["bias_gradient"]

    def result(self) -> InitializerRun:
        return InitializerRun(self.name, tuple(self.losses), tuple(self.rows), self.diverged_at)
