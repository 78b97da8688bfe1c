"""Experiments whose masks follow from training: they change while a sparse network trains, or are found before it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from keras_sparse_init.arguments import check_choice, check_positive, check_sparsity, is_integer
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.training.experiments import Scratch

Updater = Literal["set", "rigl", "rigl_inverted"]


@dataclasses.dataclass(frozen=True)
class Dynamic(Scratch):
    """Trains a sparse network from scratch whose masks change meanwhile, each kernel as sparse as before.

    Attributes:
        updater: "set": new connections are random; "rigl": where the loss has the largest gradient; "rigl_inverted":
            the smallest. See `SET`, `RigL` and `RigLInverted`, whose arguments those below are.
        drop_fraction: Which part of the connections of a kernel is exchanged at first.
        frequency: Steps between two updates. None: a twentieth of all steps, rounded down, 1 at least.
        end_step: No update after this step. None: three quarters of all steps, as the authors have it.
        schedule: "cosine", "constant" or "learning_rate".
        grow_init: "zeros", "scaled" or a function.
        gradient_batch: How many training images the gradients of an update are taken on.

    All others are those of `Scratch`: the masks and kernels of the beginning.

    Raises:
        ValueError: As `Scratch`, and when an argument is none that the updater takes.

    Example:
        >>> from keras_sparse_init.training import Dynamic
        >>> Dynamic(sparsity=0.9, updater="set").describe()["experiment"]
        'set'

    Reference:
        Evci et al. 2019, arXiv:1911.11134. SET: Mocanu et al. 2018, arXiv:1707.04780.
    """

    updater: Updater = "rigl"
    drop_fraction: float = 0.3
    frequency: int | None = None
    end_step: int | None = None
    schedule: str = "cosine"
    grow_init: Any = "zeros"
    gradient_batch: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("updater", self.updater, get_args(Updater))
        if not is_integer(self.gradient_batch) or self.gradient_batch < 1:
            raise ValueError(f"`gradient_batch` must be a positive int. Received: {self.gradient_batch!r}")
        # What does not depend on the number of steps.
        self._make_updater(
            steps=max(2 * self.frequency, 4) if is_integer(self.frequency) else 4, seed=0, learning_rate=1.0
        )

    @property
    def name(self) -> str:
        """What the run's summary calls the experiment: the updater."""
        return self.updater

    def callbacks(self, model: Any, *, seed: int, steps: int, data: Any, learning_rate: float) -> list[Any]:
        """The callback that updates masks."""
        from keras_sparse_init.mask_updates.mask_update import MaskUpdate

        updater = self._make_updater(steps, derive_seed(seed, "mask updates"), learning_rate)
        if not updater.needs_gradients:
            return [MaskUpdate(updater)]
        return [MaskUpdate(updater, data.x_train, data.y_train, batch_size=self.gradient_batch)]

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: as of `Scratch`, and the settings of the updates."""
        names = ("drop_fraction", "frequency", "end_step", "schedule", "gradient_batch")
        updates = {name: getattr(self, name) for name in names}
        updates["grow_init"] = self.grow_init if isinstance(self.grow_init, str) else "a function"
        return {**super().describe(), "updates": updates}

    def _make_updater(self, steps: int, seed: int, learning_rate: float) -> Any:
        from keras_sparse_init.mask_updates.updaters import SET, RigL, RigLInverted

        cls = {"set": SET, "rigl": RigL, "rigl_inverted": RigLInverted}[self.updater]
        return cls(
            end_step=max(steps * 3 // 4, 1) if self.end_step is None else self.end_step,
            drop_fraction=self.drop_fraction,
            frequency=max(steps // 20, 1) if self.frequency is None else self.frequency,
            schedule=self.schedule,
            initial_learning_rate=learning_rate if self.schedule == "learning_rate" else None,
            grow_init=self.grow_init,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class AtInit:
    """Prunes a network once, before any training, by the scores of `prune_at_init`, and trains it with these masks.

    Attributes:
        sparsity: The fraction of zeros over all kernels, in [0, 1).
        method: "snip", "grasp", "magnitude" or "random".
        scope: "global" or "layer".
        rounds: In how many rounds "snip" and "grasp" prune.
        images: How many training images, drawn at random, their scores are taken on. None: ten for each class.
        keep_layers: Whether every kernel keeps at least one weight.
        temperature: What logits are divided by for the scores. None: 200 for "grasp", as its authors do (without that
            it may leave a network that hardly trains), 1 for "snip".
        initializer: What draws the kernels anew for their masks: an initializer or a class that makes one. None leaves
            those that the scores were taken of, as the authors do: of a dense network, whose scale is not that of the
            sparse one.

    Raises:
        ValueError: When the sparsity is out of its range, or `images` is no positive int.

    Example:
        >>> from keras_sparse_init.training import AtInit
        >>> AtInit(0.9, "grasp").describe()["experiment"]
        'grasp'

    Reference:
        SNIP: Lee et al. 2018, arXiv:1810.02340. GraSP: Wang et al. 2020, arXiv:2002.07376.
    """

    sparsity: float
    method: str = "snip"
    scope: str = "global"
    rounds: int = 1
    images: int | None = None
    keep_layers: bool = False
    temperature: float | None = None
    initializer: Any = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_choice("method", self.method, ("snip", "grasp", "magnitude", "random"))
        if self.images is not None and not (is_integer(self.images) and self.images > 0):
            raise ValueError(f"`images` must be a positive int or None. Received: images={self.images!r}")
        if self.temperature is not None:
            check_positive("temperature", self.temperature)

    @property
    def name(self) -> str:
        """What the run's summary calls the experiment: the method."""
        return self.method

    def prepare(self, model: Any, *, seed: int, steps: int, data: Any) -> Any:
        """The model with masks of the highest scores.

        Raises:
            ValueError: When an argument is none that `prune_at_init` takes.
        """
        from keras_sparse_init import compat
        from keras_sparse_init.mask_updates.one_shot import prune_at_init
        from keras_sparse_init.sparse_model import apply_masks, reinitialize
        from keras_sparse_init.wrapping import wrap_kernels

        sparse = wrap_kernels(model)
        loss = compat.library_of(model).losses.SparseCategoricalCrossentropy(from_logits=True)
        rng = np.random.default_rng(derive_seed(seed, "images of the scores"))
        images = 10 * data.classes if self.images is None else self.images
        chosen = np.sort(rng.permutation(len(data.x_train))[:images])
        prune_at_init(
            sparse,
            self.sparsity,
            self.method,
            data.x_train[chosen],
            data.y_train[chosen],
            lambda y, logits: loss(y, logits / self._temperature),
            scope=self.scope,
            rounds=self.rounds,
            keep_layers=self.keep_layers,
            seed=derive_seed(seed, "scores"),
        )
        if self.initializer is None:
            apply_masks(sparse)
        else:
            reinitialize(sparse, self._initializer(), seed=seed)
        return sparse

    def callbacks(self, model: Any, *, seed: int, steps: int, data: Any, learning_rate: float) -> list[Any]:
        """None: the masks are static."""
        return []

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of the experiment: its name and settings."""
        init = "own"
        if self.initializer is not None:
            init = getattr(self._initializer(), "granularity", type(self._initializer()).__name__)
        settings = {name: getattr(self, name) for name in ("scope", "rounds", "images", "keep_layers")}
        settings["temperature"] = self._temperature
        described = {"experiment": self.name, "method": self.scope, "init": init, "scores": settings}
        if self.initializer is not None:
            config = self._initializer().get_config().items()
            described["initializer"] = {k: v for k, v in config if k in ("scale", "mode", "distribution")}
        return described

    @property
    def _temperature(self) -> float:
        return (200.0 if self.method == "grasp" else 1.0) if self.temperature is None else float(self.temperature)

    def _initializer(self) -> Any:
        return self.initializer() if isinstance(self.initializer, type) else self.initializer
