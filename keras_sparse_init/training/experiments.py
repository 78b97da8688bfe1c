"""What an experiment does to a network before it is trained. A job takes any object with the methods of `Scratch`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import numpy as np

from keras_sparse_init.training import run_dir


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
    """Trains a sparse network from scratch: static masks, random or of another run, and an initialization for them.

    Attributes:
        sparsity: The share of zeros over all kernels, in [0, 1); None when the masks come from a run.
        method: How the zeros are spread over the layers, as in `masks.layer_sparsities`.
        initializer: What draws the kernels for their masks: an initializer or a class that makes one. None is
            `SparseScaledInit(scale=2.0)`, which suits networks of ReLUs.
        masks_from: The directory of a run of the same network, whose masks are taken. None draws random ones.
        shuffled: Whether the masks of that run are shuffled within each kernel, which keeps nothing of them but how
            sparse each layer is.

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

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.masks_from is None):
            raise ValueError(
                "Give either `sparsity` or `masks_from`, the other None. "
                f"Received: sparsity={self.sparsity}, masks_from={self.masks_from!r}"
            )
        if not isinstance(self.shuffled, bool) or (self.shuffled and self.masks_from is None):
            raise ValueError(f"`shuffled` must be a bool, True only with `masks_from`. Received: {self.shuffled!r}")

    def prepare(self, model: Any, seed: int) -> Any:
        """Masks the kernels of a model and draws them anew.

        Args:
            model: A tf_keras model.
            seed: The seed that those of the masks and kernels are derived from. Masks do not depend on the initializer.

        Returns:
            A model with static masks.

        Raises:
            ValueError: When the sparsity or the method is not a valid one, or the masks are of another network.
            FileNotFoundError: When there are no masks in the run's directory.
        """
        from keras_sparse_init.sparse_model import reinitialize, set_masks, sparsify

        if self.masks_from is None:
            return sparsify(model, self.sparsity, method=self.method, initializer=self._initializer(), seed=seed)
        masks = run_dir.read_masks(self.masks_from)
        if self.shuffled:
            masks = {
                name: np.random.default_rng([seed, *name.encode()]).permutation(mask.reshape(-1)).reshape(mask.shape)
                for name, mask in masks.items()
            }
        sparse = sparsify(model, 0.0, initializer=self._initializer(), seed=seed)
        set_masks(sparse, masks)
        reinitialize(sparse, self._initializer(), seed=seed)
        return sparse

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name, the method and the initialization."""
        initializer = self._initializer()
        return {
            "experiment": self.name,
            "method": self.method if self.masks_from is None else "shuffled" if self.shuffled else "taken",
            "init": getattr(initializer, "granularity", type(initializer).__name__),
        }

    def _initializer(self) -> Any:
        if self.initializer is None:
            from keras_sparse_init.initializers import SparseScaledInit

            return SparseScaledInit(scale=2.0)
        return self.initializer() if isinstance(self.initializer, type) else self.initializer
