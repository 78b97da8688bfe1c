"""Pruning at initialization: by magnitude, at random, by SNIP or GraSP, before any training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat
from keras_sparse_init.arguments import check_choice, check_seed, check_sparsity, is_integer
from keras_sparse_init.mask_updates.base_callback import require_masked
from keras_sparse_init.mask_updates.drop_grow import largest
from keras_sparse_init.mask_updates.magnitude import kept, magnitudes_of
from keras_sparse_init.mask_updates.unmasked_gradients import DenseGradients
from keras_sparse_init.masked_kernel import MaskedKernel, trainable_kernels
from keras_sparse_init.samples import Samples, leaves
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.sparse_model import set_masks

Method = Literal["magnitude", "random", "snip", "grasp"]
Scope = Literal["layer", "global"]


def prune_at_init(
    model: Any,
    sparsity: float,
    method: Method = "snip",
    x: Any = None,
    y: Any = None,
    loss: Callable[..., Any] | None = None,
    scope: Scope = "global",
    rounds: int = 1,
    keep_layers: bool = False,
    batch_size: int = 128,
    seed: int = 0,
) -> None:
    """Prunes the trainable masked kernels of a model once, by a score of each weight w; the highest scores stay.

    - "magnitude": |w|;
    - "random": a random number;
    - "snip": |w g|, g = dL/dw: by how much the loss L changes when w is removed, to first order;
    - "grasp": w (H g), H the Hessian of L, both in the active weights of all kernels pruned: -2 w (H g) is the change
      of the gradient flow |g|^2 when w is removed, to first order. Those stay without which it would fall most.

    Of equal scores random ones stay. Masks lose connections only: a weight that is pruned already stays so, and counts
    in the sparsity. What an optimizer remembers of pruned weights is forgotten.

    Args:
        model: A built model with masked kernels, as a rule with masks of ones: its layers in `Masked`, or
            `sparsify(model, 0.0)`.
        sparsity: Fraction of zeros, in [0, 1).
        method: The score.
        x: For "snip" and "grasp": inputs, an array or a list, tuple or dict of arrays, or a `tf.data.Dataset` that ends
            of batches `(x, y)` or `(x, y, sample_weight)`. The loss is the mean over all of them. The authors of SNIP
            take a batch of training data, those of GraSP ten samples of each class.
        y: Their targets; not with a dataset.
        loss: A function of (y, outputs) that returns the mean over a batch, as Keras's losses do. None: the loss the
            model is compiled with. The model runs as in training. For "grasp" divide the logits by a temperature, the
            authors' program by 200: `lambda y, outputs: cross_entropy(y, outputs / 200)`. Without it
            what is left may hardly train.
        scope: "global": all kernels together, by one threshold, as the authors do; "layer": every kernel has the
            sparsity. Both to the exact number.
        rounds: For "snip" and "grasp": in how many steps the weights are pruned, the density falling by the same factor
            in each. Scores are computed anew before each.
        keep_layers: For the scope "global": whether every kernel keeps at least the weight with its highest score,
            within the same number in all. Otherwise a kernel may be left with nothing, with a warning.
        batch_size: How many samples of arrays run at a time. Only batch normalization makes the result depend on it.
        seed: Non-negative int for all that is random.

    Raises:
        ValueError: When the model has no trainable masked kernel, an argument is not allowed or missing, or scores are
            not finite. Kernels and masks are as before then.

    Warns:
        UserWarning: When a kernel is left without connections.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, prune_at_init, sparsity_table
        >>> layers = keras.layers
        >>> model = keras.Sequential([layers.Input((20,)), Masked(layers.Dense(30, "relu")), Masked(layers.Dense(3))])
        >>> rng = np.random.default_rng(0)
        >>> x, y, loss = rng.normal(size=(64, 20)), rng.normal(size=(64, 3)), keras.losses.MeanSquaredError()
        >>> prune_at_init(model, 0.9, "snip", x, y, loss)
        >>> sparsity_table(model).total.nonzeros
        69

    Reference:
        SNIP: Lee et al. 2018, arXiv:1810.02340. GraSP: Wang et al. 2020, Picking Winning Tickets Before Training by
        Preserving Gradient Flow, arXiv:2002.07376. Several rounds: Verdenius et al. 2020, arXiv:2006.00896.
    """
    sparsity = check_sparsity(sparsity)
    check_choice("method", method, get_args(Method))
    check_choice("scope", scope, get_args(Scope))
    for name, value in (("rounds", rounds), ("batch_size", batch_size)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")
    if not isinstance(keep_layers, bool):
        raise ValueError(f"`keep_layers` must be a bool. Received: keep_layers={keep_layers!r}")
    check_seed(seed)
    kernels = trainable_kernels(model, require_masked(model))
    by_gradients = method in ("snip", "grasp")
    if by_gradients and x is None:
        raise ValueError(f"`x` must be given: method={method!r} needs gradients on data. Received: x=None")
    scores = _Scores(model, kernels, method, x, y, loss, batch_size, seed)
    rounds = rounds if by_gradients else 1
    before = [pair for k in kernels for variable in (k.kernel, k.mask) for pair in compat.kept_values(variable)]
    try:
        for part in range(1, rounds + 1):
            now = sparsity if part == rounds else 1 - (1 - sparsity) ** (part / rounds)
            rng = np.random.default_rng(derive_seed(seed, f"prune_at_init/{part}"))
            masks = [kernel.mask_value() for kernel in kernels]
            new = _keep_best(masks, scores(masks), now, scope, keep_layers, rng)
            set_masks(model, {kernel.name: mask for kernel, mask in zip(kernels, new, strict=True)})
    except Exception:
        for variable, value in before:
            compat.put_back(variable, value)
        raise
    if empty := [kernel.name for kernel, mask in zip(kernels, new, strict=True) if not mask.any()]:
        warnings.warn(
            f"Pruning leaves nothing of these kernels: {', '.join(empty)}. Prune less, with `scope='layer'`, or with "
            "`keep_layers=True`.",
            stacklevel=2,
        )


class _Scores:
    """A score for each weight of each kernel; the highest stay."""

    def __init__(
        self,
        model: Any,
        kernels: list[MaskedKernel],
        method: Method,
        x: Any,
        y: Any,
        loss: Any,
        batch_size: int,
        seed: int,
    ) -> None:
        self._kernels, self._method, self._x, self._seed = kernels, method, x, seed
        if method not in ("snip", "grasp"):
            return
        self._gradients = DenseGradients(model, loss)
        if not isinstance(x, tf.data.Dataset):
            self._x = Samples(model, x, y, None if y is None else model.compute_loss, batch_size)
        elif y is not None:
            raise ValueError("`y` must be None when `x` is a dataset, whose batches have targets. Received both")
        elif x.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("`x` must be a dataset that ends. Received: one that repeats forever; see `take`")

    def __call__(self, masks: list[np.ndarray]) -> list[np.ndarray]:
        if self._method == "random":
            return [
                np.random.default_rng(derive_seed(self._seed, kernel.seed_name)).random(kernel.shape)
                for kernel in self._kernels
            ]
        weights = [compat.to_numpy("kernel", kernel.kernel) for kernel in self._kernels]
        if self._method == "magnitude":
            return [magnitudes_of(array) for array in weights]
        gradient = self._mean(self._gradients)
        if self._method == "snip":
            scores = [np.abs(w.astype(np.float64) * g) for w, g in zip(weights, gradient, strict=True)]
        else:
            active = [np.where(m, g, 0).astype(w.dtype) for m, g, w in zip(masks, gradient, weights, strict=True)]
            products = self._mean(lambda *batch: self._gradients.hessian_products(active, *batch))
            scores = [w.astype(np.float64) * h for w, h in zip(weights, products, strict=True)]
        for kernel, score in zip(self._kernels, scores, strict=True):
            if not np.isfinite(score).all():
                raise ValueError(f"The scores of {kernel.name!r} are not finite: its weights or gradients are not")
        return scores

    def _mean(self, function: Callable[..., list[np.ndarray]]) -> list[np.ndarray]:
        """What a function of a batch gives, in the mean over all samples."""
        total, sums = 0, [np.zeros(kernel.shape) for kernel in self._kernels]
        for count, batch in self._batches():
            total += count
            for part, array in zip(sums, function(*batch), strict=True):
                part += count * array.astype(np.float64)
        if not total:
            raise ValueError("`x` must have samples. Received: an empty dataset")
        return [part / total for part in sums]

    def _batches(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        if isinstance(self._x, Samples):
            for x, y, count in self._x.batches():
                yield count, (x, y)
            return
        for batch in self._x:
            batch = batch if isinstance(batch, tuple) else (batch,)
            yield int(leaves(batch[0])[0].shape[0]), batch


def _keep_best(
    masks: list[np.ndarray],
    scores: list[np.ndarray],
    sparsity: float,
    scope: Scope,
    keep_layers: bool,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Masks of those active connections whose scores are the highest, to the exact number."""
    if scope == "layer":
        return [_best(m, s, kept(m.size, sparsity), rng) for m, s in zip(masks, scores, strict=True)]
    together = np.concatenate([mask.reshape(-1) for mask in masks])
    values = np.concatenate([score.reshape(-1).astype(np.float64) for score in scores])
    count = kept(together.size, sparsity)
    if keep_layers:
        starts = np.cumsum([0, *(mask.size for mask in masks[:-1])])
        for start, mask, score in zip(starts, masks, scores, strict=True):
            if mask.any():
                values[start + np.where(mask, score, -np.inf).argmax()] = np.inf
        count = max(count, len(masks))
    new = _best(together, values, count, rng)
    parts = np.split(new, np.cumsum([mask.size for mask in masks])[:-1])
    return [part.reshape(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def _best(mask: np.ndarray, scores: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    active = np.flatnonzero(mask)
    if count >= active.size:
        return mask
    new = np.zeros(mask.size, np.bool_)
    new[active[largest(scores.reshape(-1)[active], count, rng)]] = True
    return new.reshape(mask.shape)
