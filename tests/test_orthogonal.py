"""Sparse kernels that are exactly orthogonal, and delta kernels: by the properties that define them."""

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import (
    DeltaOrthogonalInit,
    ExactOrthogonalInit,
    Masked,
    SparseScaledInit,
    compat,
    masked_kernels,
    masks,
    reinitialize,
    sparsify,
    sparsity_table,
    strip,
)
from keras_sparse_init.orthogonal import CONSTRUCTIONS, expected_density, sparse_orthogonal

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
EACH = pytest.mark.parametrize("construction", CONSTRUCTIONS)


def matrix_of(init, shape):
    return init.draw(shape, "float32", init.seed)


@EACH
@pytest.mark.parametrize("shape", [(64, 64), (90, 40), (40, 90), (7, 3), (2, 2), (1, 5), (5, 1)])
@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
def test_singular_values_are_the_gain_and_the_density_is_met(construction, shape, density):
    size, least = shape[0] * shape[1], max(shape)
    wanted = max(round(density * size), least)
    init = ExactOrthogonalInit(1 - wanted / size, 1.5, construction, seed=3)
    w = matrix_of(init, shape)
    product = w.T @ w if shape[0] >= shape[1] else w @ w.T
    # In float32, whose rounding of entries below 1.5 is below 1e-7 each.
    np.testing.assert_allclose(product, 1.5**2 * np.eye(min(shape)), rtol=0, atol=1e-6 * 1.5**2)
    # Two rows of the longer side become their union: no more is added than both were short of.
    assert abs(np.count_nonzero(w) - wanted) <= min(shape) / 2


@EACH
def test_a_seed_is_a_matrix_and_supports_are_anywhere(construction):
    draws = [np.array(ExactOrthogonalInit(0.9, 1.0, construction, seed=s)((30, 30))) for s in range(200)]
    np.testing.assert_array_equal(draws[0], np.array(ExactOrthogonalInit(0.9, 1.0, construction, seed=0)((30, 30))))
    assert not np.array_equal(draws[0], draws[1])
    counts = sum((draw != 0).astype(int) for draw in draws)
    # Binomial about 200 * 0.1 in each of 900 places; five standard deviations, and the mean of rows and columns.
    assert counts.max() < 20 + 5 * np.sqrt(18) + 1 and abs(np.mean(counts) - 20) < 1
    for axis in (0, 1):
        # A row's supports vary together; with a spread of at most that of 30 of them.
        assert np.abs(counts.mean(axis=axis) - 20).max() < 5 * np.sqrt(18)
    values = np.concatenate([draw[draw != 0] for draw in draws])
    assert abs(np.mean(values > 0) - 0.5) < 5 * 0.5 / np.sqrt(values.size / 10)


@pytest.mark.parametrize("cls", [ExactOrthogonalInit, DeltaOrthogonalInit])
def test_without_a_seed_each_is_another_and_so_is_its_copy(cls):
    one, other = cls(), cls()
    copy = cls.from_config(one.get_config())
    draws = [np.array(init((6, 6))) for init in (one, one, other, copy)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2]) and not np.array_equal(draws[0], draws[3])


def test_rotations_turn_by_any_angle_in_both_directions():
    """A matching of a matrix of two: [[c, s], [-s, c]] with c and s of any sign, |c| anywhere in (0, 1)."""
    for construction in CONSTRUCTIONS:
        draws = [ExactOrthogonalInit(0.0, 1.0, construction, seed=s).draw((2, 2), "float64", s) for s in range(400)]
        corners = np.array([draw[0] for draw in draws])
        for sign in (1, -1):
            # Each of four quadrants has a quarter: five standard deviations of a binomial count.
            for other in (1, -1):
                count = np.sum((np.sign(corners[:, 0]) == sign) & (np.sign(corners[:, 1]) == other))
                assert abs(count - 100) < 5 * np.sqrt(400 * 0.25 * 0.75), construction
        # |angle| within a quadrant is uniform: its mean is pi / 4, with standard deviation pi / (2 sqrt 12).
        angles = np.arctan2(np.abs(corners[:, 1]), np.abs(corners[:, 0]))
        assert abs(angles.mean() - np.pi / 4) < 5 * np.pi / (2 * np.sqrt(12 * 400)), construction
        assert angles.std() > 0.8 * np.pi / (2 * np.sqrt(12)), construction


