"""Keras initializers whose kernels are orthogonal, exactly or as nearly as a mask allows."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans
from keras_sparse_init.arguments import check_choice, check_positive, check_seed, check_sparsity, is_integer
from keras_sparse_init.initializers import SparseScaledInit
from keras_sparse_init.isometry import approximate_isometry, matrices
from keras_sparse_init.orthogonal import CONSTRUCTIONS, Construction, sparse_orthogonal
from keras_sparse_init.sampling import derive_seed, smallest_normal


class OrthogonalInit(compat.Initializer):
    """What those two have in common that make their own zeros: a seed, a gain, a matrix at the centre of the field."""

    def __init__(self, gain: float | None, seed: int | None) -> None:
        self.gain = gain
        self._given_seed = seed if seed is None else check_seed(seed)
        # As Keras does, so that `keras.utils.set_random_seed` makes it reproducible.
        self.seed = random.randint(1, 10**9) if seed is None else int(seed)

    @compat.not_rewritten
    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """A kernel.

        Args:
            shape: The kernel's shape: (inputs, units), or that of a convolution, (receptive field..., inputs, units).
            dtype: A floating dtype; the default float type when None.

        Returns:
            A tensor of `shape` and `dtype`: TensorFlow's when `dtype` is a `tf.DType`, else of Keras 3's backend.

        Raises:
            ValueError: When the kernel cannot be orthogonal: see the class.
        """
        return compat.to_tensor(self.draw(shape, compat.float_dtype(dtype), self.seed), dtype)

    def draw(self, shape: Any, dtype: str, seed: int) -> np.ndarray:
        """The values of a call as an array, with a seed from outside."""
        raise NotImplementedError

    @property
    def given_seed(self) -> int | None:
        """The seed of the constructor, None when it was not given."""
        return self._given_seed

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON-serializable dict."""
        return {"gain": self.gain, "seed": self._given_seed}


