"""Optimizers that give each variable a learning rate of its own, a multiple of theirs, for both Kerases."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from keras_sparse_init import compat

# By how a step depends on the size of a gradient: not at all, or in proportion.
ADAPTIVE = ("Adam", "AdamW", "Adamax", "Nadam", "RMSprop", "Lion")
PROPORTIONAL = ("SGD",)


def kind_of(optimizer: Any) -> str | None:
    """The name in `ADAPTIVE` or `PROPORTIONAL` of an optimizer of either Keras, or of the class that it extends."""
    classes = [c for c in type(optimizer).__mro__ if c.__module__.startswith(("keras.src.opt", "tf_keras.src.opt"))]
    name = classes[0].__name__ if classes else None
    return name if name in ADAPTIVE + PROPORTIONAL and ".legacy" not in classes[0].__module__ else None


def with_rates(optimizer: Any, multipliers: Sequence[float], shapes: Sequence[tuple[int, ...]]) -> Any:
    """A copy of an optimizer whose learning rate is multiplied by a number of its own for each variable.

    It is an optimizer of the same class and more, with the same settings: schedules, clipping, callbacks that change
    the learning rate, saving work as ever. Decoupled weight decay goes by the learning rate that is not multiplied.

    Args:
        optimizer: One whose kind is in `ADAPTIVE` or `PROPORTIONAL`, that has not made a step.
        multipliers: A positive float for each variable, in the order in which it is built with them: that of
            `model.trainable_variables`.
        shapes: The variables' shapes, by which it is told that they are these.

    Returns:
        The optimizer, not built.
    """
    with warnings.catch_warnings():
        # Keras warns of a learning rate that is a lambda, which is not taken from here.
        warnings.simplefilter("ignore")
        config = optimizer.get_config()
    schedule = optimizer._learning_rate
    if hasattr(schedule, "get_config") or callable(schedule):
        # As it is: the config of a user's own class may name what Keras cannot find, and that of a function too.
        config["learning_rate"] = schedule
    base = type(optimizer)
    if base.__module__.startswith("keras.src."):
        # On torch a subclass of it, which makes the steps of all variables at one rate.
        base = getattr(compat.keras.optimizers, kind_of(optimizer))
    scaled = _class_for(base).from_config(
        {**config, "rate_multipliers": list(multipliers), "rate_shapes": list(map(list, shapes))}
    )
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_names"):
        if hasattr(optimizer, name):
            setattr(scaled, name, getattr(optimizer, name))
    return scaled


class _WithRates:
    """What is added to an optimizer's class: the multipliers, and that they go with it when it is saved."""

    def __init__(
        self,
        *args: Any,
        rate_multipliers: Sequence[float] = (),
        rate_shapes: Sequence[Sequence[int]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rate_multipliers = tuple(float(number) for number in rate_multipliers)
        self.rate_shapes = tuple(tuple(int(size) for size in shape) for shape in rate_shapes)

    def build(self, variables: Any) -> None:
        """Makes the slots of the variables, each of which must have a multiplier."""
        variables = list(variables)
        shapes = tuple(tuple(variable.shape) for variable in variables)
        # Keras 3 builds the optimizer of an .h5 file with no variables at all.
        if shapes and shapes != self.rate_shapes:
            raise ValueError(
                f"This optimizer has learning rates for {len(self.rate_shapes)} variables of shapes "
                f"{list(self.rate_shapes)}, in this order. Received: {len(shapes)} of shapes {list(shapes)}. Make it "
                "anew (`SparseMuP.optimizer`) after layers were frozen or added"
            )
        super().build(variables)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON-serializable dict."""
        own = {"rate_multipliers": list(self.rate_multipliers), "rate_shapes": list(map(list, self.rate_shapes))}
        return {**super().get_config(), **own}


class _KerasRates(_WithRates):
    """The same for Keras 3, whose optimizers are given their learning rate in the step of a variable."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Makes the step of one variable."""
        multiplier = self.rate_multipliers[self._get_variable_index(variable)]
        # The rate itself where nothing is multiplied, so that a multiplier of 1 changes no bit.
        super().update_step(gradient, variable, learning_rate if multiplier == 1.0 else learning_rate * multiplier)


class _TFKerasRates(_WithRates):
    """The same for tf_keras, whose optimizers read their learning rate in the step of a variable."""

    _multiplier = 1.0

    def update_step(self, gradient: Any, variable: Any) -> None:
        """Makes the step of one variable."""
        with self._multiplied(self.rate_multipliers[self._index_dict[self._var_key(variable)]]):
            super().update_step(gradient, variable)

    @contextlib.contextmanager
    def _multiplied(self, multiplier: float) -> Iterator[None]:
        self._multiplier = multiplier
        try:
            yield
        finally:
            self._multiplier = 1.0

    @property
    def learning_rate(self) -> Any:
        """The learning rate; in the step of a variable, that of the variable."""
        rate = super().learning_rate
        return rate if self._multiplier == 1.0 else rate * self._multiplier

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        compat.tf_keras.optimizers.Optimizer.learning_rate.fset(self, value)


_MADE: dict[type, type] = {}


def _class_for(base: type) -> type:
    if issubclass(base, _WithRates):
        return base
    if base not in _MADE:
        added = _TFKerasRates if issubclass(base, compat.tf_keras.optimizers.Optimizer) else _KerasRates
        _MADE[base] = type(
            f"SparseMuP{base.__name__}", (added, base), {"__module__": __name__, "__doc__": added.__doc__}
        )
    return _MADE[base]


def _classes(library: Any) -> dict[str, type]:
    made = [_class_for(getattr(library.optimizers, name)) for name in ADAPTIVE + PROPORTIONAL]
    return {cls.__name__: compat.register_in(library, cls) for cls in made}


# By the names that models are saved with.
CLASSES = {"keras": _classes(compat.keras), "tf_keras": _classes(compat.tf_keras)}
