"""Spectra of Hessians: against a Hessian by finite differences, closed forms, and NumPy's eigenvalues."""

import json

import numpy as np
import pytest
import tf_keras
from small_jobs import rows_of, small_settings

from keras_sparse_init import SparseGlorotNormal, cli
from keras_sparse_init.training import Dense, Scratch, hessian, mlp, train
from keras_sparse_init.training.hessian_spectrum import Spectrum, lanczos
from keras_sparse_init.training.run_model import load_run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    def network(input_shape, classes):
        layers = tf_keras.layers  # Smooth, so that differences of gradients are second derivatives.
        hidden = [layers.Dense(n, "tanh", kernel_initializer=SparseGlorotNormal(seed=n)) for n in (6, 5)]
        last = layers.Dense(classes, kernel_initializer=SparseGlorotNormal(seed=1))
        return tf_keras.Sequential([layers.Input(input_shape), layers.Flatten(), *hidden, last])

    directory = tmp_path_factory.mktemp("run")
    return train(network, data, Scratch(0.9), output_dir=directory, **small_settings(steps=20)).directory


def _by_differences(loaded, x, y):
    """The Hessian over the weights that are not masked, by central differences of gradients."""
    import tensorflow as tf

    variables, masks = loaded.variables, np.concatenate([mask.reshape(-1) for mask in loaded.masks])
    whole = np.concatenate([v.numpy().reshape(-1) for v in variables]).astype(np.float64)

    def gradient(values):
        parts = np.split(values, np.cumsum([v.numpy().size for v in variables])[:-1])
        for variable, part in zip(variables, parts, strict=True):
            variable.assign(part.reshape(variable.shape))
        with tf.GradientTape() as tape:
            loss = loaded.loss(x, y)
        return np.concatenate([g.numpy().reshape(-1) for g in tape.gradient(loss, variables)])[masks]

    rows = []
    for place in np.flatnonzero(masks):
        step = np.zeros_like(whole)
        step[place] = 1e-2
        rows.append((gradient(whole + step) - gradient(whole - step)) / 2e-2)
    gradient(whole)
    return np.array(rows)


def test_all_eigenvalues_are_those_of_a_hessian_by_differences(run, data):
    (spectrum,) = hessian(run, checkpoints=["end"], method="exact", images=60, data=data).spectra
    loaded = load_run(run, data=data)
    matrix = _by_differences(loaded, data.x_train, data.y_train)
    assert spectrum.size == len(matrix) == sum(mask.sum() for mask in loaded.masks)
    expected = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    # Gradients in float32 are off by some 1e-7, divided by 2e-2; the third derivative adds some 1e-4 of the second.
    np.testing.assert_allclose(spectrum.eigenvalues, expected, atol=1e-3 * np.abs(expected).max())
    assert spectrum.trace == pytest.approx(np.trace(matrix), rel=1e-3)
    np.testing.assert_allclose(spectrum.weights, 1 / len(matrix))


def test_lanczos_finds_both_ends_and_the_trace_of_the_exact_spectrum(run, data):
    options = {"checkpoints": ["start", "end"], "images": 60, "data": data}
    exact, found, again = (hessian(run, method=method, **options).spectra for method in ("exact", "lanczos", "lanczos"))
    assert [spectrum.checkpoint for spectrum in found] == [0, "end"]
    for one, other, same in zip(exact, found, again, strict=True):
        np.testing.assert_array_equal(other.eigenvalues, same.eigenvalues)
        assert other.weights.sum() == pytest.approx(1)
        assert other.loss == one.loss
        ends, largest = [0, -1], np.abs(one.eigenvalues).max()
        np.testing.assert_allclose(other.eigenvalues[ends], one.eigenvalues[ends], atol=1e-4 * largest)
        # v^T H v of vectors of signs has the variance 2 sum_{i != j} H_ij^2 <= 2 ||H||_F^2; 4 of them, 6 deviations.
        assert abs(other.trace - one.trace) < 6 * np.sqrt(2 * np.sum(one.eigenvalues**2) / 4)


def test_lanczos_on_a_matrix_of_few_different_eigenvalues_ends_with_their_shares():
    random = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(random.normal(size=(40, 40)))
    values = np.repeat([-1.0, 0.0, 5.0], [10, 20, 10])
    matrix = vectors * values @ vectors.T
    starts = np.tile(vectors.sum(axis=1), (2, 1))  # The same share of every eigenvector.
    found, weights = lanczos(lambda v: v @ matrix.T, starts, 40)
    for value, share in ((-1.0, 0.25), (0.0, 0.5), (5.0, 0.25)):
        assert weights[np.abs(found - value) < 1e-4].sum() == pytest.approx(share, abs=1e-4)
    assert len(found) < 20  # It ended when the subspace was whole.


def test_parts_count_what_is_not_negligible():
    values = np.array([-2.0, -1e-5, 0.0, 1e-5, 1.0, 4.0])
    spectrum = Spectrum("end", "exact", 6, values, np.full(6, 1 / 6), 0.5)
    assert (spectrum.negative, spectrum.positive) == pytest.approx((1 / 6, 2 / 6))
    assert spectrum.trace == pytest.approx(3)


def test_the_command_prints_the_table_and_leaves_numbers_and_a_plot(run, data, tmp_path, capsys):
    archive = tmp_path / "data.npz"
    np.savez(archive, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    command = ["hessian", str(run), "--checkpoints", "0", "--images", "20", "--data", str(archive)]
    assert cli.main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "step 0" in printed and "exact" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["eigenvalues.csv", "hessian.png", "results.json"]
    values = [float(row["eigenvalue"]) for row in rows_of(tmp_path / "out" / "eigenvalues.csv")]
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["spectra"]
    assert (row["smallest"], row["largest"], row["size"]) == (values[0], values[-1], len(values))
    assert cli.main([*command, "--images", "0", "--output_dir", str(tmp_path / "new")]) == 2
    assert "`images` must be a positive int. Received: images=0" in capsys.readouterr().err


def test_bad_input_is_named(run, data):
    for options, message in (
        ({"method": "power"}, "`method` must be one of"),
        ({"probes": 0}, "`probes` must be a positive int"),
        ({"checkpoints": "end"}, "`checkpoints` must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian(run, data=data, **options)


def test_of_a_weight_norm_run_the_end_is_to_be_had_and_the_start_says_why_not(data, tmp_path):
    def network(input_shape, classes):
        return mlp(input_shape, classes, hidden_sizes=(4,), weight_norm="reparam")

    run = train(network, data, Dense(), output_dir=tmp_path / "run", **small_settings(steps=2)).directory
    assert hessian(run, data=data, checkpoints=["end"], method="lanczos", iterations=3).spectra[0].size > 0
    with pytest.raises(ValueError, match="norms and directions of `WeightNorm` layers.*only the end"):
        hessian(run, data=data)