@compat.register
class ExactOrthogonalInit(OrthogonalInit):
    """Sparse kernels with W^T W = gain^2 I exactly (W W^T, for fewer inputs than units), zeros included.

    It makes its own mask: the nonzeros of the kernel. `Masked(Dense(...))` takes them for its mask, and
    `sparsify(model, sparsity, initializer=ExactOrthogonalInit())` sets the masks of all wrappers to them. It is for
    dense layers and convolutions in one group: of the kernel of several groups, a depthwise one or one of several
    gates it sees the shape alone, which does not tell, and the layer is no isometry.

    Random Givens rotations are composed until the density is reached, to within half of what one rotation adds. A
    column of m rows then has on average the support that `orthogonal.expected_density` gives. The kernel of a
    convolution is 0 but for its centre, which is such a matrix ("delta"): its nonzeros are at most inputs * units.

    The signal keeps its size in linear networks, and nearly so under tanh, however deep. Of 95% sparse networks on
    digits those of ten hidden tanh layers gain by it (97.3% against 94.9% for kernels scaled per unit), those of two do
    not, and lose 0.2 points under relu: benchmarks/orthogonal.py.

    Args:
        sparsity: Fraction of zeros of the whole kernel, in [0, 1), at most 1 - 1/max(inputs, units) (of what is at the
            centre). `sparsify` gives each layer its own; this one is for layers by themselves.
        gain: Positive float, what every singular value is.
        construction: "rotations", one after the other, as in the paper: some rows have many nonzeros, others few.
            "matchings", of random pairs of all rows at once: rows have about as many each.
        spread: Of a convolution, whether a kernel that is to have more nonzeros than its centre has places gets them
            around it. These weights begin at 0 and are on in the mask that `sparsify` sets. False is an error then.
        seed: Non-negative int; None draws one from Python's `random`, as Keras does.

    Raises:
        ValueError: When an argument is not one of those allowed; in a call, when the kernel is no matrix or convolution
            of odd sizes, or cannot have that sparsity.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import ExactOrthogonalInit, Masked
        >>> layer = Masked(keras.layers.Dense(64, kernel_initializer=ExactOrthogonalInit(0.9, seed=0)))
        >>> layer.build((None, 64))
        >>> w = np.array(layer.layer.kernel.numpy())
        >>> bool(np.allclose(w.T @ w, np.eye(64), atol=1e-6)), round(float((w == 0).mean()), 2)
        (True, 0.9)

    Reference:
        Nowak et al. 2024, Sparser, Better, Deeper, Stronger: Improving Sparse Training with Exact Orthogonal
        Initialization, arXiv:2406.01755.
    """

    def __init__(
        self,
        sparsity: float = 0.0,
        gain: float = 1.0,
        construction: Construction = "rotations",
        spread: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(check_positive("gain", gain), seed)
        self.sparsity = check_sparsity(sparsity)
        self.construction = check_choice("construction", construction, CONSTRUCTIONS)
        if not isinstance(spread, bool):
            raise ValueError(f"`spread` must be a bool. Received: spread={spread!r}")
        self.spread = spread

    def draw(self, shape: Any, dtype: str, seed: int) -> np.ndarray:
        """The values of a call as an array, with a seed from outside."""
        return self.draw_with_mask(shape, dtype, seed, self.sparsity)[0]

    def draw_with_mask(self, shape: Any, dtype: str, seed: int, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
        """A kernel of a sparsity, and its mask, a boolean array.

        Raises:
            ValueError: When the kernel is no matrix or convolution of odd sizes, or cannot have that sparsity.
        """
        shape, centre = _centre_of(shape)
        inputs, units = shape[-2:]
        size, places, least = math.prod(shape), inputs * units, max(inputs, units)
        wanted = round(size * (1 - sparsity))
        if wanted < least or (wanted > places and not self.spread):
            highest = math.floor(1e4 * (1 - least / size)) / 1e4
            lowest = f"at least {1 - places / size:.4g} without `spread`" if places < size and not self.spread else ""
            raise ValueError(
                f"`sparsity` of an orthogonal kernel of shape {shape} must be at most {highest:g}"
                f"{' and ' if lowest else ''}{lowest}. Received: sparsity={sparsity:g}"
            )
        rng = np.random.Generator(np.random.SFC64(derive_seed(seed, "orthogonal")))
        matrix = sparse_orthogonal(inputs, units, min(wanted, places), self.construction, rng)
        matrix *= self.gain
        matrix = matrix.astype(compat.numpy_dtype(dtype))
        if size == places:
            return matrix.reshape(shape), matrix.reshape(shape) != 0
        kernel = np.zeros(shape, matrix.dtype)
        kernel[centre] = matrix
        mask = kernel != 0
        more = wanted - np.count_nonzero(mask)
        if self.spread and more > 0:
            around = np.ones(shape, bool)
            around[centre] = False
            free = np.flatnonzero(around)
            mask.reshape(-1)[rng.choice(free, min(more, free.size), replace=False)] = True
        return kernel, mask

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON-serializable dict."""
        own = {"sparsity": self.sparsity, "construction": self.construction, "spread": self.spread}
        return {**own, **super().get_config()}


@compat.register
class DeltaOrthogonalInit(OrthogonalInit):
    """Convolution kernels that are 0 but for their centre, a random orthogonal matrix times the gain.

    With at least as many units as inputs and gain 1, a circular convolution with it keeps the norm of every input. One
    in several groups or a depthwise one does not, and the shape of its kernel does not tell.

    Args:
        gain: Positive float. None: max(sqrt(units / inputs), 1), with which the mean square over units stays where
            there are more units than inputs.
        seed: Non-negative int; None draws one from Python's `random`, as Keras does.

    Raises:
        ValueError: When an argument is not one of those allowed; in a call, when the kernel is no matrix or convolution
            of odd sizes.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import DeltaOrthogonalInit
        >>> layer = keras.layers.Conv2D(8, 3, padding="same", kernel_initializer=DeltaOrthogonalInit(gain=1.0, seed=0))
        >>> x = np.random.default_rng(0).normal(size=(1, 6, 6, 4)).astype("float32")
        >>> bool(np.isclose(np.linalg.norm(x), np.linalg.norm(layer(x).numpy())))
        True

    Reference:
        Xiao et al. 2018, Dynamical Isometry and a Mean Field Theory of CNNs, arXiv:1806.05393, algorithm 2.
    """

    def __init__(self, gain: float | None = None, seed: int | None = None) -> None:
        super().__init__(None if gain is None else check_positive("gain", gain), seed)

    def draw(self, shape: Any, dtype: str, seed: int) -> np.ndarray:
        """The values of a call as an array, with a seed from outside."""
        shape, centre = _centre_of(shape)
        inputs, units = shape[-2:]
        rng = np.random.Generator(np.random.SFC64(derive_seed(seed, "delta")))
        q = _orthogonal(rng, (max(inputs, units), min(inputs, units)))
        kernel = np.zeros(shape)
        gain = max(math.sqrt(units / inputs), 1.0) if self.gain is None else self.gain
        kernel[centre] = gain * (q if inputs >= units else q.T)
        return kernel.astype(compat.numpy_dtype(dtype))


@compat.register
class ApproximateIsometryInit(SparseScaledInit):
    """Sparse kernels as nearly orthogonal as their masks allow: random orthogonal ones, masked, then mended.

    What `approximate_isometry` does to a kernel, from the start that the paper has. It takes a mask that is there, as
    `SparseScaledInit` does: in `Masked`, in `sparsify` and `reinitialize`, for masks that were pruned too. Whoever may
    choose the mask gets an exact isometry from `ExactOrthogonalInit`.

    Args:
        gain: Positive float, what every singular value is to be.
        steps: Largest number of steps of the optimizer, at least 0; 0 leaves the masked orthogonal kernel. 100 for a
            kernel of 784x300 at 95% take one to two seconds, many times that where other programs keep the processors
            busy. The last bits depend on the processor and the threads of NumPy's linear algebra.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed; in a call, for an embedding.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import ApproximateIsometryInit, Masked
        >>> init = ApproximateIsometryInit(seed=0)
        >>> layer = Masked(keras.layers.Dense(60, kernel_initializer=init), sparsity=0.9, seed=0)
        >>> layer.build((None, 100))
        >>> w = np.array(layer.layer.kernel.numpy())
        >>> round(float((w == 0).mean()), 2), bool(np.linalg.norm(w.T @ w - np.eye(60)) < 0.1)
        (0.9, True)

    Reference:
        Lee et al. 2020, A Signal Propagation Perspective for Pruning Neural Networks at Initialization,
        arXiv:1906.06307, section 4.
    """

    def __init__(
        self,
        gain: float = 1.0,
        steps: int = 100,
        *,
        mask: Any = None,
        sparsity: float | None = None,
        seed: Any = None,
        kernel_layout: str | fans.KernelLayout | None = None,
    ) -> None:
        self.gain = check_positive("gain", gain)
        if not is_integer(steps) or steps < 0:
            raise ValueError(f"`steps` must be an int of at least 0. Received: steps={steps!r}")
        self.steps = int(steps)
        # With at least as many inputs as units, each unit's weights have the norm `gain`.
        super().__init__(
            scale=self.gain**2,
            distribution="untruncated_normal",
            mask=mask,
            sparsity=sparsity,
            seed=seed,
            kernel_layout=kernel_layout,
        )

    def draw(
        self, shape: Any, dtype: str, mask: Any, kernel_layout: Any, seed: int, *live_ends: np.ndarray | None
    ) -> np.ndarray:
        """The values of a call as an array, with a seed from outside."""
        shape, layout, mask = self._resolved(shape, mask, kernel_layout, seed)
        size = math.prod(shape)
        places = matrices(np.arange(size).reshape(shape), layout)
        rng = np.random.Generator(np.random.SFC64(derive_seed(seed, "isometry")))
        kernel = np.empty(size)
        kernel[places] = self.gain * _orthogonal(rng, places.shape)
        kernel = kernel.reshape(shape)
        if mask is not None and not mask.all():
            kernel = approximate_isometry(kernel, mask, self.steps, self.gain, kernel_layout=layout)
        kernel = kernel.astype(compat.numpy_dtype(dtype))
        # What rounds to 0 would be taken for masked.
        kernel[(kernel == 0) if mask is None else (kernel == 0) & mask] = smallest_normal(kernel.dtype)
        return kernel

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON-serializable dict."""
        config = {"gain": self.gain, "steps": self.steps, **self._common_config()}
        del config["granularity"]
        return config


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random matrices with orthonormal columns; `shape` ends in (rows, columns), at least as many rows."""
    q, r = np.linalg.qr(rng.standard_normal(shape))
    # Else not every orthogonal matrix is as likely.
    return q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]


def _centre_of(shape: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape, checked, and the index of the centre of its receptive field."""
    shape = fans.check_shape(shape)
    if len(shape) < 2 or any(size % 2 == 0 for size in shape[:-2]) or 0 in shape:
        raise ValueError(
            "`shape` of an orthogonal kernel must be (inputs, units), or (odd sizes..., inputs, units). "
            f"Received: shape={shape}"
        )
    return shape, tuple(size // 2 for size in shape[:-2])
