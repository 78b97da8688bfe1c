"""Models of other kinds than images and perceptrons: initialized, masked, normalized and measured like any other."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import (
    Masked,
    SparseHeNormal,
    WeightNorm,
    WeightNormConstraint,
    apply_constraints,
    compat,
    fans,
    fold_weight_norm,
    masked_kernels,
    measure_signal,
    sparsify,
    strip,
)

LIBRARIES = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
KINDS = pytest.mark.parametrize("kind", ["conv3d", "lstm", "sampled softmax", "nce"])
_WORDS, _SAMPLED = 40, 8
_LOSSES = {"sampled softmax": tf.nn.sampled_softmax_loss, "nce": tf.nn.nce_loss}
_LAYOUTS = {
    "conv3d": ["conv", "dense"],
    "lstm": ["lstm", "lstm", "dense"],
    **dict.fromkeys(_LOSSES, ["embedding", "dense"]),
}
_RANDOM = np.random.default_rng(0)
_VOLUMES = _RANDOM.normal(size=(12, 4, 5, 5, 2)).astype(np.float32)
_SEQUENCES = _RANDOM.normal(size=(12, 6, 5)).astype(np.float32)
_CONTEXTS, _NEXT = _RANDOM.integers(0, _WORDS, (12, 6)), _RANDOM.integers(0, _WORDS, (12, 1))
_LABELS = _RANDOM.integers(0, 3, 12)


def _words(library, loss):
    """A layer of the user's own: logits of all words or, given the right ones, a loss over a sample of the others."""

    class Words(library.layers.Dense):
        def call(self, inputs, words=None):
            if words is None:
                return super().call(inputs)
            weights = tf.transpose(self.kernel)
            words = tf.cast(words, tf.int64)
            sampled = tf.random.log_uniform_candidate_sampler(words, 1, _SAMPLED, True, self.units, seed=1)
            return loss(weights, self.bias, words, inputs, _SAMPLED, self.units, sampled_values=sampled)

    return Words


def _same(layer):
    return layer


def _model(library, kind, wrap=_same, constraint=None):
    """(model, inputs, targets); the layers are wrapped, save the last one of a classifier."""
    layers, of_kernel = library.layers, {"kernel_constraint": constraint}
    if kind == "conv3d":
        he = SparseHeNormal()
        convolution = wrap(layers.Conv3D(6, 3, padding="same", kernel_initializer=he, **of_kernel, name="conv"))
        parts = [convolution, layers.BatchNormalization(), layers.ReLU(), layers.GlobalAveragePooling3D()]
        return _classifier(library, (4, 5, 5, 2), parts), _VOLUMES, _LABELS
    if kind == "lstm":
        lstm = wrap(layers.LSTM(8, **of_kernel, recurrent_constraint=constraint, name="lstm"))
        return _classifier(library, (6, 5), [lstm]), _SEQUENCES, _LABELS
    by_row = None if constraint is None else WeightNormConstraint(axis=1)
    contexts, following = layers.Input((6,), dtype="int32"), layers.Input((1,), dtype="int32")
    value = wrap(layers.Embedding(_WORDS, 8, embeddings_constraint=by_row, name="embedding"))(contexts)
    words = wrap(_words(library, _LOSSES[kind])(_WORDS, **of_kernel, name="words"))
    losses = words(layers.GlobalAveragePooling1D()(value), words=following)
    return library.Model([contexts, following], losses), [_CONTEXTS, _NEXT], np.zeros(12)


def _classifier(library, shape, parts):
    return library.Sequential([library.layers.Input(shape), *parts, library.layers.Dense(3, name="classes")])


def _is_loss(_, losses):
    return losses


def _train(library, kind, model, x, y):
    """A few steps, with which the loss falls."""
    loss = _is_loss if kind in _LOSSES else library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.Adam(0.01), loss, run_eagerly=True)
    losses = [float(model.train_on_batch(x, y)) for _ in range(5)]
    # The wrong words of a sampled loss are others in each step, and it with them.
    assert np.all(np.isfinite(losses)) and (kind in _LOSSES or losses[-1] < losses[0])


def _values(tensor):
    return compat.to_numpy("tensor", tensor)


def _assert_measured(kind, model, x, y):
    if kind in _LOSSES:  # The wrong words are others in each call, and the losses that the model puts out with them.
        report = measure_signal(model, x, y, _is_loss)
        embedding = next(layer for layer in model.layers if layer.name.endswith("embedding"))
        pooled = next(layer for layer in report.layers if "pooling" in layer.name)
        assert pooled.post.std == pytest.approx(_values(embedding(x[0])).mean(axis=1).std(), rel=1e-4)
        # Losses are single numbers, and above 0: they have no direction.
        assert not any("same direction" in fault for fault in report.diagnose())
    else:
        report = measure_signal(model, x)
        assert report.output_std == pytest.approx(_values(model(x)).std(), rel=1e-4)
    assert [kernel.shape for kernel in report.kernels] == [kernel.shape for kernel in masked_kernels(model)]
    assert all(kernel.gradient_std > 0 for kernel in report.kernels)
    # What a loop over time does inside is not seen, and said so.
    assert set(report.not_seen) <= {"lstm/lstm_cell"}


