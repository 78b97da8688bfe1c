"""Initializers that do not know masks, turned into ones that do."""

from __future__ import annotations

import math
from typing import Any

from keras_sparse_init import compat, fans
from keras_sparse_init.initializers import SparseScaledInit
from keras_sparse_init.orthogonal_initializers import ApproximateIsometryInit, ExactOrthogonalInit, OrthogonalInit
from keras_sparse_init.sampling import TRUNCATED_STD


def mask_aware(initializer: Any, name: str, shape: tuple[int, ...], layout: fans.KernelLayout) -> SparseScaledInit:
    """The initializer itself when it takes masks, else a `SparseScaledInit` with the same settings.

    Args:
        initializer: An initializer of either Keras, its class or its name.
        name: The kernel's name, for messages.
        shape: The kernel's shape.
        layout: The kernel's layout.

    Returns:
        The initializer, or one with its scale, mode and distribution. Of an initializer with a fixed variance the
        variance is kept at density 1 and grows as the fan-in shrinks.

    Raises:
        ValueError: When the initializer is not random around 0: there is no variance to scale; or it makes masks of its
            own, which masks that are given would destroy.
    """
    if isinstance(initializer, type):
        initializer = _made(initializer)
    if isinstance(initializer, ExactOrthogonalInit):
        raise ValueError(
            f"ExactOrthogonalInit of {name!r} makes its own zeros, and takes no mask: give it to `sparsify`, or to a "
            "layer without a mask. For masks that are there, give `initializer` another one"
        )
    if isinstance(initializer, OrthogonalInit):
        raise ValueError(f"{type(initializer).__name__} of {name!r} is no longer orthogonal under a mask: give another")
    if isinstance(initializer, str):
        initializer = compat.tf_keras.initializers.get(initializer)
    if isinstance(initializer, SparseScaledInit):
        return initializer
    config = initializer.get_config() if hasattr(initializer, "get_config") else {}
    seed = config.get("seed") if isinstance(config.get("seed"), int) else None
    if all(hasattr(initializer, name) for name in ("scale", "mode", "distribution")):
        return SparseScaledInit.seeded_later(
            initializer.scale, initializer.mode, initializer.distribution, given_seed=seed
        )
    variance, distribution = _fixed_variance(initializer, config, shape)
    if variance is None:
        raise ValueError(
            f"The initializer of {name!r} has no variance that could be scaled for a mask; give `initializer`. "
            f"Received: {initializer!r}"
        )
    dense_fan_in, _ = fans.dense_fans(shape, layout)
    return SparseScaledInit.seeded_later(variance * max(1.0, dense_fan_in), "fan_in", distribution, given_seed=seed)


def _made(cls: type) -> Any:
    if issubclass(cls, SparseScaledInit):
        return cls.seeded_later()
    try:
        return cls()
    except TypeError as error:
        raise ValueError(
            f"`initializer` must be an initializer, or a class that makes one. Received: {cls!r}"
        ) from error


def unaware(initializer: SparseScaledInit | OrthogonalInit, library: Any) -> Any:
    """Keras's initializer with the settings of ours, which knows no masks."""
    if isinstance(initializer, OrthogonalInit | ApproximateIsometryInit):
        return library.initializers.Orthogonal(initializer.gain or 1.0, seed=initializer.given_seed)
    return library.initializers.VarianceScaling(
        initializer.scale, initializer.mode, initializer.distribution, seed=initializer.given_seed
    )


def _fixed_variance(initializer: Any, config: dict[str, Any], shape: tuple[int, ...]) -> tuple[float | None, str]:
    """Variance and distribution of an initializer that does not look at fans; None when it is not centred on 0."""
    kind = type(initializer).__name__
    if kind in ("RandomNormal", "TruncatedNormal") and config["mean"] == 0:
        if kind == "RandomNormal":
            return config["stddev"] ** 2, "untruncated_normal"
        return (config["stddev"] * TRUNCATED_STD) ** 2, "truncated_normal"
    if kind == "RandomUniform" and config["minval"] == -config["maxval"]:
        return config["maxval"] ** 2 / 3.0, "uniform"
    if kind in ("Orthogonal", "OrthogonalInitializer"):
        # An orthogonal m x n matrix has min(m, n) unit vectors, so that an entry has variance 1 / max(m, n).
        return config["gain"] ** 2 / max(math.prod(shape[:-1]), shape[-1]), "untruncated_normal"
    return None, ""
