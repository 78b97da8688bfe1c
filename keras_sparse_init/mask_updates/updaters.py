"""SET, RigL and RigLInverted: connections of a sparse model are dropped, and as many are grown elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.arguments import check_choice, check_positive, check_seed, is_integer
from keras_sparse_init.blocks import BLOCK_SIZE, map_blocks
from keras_sparse_init.initializers import SparseScaledInit
from keras_sparse_init.mask_updates.base_callback import require_masked
from keras_sparse_init.mask_updates.drop_grow import Exchange, Growth, drop_and_grow
from keras_sparse_init.masked_kernel import MaskedKernel, trainable_kernels
from keras_sparse_init.matching import mask_aware
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.slots import slots_of

DropSchedule = Literal["constant", "cosine", "learning_rate"]
GrowInit = Literal["zeros", "scaled"] | Callable[[MaskedKernel, np.ndarray, np.ndarray, int], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskUpdater:
    """Base of `SET`, `RigL` and `RigLInverted`: when how many connections of each kernel are exchanged, and how.

    A subclass says where connections are grown. Arguments are those of `RigL`.
    """

    growth: ClassVar[Growth]

    end_step: int
    drop_fraction: float = 0.3
    frequency: int = 100
    schedule: DropSchedule = "cosine"
    initial_learning_rate: float | None = None
    grow_init: GrowInit = "zeros"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("end_step", "frequency"):
            if not is_integer(value := getattr(self, name)):
                raise ValueError(f"`{name}` must be an int. Received: {name}={value!r}")
        check_choice("schedule", self.schedule, ("constant", "cosine", "learning_rate"))
        if self.end_step < 1 and (self.end_step != -1 or self.schedule == "cosine"):
            without_end = "" if self.schedule == "cosine" else ", or -1 for updates without end"
            raise ValueError(f"`end_step` must be positive{without_end}. Received: end_step={self.end_step}")
        if self.frequency < 1:
            raise ValueError(f"`frequency` must be positive. Received: frequency={self.frequency}")
        if 0 < self.end_step < self.frequency:
            raise ValueError(
                "`end_step` must be at least `frequency`: there would be no update at all. "
                f"Received: end_step={self.end_step}, frequency={self.frequency}"
            )
        if check_positive("drop_fraction", self.drop_fraction) > 1:
            raise ValueError(f"`drop_fraction` must be in (0, 1]. Received: drop_fraction={self.drop_fraction}")
        if self.initial_learning_rate is not None:
            check_positive("initial_learning_rate", self.initial_learning_rate)
            if self.schedule != "learning_rate":
                raise ValueError(
                    "`initial_learning_rate` is for `schedule='learning_rate'` only. "
                    f"Received: schedule={self.schedule!r}"
                )
        if not callable(self.grow_init):
            check_choice("grow_init", self.grow_init, ("zeros", "scaled"))
        check_seed(self.seed)

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` takes gradients."""
        return self.growth != "random"

    def is_due(self, step: int) -> bool:
        """Whether masks are updated at a step: frequency, 2 * frequency, ..., up to `end_step`."""
        return step > 0 and step % self.frequency == 0 and (step <= self.end_step or self.end_step < 0)

    def drop_fraction_at(self, step: int, optimizer: Any = None) -> float:
        """Which part of the connections of each kernel is dropped at a step.

        Args:
            step: The step, whether it is due or not.
            optimizer: The optimizer, whose learning rate `schedule="learning_rate"` goes by: the one that it has now.

        Raises:
            ValueError: When the fraction follows the learning rate and there is no initial one above 0 to compare with.
        """
        if self.schedule == "constant":
            return self.drop_fraction
        if self.schedule == "cosine":
            return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(step / self.end_step, 1)))
        initial = self.initial_learning_rate
        if initial is None and optimizer is not None:
            initial = compat.learning_rate(optimizer, 0)
        if not initial:
            raise ValueError(
                "`initial_learning_rate` must be given: the optimizer has no schedule of learning rates that begins "
                f"above 0. Received: initial_learning_rate={self.initial_learning_rate}"
            )
        return min(self.drop_fraction * compat.learning_rate(optimizer, None) / initial, 1.0)

    def update(
        self,
        model: Any,
        step: int,
        gradients: Sequence[Any] | Mapping[str, Any] | None = None,
        optimizer: Any = None,
    ) -> dict[str, int]:
        """Updates the masks of all trainable masked kernels of a model, whether the step is due or not.

        Args:
            model: A built model with masked kernels.
            step: The step, which decides on the drop fraction and, with the seed, on all that is random.
            gradients: For RigL and RigLInverted: the gradient for all weights of each kernel, as `dense_gradients`
                returns them, or by the names of the kernels.
            optimizer: The optimizer that trains the model; the one it is compiled with when None.

        Returns:
            How many connections of each kernel are new, by its name.

        Raises:
            ValueError: When the model has no masked kernel, or gradients are missing or do not fit. Nothing has been
                changed then.
        """
        kernels = trainable_kernels(model, require_masked(model))
        optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        fraction = self.drop_fraction_at(step, optimizer)
        pairs = _pair(kernels, gradients) if self.needs_gradients else [None] * len(kernels)
        # For small kernels, threads take longer than the work.
        in_turn = map_blocks if sum(math.prod(kernel.shape) for kernel in kernels) >= BLOCK_SIZE else map
        exchanges = list(in_turn(lambda kernel, g: self._exchange(kernel, g, fraction, step), kernels, pairs))
        values = [self._initial_values(k, exchange, step) for k, exchange in zip(kernels, exchanges, strict=True)]
        for kernel, exchange, value in zip(kernels, exchanges, values, strict=True):
            _assign(kernel, exchange, value, optimizer)
        return {kernel.name: exchange.grown.size for kernel, exchange in zip(kernels, exchanges, strict=True)}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor as a dict, JSON-serializable unless `grow_init` is a function."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The updater of a dict that `get_config` returned."""
        return cls(**config)

    def check(self, kernels: Iterable[MaskedKernel]) -> None:
        """Checks before the training that new connections of these kernels can be drawn.

        Raises:
            ValueError: When they are to be "scaled" and the initializer of a layer has no variance.
        """
        for kernel in kernels if self.grow_init == "scaled" else ():
            mask_aware(kernel.initializer, kernel.name, kernel.shape, kernel.layout)

    def _seed(self, kernel: MaskedKernel, step: int, use: str) -> int:
        return derive_seed(self.seed, f"{kernel.seed_name}/{step}/{use}")

    def _exchange(self, kernel: MaskedKernel, gradient: Any, fraction: float, step: int) -> Exchange:
        weights = compat.to_numpy("kernel", kernel.kernel)
        seed = self._seed(kernel, step, "mask")
        return drop_and_grow(weights, kernel.mask_value(), fraction, self.growth, gradient, seed)

    def _initial_values(self, kernel: MaskedKernel, exchange: Exchange, step: int) -> Any:
        """The values of new connections, in the order of `exchange.grown`."""
        if self.grow_init == "zeros" or not exchange.grown.size:
            return 0
        seed = self._seed(kernel, step, "init")
        if self.grow_init == "scaled":
            initializer = mask_aware(kernel.initializer, kernel.name, kernel.shape, kernel.layout)
            # Of an `ApproximateIsometryInit` the variance alone: the weights that stay are no part of a new isometry.
            values = SparseScaledInit.draw(
                initializer, kernel.shape, compat.true_dtype(kernel.kernel), exchange.mask, kernel.layout, seed
            )
        else:
            grown = np.zeros(exchange.mask.size, np.bool_)
            grown[exchange.grown] = True
            values = self.grow_init(kernel, exchange.mask, grown.reshape(kernel.shape), seed)
            values = compat.to_numpy("grow_init", values)
            if values.shape != kernel.shape:
                raise ValueError(
                    f"`grow_init` must return an array of the kernel's shape {kernel.shape}. Received: one of shape "
                    f"{values.shape} for {kernel.name!r}"
                )
        return values.reshape(-1)[exchange.grown]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SET(MaskUpdater):
    """Sparse evolutionary training: drops the smallest weights, grows as many connections at random.

    Arguments are those of `RigL`. No gradients are needed.

    Example:
        >>> import keras
        >>> from keras_sparse_init import SET, Masked
        >>> model = keras.Sequential([keras.layers.Input((20,)), Masked(keras.layers.Dense(9, name="d"), sparsity=0.8)])
        >>> SET(end_step=1000, drop_fraction=0.5, schedule="constant").update(model, step=100)["d/kernel"] > 0
        True

    Reference:
        Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity inspired
        by network science, arXiv:1707.04780.
    """

    growth: ClassVar[Growth] = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(MaskUpdater):
    """Drops the smallest weights of each kernel, grows as many connections where the loss has the largest gradient.

    At a step t that is due, of the n connections of a kernel

    - the k = floor(n * f(t)) with the smallest |w| are dropped;
    - of all that are then inactive, the k with the largest |gradient| are grown: a connection that was just dropped
      may be among them, and then stays as it was.

    Every kernel keeps exactly its n connections. Of equal weights or gradients random ones are taken. What an optimizer
    remembers of new and dropped connections (momenta, moments, averages) is forgotten; all other weights and slots stay
    bit for bit. Everything random follows from the seed, the kernel's name and the step: it is the same in every
    process. Kernels of frozen layers keep their masks.

    An updater is used in `fit` by the callback `MaskUpdate`, or in a training loop of one's own:

        for step, (x, y) in enumerate(batches, start=1):
            if updater.is_due(step):
                updater.update(model, step, dense_gradients(model, x, y, loss), optimizer)
            train_step(x, y)

    Args:
        end_step: No update after this step; -1 for updates without end, unless the schedule is "cosine". The authors
            take three quarters of the training.
        drop_fraction: Which part of a kernel's connections is dropped at first, in (0, 1].
        frequency: Steps between updates: they are due at frequency, 2 * frequency, ...
        schedule: How f(t) goes on from drop_fraction: "cosine": drop_fraction / 2 * (1 + cos(pi * t / end_step));
            "constant"; or "learning_rate": drop_fraction * (learning rate at t) / (initial learning rate).
        initial_learning_rate: For that: the rate to compare with. None: the one at step 0 of the optimizer's
            `LearningRateSchedule`; it must be given where the optimizer has none.
        grow_init: What new connections start as. "zeros"; "scaled": drawn by the layer's own initializer, for the fan
            of their units in the new mask, as `reinitialize` draws ("effective" counts all inputs here); or a function
            of (kernel, mask, grown, seed) that returns an array of the kernel's shape, of which the entries at `grown`
            are taken. `kernel` is a `MaskedKernel`, `mask` the new mask, `grown` the new connections (boolean arrays of
            that shape), `seed` an int. On the embedded digits, 99% sparse and more, "scaled" did worse than "zeros"
            (`benchmarks/sparse_training.py`).
        seed: Non-negative int.

    Raises:
        ValueError: When an argument is out of range.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, RigL, dense_gradients, sparsity_table
        >>> model = keras.Sequential([keras.layers.Input((20,)), Masked(keras.layers.Dense(10), sparsity=0.8)])
        >>> rigl = RigL(end_step=1000, frequency=50)
        >>> rigl.is_due(50), round(rigl.drop_fraction_at(500), 4)
        (True, 0.15)
        >>> gradients = dense_gradients(model, np.ones((8, 20)), np.ones((8, 10)), loss=keras.losses.MeanSquaredError())
        >>> replaced = rigl.update(model, 50, gradients)
        >>> sparsity_table(model).total.nonzeros
        40

    Reference:
        Evci et al. 2019, Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134, algorithm 1.
    """

    growth: ClassVar[Growth] = "largest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigLInverted(MaskUpdater):
    """`RigL` upside down, a control: grows connections where the loss has the smallest gradient.

    Arguments are those of `RigL`.

    Example:
        >>> from keras_sparse_init import RigLInverted
        >>> RigLInverted(end_step=1000).growth
        'smallest'

    Reference:
        Evci et al. 2020, Gradient flow in sparse neural networks and how lottery tickets win, arXiv:2010.03533.
    """

    growth: ClassVar[Growth] = "smallest"