@LIBRARIES
def test_a_convolution_of_one_time_step_is_a_dense_layer(library):
    layers = library.layers
    he = SparseHeNormal(sparsity=0.5, seed=3)
    dense = layers.Dense(7, "relu", kernel_initializer=he)
    conv = layers.Conv1D(7, 1, activation="relu", kernel_initializer=he)
    x = _RANDOM.normal(size=(9, 5)).astype(np.float32)
    np.testing.assert_allclose(_values(conv(x[:, None]))[:, 0], _values(dense(x)), atol=1e-6)
    np.testing.assert_array_equal(_values(conv.kernel)[0], _values(dense.kernel))
    for wrap in (lambda layer: Masked(layer, sparsity=0.4, seed=1), WeightNorm):
        np.testing.assert_allclose(_values(wrap(conv)(x[:, None]))[:, 0], _values(wrap(dense)(x)), atol=1e-6)
    kernel = _RANDOM.normal(size=(5, 7)).astype(np.float32)
    normed = [WeightNormConstraint.for_layer(layer)(k) for layer, k in ((dense, kernel), (conv, kernel[None]))]
    np.testing.assert_allclose(_values(normed[1])[0], _values(normed[0]), rtol=1e-6)
    # Of a wider kernel one tap meets the time step, the others the padding.
    wide = layers.Conv1D(7, 3, padding="same", activation="relu")
    wide.build((None, 1, 5))
    compat.assign(dense.kernel, _values(wide.kernel)[1])
    np.testing.assert_allclose(_values(wide(x[:, None]))[:, 0], _values(dense(x)), atol=1e-6)


def _wrappers():
    for library in (keras, tf_keras):
        for kind in ("conv3d", "lstm", *_LOSSES):
            yield library, kind, "masked"
    # tfmot takes layers of tf_keras alone, and none of the user's own.
    yield from ((tf_keras, kind, "tfmot") for kind in ("conv3d", "lstm"))


@pytest.mark.parametrize(
    ("library", "kind", "wrapper"),
    [pytest.param(*case, id=f"{case[0].__name__} {case[1]} {case[2]}") for case in _wrappers()],
)
def test_a_masked_model_is_drawn_for_its_masks_trains_and_keeps_them(library, kind, wrapper):
    dense, x, y = _model(library, kind)
    model = sparsify(dense, 0.6, method="uniform", initializer=SparseHeNormal(), wrapper=wrapper, seed=0)
    kernels = masked_kernels(model)
    assert [kernel.layout.name for kernel in kernels] == _LAYOUTS[kind]
    before = [_values(kernel.kernel).copy() for kernel in kernels]
    for kernel, w in zip(kernels, before, strict=True):
        mask = kernel.mask_value()
        assert 0.3 < mask.mean() < 0.5 and np.all(w[~mask] == 0)
        fan_in = np.broadcast_to(np.maximum(fans.fans(mask, kernel.layout)[0], 1), mask.shape)
        # Squares of a truncated normal vary less than those of a normal, whose variance is 2: 5 standard errors.
        assert np.mean(w[mask] ** 2 * fan_in[mask]) / 2 == pytest.approx(1, abs=5 * np.sqrt(2 / mask.sum()))
    _assert_measured(kind, model, x, y)
    _train(library, kind, model, x, y)
    outputs = _values(model(x))  # tfmot masks its kernels as the model runs.
    for kernel, w0 in zip(kernels, before, strict=True):
        mask, w = kernel.mask_value(), _values(kernel.kernel)
        assert np.all(w[~mask] == 0) and not np.array_equal(w, w0)
    plain = strip(model)
    assert not masked_kernels(plain) and not getattr(plain, "compiled", False)
    if kind not in _LOSSES:
        np.testing.assert_allclose(_values(plain(x)), outputs, atol=1e-6)


@LIBRARIES
@KINDS
def test_weight_normalization_starts_with_the_same_weights_and_trains_with_masks_too(library, kind):
    normed, x, y = _model(library, kind, WeightNorm)
    wrapped = [layer for layer in normed.layers if isinstance(layer, WeightNorm)]
    for layer in wrapped:
        for w, v in zip(layer.effective_weights(), layer.get_prunable_weights(), strict=True):
            np.testing.assert_allclose(_values(w), _values(v), rtol=1e-6)
    sparse = sparsify(normed, 0.5, method="uniform", wrapper="masked", seed=0)
    _train(library, kind, sparse, x, y)
    masks = [kernel.mask_value() for kernel in masked_kernels(sparse)]
    for kernel, mask in zip(masked_kernels(sparse), masks, strict=True):
        assert not mask.all() and np.all(_values(kernel.kernel)[~mask] == 0)
    _assert_measured(kind, sparse, x, y)
    if kind not in _LOSSES:
        np.testing.assert_allclose(_values(fold_weight_norm(strip(sparse))(x)), _values(sparse(x)), atol=1e-5)


@LIBRARIES
@KINDS
def test_the_constraint_holds_for_each_unit_from_the_beginning_and_after_training(library, kind):
    model, x, y = _model(library, kind, constraint=WeightNormConstraint())

    def norms():
        found = {"conv": (0, 1, 2, 3), "lstm": (0,), "embedding": (1,), "words": (0,)}
        for layer in model.layers:
            for weight in layer.weights if layer.name in found else ():
                if len(weight.shape) > 1:
                    yield np.sqrt((_values(weight).astype(np.float64) ** 2).sum(axis=found[layer.name]))

    apply_constraints(model)
    for _ in range(2):
        assert len(list(norms())) == (1 if kind == "conv3d" else 2)
        for norm in norms():
            np.testing.assert_allclose(norm, 1, rtol=1e-5)
        _train(library, kind, model, x, y)
