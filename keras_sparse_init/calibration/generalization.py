"""How a model's answer to a change of its inputs depends on its weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.arguments import check_all_finite, check_positive, check_seed, is_integer
from keras_sparse_init.batches import batches
from keras_sparse_init.masked_kernel import masked_kernels
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.watching import left_as_it_is

_BATCH = 1024


def generalization_gap(model: Any, x: Any, relative_size: float = 0.01, perturbations: int = 8, seed: int = 0) -> float:
    """The mixed second difference of a model in its inputs x and its parameters P: 0 for f(x, P) = g(x) + h(P).

    L_gen = E || f(x', P') - f(x', P) - f(x, P') + f(x, P) ||

    x and x' are two samples: each x once, with a partner drawn anew for each P'. P' = P + relative_size rms(P_k) e,
    with standard normal e and the root mean square of each trainable variable P_k over its weights; weights off a mask
    stay 0. A step of training moves the outputs for x and x' by different vectors; L_gen is the mean length of the
    difference, were the step random. It grows in proportion to `relative_size` while that is small.

    Args:
        model: A built model of either Keras. It runs as at prediction and is left as it was, bit for bit.
        x: Samples: an array; or a list or dict of arrays for several inputs.
        relative_size: Positive float.
        perturbations: How many P'.
        seed: Non-negative int, for perturbations and partners.

    Returns:
        L_gen, a float; Euclidean norms over all outputs of a sample.

    Raises:
        TypeError: When `model` is no Keras model or layer.
        ValueError: When an argument is not one of those allowed, the model is not built or has no trainable variable,
            an output is not finite, or there are fewer than 2 samples.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import generalization_gap
        >>> dense = keras.layers.Dense(1, kernel_initializer="ones")
        >>> model = keras.Sequential([keras.layers.Input((1,)), dense])
        >>> x = np.array([[0.0], [1.0]])
        >>> gap = generalization_gap(model, x, relative_size=0.1, perturbations=100)
        >>> bool(abs(gap - 0.1 * np.sqrt(2 / np.pi)) < 0.03)  # 0.1 E|e|
        True
    """
    size = check_positive("relative_size", relative_size)
    if not is_integer(perturbations) or perturbations < 1:
        raise ValueError(f"`perturbations` must be a positive int. Received: perturbations={perturbations!r}")
    base = check_seed(seed)
    compat.library_of(model)
    compat.require_built(model, "weights")
    masks = {id(kernel.kernel): kernel.mask_value() for kernel in masked_kernels(model)}
    variables = list(model.trainable_variables)
    if not variables:
        raise ValueError(f"`model` must have trainable variables. Received: the model {model.name!r} without any")
    with left_as_it_is(model):
        values = [compat.to_numpy("weight", variable).astype(np.float64) for variable in variables]
        outputs = _outputs(model, x)
        if len(outputs) < 2:
            raise ValueError(f"`x` must have at least 2 samples. Received: {len(outputs)}")
        found = []
        for number in range(perturbations):
            for place, (variable, value) in enumerate(zip(variables, values, strict=True)):
                mask = masks.get(id(variable), np.ones(value.shape, bool))
                random = np.random.default_rng(derive_seed(base, f"{number}/{place}"))
                rms = np.sqrt((value[mask] ** 2).mean()) if mask.any() else 0.0
                compat.assign(variable, np.where(mask, value + size * rms * random.standard_normal(value.shape), 0.0))
            change = _outputs(model, x) - outputs
            # Each sample's partner is another one: the next in a random circle.
            order = np.random.default_rng(derive_seed(base, f"{number}/pairs")).permutation(len(change))
            found.append(np.linalg.norm(change[order] - change[np.roll(order, 1)], axis=1).mean())
    return float(np.mean(found))


def _outputs(model: Any, x: Any) -> np.ndarray:
    """What the model puts out, all outputs of a sample side by side, (samples, numbers)."""
    found = []
    for samples, inputs in batches(x, _BATCH):
        outputs = model(inputs, training=False)
        parts = outputs.values() if isinstance(outputs, dict) else outputs
        parts = parts if isinstance(outputs, dict | list | tuple) else [outputs]
        arrays = [compat.to_numpy("outputs", part).astype(np.float64) for part in parts]
        found.append(np.concatenate([array.reshape(samples, -1) for array in arrays], axis=1))
    check_all_finite(f"What the model {model.name!r} puts out for `x`", np.concatenate(found))
    return np.concatenate(found)
