"""What mask updates must do on every backend of Keras 3 and in tf_keras. As a program: prints the failures as JSON."""

from __future__ import annotations

import json
import traceback

import keras
import numpy as np
from pruning_checks import Recorder, X, Y, assert_same, fit, kernels, mask_values, network

from keras_sparse_init import SET, Masked, MaskUpdate, RigL, RigLInverted, dense_gradients, masked_kernels, set_masks
from keras_sparse_init.compat import to_numpy
from keras_sparse_init.mask_updates.unmasked_gradients import DenseGradients
from keras_sparse_init.masks import Random
from keras_sparse_init.slots import slots_of


def sparse_network(library, optimizer="sgd", wrap=Masked, **compiled):
    """12 * 16 and 16 * 3 weights, a quarter of them active."""
    model = network(library, optimizer, wrap, **compiled)
    set_masks(model, Random(0.75), seed=5)
    return model


def assert_exchanged(new, old, weights, gradient, updater, step):
    """The mask is one that the algorithm may give, whatever it does with weights and gradients that are equal."""
    magnitudes = np.abs(weights)
    count = int(np.float32(old.sum()) * np.float32(updater.drop_fraction_at(step)))
    smallest = np.sort(magnitudes[old])[count - 1]
    kept = old & (magnitudes > smallest)
    assert count and new[kept].all() and new.sum() == old.sum()
    free = ~old | (magnitudes < smallest)
    score = np.abs(gradient) * (-1 if isinstance(updater, RigLInverted) else 1)
    if updater.needs_gradients:
        assert score[free & new].min(initial=np.inf) >= score[free & ~new].max() - 1e-6


def gradients_by_hand(weights, bias, x, y):
    """Of the mean squared error of the two layers (tanh, linear) for all their weights, in float64."""
    (w1, w2), (b1, b2) = [[np.asarray(a, np.float64) for a in part] for part in (weights, bias)]
    hidden = np.tanh(x @ w1 + b1)
    error = 2 * (hidden @ w2 + b2 - y) / y.size
    return [x.T @ (error @ w2.T * (1 - hidden**2)), hidden.T @ error]


def biases(model):
    return [to_numpy("bias", kernel.layer.bias) for kernel in masked_kernels(model)]


class WithBiases(Recorder):
    """Records the biases before each execution, too."""

    def __init__(self):
        super().__init__()
        self.biases = []

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        self.biases.append(biases(self.model))


