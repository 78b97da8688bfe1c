"""The sparse maximal update parametrization: one learning rate for every width and density."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, traversal
from keras_sparse_init.arguments import check_positive, check_seed, is_integer
from keras_sparse_init.base_shapes import base_shapes
from keras_sparse_init.initializers import SparseScaledInit
from keras_sparse_init.layers import WeightNorm
from keras_sparse_init.layers.wrapper import layout_of
from keras_sparse_init.masked_kernel import masked_kernels
from keras_sparse_init.matching import mask_aware
from keras_sparse_init.orthogonal_initializers import ApproximateIsometryInit
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.scaled_rates import ADAPTIVE, PROPORTIONAL, kind_of, with_rates
from keras_sparse_init.table import laid_out

# Trainable variables of these names have a number for each unit, whatever their rank: attention's biases are of rank 2.
_VECTORS = ("bias", "gamma", "beta", "alpha", "scale")
# By name: of either Keras, and our own.
_NORM_CONSTRAINTS = ("UnitNorm", "MaxNorm", "MinMaxNorm", "WeightNormConstraint")


@dataclasses.dataclass(frozen=True)
class ParameterScale:
    """How one trainable variable is scaled.

    Attributes:
        name: Its path in the model.
        role: "input" (its fan-in does not grow with the width; depthwise kernels and embeddings too), "output" (its
            fan-in grows, its number of units does not), "hidden" (both grow; or neither, which makes no difference), or
            "vector" (biases and the like).
        width: m_d, its fan-in over that of the base.
        density: m_rho, the density of its mask over the base density; 1 without a mask.
        variance: By what the variance of the base's initialization is multiplied; None of a vector.
        adam_rate: By what the learning rate is multiplied under Adam and other adaptive optimizers.
        sgd_rate: The same under SGD.
    """

    name: str
    role: str
    width: float
    density: float
    variance: float | None
    adam_rate: float
    sgd_rate: float


@dataclasses.dataclass(frozen=True)
class ScaleTable:
    """How every trainable variable of a model is scaled; `str()` lays it out for reading.

    Attributes:
        rows: A `ParameterScale` for each, in the order of `model.trainable_variables`.
    """

    rows: list[ParameterScale]

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as JSON-serializable dicts."""
        return [dataclasses.asdict(row) for row in self.rows]

    def __str__(self) -> str:
        lines = [("variable", "role", "m_d", "m_rho", "variance", "rate: adam", "sgd")]
        for row in self.rows:
            variance = "" if row.variance is None else f"{row.variance:.4g}"
            numbers = f"{row.width:.4g}", f"{row.density:.4g}", variance, f"{row.adam_rate:.4g}", f"{row.sgd_rate:.4g}"
            lines.append((row.name, row.role, *numbers))
        return laid_out(lines)