def _pair(kernels: list[MaskedKernel], gradients: Any) -> list[np.ndarray]:
    names = [kernel.name for kernel in kernels]
    if gradients is None:
        raise ValueError("`gradients` must be given: those of `dense_gradients`. Received: gradients=None")
    if isinstance(gradients, Mapping):
        if set(gradients) != set(names):
            raise ValueError(f"`gradients` must be those of {names}. Received: {sorted(gradients)}")
        gradients = [gradients[name] for name in names]
    if len(gradients) != len(kernels):
        raise ValueError(f"`gradients` must be those of {names}. Received: {len(gradients)} arrays")
    arrays = [compat.to_numpy("gradients", gradient) for gradient in gradients]
    for kernel, array in zip(kernels, arrays, strict=True):
        if array.shape != kernel.shape:
            raise ValueError(
                f"`gradients` must have the shapes of the kernels. Received: {array.shape} for {kernel.name!r} of "
                f"shape {kernel.shape}"
            )
    return arrays


def _assign(kernel: MaskedKernel, exchange: Exchange, values: Any, optimizer: Any) -> None:
    """Stores what has changed; what an optimizer remembers of dropped and new connections is forgotten."""
    if not exchange.grown.size:
        return
    dropped, grown = exchange.dropped, exchange.grown
    changed = np.concatenate([dropped, grown])
    compat.assign_at(kernel.mask, changed, np.repeat([0, 1], [dropped.size, grown.size]))
    weights = np.zeros(changed.size, compat.numpy_dtype(compat.true_dtype(kernel.kernel)))
    weights[dropped.size :] = values
    compat.assign_at(kernel.kernel, changed, weights)
    for slot, initial in slots_of(optimizer, kernel.kernel):
        compat.assign_at(slot, changed, initial)
