"""Kernels brought near an isometry under given masks: by their residual, and against plain gradient descent."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import (
    ApproximateIsometryInit,
    Masked,
    RigL,
    SparseScaledInit,
    approximate_isometry,
    compat,
    masked_kernels,
    masks,
    measure_signal,
    reinitialize,
    sparsify,
    strip,
)
from keras_sparse_init.fans import kernel_layout
from keras_sparse_init.isometry import matrices
from keras_sparse_init.signal.kernel_scale import expected_scales, scale_of

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def residual(matrix, gain=1.0):
    """|| M^T M - gain^2 I ||_F on the smaller side."""
    matrix = np.asarray(matrix, np.float64)
    small = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return np.linalg.norm(small - gain**2 * np.eye(len(small)))


def masked_orthogonal(shape, mask, seed=0):
    tall = np.linalg.qr(np.random.default_rng(seed).normal(size=(max(shape), min(shape))))[0]
    return (tall if shape[0] >= shape[1] else tall.T) * mask


@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (64, 64)])
@pytest.mark.parametrize("gain", [1.0, 1.7])
def test_the_residual_falls_step_by_step_and_the_mask_stays(shape, gain):
    mask = masks.random_mask(shape, 0.85, seed=1)
    start = gain * masked_orthogonal(shape, mask)
    before = start.copy()
    residuals = [residual(approximate_isometry(start, mask, n, gain), gain) for n in (0, 1, 3, 10, 30, 100)]
    assert np.isclose(residuals[0], residual(start, gain))
    assert all(np.diff(residuals) < 0)
    found = approximate_isometry(start, mask, gain=gain)
    assert np.array_equal(found != 0, mask != 0) and found.dtype == np.float64
    np.testing.assert_array_equal(start, before)


def test_it_ends_where_gradient_descent_ends():
    shape, steps = (60, 40), 3000
    mask = masks.random_mask(shape, 0.9, seed=2)
    # The first unit has no weights: its part of the residual, 1, stays.
    mask[:, 0] = 0
    start = slow = masked_orthogonal(shape, mask)
    for _ in range(steps):
        slow = slow - 0.1 * 4 * slow @ (slow.T @ slow - np.eye(40)) * mask
    found = approximate_isometry(start, mask)
    assert residual(start) > 3 and residual(slow) >= 1
    assert abs(residual(found) - residual(slow)) < 0.01
    assert not found[:, 0].any()


def test_it_ends_early(monkeypatch):
    import scipy.optimize

    minimize, results = scipy.optimize.minimize, []
    monkeypatch.setattr(scipy.optimize, "minimize", lambda *a, **k: results.append(minimize(*a, **k)) or results[-1])
    mask = masks.random_mask((60, 40), 0.9, seed=2)
    start = masked_orthogonal((60, 40), mask)
    many = approximate_isometry(start, mask, 100_000)
    assert results[0].nit < 300
    np.testing.assert_array_equal(many, approximate_isometry(start, mask, 300))


def test_each_group_channel_and_gate_is_a_matrix_of_its_own():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4, 6))
    parts = {
        "conv": [kernel.reshape(36, 6)],
        "conv_transpose": [kernel.swapaxes(2, 3).reshape(54, 4)],
        "depthwise": [kernel[:, :, channel].reshape(9, 6) for channel in range(4)],
        kernel_layout("conv", kernel.shape, groups=2): [kernel[..., :3].reshape(36, 3), kernel[..., 3:].reshape(36, 3)],
    }
    for layout, expected in parts.items():
        np.testing.assert_array_equal(matrices(kernel, layout), np.stack(expected))
    gates = rng.normal(size=(5, 12))
    np.testing.assert_array_equal(matrices(gates, "lstm"), [gates[:, 3 * i : 3 * i + 3] for i in range(4)])
    wide = rng.normal(size=(5, 28))
    np.testing.assert_array_equal(matrices(wide, "lstm"), [wide[:, 7 * i : 7 * i + 7].T for i in range(4)])
    heads = rng.normal(size=(6, 2, 4))
    np.testing.assert_array_equal(matrices(heads, "abc,cde->abde"), [heads.reshape(6, 8).T])


LAYERS = {
    "groups": (lambda: keras.layers.Conv2D(8, 3, groups=2), (None, 6, 6, 4)),
    "depthwise": (lambda: keras.layers.DepthwiseConv2D(5, depth_multiplier=2), (None, 6, 6, 4)),
    "transposed": (lambda: keras.layers.Conv2DTranspose(8, 3), (None, 6, 6, 4)),
    "lstm": (lambda: keras.layers.LSTM(9), (None, 3, 14)),
    "einsum": (lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 4, 5)), (None, 3, 30)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layout_ends_below_the_masked_orthogonal(name):
    make, shape = LAYERS[name]
    layer = make()
    layer.build(shape)
    kernel = (getattr(layer, "cell", layer)).kernel
    layout = kernel_layout(layer, kernel.shape)
    mask = masks.random_mask(kernel.shape, 0.5, seed=0)

    def residuals(steps):
        drawn = ApproximateIsometryInit(steps=steps).draw(kernel.shape, "float32", mask, layout, seed=3)
        assert np.array_equal(drawn != 0, mask != 0)
        return np.array([residual(matrix) for matrix in matrices(drawn, layout)])

    assert (residuals(100) < 0.5 * residuals(0)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept(dtype):
    mask = masks.random_mask((40, 20), 0.8, seed=1)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    found = approximate_isometry(masked_orthogonal((40, 20), mask).astype(dtype), mask)
    assert found.dtype == dtype
    # Entries below 1 are rounded to eps / 2: a product of columns by at most eps times the sum of |products|.
    assert residual(found) < 0.02 + 20 * float(ml_dtypes.finfo(dtype).eps)


def test_the_mask_may_be_what_is_not_zero_and_a_kernel_empty():
    mask = masks.random_mask((40, 20), 0.8, seed=1)
    start = masked_orthogonal((40, 20), mask)
    np.testing.assert_array_equal(approximate_isometry(start), approximate_isometry(start, mask))
    assert not approximate_isometry(start, np.zeros_like(mask)).any()
    assert approximate_isometry([[3]]).tolist() == [[pytest.approx(1.0, abs=1e-3)]]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e6, 1e100])
def test_kernels_of_any_size_end_alike(scale):
    mask = masks.random_mask((40, 20), 0.8, seed=1)
    start = masked_orthogonal((40, 20), mask)
    expected = approximate_isometry(start, mask)
    np.testing.assert_allclose(approximate_isometry(scale * start, mask), expected, rtol=0, atol=1e-2)


def test_each_matrix_is_scaled_by_itself():
    layout = kernel_layout("conv", (3, 3, 4, 12), groups=2)
    mask = masks.random_mask((3, 3, 4, 12), 0.7, seed=1)
    start = np.random.default_rng(0).normal(size=mask.shape) * mask
    uneven = start * np.repeat([1e-3, 1e3], 6)
    # After one step, before the descent has made up for a start of the wrong size.
    found, expected = (approximate_isometry(k, mask, 1, kernel_layout=layout) for k in (uneven, start))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_a_unit_that_is_0_on_its_mask_is_refused():
    mask = masks.random_mask((40, 20), 0.8, seed=1)
    start = masked_orthogonal((40, 20), mask)
    start[:, 3] = 0
    with pytest.raises(ValueError, match="`kernel` must not be 0 in all places that the mask leaves a unit.*1 such"):
        approximate_isometry(start, mask)
    assert not approximate_isometry(start, mask * (start != 0))[:, 3].any()


@pytest.mark.parametrize("shape", [(30, 60), (60, 30)])
def test_their_scale_is_known_to_the_diagnosis(shape):
    layers = keras.layers
    dense = layers.Dense(shape[1], kernel_initializer=ApproximateIsometryInit(1.4, seed=0), name="d")
    model = keras.Sequential([layers.Input(shape[:1]), Masked(dense, sparsity=0.8, seed=0)])
    x = np.random.default_rng(0).normal(size=(64, shape[0])).astype("float32")
    assert measure_signal(model, x).diagnose() == []
    kernel = masked_kernels(model)[0]
    expected, ignored = expected_scales(kernel, kernel.mask_value())
    found = scale_of(compat.to_numpy("k", kernel.kernel), kernel.mask_value(), kernel.layout)
    assert found == pytest.approx(expected, rel=0.01)
    masked = ApproximateIsometryInit(1.4, steps=0).draw(shape, "float32", kernel.mask_value(), kernel.layout, 0)
    assert scale_of(masked, kernel.mask_value(), kernel.layout) == pytest.approx(ignored, rel=0.1)


def test_long_runs_tell_how_far_they_are(capsys, monkeypatch):
    monkeypatch.setattr("keras_sparse_init.isometry._SECONDS_BETWEEN_LINES", 0.0)
    mask = masks.random_mask((40, 20), 0.8, seed=1)
    start = masked_orthogonal((40, 20), mask)
    approximate_isometry(start, mask, 7)
    assert capsys.readouterr().out == ""
    end = residual(approximate_isometry(start, mask, 7, verbose=1))
    assert capsys.readouterr().out.splitlines()[-1] == f"isometry: step 7 of at most 7, residual {end:.4g}"


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"kernel": np.ones((3, 2)), "steps": -1}, "`steps`.*-1"),
        ({"kernel": np.ones((3, 2)), "steps": 1.5}, "`steps`.*1.5"),
        ({"kernel": np.ones((3, 2)), "gain": 0}, "`gain`"),
        ({"kernel": np.ones((3, 2)), "verbose": 3}, "`verbose`.*3"),
        ({"kernel": np.ones((3, 2)), "mask": np.ones((2, 3))}, r"\(3, 2\)"),
        ({"kernel": np.full((3, 2), np.nan)}, "`kernel`.*finite"),
        ({"kernel": np.ones((3, 2)) * 1j}, "`kernel`.*complex"),
        ({"kernel": np.zeros((3, 2)), "mask": np.ones((3, 2))}, "`kernel` must not be 0 in all.*Received: 2"),
        ({"kernel": np.ones((3, 2)), "kernel_layout": "embedding"}, "`kernel`.*embedding"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        approximate_isometry(**arguments)


def test_the_initializer_names_bad_arguments():
    for arguments, named in (({"gain": -1.0}, "`gain`"), ({"steps": True}, "`steps`"), ({"sparsity": 1.0}, "sparsity")):
        with pytest.raises(ValueError, match=named):
            ApproximateIsometryInit(**arguments)


def test_half_precision_loses_no_weight_to_rounding():
    mask = masks.random_mask((30, 20), 0.8, seed=0)
    for seed in range(100):  # 12,000 weights; unmended, about one in 3,400 is below what float16 can hold.
        drawn = ApproximateIsometryInit().draw((30, 20), "float16", mask, None, seed)
        np.testing.assert_array_equal(drawn != 0, mask != 0)


def test_a_seed_is_a_kernel_and_without_a_mask_it_is_orthogonal():
    init = ApproximateIsometryInit(1.5, sparsity=0.8, seed=4)
    first, again = (np.array(init((50, 30))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, np.array(ApproximateIsometryInit(1.5, sparsity=0.8, seed=5)((50, 30))))
    mask = masks.random_mask((50, 30), 0.8, seed=0)
    drawn = [ApproximateIsometryInit(mask=mask, seed=seed)((50, 30)) for seed in (4, 5)]
    assert not np.array_equal(*map(np.array, drawn))
    copy = ApproximateIsometryInit.from_config(init.get_config())
    np.testing.assert_array_equal(first, np.array(copy((50, 30))))
    assert residual(np.array(ApproximateIsometryInit(1.5, seed=0)((30, 50))), 1.5) < 1e-5
    assert (first == 0).sum() == 1200 and residual(first, 1.5) < 0.1


def small(library):
    layers = library.layers
    stack = [layers.Input((8, 8, 2)), layers.Conv2D(6, 3), layers.Flatten(), layers.Dense(40), layers.Dense(7)]
    return library.Sequential(stack)


@BOTH
def test_models_are_brought_near_an_isometry_for_the_masks_they_have(library, tmp_path):
    model = sparsify(small(library), 0.8, "uniform", initializer=ApproximateIsometryInit(), seed=0)
    kept = [kernel.mask_value() for kernel in masked_kernels(model)]

    def residuals():
        return np.array(
            [residual(matrices(compat.to_numpy("k", k.kernel), k.layout)[0]) for k in masked_kernels(model)]
        )

    assert residuals().max() < 0.1
    reinitialize(model, SparseScaledInit(), seed=0)
    assert residuals().min() > 0.5
    reinitialize(model, ApproximateIsometryInit(steps=0), seed=1)
    masked = residuals()
    assert masked.min() > 0.5
    reinitialize(model, ApproximateIsometryInit(), seed=1)
    assert residuals().max() < 0.1
    for kernel, mask in zip(masked_kernels(model), kept, strict=True):
        np.testing.assert_array_equal(kernel.mask_value(), mask)
        np.testing.assert_array_equal(compat.to_numpy("k", kernel.kernel) != 0, mask)


@BOTH
def test_layers_with_it_are_saved_cloned_grown_and_stripped(library, tmp_path, monkeypatch):
    init = ApproximateIsometryInit(1.2, 50, seed=3)
    layers = library.layers
    stack = [layers.Input((30,)), Masked(layers.Dense(20, kernel_initializer=init, name="d"), sparsity=0.8, seed=0)]
    model = library.Sequential(stack)
    kernel = masked_kernels(model)[0]
    assert residual(compat.to_numpy("k", kernel.kernel), 1.2) < 0.1
    model.save(tmp_path / "model.keras")
    loaded = library.models.load_model(tmp_path / "model.keras")
    again = masked_kernels(loaded)[0]
    np.testing.assert_array_equal(compat.to_numpy("k", again.kernel), compat.to_numpy("k", kernel.kernel))
    assert again.initializer.get_config() == {**init.get_config()} and again.initializer.steps == 50
    plain = strip(model)
    assert type(plain.layers[-1].kernel_initializer).__name__ in ("Orthogonal", "OrthogonalInitializer")
    # Grown weights get the variance of an isometry's, gain^2 / fan-in, without the time to find one.
    updater = RigL(end_step=1000, drop_fraction=0.5, grow_init="scaled")
    gradient = np.random.default_rng(0).normal(size=(30, 20)).astype("float32")
    before = kernel.mask_value()
    monkeypatch.setattr("keras_sparse_init.orthogonal_initializers.approximate_isometry", None)
    updater.update(model, step=100, gradients={"d/kernel": gradient})
    grown = kernel.mask_value() & ~before
    assert grown.sum() > 0 and np.all(compat.to_numpy("k", kernel.kernel)[grown] != 0)


def test_grown_weights_have_the_variance_of_an_isometry():
    layers = keras.layers
    dense = layers.Dense(200, kernel_initializer=ApproximateIsometryInit(3.0, 0, seed=3), name="d")
    model = keras.Sequential([layers.Input((300,)), Masked(dense, sparsity=0.8, seed=0)])
    kernel, before = masked_kernels(model)[0], masked_kernels(model)[0].mask_value()
    gradient = np.random.default_rng(0).normal(size=(300, 200)).astype("float32")
    RigL(end_step=1000, drop_fraction=0.5, grow_init="scaled").update(model, step=100, gradients={"d/kernel": gradient})
    now = kernel.mask_value()
    grown = now & ~before
    # Of variance gain^2 / fan-in; squares of normal values have a variance of twice that squared: five standard errors.
    scaled = (compat.to_numpy("k", kernel.kernel) ** 2 * now.sum(axis=0) / 9)[grown]
    assert abs(scaled.mean() - 1) < 5 * np.sqrt(2 / grown.sum())