def check_gradients_are_those_of_all_weights(library):
    model = sparse_network(library)
    before = [to_numpy("weight", weight).copy() for weight in model.weights]
    expected = gradients_by_hand(kernels(model), biases(model), X, Y)
    for loss in (None, library.losses.MeanSquaredError()):
        for ours, theirs in zip(dense_gradients(model, X, Y, loss), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert_same([to_numpy("weight", weight) for weight in model.weights], before)
    assert all(np.count_nonzero(gradient[~mask]) for gradient, mask in zip(expected, mask_values(model), strict=True))


def check_products_with_the_hessian_are_differences_of_gradients(library):
    """Also off the masks."""
    model = sparse_network(library)
    weights, bias = [kernel.astype(float) for kernel in kernels(model)], biases(model)
    vectors = [np.random.default_rng(i).normal(size=kernel.shape) for i, kernel in enumerate(weights)]
    ahead, behind = (
        gradients_by_hand([w + step * v for w, v in zip(weights, vectors, strict=True)], bias, X, Y)
        for step in (1e-5, -1e-5)
    )
    found = DenseGradients(model).hessian_products([vector.astype("float32") for vector in vectors], X, Y)
    for ours, plus, minus in zip(found, ahead, behind, strict=True):
        np.testing.assert_allclose(ours, (plus - minus) / 2e-5, rtol=1e-3, atol=1e-4)


def check_fit_updates_the_masks_at_the_steps_that_are_due(library, updater, wrap=Masked, **compiled):
    """Steps due are 3, 6, ..., 18 of 20."""
    model = sparse_network(library, library.optimizers.Adam(0.01), wrap, **compiled)
    before, after = WithBiases(), Recorder()
    fit(model, before, MaskUpdate(updater, X, Y, batch_size=80), after)
    updated = exchanged = 0
    for (done, weights, old), (_, changed, new), bias in zip(before.begun, after.begun, before.biases, strict=True):
        step = done + 1
        if not updater.is_due(step):
            assert_same(new, old)
            assert_same(changed, weights)
            continue
        updated += 1
        gradients = gradients_by_hand(weights, bias, X, Y)
        for i, (mask, fresh) in enumerate(zip(old, new, strict=True)):
            assert_exchanged(fresh, mask, weights[i], gradients[i], updater, step)
            np.testing.assert_array_equal(changed[i], np.where(mask & fresh, weights[i], 0))
        exchanged += any((mask != fresh).any() for mask, fresh in zip(old, new, strict=True))
    # RigL may drop what it has just grown and grow it again.
    assert updated == 6 and exchanged >= 3
    assert before.off_mask and not any(before.off_mask + after.off_mask)


def check_survivors_stay_and_slots_of_new_connections_are_reset(library, make):
    model = sparse_network(library, make(library))
    fit(model, epochs=1)
    optimizer, found = model.optimizer, masked_kernels(model)
    slots = [[slot for slot, _ in slots_of(optimizer, kernel.kernel)] for kernel in found]
    assert all(slots)
    # As if there were something off the masks, which Masked does not let happen.
    for slot in sum(slots, []):
        slot.assign(to_numpy("slot", slot) + 0.5)
    old, weights = mask_values(model), kernels(model)
    values = [[to_numpy("slot", slot).copy() for slot in part] for part in slots]
    gradients = [np.random.default_rng(i).normal(size=mask.shape) for i, mask in enumerate(old)]
    new_connections = RigL(end_step=100, frequency=1).update(model, 1, gradients)
    for i, (kernel, mask) in enumerate(zip(found, mask_values(model), strict=True)):
        grown, changed = mask & ~old[i], mask != old[i]
        assert new_connections[kernel.name] == grown.sum() > 0
        np.testing.assert_array_equal(kernels(model)[i], np.where(mask & old[i], weights[i], 0))
        for slot, value in zip(slots[i], values[i], strict=True):
            np.testing.assert_array_equal(to_numpy("slot", slot), np.where(changed, 0, value))


def check_random_growth_follows_from_seed_name_and_step(library):
    """In every process, on every backend: the number is a sum of positions."""

    def masks_of(seed, step):
        model = sparse_network(library)
        SET(end_step=100, seed=seed).update(model, step)
        return mask_values(model)

    first = masks_of(0, 1)
    assert_same(first, masks_of(0, 1))
    assert [int(np.flatnonzero(mask).sum()) for mask in first] == EXPECTED
    for other in (masks_of(1, 1), masks_of(0, 2)):
        assert all((a != b).any() for a, b in zip(first, other, strict=True))


EXPECTED = [4519, 230]

OPTIMIZERS = {
    "momentum": lambda library: library.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda library: library.optimizers.Adam(0.05, amsgrad=True),
    "rmsprop": lambda library: library.optimizers.RMSprop(0.05, momentum=0.9, centered=True),
}

UPDATERS = [kind(end_step=30, frequency=3, drop_fraction=0.4) for kind in (SET, RigL, RigLInverted)]


def cases(library, few=False):
    """Every check as (name, function without arguments), or a few of them, for processes that take long to begin."""
    for updater in UPDATERS[1:2] if few else UPDATERS:
        yield (
            f"check_fit-{type(updater).__name__}",
            lambda u=updater: check_fit_updates_the_masks_at_the_steps_that_are_due(library, u),
        )
    for name, make in list(OPTIMIZERS.items())[: 1 if few else None]:
        yield (
            f"check_survivors_stay_and_slots_are_reset-{name}",
            lambda make=make: check_survivors_stay_and_slots_of_new_connections_are_reset(library, make),
        )
    for check in (
        check_gradients_are_those_of_all_weights,
        check_products_with_the_hessian_are_differences_of_gradients,
        check_random_growth_follows_from_seed_name_and_step,
    ):
        yield check.__name__, lambda check=check: check(library)


def main() -> None:
    """The traceback of each check, or an empty string."""
    result = {"backend": keras.backend.backend()}
    for name, check in cases(keras, few=True):
        try:
            check()
            result[name] = ""
        except Exception:
            result[name] = traceback.format_exc()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
