"""The signal-propagation experiment: how much of a random input reaches the output of sparse LeNet-5 networks.

Configuration by gin is elsewhere (gin_registry.py), tables, files and plots too (signal_report.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from keras_sparse_init import masks as mask_rules
from keras_sparse_init.arguments import check_choice, check_positive, check_seed, check_sparsity, is_integer
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.training.signal_probe import INPUT_SHAPE, SHAPES, SignalProbe
from keras_sparse_init.training.signal_report import Network, SignalResult
from keras_sparse_init.variance import GRANULARITIES, Granularity

Family = Literal["uniform", "heterogeneous"]
FAMILIES = get_args(Family)
_RULE_OF = {"uniform": mask_rules.Random, "heterogeneous": mask_rules.Heterogeneous}

_AT_ONCE = 30  # Networks in one call of the probe.


@dataclasses.dataclass(frozen=True)
class SignalGrid:
    """LeNet-5 at initialization on N(0, 1) inputs, for every family of masks, sparsity and way to scale the kernels.

    The networks take images of 28x28x3; they have 6 and 16 filters of 5x5 with 2x2 max pooling, and 120, 84 and 10
    units, relu after every layer, the last too. Biases are 0. All layers of a network are equally sparse. The kernels
    are those of `SparseScaledInit(scale, "fan_in", "untruncated_normal", granularity=init)`: the methods get the same
    masks and the same random numbers, and all networks the same inputs, so that only the scaling differs.

    Args:
        masks: Families of masks: "uniform" (`masks.Random`), "heterogeneous" (`masks.Heterogeneous`).
        sparsities: Sparsities in [0, 1).
        inits: What the kernels are scaled by: "dense" (the mask only zeroes), "unit", "layer", "effective".
        repeats: Networks of each kind.
        inputs: Images that each network gets.
        scale: The squared gain; 2 is He's for relu.
        seed: Determines inputs, masks and kernels.

    Raises:
        ValueError: When an argument is out of its range.
        TypeError: When the seed is no integer.

    Example:
        >>> from keras_sparse_init.training import SignalGrid
        >>> grid = SignalGrid(sparsities=[0.8], repeats=2, inputs=8)
        >>> result = grid.run()
        >>> len(result.networks)
        12

    Reference:
        Evci et al. 2020, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, arXiv:2010.03533.
    """

    masks: Sequence[Family] = FAMILIES
    sparsities: Sequence[float] = (0.8, 0.845, 0.89, 0.935, 0.98)
    inits: Sequence[Granularity] = ("dense", "unit", "layer")
    repeats: int = 30
    inputs: int = 256
    scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        sequences = {
            "masks": lambda value: check_choice("masks", value, FAMILIES),
            "sparsities": lambda value: check_sparsity(value, "sparsities"),
            "inits": lambda value: check_choice("inits", value, GRANULARITIES),
        }
        for name, check in sequences.items():
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or not len(values):
                raise ValueError(f"`{name}` must be a list of one or more. Received: {name}={values!r}")
            checked = tuple(check(value) for value in values)
            if len(set(checked)) < len(checked):
                raise ValueError(f"`{name}` must differ. Received: {name}={values!r}")
            object.__setattr__(self, name, checked)
        for name in ("repeats", "inputs"):
            if not is_integer(value := getattr(self, name)) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
            object.__setattr__(self, name, int(value))  # JSON does not hold those of NumPy.
        object.__setattr__(self, "scale", check_positive("scale", self.scale))
        object.__setattr__(self, "seed", check_seed(self.seed))

    def images(self) -> np.ndarray:
        """The inputs, a float32 array of shape (inputs, 28, 28, 3)."""
        rng = np.random.Generator(np.random.SFC64(derive_seed(self.seed, "inputs")))
        return rng.standard_normal((self.inputs, *INPUT_SHAPE), np.float32)

    def network_masks(self, mask: Family, sparsity: float, repeat: int) -> list[np.ndarray]:
        """The masks of the layers of a network, in order."""
        rule = _RULE_OF[check_choice("mask", mask, FAMILIES)](sparsity)
        seeds = self._seeds(mask, sparsity, repeat)
        return [rule(shape, derive_seed(s, "mask")) for shape, s in zip(SHAPES.values(), seeds, strict=True)]

    def kernels(self, mask: Family, sparsity: float, init: Granularity, repeat: int) -> list[np.ndarray]:
        """The kernels of the layers of a network, in order, as the initializer draws them."""
        return self._draw(init, self._seeds(mask, sparsity, repeat), self.network_masks(mask, sparsity, repeat))

    def run(self) -> SignalResult:
        """Measures all networks."""
        start = time.perf_counter()
        probe, networks = SignalProbe(self.images()), []
        cells = itertools.product(self.masks, self.sparsities, range(self.repeats))
        while part := list(itertools.islice(cells, -(-_AT_ONCE // len(self.inits)))):
            named, kernels = [], []
            for mask, sparsity, repeat in part:
                seeds, drawn = self._seeds(mask, sparsity, repeat), self.network_masks(mask, sparsity, repeat)
                named += [(mask, sparsity, init, repeat) for init in self.inits]
                kernels += [self._draw(init, seeds, drawn) for init in self.inits]
            stacked = [np.stack(layer) for layer in zip(*kernels, strict=True)]
            for name, *values in zip(named, *map(np.ndarray.tolist, probe(stacked)), strict=True):
                networks.append(Network(*name, *values))
        return SignalResult(dataclasses.asdict(self), networks, time.perf_counter() - start)

    def __str__(self) -> str:
        count = len(self.masks) * len(self.sparsities) * len(self.inits) * self.repeats
        return f"signal of {count} LeNet-5 networks at initialization, {self.inputs} inputs N(0, 1), seed {self.seed}"

    def _seeds(self, mask: str, sparsity: float, repeat: int) -> list[int]:
        return [derive_seed(self.seed, f"{mask}/{sparsity:g}/{repeat}/{layer}") for layer in SHAPES]

    def _draw(self, init: Granularity, seeds: Sequence[int], drawn: Sequence[np.ndarray]) -> list[np.ndarray]:
        from keras_sparse_init.initializers import SparseScaledInit

        initializer = SparseScaledInit.seeded_later(self.scale, "fan_in", "untruncated_normal", init)
        kernels, live = [], np.ones(INPUT_SHAPE[-1], bool)
        for mask, seed in zip(drawn, seeds, strict=True):
            # Where an image is flattened, its channels repeat from position to position.
            inputs = np.resize(live, mask.shape[-2])[:, None]
            kernels.append(initializer.draw(mask.shape, "float32", mask, None, seed, inputs))
            live = (mask & inputs).any(axis=tuple(range(mask.ndim - 1)))
        return kernels
