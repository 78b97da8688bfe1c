"""When to prune, and how sparsely: tfmot's pruning schedules without TensorFlow.

Names, arguments and formulas are tfmot's. A schedule is a function of the step alone: `schedule(step)` returns
`(should_prune, sparsity)`. Steps count from 1: the first update of the optimizer is step 1.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Self

import numpy as np

from keras_sparse_init.densities import check_sparsity


@dataclasses.dataclass(frozen=True)
class PruningSchedule:
    """What the schedules have in common; a subclass has the fields `begin_step`, `end_step` and `frequency`.

    Call: `schedule(step)` returns `(should_prune, sparsity)`, a bool and a float. Masks are updated at the steps
    begin_step, begin_step + frequency, ..., up to end_step (-1: without end).
    """

    def __call__(self, step: int) -> tuple[bool, float]:
        """Whether to prune at a step, and to which sparsity."""
        step = int(step)
        running = step >= self.begin_step and (step <= self.end_step or self.end_step < 0)
        return running and (step - self.begin_step) % self.frequency == 0, self.sparsity_at(step)

    def sparsity_at(self, step: int) -> float:
        """The sparsity of a step, whether masks are updated in it or not."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor as a JSON-serializable dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The schedule of a dict that `get_config` returned."""
        return cls(**config)

    def _check_steps(self, endless: bool) -> None:
        for name in ("begin_step", "end_step", "frequency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"`{name}` must be an int. Received: {name}={value!r}")
            object.__setattr__(self, name, int(value))
        if self.begin_step < 0:
            raise ValueError(f"`begin_step` must not be negative. Received: begin_step={self.begin_step}")
        if self.frequency < 1:
            raise ValueError(f"`frequency` must be positive. Received: frequency={self.frequency}")
        if endless and self.end_step == -1:
            return
        if self.end_step < self.begin_step:
            raise ValueError(
                f"`end_step` must be at least `begin_step`{', or -1' if endless else ''}. "
                f"Received: begin_step={self.begin_step}, end_step={self.end_step}"
            )

    def _check_sparsity(self, name: str) -> None:
        object.__setattr__(self, name, check_sparsity(getattr(self, name), name))


@dataclasses.dataclass(frozen=True)
class ConstantSparsity(PruningSchedule):
    """The same sparsity at every update: tfmot's `ConstantSparsity`.

    Args:
        target_sparsity: Fraction of zeros, in [0, 1).
        begin_step: Step of the first update; there is no step 0 in training.
        end_step: No update after this step; -1 for updates without end.
        frequency: Steps between updates.

    Raises:
        ValueError: When an argument is out of range.

    Example:
        >>> from keras_sparse_init import ConstantSparsity
        >>> schedule = ConstantSparsity(0.5, begin_step=10, end_step=30, frequency=10)
        >>> [step for step in range(50) if schedule(step)[0]], schedule(10)[1]
        ([10, 20, 30], 0.5)
    """

    target_sparsity: float
    begin_step: int
    end_step: int = -1
    frequency: int = 100

    def __post_init__(self) -> None:
        self._check_sparsity("target_sparsity")
        self._check_steps(endless=True)

    def sparsity_at(self, step: int) -> float:
        """The target sparsity, rounded to float32."""
        return float(np.float32(self.target_sparsity))


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(PruningSchedule):
    """The density decays polynomially from the first to the last update: tfmot's `PolynomialDecay`.

    sparsity = final_sparsity + (initial_sparsity - final_sparsity) * (1 - p)^power,
    p = (step - begin_step) / (end_step - begin_step) clipped to [0, 1], in float32 as in tfmot.

    Args:
        initial_sparsity: Sparsity up to `begin_step`, in [0, 1).
        final_sparsity: Sparsity from `end_step` on, in [0, 1).
        begin_step: Step of the first update; there is no step 0 in training.
        end_step: No update after this step. The final sparsity is reached when `frequency` divides
            `end_step - begin_step`.
        power: A positive number. Zhu and Gupta take 3.
        frequency: Steps between updates.

    Raises:
        ValueError: When an argument is out of range.

    Example:
        >>> from keras_sparse_init import PolynomialDecay
        >>> schedule = PolynomialDecay(0.0, 0.875, begin_step=0, end_step=200)
        >>> [schedule(step) for step in (0, 50, 100, 200)]
        [(True, 0.0), (False, 0.505859375), (True, 0.765625), (True, 0.875)]

    Reference:
        Zhu and Gupta 2017, To prune, or not to prune: exploring the efficacy of pruning for model compression,
        arXiv:1710.01878.
    """

    initial_sparsity: float
    final_sparsity: float
    begin_step: int
    end_step: int
    power: float = 3
    frequency: int = 100

    def __post_init__(self) -> None:
        self._check_sparsity("initial_sparsity")
        self._check_sparsity("final_sparsity")
        self._check_steps(endless=False)
        power = self.power
        if isinstance(power, bool) or not isinstance(power, numbers.Real) or not 0 < power < np.inf:
            raise ValueError(f"`power` must be a positive number. Received: power={power!r}")

    def sparsity_at(self, step: int) -> float:
        """The formula's value."""
        one, final = np.float32(1), np.float32(self.final_sparsity)
        if step >= self.end_step:
            return float(final)
        p = np.float32(max(step - self.begin_step, 0)) / np.float32(max(self.end_step - self.begin_step, 1))
        # Exact powers, then rounded; TensorFlow's own differ between eager and graph execution in the last bit.
        left = np.float32(np.float64(one - p) ** self.power)
        return float(np.float32(self.initial_sparsity - self.final_sparsity) * left + final)