def test_supports_are_uneven_by_rotations_and_even_by_matchings():
    spread = {
        c: (matrix_of(ExactOrthogonalInit(0.95, 1.0, c, seed=1), (256, 256)) != 0).sum(axis=1).std()
        for c in CONSTRUCTIONS
    }
    assert spread["rotations"] > 2 * spread["matchings"]


def test_the_density_grows_with_rotations_as_the_closed_form_says():
    rows, columns, rotations, random = 12, 12, 15, np.random.default_rng(0)
    densities = []
    for _ in range(400):
        support = np.eye(rows, columns, dtype=bool)
        for _ in range(rotations):
            i, j = random.choice(rows, 2, replace=False)
            support[[i, j]] = support[i] | support[j]
        densities.append(support.mean())
    # Five standard errors of the mean of 400.
    assert abs(np.mean(densities) - expected_density(rows, rotations)) < 5 * np.std(densities) / 20
    # That many rotations give the density, on average, that asking for it takes: about as many are made.
    assert expected_density(5, 0) == 0.2 and expected_density(5, 10**6) == pytest.approx(1.0)


def test_a_deep_linear_network_is_an_isometry_and_a_scaled_one_is_none():
    inits = [ExactOrthogonalInit(0.97, seed=s) for s in range(7)]
    scaled = [SparseScaledInit(sparsity=0.97, seed=s) for s in range(7)]
    jacobians = [
        np.linalg.multi_dot([np.array(init((100, 100)), np.float64) for init in each]) for each in (inits, scaled)
    ]
    values = [np.linalg.svd(jacobian, compute_uv=False) for jacobian in jacobians]
    np.testing.assert_allclose(values[0], 1, atol=1e-5)
    assert values[1].max() > 2 and values[1].min() < 0.1


