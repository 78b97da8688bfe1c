"""What an experiment does to a network before and while it is trained.

A job takes any object with these methods:

- `prepare(model, *, seed, steps, data)` returns the model to train, made of a built one of either Keras;
- `callbacks(model, *, seed, steps, data, learning_rate)` returns the Keras callbacks that training it takes; what Keras
  tells them of as a batch may be several steps, of which the optimizer's `iterations` knows;
- `describe()` returns what the summary says: at least its name ("experiment"), how zeros are spread ("method"), and
  what the kernels start as ("init").
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice, check_sparsity, is_integer
from keras_sparse_init.schedules import PolynomialDecay
from keras_sparse_init.training import checkpoints, run_dir


@dataclasses.dataclass(frozen=True)
class Dense:
    """Trains the network as it is: the dense baseline, or with fewer units a dense network of a sparse one's size.

    Attributes:
        name: What the run's summary calls the experiment.

    Example:
        >>> from keras_sparse_init.training.experiments import Dense
        >>> Dense().describe()["experiment"]
        'dense'
    """

    name: str = "dense"

    def prepare(self, model: Any, *, seed: int, steps: int, data: Any) -> Any:
        """The model itself; its kernels are what the network's own initializers drew."""
        return model

    def callbacks(self, model: Any, *, seed: int, steps: int, data: Any, learning_rate: float) -> list[Any]:
        """None."""
        return []

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name, no method, the network's own initialization."""
        return {"experiment": self.name, "method": "none", "init": "own"}


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Trains a sparse network from scratch: static masks, random or of another run, and an initialization for them.

    Attributes:
        sparsity: The share of zeros over all kernels, in [0, 1); None when the masks come from a run.
        method: How the zeros are spread over the layers, as in `masks.layer_sparsities`.
        initializer: What draws the kernels for their masks: an initializer or a class that makes one. None is
            `SparseScaledInit(scale=2.0)`, which suits networks of ReLUs.
        masks_from: The directory of a run of the same network, whose masks are taken. None draws random ones.
        shuffled: Whether the masks of that run are shuffled within each kernel, which keeps nothing of them but how
            sparse each layer is.
        calibrate: "lsuv" or "metainit": what `calibrate_init` then does to the norms of the kernels, on 256 images of
            the training data. None does nothing.

    Raises:
        ValueError: When both or neither of `sparsity` and `masks_from` are given.

    Example:
        >>> from keras_sparse_init.training.experiments import Scratch
        >>> Scratch(sparsity=0.9, method="uniform").describe()["method"]
        'uniform'
    """

    name: ClassVar[str] = "scratch"

    sparsity: float | None = None
    method: str = "erk"
    initializer: Any = None
    masks_from: str | os.PathLike[str] | None = None
    shuffled: bool = False
    calibrate: Literal["lsuv", "metainit"] | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.masks_from is None):
            raise ValueError(
                "Give either `sparsity` or `masks_from`, the other None. "
                f"Received: sparsity={self.sparsity}, masks_from={self.masks_from!r}"
            )
        if not isinstance(self.masks_from, str | os.PathLike | None):
            raise ValueError(f"`masks_from` must be the directory of a run. Received: masks_from={self.masks_from!r}")
        if not isinstance(self.shuffled, bool) or (self.shuffled and self.masks_from is None):
            raise ValueError(f"`shuffled` must be a bool, True only with `masks_from`. Received: {self.shuffled!r}")
        if self.calibrate is not None:
            check_choice("calibrate", self.calibrate, ("lsuv", "metainit"))

    def prepare(self, model: Any, *, seed: int, steps: int, data: Any) -> Any:
        """Masks the kernels of a model, draws them anew and calibrates their norms.

        Args:
            model: A built model of either Keras.
            seed: The seed that those of the masks and kernels are derived from. Masks do not depend on the initializer.
            steps: The number of training steps, on which nothing depends here.
            data: The `Data`, which norms are calibrated on.

        Returns:
            A model with static masks: in tfmot's wrappers for tf_keras, in `Masked` for Keras 3.

        Raises:
            ValueError: When the sparsity or the method is not a valid one, or the masks are of another network.
            FileNotFoundError: When there are no masks in the run's directory.
        """
        sparse = self._masked_and_drawn(model, seed)
        if self.calibrate is not None:
            from keras_sparse_init import compat
            from keras_sparse_init.calibration.calibrate import calibrate_init

            more: dict[str, Any] = {}
            if self.calibrate == "metainit":
                loss = compat.library_of(sparse).losses.SparseCategoricalCrossentropy(from_logits=True)
                more = {"y": data.y_train, "loss": loss}
            calibrate_init(sparse, data.x_train, self.calibrate, n_samples=256, seed=seed, **more)
        return sparse

    def _masked_and_drawn(self, model: Any, seed: int) -> Any:
        from keras_sparse_init.sparse_model import reinitialize, sparsify
        from keras_sparse_init.wrapping import wrap_kernels

        if self.masks_from is None:
            return sparsify(model, self.sparsity, method=self.method, initializer=self._initializer(), seed=seed)
        masks = run_dir.read_masks(self.masks_from)
        if self.shuffled:
            masks = {
                name: np.random.default_rng([seed, *name.encode()]).permutation(mask.reshape(-1)).reshape(mask.shape)
                for name, mask in masks.items()
            }
        sparse = wrap_kernels(model)
        _take_masks(sparse, masks)
        reinitialize(sparse, self._initializer(), seed=seed)
        return sparse

    def callbacks(self, model: Any, *, seed: int, steps: int, data: Any, learning_rate: float) -> list[Any]:
        """None: the masks are static."""
        return []

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name, the method and the initialization."""
        initializer = self._initializer()
        config = initializer.get_config()
        return {
            "experiment": self.name,
            "method": self.method if self.masks_from is None else "shuffled" if self.shuffled else "taken",
            "init": "-".join(filter(None, (config.get("granularity", type(initializer).__name__), self.calibrate))),
            "initializer": {
                name: value
                for name, value in config.items()
                if name in ("scale", "mode", "distribution", "gain", "steps", "construction")
            },
        }

    def _initializer(self) -> Any:
        if self.initializer is None:
            from keras_sparse_init.initializers import SparseScaledInit

            return SparseScaledInit(scale=2.0)
        return self.initializer() if isinstance(self.initializer, type) else self.initializer