class SparseMuP:
    """Initializes sparse models and scales their learning rates so that those of a small dense model suit them too.

    Tune a learning rate on a base, narrow and dense, and keep it for models that are wider and sparser: with variances
    and rates that follow the width and the density, activations and their changes in training stay of one size. With
    m_d = fan-in / fan-in of the base and m_rho = density / density of the base, compared to the base

        input kernels    variance 1 / m_rho,           rate 1 / m_rho (Adam), m_out / m_rho (SGD)
        hidden kernels   variance 1 / (m_d m_rho),     rate 1 / (m_d m_rho) (Adam), 1 / m_rho (SGD)
        output kernels   variance 1 / (m_d^2 m_rho),   rate 1 / (m_d m_rho) (both)
        biases etc.      as they are,                  rate 1 (Adam), m_out (SGD)

    with m_out the number of units over that of the base, m_rho = 1 without a mask. The paper multiplies outputs by
    1 / m_d in the forward pass instead; that is the same as kernels smaller by that factor and rates to suit, and needs
    no change of the model. Under SGD, rates of input kernels and biases grow with the width, for gradients shrink with
    it (Yang et al. 2022, table 3); the paper is about Adam. Embeddings are input kernels, with a fan-in of 1.

    It is derived for masks that are random and stay, and is known to fail where they do not: weights that survive
    pruning, SET or RigL are no longer independent of their mask, their distribution is not that of the draw, and rates
    that suit a static mask of that density do not suit them. Nor does it follow a density that changes: masks are read
    when `initialize` and `optimizer` are called. It is a limit of wide layers, and no guide where units have a handful
    of inputs: see `benchmarks/initializers.py`. Attention: Keras divides scores by the square root of `key_dim`, where
    the theory of width divides by it; make such models wider by more heads, at one `key_dim`.

    Args:
        base: What widths are compared to. A built model with the same layers, narrower; or an int, the width of the
            base, for models in which all hidden units are of one width; or None, when only the density changes.
        base_density: Density of the masked kernels of the base, in (0, 1].

    Raises:
        ValueError: When an argument is not one of those allowed.
        TypeError: When `base` is neither.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SparseMuP, sparsify
        >>> layers = keras.layers
        >>> def mlp(width):
        ...     return keras.Sequential([layers.Input((20,)), layers.Dense(width, "relu", name="first"),
        ...                              layers.Dense(width, "relu", name="second"), layers.Dense(3, name="last")])
        >>> model = sparsify(mlp(256), 0.75, method="uniform", skip=["first", "last"], seed=0)
        >>> mup = SparseMuP(base=32)
        >>> mup.initialize(model, seed=0)
        >>> model.compile(mup.optimizer(model, keras.optimizers.Adam(1e-3)), "mse")
        >>> print(mup.table(model))
        variable         role  m_d  m_rho  variance  rate: adam    sgd
        first/kernel    input    1      1         1           1      8
        first/bias     vector    1      1                     1      8
        second/kernel  hidden    8   0.25       0.5         0.5      4
        second/bias    vector    1      1                     1      8
        last/kernel    output    8      1   0.01562       0.125  0.125
        last/bias      vector    1      1                     1      1

    Reference:
        Dey, Bergsma, Hestness 2024, Sparse maximal update parameterization: A holistic approach to sparse training
        dynamics, arXiv:2405.15743, table 1. Yang et al. 2022, Tensor Programs V, arXiv:2203.03466.
    """

    def __init__(self, base: Any = None, base_density: float = 1.0) -> None:
        if is_integer(base):
            if base < 1:
                raise ValueError(f"`base` must be a positive int, a model or None. Received: base={base}")
        elif base is not None:
            compat.library_of(base)
        self.base = base
        self.base_density = check_positive("base_density", base_density)
        if self.base_density > 1:
            raise ValueError(f"`base_density` must be in (0, 1]. Received: base_density={base_density}")

    def table(self, model: Any) -> ScaleTable:
        """How each trainable variable of a model is scaled.

        Raises:
            ValueError: When the model has not the layers of the base, several widths although the base is an int,
                layers whose norm is no matter of the kernel (`WeightNorm`, `SpectralNormalization`, constraints of the
                norm), or variables of unknown kind.
            TypeError: When `model` is no Keras model.
        """
        compat.library_of(model)
        variables = model.trainable_variables
        if not variables:
            raise ValueError(
                f"`model` must be built and have trainable variables. Received: {model.name!r} without any"
            )
        places = {id(place.kernel): place for place in traversal.kernels_of(model)}
        masks = {id(kernel.kernel): kernel.mask_value() for kernel in masked_kernels(model)}
        _check_kinds(model, variables, places)
        rows = []
        for variable, base_shape in zip(variables, base_shapes(model, variables, places, self.base), strict=True):
            name, shape = _path(model, variable, places), tuple(variable.shape)
            if id(variable) not in places:
                wider = math.prod(shape) / math.prod(base_shape)
                rows.append(ParameterScale(name, "vector", 1.0, 1.0, None, 1.0, wider))
                continue
            layout = layout_of(places[id(variable)])
            mask = masks.get(id(variable))
            if mask is not None and not mask.any():
                raise ValueError(f"`model` must have no empty masks. Received: {name!r} without any weights")
            m_rho = 1.0 if mask is None else float(mask.mean()) / self.base_density
            m_d = fans.dense_fans(shape, layout)[0] / fans.dense_fans(base_shape, layout)[0]
            m_out = _units(shape, layout) / _units(base_shape, layout)
            if m_d == 1:
                scale = ("input" if m_out != 1 else "hidden", 1 / m_rho, 1 / m_rho, m_out / m_rho)
            elif m_out == 1:
                scale = ("output", 1 / (m_d**2 * m_rho), 1 / (m_d * m_rho), 1 / (m_d * m_rho))
            else:
                scale = ("hidden", 1 / (m_d * m_rho), 1 / (m_d * m_rho), 1 / m_rho)
            rows.append(ParameterScale(name, scale[0], m_d, m_rho, *scale[1:]))
        return ScaleTable(rows)

    def initialize(self, model: Any, initializer: Any = None, seed: int | None = None) -> None:
        """Draws the kernels of a model anew, masked or not. Embeddings, biases and frozen layers stay.

        Args:
            model: A built model.
            initializer: What kernels of the base are drawn by: with mode "fan_in", per unit or layer, or with a fixed
                variance (`RandomNormal`, say), which is that of the base. None: `SparseHeNormal(granularity="layer")`,
                whose variance is that of the paper with He's for the base.
            seed: Non-negative int, from which, and the kernel's name, that of each kernel is derived. When None, the
                initializer's own takes its place, or a new one is drawn.

        Raises:
            ValueError: As `table` does, or when the initializer's variance does not follow the fan-in. No kernel has
                been changed then.
        """
        if initializer is None:
            # That of `SparseHeNormal`; none of its own seed is drawn.
            initializer = SparseScaledInit.seeded_later(2.0, "fan_in", "truncated_normal", "layer")
        base_seed = compat.fresh_seed() if seed is None else check_seed(seed)
        variables = model.trainable_variables
        rows = {id(v): row for v, row in zip(variables, self.table(model).rows, strict=True)}
        places = {id(place.kernel): place for place in traversal.kernels_of(model)}
        in_base = dict(zip(map(id, variables), base_shapes(model, variables, places, self.base), strict=True))
        masks = {id(kernel.kernel): kernel.mask_value() for kernel in masked_kernels(model)}
        drawn = []
        for place in places.values():
            layout = layout_of(place)
            if id(place.kernel) not in rows or layout.one_hot:
                continue
            # Of an initializer with a fixed variance, that is the variance of the base.
            drawer = mask_aware(initializer, place.path, in_base[id(place.kernel)], layout)
            if isinstance(drawer, ApproximateIsometryInit):
                raise ValueError(f"`initializer` must scale by the fan-in alone. Received: {drawer!r}")
            if drawer.mode != "fan_in" or drawer.granularity not in ("unit", "layer"):
                raise ValueError(
                    "`initializer` must scale by the fan-in, per unit or layer. "
                    f"Received: mode={drawer.mode!r}, granularity={drawer.granularity!r}"
                )
            own_seed = drawer.given_seed if seed is None else None
            kernel_seed = derive_seed(base_seed if own_seed is None else own_seed, place.name)
            # Of ones where there is none: an initializer may have one of its own.
            mask = masks.get(id(place.kernel), np.ones(place.shape, bool))
            value = drawer.draw(place.shape, compat.true_dtype(place.kernel), mask, layout, kernel_seed)
            row = rows[id(place.kernel)]
            # The drawer knows of the fan-in and the density already, and not of what is an output.
            factor = 1.0 / math.sqrt(row.width) if row.role == "output" else 1.0
            drawn.append((place.kernel, (factor * value).astype(value.dtype)))
        for kernel, value in drawn:
            compat.assign(kernel, value)

    def optimizer(self, model: Any, optimizer: Any) -> Any:
        """An optimizer of the same kind and settings that scales the learning rate of each variable.

        Its learning rate is that of the base; what schedules and callbacks do to it scales too. Decoupled weight decay
        goes by the learning rate itself. Adam's epsilon should be far below the gradients, which shrink with the width.

        Args:
            model: The built model that it is to train, with its masks and with those layers frozen that will be.
            optimizer: An optimizer of the model's Keras that has made no step: SGD; Adam, AdamW, Adamax, Nadam, RMSprop
                or Lion. It stays as it is.

        Returns:
            The optimizer, to compile the model with. It saves with the model, and loads where this package is imported.
            One of a class of your own that extends Keras's loads where an optimizer has been made of one before.

        Raises:
            ValueError: When the optimizer is of another kind, or built, or as `table` does.
        """
        kind = kind_of(optimizer)
        library = compat.library_of(model)
        if kind is None or not isinstance(optimizer, library.optimizers.Optimizer):
            raise ValueError(
                f"`optimizer` must be one of {', '.join(PROPORTIONAL + ADAPTIVE)} of {library.__name__}. "
                f"Received: {optimizer!r}"
            )
        if getattr(optimizer, "built", getattr(optimizer, "_built", False)):
            raise ValueError(f"`optimizer` must not be built: what it remembers would be lost. Received: {optimizer!r}")
        rows = self.table(model).rows
        rates = [row.sgd_rate if kind in PROPORTIONAL else row.adam_rate for row in rows]
        return with_rates(optimizer, rates, [tuple(variable.shape) for variable in model.trainable_variables])