def test_a_thousand_tanh_layers_keep_their_signal():
    """Near the critical point of Nowak et al., section 4: sigma_w 1.0247, sigma_b 0.00448, width 128, density 1/8."""
    random, width, layers, probes = np.random.default_rng(0), 128, 1000, 16

    def log_rms(kernels):
        """log10 of the root mean square singular value of the input-output Jacobian, on random directions."""
        h, directions, log = random.normal(size=width), random.normal(size=(probes, width)) / np.sqrt(probes), 0.0
        start = np.linalg.norm(directions)
        for kernel in kernels:
            h = np.tanh(h @ kernel * 1.0247 + 0.00448 * random.normal(size=width))
            directions = directions @ (kernel * 1.0247) * (1 - h**2)
            size = np.linalg.norm(directions)
            log, directions = log + np.log10(size), directions / size
        return log - np.log10(start)

    # Twenty kernels, again and again with their inputs in another order.
    exact = [sparse_orthogonal(width, width, width * width // 8, "rotations", random) for _ in range(20)]
    dense = [np.linalg.qr(random.normal(size=(width, width)))[0] for _ in range(20)]
    masked = [w * (random.random((width, width)) < 1 / 8) for w in dense]
    found = [log_rms(kernels[i % 20][random.permutation(width)] for i in range(layers)) for kernels in (exact, masked)]
    assert -3 < found[0] < 1 and found[1] < -300


@BOTH
@EACH
@pytest.mark.parametrize("wrapper", ["masked", "tfmot"])
def test_sparsify_sets_the_masks_of_wrappers_to_the_nonzeros(library, construction, wrapper):
    if library is keras and wrapper == "tfmot":
        wrapper = None
    L = library.layers
    layers = [L.Conv2D(24, 3, padding="same"), L.Flatten(), L.Dense(40, "tanh"), L.Dense(30)]
    dense = library.Sequential([L.Input((6, 6, 8)), *layers])
    init = ExactOrthogonalInit(gain=1.2, construction=construction)
    model = sparsify(dense, 0.95, initializer=init, wrapper=wrapper, seed=4)
    again = sparsify(library.models.clone_model(dense), 0.95, initializer=init, wrapper=wrapper, seed=4)
    assert sparsity_table(model).total.sparsity == pytest.approx(0.95, abs=0.003)
    for kernel, other in zip(masked_kernels(model), masked_kernels(again), strict=True):
        value = compat.to_numpy("kernel", kernel.kernel)
        np.testing.assert_array_equal(value, compat.to_numpy("kernel", other.kernel))
        np.testing.assert_array_equal(value != 0, kernel.mask_value())
        matrix = value[1, 1] if value.ndim == 4 else value
        assert np.count_nonzero(matrix) == np.count_nonzero(value)
        product = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
        np.testing.assert_allclose(product, 1.44 * np.eye(len(product)), atol=2e-6)
    with pytest.raises(ValueError, match="ExactOrthogonalInit of 'conv2d.*' makes its own zeros, and takes no mask"):
        reinitialize(model, init)


@BOTH
@pytest.mark.parametrize("options", [{"sparsity": 0.8}, {"mask": np.eye(8)}])
def test_another_mask_is_refused(library, options):
    for cls, named in ((ExactOrthogonalInit, "ExactOrthogonalInit"), (DeltaOrthogonalInit, "DeltaOrthogonalInit")):
        layer = Masked(library.layers.Dense(8, kernel_initializer=cls(seed=0), name="d"), **options)
        with pytest.raises(ValueError, match=f"`mask` and `sparsity` must be left out for 'kernel'.*'d'.*{named}"):
            layer.build((None, 8))
    # Of a layer that has been trained the weights off the mask go, as ever.
    dense = library.layers.Dense(8, kernel_initializer=ExactOrthogonalInit(seed=0))
    dense.build((None, 8))
    Masked(dense, **options).build((None, 8))


def test_sparsify_takes_the_class_too():
    dense = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(8)])
    one, other = (
        sparsify(dense, 0.5, initializer=init, seed=1) for init in (ExactOrthogonalInit, ExactOrthogonalInit())
    )
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)


@BOTH
def test_around_the_centre_of_a_convolution_weights_begin_at_0(library):
    L = library.layers
    layers = [L.Conv2D(6, 3, name="conv"), L.Flatten(), L.Dense(3)]
    model = library.Sequential([L.Input((5, 5, 4)), *layers])
    with pytest.raises(
        ValueError, match=r"'conv/kernel' cannot be orthogonal: `sparsity`.*at least 0.8889 without `spread`"
    ):
        sparsify(model, 0.5, "uniform", initializer=ExactOrthogonalInit(), wrapper="masked", seed=0)
    sparse = sparsify(model, 0.5, "uniform", initializer=ExactOrthogonalInit(spread=True), wrapper="masked", seed=0)
    kernel = masked_kernels(sparse)[0]
    value, mask = compat.to_numpy("kernel", kernel.kernel), kernel.mask_value()
    assert mask.sum() == 108 and np.count_nonzero(value) == np.count_nonzero(value[1, 1]) == 24
    np.testing.assert_allclose(value[1, 1] @ value[1, 1].T, np.eye(4), atol=1e-6)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@BOTH
