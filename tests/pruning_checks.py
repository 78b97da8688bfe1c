"""What pruning must do on every backend of Keras 3 and in tf_keras. As a program: prints the failures as JSON."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
import warnings

import keras
import numpy as np
import tf_keras

from keras_sparse_init import Masked, masked_kernels, masks
from keras_sparse_init.compat import Callback, iterations, to_numpy
from keras_sparse_init.mask_updates.magnitude import global_magnitude_masks, magnitude_mask
from keras_sparse_init.mask_updates.pruning import ConstantSparsity, MagnitudePruning, PolynomialDecay

X = np.random.default_rng(0).normal(size=(80, 12)).astype("float32")
Y = np.random.default_rng(1).normal(size=(80, 3)).astype("float32")


def network(library, optimizer="sgd", wrap=Masked, loss="mse", seed=0, **compiled):
    """Two layers of 12 * 16 and 16 * 3 weights, the same values in every Keras; 10 steps an epoch."""
    dense = [library.layers.Dense(16, "tanh", name="hidden"), library.layers.Dense(3, name="output")]
    model = library.Sequential([library.layers.Input((12,)), *(wrap(layer) for layer in dense)])
    rng = np.random.default_rng(seed)
    for layer, shape in zip(dense, ((12, 16), (16, 3)), strict=True):
        layer.set_weights([rng.normal(size=shape).astype("float32"), np.zeros(shape[1], "float32")])
    if library is keras:
        compiled.setdefault("jit_compile", keras.backend.backend() == "jax")
        if keras.backend.backend() == "torch":
            compiled["steps_per_execution"] = 1  # Keras allows no other there.
    model.compile(optimizer, loss, **compiled)
    return model


def fit(model, *callbacks, epochs=2):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)).history


def kernels(model):
    return [to_numpy("kernel", kernel.kernel) for kernel in masked_kernels(model)]


def mask_values(model):
    return [kernel.mask_value() for kernel in masked_kernels(model)]


class Recorder(Callback):
    """The state before and after every execution: updates of the optimizer, kernels, masks."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended, self.off_mask = [], [], []

    def _state(self):
        model = self.model
        return iterations(model), kernels(model), mask_values(model)

    def on_train_batch_begin(self, batch, logs=None):
        self.begun.append(self._state())

    def on_train_batch_end(self, batch, logs=None):
        self.ended.append(self._state())
        self.off_mask += [float(np.abs(k[~m]).sum()) for k, m in zip(*self.ended[-1][1:], strict=True)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def check_masks_are_those_of_the_weights_before_each_step_that_is_due(library, scope, rule):
    """Steps due are 3, 6, ..., 18, and the step of a batch is 1 + the updates so far."""
    schedule = PolynomialDecay(0.1, 0.75, begin_step=3, end_step=18, frequency=3)
    before, after, model = Recorder(), Recorder(), network(library, "adam")
    history = fit(model, before, MagnitudePruning(schedule, scope, rule), after)
    updated = []
    for (done, weights, old), (_, pruned, new) in zip(before.begun, after.begun, strict=True):
        due, sparsity = schedule(done + 1)
        updated.append(due)
        if not due:
            assert_same(new, old)
            assert_same(pruned, weights)
            continue
        if scope == "global":
            expected = global_magnitude_masks(weights, sparsity)
        else:
            expected = [magnitude_mask(kernel, sparsity, rule) for kernel in weights]
        assert_same(new, [mask == 1 for mask in expected])
        assert_same(pruned, [np.where(mask, kernel, 0) for mask, kernel in zip(expected, weights, strict=True)])
    assert sum(updated) == 6 and len(updated) == 20
    assert before.off_mask and not any(before.off_mask + after.off_mask)
    zeros = sum(np.count_nonzero(kernel == 0) for kernel in kernels(model)) / (12 * 16 + 16 * 3)
    assert abs(zeros - 0.75) < 0.04, zeros
    np.testing.assert_allclose(history["sparsity"][-1], zeros)


def check_masks_change_what_the_model_computes_within_an_epoch(library):
    """The weights that are left learn on: a lost assignment would leave all of them in place."""
    recorder, model = Recorder(), network(library)
    fit(model, MagnitudePruning(ConstantSparsity(0.5, 5, 5)), recorder, epochs=1)
    assert [m[0].sum() for _, _, m in recorder.ended] == [192] * 4 + [96] * 6
    for index in range(5, 10):
        changed = recorder.ended[index][1][0] != recorder.ended[index - 1][1][0]
        mask = recorder.ended[index][2][0]
        # Units without outputs learn no more.
        assert not changed[~mask].any() and changed[mask].mean() > 0.7
    # The reference: the same training in two parts with the mask set by hand in between.
    reference = network(library)
    reference.fit(X[:32], Y[:32], batch_size=8, shuffle=False, verbose=0)
    for kernel in masked_kernels(reference):
        value = to_numpy("kernel", kernel.kernel)
        mask = magnitude_mask(value, 0.5)
        kernel.mask.assign(mask.astype("float32"))
        kernel.kernel.assign(value * mask)
    reference.fit(X[32:], Y[32:], batch_size=8, shuffle=False, verbose=0)
    for ours, theirs in zip(kernels(model), kernels(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def check_weights_stay_zero(library, make):
    """After every batch, also for a callback that comes before ours."""
    optimizer = make(library)
    before, after, model = Recorder(), Recorder(), network(library, optimizer)
    pruning = MagnitudePruning(PolynomialDecay(0.0, 0.8, begin_step=4, end_step=16, frequency=4))
    fit(model, before, pruning, after)
    assert not any(before.off_mask + after.off_mask)
    assert not pruning._moved
    zeros = [np.count_nonzero(kernel == 0) for kernel in kernels(model)]
    assert zeros == [154, 38], zeros
    assert all(np.isfinite(kernel).all() for kernel in kernels(model))


OPTIMIZERS = {
    "momentum": lambda library: library.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda library: library.optimizers.Adam(0.05, amsgrad=True),
    "adamw": lambda library: library.optimizers.AdamW(0.05, weight_decay=0.1),
    "average": lambda library: library.optimizers.AdamW(0.05, use_ema=True, ema_momentum=0.5),
}


def check_an_optimizer_that_mixes_weights_is_followed():
    """Muon's update of a weight depends on the gradients of others."""
    if not hasattr(keras.optimizers, "Muon"):
        return
    recorder, model = Recorder(), network(keras, keras.optimizers.Muon(0.05))
    pruning = MagnitudePruning(ConstantSparsity(0.5, 3, 3))
    fit(model, pruning, recorder)
    assert pruning._moved
    assert not any(recorder.off_mask)
    assert [np.count_nonzero(kernel == 0) for kernel in kernels(model)] == [96, 24]


def check_no_due_step_is_left_out_with_several_steps_per_execution(library, steps):
    """Those inside an execution follow it; the last one of the epoch is as good as any."""
    schedule = PolynomialDecay(0.0, 0.8, begin_step=2, end_step=20, frequency=3)
    recorder, model = Recorder(), network(library, "adam", steps_per_execution=steps)
    fit(model, MagnitudePruning(schedule), recorder)
    # An execution ends with the epoch.
    each = steps == 1 or (library is keras and keras.backend.backend() == "torch")
    assert [done for done, _, _ in recorder.ended] == (list(range(1, 21)) if each else [7, 10, 17, 20])
    for states, ahead in ((recorder.begun, 1), (recorder.ended, 0)):
        for done, _, found in states:
            due = [s for s in range(1, done + ahead + 1) if schedule(s)[0]]
            size = 12 * 16
            wanted = 1 - schedule(due[-1])[1] if due else 1
            assert found[0].sum() == max(round(size * wanted), 1), (done, ahead)
    assert not any(recorder.off_mask)
    assert mask_values(model)[0].sum() == 38


def check_checkpoints_are_sparse_before_and_after_the_callback(library):
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{place}-{{epoch}}.keras") for place in ("before", "after")]
        first, last = (library.callbacks.ModelCheckpoint(path) for path in paths)
        pruning = MagnitudePruning(PolynomialDecay(0.0, 0.8, begin_step=0, end_step=20, frequency=5))
        model = network(library, "adam", steps_per_execution=3)
        fit(model, first, pruning, last)
        for path in paths:
            for epoch, kept in ((1, 58), (2, 38)):
                loaded = library.models.load_model(path.format(epoch=epoch))
                for kernel, mask in zip(kernels(loaded), mask_values(loaded), strict=True):
                    np.testing.assert_array_equal(kernel != 0, mask)
                assert mask_values(loaded)[0].sum() == kept
        assert_same(kernels(loaded), kernels(model))


def check_a_run_is_continued_with_its_optimizer(library):
    schedule = PolynomialDecay(0.0, 0.9, begin_step=3, end_step=27, frequency=4)
    whole, first = network(library, "adam"), network(library, "adam")
    fit(whole, MagnitudePruning(schedule), epochs=3)
    fit(first, MagnitudePruning(schedule), epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        first.save(path)
        second = library.models.load_model(path)
    assert iterations(second) == 10
    recorder = Recorder()
    fit(second, MagnitudePruning(schedule), recorder, epochs=2)
    assert_same(mask_values(second), mask_values(whole))
    for ours, theirs in zip(kernels(second), kernels(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert mask_values(second)[0].sum() == 19
    # Nothing happens before the next step that is due, 11.
    assert recorder.begun[0][0] == 10 and recorder.begun[0][2][0].sum() < mask_values(first)[0].sum()


def check_updates_are_counted_not_batches():
    """Two batches an update, as Keras 3 accumulates gradients."""
    recorder = Recorder()
    model = network(keras, keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    fit(model, MagnitudePruning(ConstantSparsity(0.5, 4, 4)), recorder, epochs=1)
    assert [mask[0].sum() for _, _, mask in recorder.begun] == [192] * 6 + [96] * 4


def check_mixed_precision(library):
    library.mixed_precision.set_global_policy("mixed_float16") if library is tf_keras else (
        library.config.set_dtype_policy("mixed_float16")
    )
    try:
        model = network(library, library.optimizers.Adam(0.01))
        recorder, pruning = Recorder(), MagnitudePruning(PolynomialDecay(0.0, 0.8, 0, 10, frequency=2))
        fit(model, recorder, pruning)
    finally:
        library.mixed_precision.set_global_policy("float32") if library is tf_keras else (
            library.config.set_dtype_policy("float32")
        )
    assert "LossScale" in type(model.optimizer).__name__
    assert not any(recorder.off_mask) and not pruning._moved
    assert [np.count_nonzero(kernel == 0) for kernel in kernels(model)] == [154, 38]


PATTERNS = [("layer", None), ("global", None), ("layer", masks.NM(1, 4))]


def cases(library):
    """Every check as (name, function without arguments)."""
    for scope, rule in PATTERNS:
        yield (
            f"check_masks_are_those_of_the_weights-{scope}-{rule}",
            lambda s=scope, r=rule: check_masks_are_those_of_the_weights_before_each_step_that_is_due(library, s, r),
        )
    for name, make in OPTIMIZERS.items():
        yield f"check_weights_stay_zero-{name}", lambda make=make: check_weights_stay_zero(library, make)
    for steps in (1, 7):
        yield (
            f"check_no_due_step_is_left_out-{steps}",
            lambda n=steps: check_no_due_step_is_left_out_with_several_steps_per_execution(library, n),
        )
    for check in (
        check_masks_change_what_the_model_computes_within_an_epoch,
        check_checkpoints_are_sparse_before_and_after_the_callback,
        check_a_run_is_continued_with_its_optimizer,
        check_mixed_precision,
    ):
        yield check.__name__, lambda check=check: check(library)
    if library is keras:
        for check in (check_an_optimizer_that_mixes_weights_is_followed, check_updates_are_counted_not_batches):
            yield check.__name__, check


def main() -> None:
    """Every check's traceback, or an empty string."""
    warnings.simplefilter("error", UserWarning)
    result = {"backend": keras.backend.backend()}
    for name, check in cases(keras):
        try:
            check()
            result[name] = ""
        except Exception:
            result[name] = traceback.format_exc()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