@dataclasses.dataclass(frozen=True)
class Prune:
    """Trains a dense network and prunes the smallest weights of each kernel while it trains, more and more of them.

    A tf_keras model is pruned by tfmot, a Keras 3 model by `MagnitudePruning` with the same schedule: masks are updated
    at the steps begin_step, begin_step + frequency, ... up to end_step, by `PolynomialDecay` from density 1 on.

    Attributes:
        sparsity: The fraction of zeros of each kernel at the end, in [0, 1).
        begin_step: The first step at which masks are updated. None: a quarter of all steps.
        end_step: The last one. None: three fifths of all steps, rounded down so that an update falls on it.
        frequency: Steps between two updates. None: a fortieth of the steps between them, rounded down.
        power: The exponent of the polynomial.

    Raises:
        ValueError: When the sparsity or the power is out of its range.

    Example:
        >>> from keras_sparse_init.training.experiments import Prune
        >>> Prune(sparsity=0.95).schedule(steps=2000)  # doctest: +NORMALIZE_WHITESPACE
        PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.95, begin_step=500, end_step=1197, power=3, frequency=17)

    Reference:
        Zhu and Gupta 2017, arXiv:1710.01878. The steps are those of Evci et al. 2020, arXiv:2010.03533, for LeNet-5,
        about: 3000 to 7000 of 11,719.
    """

    name: ClassVar[str] = "prune"

    sparsity: float
    begin_step: int | None = None
    end_step: int | None = None
    frequency: int | None = None
    power: float = 3

    def __post_init__(self) -> None:
        PolynomialDecay(0.0, check_sparsity(self.sparsity), begin_step=1, end_step=2, power=self.power)
        for name in ("begin_step", "end_step", "frequency"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value > 0):
                raise ValueError(f"`{name}` must be a positive integer or None. Received: {name}={value!r}")

    def schedule(self, steps: int) -> PolynomialDecay:
        """When the masks are updated, and to which sparsity.

        Args:
            steps: The number of training steps.

        Raises:
            ValueError: When the steps of the schedule are none of the training, or leave no time to prune.
        """
        begin = max(steps // 4, 1) if self.begin_step is None else self.begin_step
        end = steps * 3 // 5 if self.end_step is None else self.end_step
        if not 1 <= begin < end <= steps:
            raise ValueError(
                f"Pruning must begin at step 1 or later, and end after that within the {steps} steps of the training. "
                f"Received: begin_step={begin}, end_step={end}; without them it takes at least 4 steps"
            )
        frequency = max((end - begin) // 40, 1) if self.frequency is None else self.frequency
        if self.end_step is None:
            end -= (end - begin) % frequency
        elif (end - begin) % frequency:
            raise ValueError(
                "`frequency` must divide end_step - begin_step: the last update would not reach the sparsity. "
                f"Received: begin_step={begin}, end_step={end}, frequency={frequency}"
            )
        return PolynomialDecay(0.0, self.sparsity, begin, end, self.power, frequency)

    def prepare(self, model: Any, *, seed: int, steps: int, data: Any) -> Any:
        """A model with masks of ones, its weights as they were.

        Raises:
            ValueError: When the schedule does not fit the number of steps.
        """
        from keras_sparse_init import compat
        from keras_sparse_init.wrapping import wrap_kernels

        pruned = wrap_kernels(model, schedule=self.schedule(steps))
        if compat.library_of(model) is compat.tf_keras:
            from keras_sparse_init.tfmot import fix_precision

            fix_precision(pruned)  # Now: each evaluation would round the kernels, too.
        return pruned

    def callbacks(self, model: Any, *, seed: int, steps: int, data: Any, learning_rate: float) -> list[Any]:
        """The callback that prunes."""
        from keras_sparse_init import compat

        if compat.library_of(model) is compat.tf_keras:
            from keras_sparse_init.tfmot import UpdatePruningStep

            return [UpdatePruningStep()]
        from keras_sparse_init.mask_updates.pruning import MagnitudePruning

        return [MagnitudePruning(self.schedule(steps))]

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name and settings."""
        return {"experiment": self.name, "method": "uniform", "init": "own", "pruning": dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Lottery:
    """Trains the lottery ticket of a pruned network: its masks at the end, and its weights of the beginning.

    Attributes:
        pruned_run: The directory of a finished run of the same network with masks, such as `Prune` makes, in either
            Keras. Layers are told apart by their names and shapes: that they are otherwise the same is yours to see to.

    Raises:
        ValueError: When no directory is given.

    Example:
        >>> from keras_sparse_init.training.experiments import Lottery
        >>> Lottery(pruned_run="runs/pruned").describe()["init"]
        'beginning'

    Reference:
        Frankle and Carbin 2019, The lottery ticket hypothesis, arXiv:1803.03635.
    """

    name: ClassVar[str] = "lottery"

    pruned_run: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pruned_run, str | os.PathLike) or not os.fspath(self.pruned_run):
            raise ValueError(
                "`pruned_run` must be the directory of a finished run that pruned this network, such as one of "
                f"lenet5/prune.gin. Received: pruned_run={self.pruned_run!r}"
            )

    def prepare(self, model: Any, *, seed: int, steps: int, data: Any) -> Any:
        """The model with the masks of the run, and the weights of its beginning where they are 1.

        Raises:
            ValueError: When the run is of another network.
            FileNotFoundError: When the directory holds no finished run.
        """
        from keras_sparse_init import compat
        from keras_sparse_init.wrapping import wrap_kernels

        masks = run_dir.read_masks(self.pruned_run)
        sparse = wrap_kernels(model)
        beginning = checkpoints.weights(checkpoints.first(Path(self.pruned_run)), sparse)
        for variable, value in zip(checkpoints.plain_variables(sparse), beginning, strict=True):
            compat.assign(variable, value)
        _take_masks(sparse, masks)
        return sparse

    def callbacks(self, model: Any, *, seed: int, steps: int, data: Any, learning_rate: float) -> list[Any]:
        """None: the masks are static."""
        return []

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name, and the run that the ticket is of."""
        return {
            "experiment": self.name,
            "method": "taken",
            "init": "beginning",
            "pruned_run": os.fspath(self.pruned_run),
        }


def _take_masks(model: Any, masks: dict[str, np.ndarray]) -> None:
    """Sets the masks of a run, by the names that masks.npz has for them.

    Raises:
        ValueError: When they are those of another network.
    """
    from keras_sparse_init.sparse_model import masked_kernels, set_masks

    names = {kernel.seed_name: kernel.name for kernel in masked_kernels(model)}
    if names.keys() != masks.keys():
        raise ValueError(f"The masks are of another network: of {sorted(masks)}, where the model has {sorted(names)}")
    set_masks(model, {names[name]: mask for name, mask in masks.items()})