def test_layers_take_it_and_are_saved_cloned_and_stripped(library, tmp_path):
    L = library.layers
    inits = [ExactOrthogonalInit(0.8, 1.1, "matchings", seed=1), DeltaOrthogonalInit(seed=2)]
    layers = [
        L.Conv1D(12, 3, kernel_initializer=inits[1]),
        L.Flatten(),
        Masked(L.Dense(10, kernel_initializer=inits[0])),
    ]
    model = library.Sequential([L.Input((4, 6)), *layers])
    kernel = masked_kernels(model)[0]
    assert kernel.mask_value().mean() == pytest.approx(0.2, abs=0.02)
    for name in ("model.keras", "model.h5"):
        if library is keras and name == "model.h5":
            continue
        model.save(tmp_path / name)
        loaded = library.models.load_model(tmp_path / name)
        for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    for init in inits:
        assert type(init).from_config(init.get_config()).get_config() == init.get_config()
    clone = library.models.clone_model(model)
    np.testing.assert_array_equal(masked_kernels(clone)[0].mask_value(), kernel.mask_value())
    plain = strip(model)
    kinds = [
        type(layer.kernel_initializer).__module__.split(".")[0] for layer in plain.layers if hasattr(layer, "kernel")
    ]
    assert kinds == [library.__name__] * 2


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 5, 4, 4), (5, 6, 4), (1, 1, 2, 8)])
def test_circular_convolution_with_a_delta_kernel_keeps_norms(shape):
    """By Fourier transform: a circular convolution multiplies frequencies with the transformed kernel."""
    *field, inputs, units = shape
    kernel = DeltaOrthogonalInit(gain=1.0, seed=1).draw(shape, "float64", 1)
    grid, axes = (7,) * len(field), tuple(range(len(field)))
    x = np.random.default_rng(0).normal(size=(*grid, inputs))
    y = np.fft.fftn(x, axes=axes)[..., None, :] @ np.fft.fftn(kernel, grid, axes=axes)
    y = np.fft.ifftn(y[..., 0, :], axes=axes).real
    if units >= inputs:
        assert np.linalg.norm(y) == pytest.approx(np.linalg.norm(x))
        scaled = DeltaOrthogonalInit(seed=1).draw(shape, "float64", 1)
        np.testing.assert_allclose(scaled, kernel * np.sqrt(units / inputs))
    else:
        centre = kernel[tuple(size // 2 for size in field)]
        np.testing.assert_allclose(centre.T @ centre, np.eye(units), atol=1e-12)
        np.testing.assert_array_equal(DeltaOrthogonalInit(seed=1).draw(shape, "float64", 1), kernel)


def test_the_orthogonal_matrices_are_uniform():
    """The mean of H is 0 and that of H^2 is 1/n, for a uniform one: five standard errors over 2000."""
    draws = np.stack([DeltaOrthogonalInit(1.0, seed=s).draw((4, 4), "float64", s) for s in range(2000)])
    assert np.abs(draws.mean(axis=0)).max() < 5 * 0.5 / np.sqrt(2000)
    assert np.abs((draws**2).mean(axis=0) - 0.25).max() < 5 * 0.25 / np.sqrt(2000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactOrthogonalInit(1.0), "`sparsity` must be a float in"),
        (lambda: ExactOrthogonalInit(0.5, gain=0), "`gain` must be a positive"),
        (lambda: ExactOrthogonalInit(0.5, construction="qr"), "`construction` must be one of 'rotations', 'matchings'"),
        (lambda: ExactOrthogonalInit(0.5, spread=1), "`spread` must be a bool"),
        (lambda: ExactOrthogonalInit(0.5, seed=-1), "`seed` must be a non-negative int"),
        (lambda: ExactOrthogonalInit(0.99)((10, 20)), r"must be at most 0.9. Received: sparsity=0.99"),
        (lambda: ExactOrthogonalInit(0.5)((4,)), r"`shape` of an orthogonal kernel must be \(inputs, units\)"),
        (lambda: ExactOrthogonalInit(0.95)((2, 3, 4, 4)), "odd sizes"),
        (lambda: DeltaOrthogonalInit(gain=-1), "`gain` must be a positive"),
        (lambda: DeltaOrthogonalInit()((4, 3, 2)), "odd sizes"),
        (lambda: _sparse(masks.NM(2, 4)), "`rule` must be left out with ExactOrthogonalInit"),
        (lambda: _sparse(masks.Random, DeltaOrthogonalInit()), "is no longer orthogonal under a mask"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _sparse(rule, init=None):
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4)])
    return sparsify(model, 0.5, rule=rule, initializer=init or ExactOrthogonalInit(), seed=0)
