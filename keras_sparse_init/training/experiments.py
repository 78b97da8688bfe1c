"""What an experiment does to a network before it is trained. A job takes any object with the methods of `Scratch`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


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

    def prepare(self, model: Any, seed: int) -> Any:
        """The model itself; its kernels are what the network's own initializers drew."""
        return model

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name, no method, the network's own initialization."""
        return {"experiment": self.name, "method": "none", "init": "own"}


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Trains a sparse network from scratch: a static random mask and an initialization for it.

    Attributes:
        sparsity: The share of zeros over all kernels, in [0, 1).
        method: How the zeros are spread over the layers, as in `masks.layer_sparsities`.
        initializer: What draws the kernels for their masks: an initializer or a class that makes one. None is
            `SparseScaledInit(scale=2.0)`, which suits networks of ReLUs.

    Example:
        >>> from keras_sparse_init.training.experiments import Scratch
        >>> Scratch(sparsity=0.9, method="uniform").describe()["method"]
        'uniform'
    """

    name: ClassVar[str] = "scratch"

    sparsity: float
    method: str = "erk"
    initializer: Any = None

    def prepare(self, model: Any, seed: int) -> Any:
        """Masks the kernels of a model and draws them anew.

        Args:
            model: A tf_keras model.
            seed: The seed that those of the masks and kernels are derived from. Masks do not depend on the initializer.

        Returns:
            A model with static masks.

        Raises:
            ValueError: When the sparsity or the method is not a valid one.
        """
        from keras_sparse_init.sparse_model import sparsify

        return sparsify(model, self.sparsity, method=self.method, initializer=self._initializer(), seed=seed)

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name, the method and the initialization."""
        initializer = self._initializer()
        return {
            "experiment": self.name,
            "method": self.method,
            "init": getattr(initializer, "granularity", type(initializer).__name__),
        }

    def _initializer(self) -> Any:
        if self.initializer is None:
            from keras_sparse_init.initializers import SparseScaledInit

            return SparseScaledInit(scale=2.0)
        return self.initializer() if isinstance(self.initializer, type) else self.initializer
