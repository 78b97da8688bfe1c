"""The Keras initializers: thin adapters from mask, fans and standard deviation to a tensor, for both Kerases."""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np

from keras_sparse_init import compat, fans, masks
from keras_sparse_init.arguments import check_choice, check_finite, check_positive, check_seed
from keras_sparse_init.sampling import DISTRIBUTIONS, Distribution, derive_seed, sample
from keras_sparse_init.variance import (
    GRANULARITIES,
    MODES,
    Granularity,
    Mode,
    weight_std,
)


@compat.register
class SparseScaledInit(compat.Initializer):
    """Variance scaling for sparse kernels: the variance of a weight is scale / fan, with the fan its unit really has.

    Without a mask it is Keras's `VarianceScaling`. With one, weights off the mask are exactly 0 and the others have

        unit:  var(w_ij) = scale / fan_in_j,  fan_in_j = number of nonzeros into unit j over the receptive field
               (fan_out_i = nonzeros out of i; "fan_avg": the mean of the two)
        effective: the same, but fan_in_j counts only inputs that a signal reaches through the masks before, and
               fan_out_i only outputs from which one reaches the output of the model
        layer: var(w)    = scale / (dense fan * density of the layer)
        dense: var(w)    = scale / dense fan (the mask only zeroes: what happens when masks are ignored)

    An initializer only sets the starting values: with a bare `kernel_initializer=SparseScaledInit(sparsity=0.95)` the
    zeros train away. `Masked(layer)` or `sparsify` keep them at 0.

    "effective" needs the masks of a whole model: `reinitialize` and `sparsify` give it those. A layer that draws a
    kernel by itself, when it is built, knows of no others: all of its inputs count as live, as with "unit". On random
    masks that are not very sparse all units are live and the two agree; where many are dead, as with
    `masks.Heterogeneous`, "unit" counts connections that carry nothing, and the signal shrinks from layer to layer.

    Fans below 1 count as 1. A unit without inputs is all 0. The same seed gives the same bits in every process, on
    every replica and backend; calling twice gives the same values.

    Args:
        scale: Positive float, the squared gain: 2 for relu, `gain(...)**2` in general.
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "truncated_normal" (or "normal"; N(0, sigma^2 / 0.87962566^2) cut at 2 standard deviations,
            so that the variance is exact), "untruncated_normal", or "uniform" (within sqrt(3 * scale / fan)).
        granularity: "unit", "effective", "layer" or "dense".
        mask: None (dense until a mask is known), an array of 0 and 1 of the kernel's shape, or a rule of
            `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`; the mask's seed derives from `seed`.
        seed: Non-negative int, or a `keras.random.SeedGenerator` for new values at each call. When None, a seed is
            drawn once, at construction, from Python's `random`, as Keras does, so that
            `keras.utils.set_random_seed` makes it reproducible.
        kernel_layout: How to read the kernel's axes where its shape does not tell: a name ("depthwise",
            "conv_transpose", "lstm", "gru", "embedding"), an einsum equation, or a
            `keras_sparse_init.fans.KernelLayout`. None follows Keras: (in, out), (receptive field..., in, out).

    Raises:
        ValueError: When an argument is not one of those allowed, both `mask` and `sparsity` are given, or one of them
            with "effective", which goes by the masks of a model.
        TypeError: When the seed is no integer.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseScaledInit
        >>> init = SparseScaledInit(scale=2.0, sparsity=0.95, seed=0)
        >>> layer = keras.layers.Dense(100, kernel_initializer=init)
        >>> layer.build((None, 300))
        >>> int((layer.kernel.numpy() != 0).sum())
        1500

    Reference:
        unit: Evci et al. 2020, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win,
        arXiv:2010.03533, section 3.1. layer: Liu et al. 2018, Rethinking the Value of Network Pruning,
        arXiv:1810.05270.
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: Mode = "fan_in",
        distribution: Distribution = "truncated_normal",
        granularity: Granularity = "unit",
        mask: Any = None,
        sparsity: float | None = None,
        seed: Any = None,
        *,
        kernel_layout: str | fans.KernelLayout | None = None,
    ):
        self.scale = check_positive("scale", scale)
        self.mode = check_choice("mode", mode, MODES)
        distribution = distribution.lower() if isinstance(distribution, str) else distribution
        self.distribution = check_choice(
            "distribution", "truncated_normal" if distribution == "normal" else distribution, DISTRIBUTIONS
        )
        self.granularity = check_choice("granularity", granularity, GRANULARITIES)
        if mask is not None and sparsity is not None:
            raise ValueError(
                f"Give either `mask` or `sparsity`, not both. Received: mask={mask!r}, sparsity={sparsity}"
            )
        if self.granularity == "effective" and not (mask is None and sparsity is None):
            raise ValueError(
                "`mask` and `sparsity` must be None with granularity='effective', which counts what the masks of a "
                f"whole model connect: see `sparsify` and `reinitialize`. Received: mask={mask!r}, sparsity={sparsity}"
            )
        mask = _mask_argument(mask)
        self.mask = mask.copy() if isinstance(mask, np.ndarray) else mask  # Its owner may go on to change it.
        self.sparsity = None if sparsity is None else masks.Random(sparsity).sparsity
        self.kernel_layout = _layout_argument(kernel_layout)
        # The seed as given goes into the config: clones of an unseeded initializer (Bidirectional, MultiHeadAttention)
        # must not repeat one another's values.
        self._given_seed = seed = keras.saving.deserialize_keras_object(seed) if isinstance(seed, dict) else seed
        if seed is None:
            self.seed = random.randint(1, 10**9)
        else:
            self.seed = self._given_seed = seed if isinstance(seed, keras.random.SeedGenerator) else check_seed(seed)

    @classmethod
    def seeded_later(cls, *args: Any, given_seed: int | None = None) -> SparseScaledInit:
        """An initializer for `draw` alone, whose seeds come from outside: none is drawn from Python's `random`."""
        initializer = cls(*args, seed=0 if given_seed is None else given_seed)
        initializer._given_seed = given_seed
        return initializer

    @compat.not_rewritten
    def __call__(self, shape: Any, dtype: Any = None, mask: Any = None, kernel_layout: Any = None) -> Any:
        """A kernel's initial values.

        Args:
            shape: The kernel's shape.
            dtype: A floating dtype; the default float type when None. Half types are drawn in float32 and cast.
            mask: Array or tensor of 0 and 1 of that shape, or a rule; wins over the mask of the constructor.
            kernel_layout: As in the constructor, over which it wins.

        Returns:
            A tensor of `shape` and `dtype`: TensorFlow's when `dtype` is a `tf.DType`, else of Keras 3's backend.

        Raises:
            ValueError: When the shape, dtype, mask or layout does not fit.
        """
        name = compat.float_dtype(dtype)
        seed = self.seed if isinstance(self.seed, int) else compat.next_seed(self.seed)
        return compat.to_tensor(self.draw(shape, name, mask, kernel_layout, seed), dtype)

    def draw(
        self,
        shape: Any,
        dtype: str,
        mask: Any,
        kernel_layout: Any,
        seed: int,
        live_inputs: np.ndarray | None = None,
        live_outputs: np.ndarray | None = None,
    ) -> np.ndarray:
        """The values of a call as a NumPy array, with a seed from outside: whole models have one seed for all kernels.

        Args:
            shape: The kernel's shape.
            dtype: Name of a floating dtype.
            mask: As in a call.
            kernel_layout: As in a call.
            seed: Non-negative int.
            live_inputs: For "effective", as in `variance.weight_std`.
            live_outputs: The same.

        Returns:
            An array of `shape` and `dtype`.

        Raises:
            ValueError: When the shape, mask or layout does not fit.
        """
        shape, layout, mask = self._resolved(shape, mask, kernel_layout, seed)
        std = weight_std(shape, mask, layout, self.scale, self.mode, self.granularity, live_inputs, live_outputs)
        return sample(std, shape, seed, mask, self.distribution, compat.numpy_dtype(dtype))

    @property
    def given_seed(self) -> int | None:
        """The seed of the constructor when it was an int; None when it was not given or is a generator."""
        return self._given_seed if isinstance(self._given_seed, int | np.integer) else None

    def _resolved(
        self, shape: Any, mask: Any, kernel_layout: Any, seed: int
    ) -> tuple[tuple[int, ...], fans.KernelLayout, np.ndarray | None]:
        """The shape, layout and boolean mask that the arguments of `draw` and the constructor's come to."""
        shape = fans.check_shape(shape)
        layout = fans.kernel_layout(self.kernel_layout if kernel_layout is None else kernel_layout, shape)
        mask = self._own_mask() if mask is None else _mask_argument(mask)
        if callable(mask):
            mask = compat.to_numpy("mask", masks.draw(mask, shape, derive_seed(seed, "mask"), layout))
        return shape, layout, None if mask is None else fans.as_mask(mask, shape)

    def _own_mask(self) -> Any:
        return self.mask if self.sparsity is None else masks.Random(self.sparsity)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON-serializable dict."""
        return {**self._settings(), **self._common_config()}

    def _settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "mode": self.mode, "distribution": self.distribution}

    def _common_config(self) -> dict[str, Any]:
        mask, layout, seed = self.mask, self.kernel_layout, self._given_seed
        if isinstance(mask, np.ndarray):
            mask = mask.astype(int).tolist()
        elif mask is not None:
            mask = serialize_rule(mask)
        return {
            "granularity": self.granularity,
            "mask": mask,
            "sparsity": self.sparsity,
            "seed": keras.saving.serialize_keras_object(seed) if isinstance(seed, keras.random.SeedGenerator) else seed,
            "kernel_layout": layout.get_config() if isinstance(layout, fans.KernelLayout) else layout,
        }


class _Preset(SparseScaledInit):
    """A `SparseScaledInit` whose scale, mode and distribution are those of a Keras initializer."""

    _preset: dict[str, Any]

    def __init__(
        self,
        *,
        granularity: Granularity = "unit",
        mask: Any = None,
        sparsity: float | None = None,
        seed: Any = None,
        kernel_layout: str | fans.KernelLayout | None = None,
    ):
        super().__init__(
            **self._preset,
            granularity=granularity,
            mask=mask,
            sparsity=sparsity,
            seed=seed,
            kernel_layout=kernel_layout,
        )

    def _settings(self) -> dict[str, Any]:
        return {}


class _PresetHe(SparseScaledInit):
    """The same for He, whose scale depends on the slope of the activation that follows."""

    _distribution: Distribution

    def __init__(
        self,
        *,
        negative_slope: float = 0.0,
        granularity: Granularity = "unit",
        mask: Any = None,
        sparsity: float | None = None,
        seed: Any = None,
        kernel_layout: str | fans.KernelLayout | None = None,
    ):
        self.negative_slope = check_finite("negative_slope", negative_slope)
        super().__init__(
            scale=2.0 / (1.0 + self.negative_slope**2),
            mode="fan_in",
            distribution=self._distribution,
            granularity=granularity,
            mask=mask,
            sparsity=sparsity,
            seed=seed,
            kernel_layout=kernel_layout,
        )

    def _settings(self) -> dict[str, Any]:
        return {"negative_slope": self.negative_slope}


@compat.register
class SparseHeNormal(_PresetHe):
    """He's normal initializer for sparse kernels.

    var(w) = 2 / ((1 + negative_slope^2) * fan_in), truncated normal. Without a mask and slope it is Keras's
    `HeNormal`.

    Args:
        negative_slope: Slope of the activation for negative inputs: 0 for relu, 0.2 for Keras 3's leaky_relu.
        granularity: "unit", "effective", "layer" or "dense", as in `SparseScaledInit`.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseHeNormal
        >>> layer = keras.layers.Dense(8, kernel_initializer=SparseHeNormal(sparsity=0.75, seed=0))
        >>> layer.build((None, 16))
        >>> int((layer.kernel.numpy() != 0).sum())
        32

    Reference:
        He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852, eq. (15).
    """

    _distribution = "truncated_normal"


@compat.register
class SparseHeUniform(_PresetHe):
    """He's uniform initializer for sparse kernels.

    var(w) = 2 / ((1 + negative_slope^2) * fan_in), uniform. Without a mask and slope it is Keras's
    `HeUniform`.

    Args:
        negative_slope: Slope of the activation for negative inputs: 0 for relu, 0.2 for Keras 3's leaky_relu.
        granularity: "unit", "effective", "layer" or "dense", as in `SparseScaledInit`.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseHeUniform
        >>> layer = keras.layers.Dense(8, kernel_initializer=SparseHeUniform(sparsity=0.75, seed=0))
        >>> layer.build((None, 16))
        >>> int((layer.kernel.numpy() != 0).sum())
        32

    Reference:
        He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852, eq. (15).
    """

    _distribution = "uniform"


@compat.register
class SparseGlorotNormal(_Preset):
    """Glorot's normal initializer for sparse kernels.

    var(w) = 2 / (fan_in + fan_out), truncated normal. Without a mask it is Keras's `GlorotNormal`.

    Args:
        granularity: "unit", "effective", "layer" or "dense", as in `SparseScaledInit`.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseGlorotNormal
        >>> layer = keras.layers.Dense(8, kernel_initializer=SparseGlorotNormal(sparsity=0.75, seed=0))
        >>> layer.build((None, 16))
        >>> int((layer.kernel.numpy() != 0).sum())
        32

    Reference:
        Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks, eq. (16).
    """

    _preset = {"scale": 1.0, "mode": "fan_avg", "distribution": "truncated_normal"}


@compat.register
class SparseGlorotUniform(_Preset):
    """Glorot's uniform initializer for sparse kernels.

    var(w) = 2 / (fan_in + fan_out), uniform. Without a mask it is Keras's `GlorotUniform`.

    Args:
        granularity: "unit", "effective", "layer" or "dense", as in `SparseScaledInit`.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseGlorotUniform
        >>> layer = keras.layers.Dense(8, kernel_initializer=SparseGlorotUniform(sparsity=0.75, seed=0))
        >>> layer.build((None, 16))
        >>> int((layer.kernel.numpy() != 0).sum())
        32

    Reference:
        Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks, eq. (16).
    """

    _preset = {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform"}


@compat.register
class SparseLecunNormal(_Preset):
    """LeCun's normal initializer for sparse kernels.

    var(w) = 1 / fan_in, truncated normal. Without a mask it is Keras's `LecunNormal`.

    Args:
        granularity: "unit", "effective", "layer" or "dense", as in `SparseScaledInit`.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseLecunNormal
        >>> layer = keras.layers.Dense(8, kernel_initializer=SparseLecunNormal(sparsity=0.75, seed=0))
        >>> layer.build((None, 16))
        >>> int((layer.kernel.numpy() != 0).sum())
        32

    Reference:
        LeCun et al. 1998, Efficient BackProp, section 4.6.
    """

    _preset = {"scale": 1.0, "mode": "fan_in", "distribution": "truncated_normal"}


@compat.register
class SparseLecunUniform(_Preset):
    """LeCun's uniform initializer for sparse kernels.

    var(w) = 1 / fan_in, uniform. Without a mask it is Keras's `LecunUniform`.

    Args:
        granularity: "unit", "effective", "layer" or "dense", as in `SparseScaledInit`.
        mask: None, an array of 0 and 1, or a rule of `keras_sparse_init.masks`.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int, `keras.random.SeedGenerator` or None.
        kernel_layout: How to read the kernel's axes, as in `SparseScaledInit`.

    Raises:
        ValueError: When an argument is not one of those allowed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseLecunUniform
        >>> layer = keras.layers.Dense(8, kernel_initializer=SparseLecunUniform(sparsity=0.75, seed=0))
        >>> layer.build((None, 16))
        >>> int((layer.kernel.numpy() != 0).sum())
        32

    Reference:
        LeCun et al. 1998, Efficient BackProp, section 4.6.
    """

    _preset = {"scale": 1.0, "mode": "fan_in", "distribution": "uniform"}


def _mask_argument(mask: Any) -> Any:
    """A mask argument as None, a boolean array or a rule; from a config, a list or a serialized rule."""
    if isinstance(mask, dict):
        mask = deserialize_rule(mask)
    if mask is None or (callable(mask) and not isinstance(mask, type)):
        return mask
    if isinstance(mask, str | type):
        raise ValueError(
            f"`mask` must be None, an array of 0 and 1, or a rule such as masks.Random(0.9). Received: mask={mask!r}"
        )
    return fans.as_mask(compat.to_numpy("mask", mask))


def serialize_rule(rule: Any) -> dict[str, Any]:
    """A mask rule as a JSON-serializable dict: by its name alone, or, a user's own, as Keras's registry has it."""
    ours = getattr(masks, type(rule).__name__, None) is type(rule)
    return masks.serialize(rule) if ours else keras.saving.serialize_keras_object(rule)


def deserialize_rule(config: dict[str, Any]) -> Any:
    """The mask rule of a dict that `serialize_rule` returned."""
    by_keras = "registered_name" in config or config.get("class_name") == "__lambda__"
    return keras.saving.deserialize_keras_object(config) if by_keras else masks.deserialize(config)


def _layout_argument(layout: Any) -> str | fans.KernelLayout | None:
    if isinstance(layout, dict):
        return fans.KernelLayout.from_config(layout)
    if layout is None or isinstance(layout, fans.KernelLayout):
        return layout
    if layout in fans.LAYOUT_NAMES or (isinstance(layout, str) and "->" in layout):
        return layout
    raise ValueError(
        f"`kernel_layout` must be one of {', '.join(map(repr, fans.LAYOUT_NAMES))}, an einsum equation, a KernelLayout "
        f"or None. Received: kernel_layout={layout!r}"
    )
