"""What a calibration is measured by: NumPy alone."""

import json

import numpy as np
import pytest

from keras_sparse_init.calibration.report import AffineFit, CalibrationReport, LayerCalibration

_RANDOM = np.random.default_rng(0)


def test_non_linearity_is_0_of_affine_functions_and_about_1_of_what_is_even():
    x = _RANDOM.normal(size=(300, 2, 3))
    affine = x.reshape(300, 6) @ _RANDOM.normal(size=(6, 4)) + 5
    assert AffineFit(x).non_linearity(affine) == pytest.approx(0, abs=1e-12)
    # No straight line explains |x|; the error of the mean of 300 is 0.06 and less.
    assert AffineFit(x).non_linearity(np.abs(x[:, 0, 0])) == pytest.approx(1, abs=0.05)
    # Half of the variance of each, on symmetric inputs.
    mixed = x[:, 0, 0] / x[:, 0, 0].std() + np.abs(x[:, 1, 0]) / np.abs(x[:, 1, 0]).std()
    assert AffineFit(x).non_linearity(mixed) == pytest.approx(0.5, abs=0.1)


def test_non_linearity_of_noise_is_1_however_many_inputs_fit_it():
    for inputs in (1, 20, 60):
        x, noise = _RANDOM.normal(size=(120, inputs)), _RANDOM.normal(size=(120, 30))
        assert AffineFit(x).non_linearity(noise) == pytest.approx(1, abs=0.1)


def test_non_linearity_is_unknown_with_few_samples_or_constant_outputs_and_constant_inputs_do_not_count():
    x = _RANDOM.normal(size=(30, 20))
    assert AffineFit(x).non_linearity(x[:, 0] ** 2) is None
    assert AffineFit(x[:, :4]).non_linearity(np.full(30, 0.1)) is None
    x[:, 5:] = 3.0
    assert AffineFit(x).non_linearity(x[:, 0] * 2) == pytest.approx(0, abs=1e-12)


def test_rows_count_zeros_patterns_flips_and_units_of_all_calls():
    before = {("a", 0): np.array([[[True, False]], [[True, True]]]), ("a", 1): np.zeros((2, 1, 2), bool)}
    after = {("a", 0): np.array([[[True, False]], [[True, False]]]), ("a", 1): np.zeros((2, 1, 2), bool)}
    row = LayerCalibration.of("a", before, after, calibrated="a", scale=1.5)
    assert (row.zeros_before, row.zeros, row.flip_rate) == (3 / 8, 2 / 8, 1 / 8)
    assert (row.patterns_before, row.patterns, row.units) == (2, 1, 2)
    report = CalibrationReport("bias", 2, [row], LayerCalibration.of("total", before, after), None, None, {"out": "no"})
    assert report.is_affine
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["layer", "zeros", "before"]
    assert lines[1].split() == ["a", "37.50%", "25.00%", "2", "1", "12.50%", "0", "of", "2", "1.500"]
    assert lines[-3] == "2 samples; non-linearity unknown before, unknown after"
    assert lines[-2].startswith("patterns: ") and lines[-1] == "not calibrated: out (no)"
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["scale"] == 1.5


@pytest.mark.parametrize(("value", "patterns", "affine"), [(0.2, 5, False), (0.001, 5, True), (None, 5, False)])
def test_a_network_is_affine_when_its_outputs_are(value, patterns, affine):
    row = LayerCalibration("total", 0.1, 0.1, patterns, patterns, 0.0, 3)
    assert CalibrationReport("bias", 9, [row], row, value, value, {}).is_affine is affine