def _units(shape: tuple[int, ...], layout: fans.KernelLayout) -> int:
    return math.prod(shape[axis] for axis in layout.output_axes)


def _path(model: Any, variable: Any, places: dict[int, Any]) -> str:
    if id(variable) in places:
        return places[id(variable)].path
    path, _, _, attribute = traversal.owner_of(model, variable)
    return "/".join((*path, attribute))


def _check_kinds(model: Any, variables: Iterable[Any], places: dict[int, Any]) -> None:
    for _, _, layer in traversal.walk(model):
        if isinstance(layer, WeightNorm) or type(layer).__name__ == "SpectralNormalization":
            raise ValueError(
                f"`model` must have no layers that set the norm of a kernel themselves. Received: {layer.name!r}, a "
                f"{'WeightNorm' if isinstance(layer, WeightNorm) else 'SpectralNormalization'} layer"
            )
    for place in places.values():
        constraint = getattr(place.kernel, "constraint", None)
        if type(constraint).__name__ in _NORM_CONSTRAINTS:
            raise ValueError(
                f"`model` must have no constraints of a kernel's norm. Received: {type(constraint).__name__} of "
                f"{place.path!r}"
            )
    for variable in variables:
        name = _path(model, variable, places)
        if id(variable) not in places and len(variable.shape) > 1 and name.split("/")[-1] not in _VECTORS:
            raise ValueError(
                "`model` must have kernels and vectors of Keras's layers only: how other weights scale is not known. "
                f"Received: {name!r} of shape {tuple(variable.shape)}"
            )
