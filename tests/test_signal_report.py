"""A report as text, dict, data frame and figure."""

import json
import math

import keras
import numpy as np
import pandas
import pytest

from keras_sparse_init import Masked, measure_signal


@pytest.fixture(scope="module")
def report():
    L = keras.layers
    layers = [
        L.Dense(12, "relu", name="first"),
        L.LSTM(3, name="loop"),
        Masked(L.Dense(2, name="out"), mask=[[1, 0]] * 3),
    ]
    model = keras.Sequential([L.Input((5, 4)), *layers])
    return measure_signal(model, np.random.default_rng(0).normal(size=(30, 5, 4)), jacobian=True)


def test_the_text_has_every_layer_and_kernel_and_says_what_is_not_seen(report):
    text = str(report)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert f"{report['first'].pre.std:.3g}" in lines["first"]
    assert f"{report['first'].zero_fraction:.1%}" in lines["first"]
    assert "50.00%" in lines["out/kernel"] and "1 of 2" in lines["out/kernel"]
    assert f"output std {report.output_std:.3g}" in text
    assert "loop/lstm_cell (inside the loop over time of 'loop')" in text
    assert "masks not followed through: loop (LSTM)" in text
    assert "30 samples" in text and "singular values" in text
    assert max(map(len, text.splitlines())) < 200


def test_the_dict_is_what_json_keeps(report):
    again = json.loads(json.dumps(report.to_dict()))
    layer = next(layer for layer in again["layers"] if layer["name"] == "first")
    assert layer["pre"]["std"] == report["first"].pre.std
    assert again["kernels"][-1]["topology"]["nonzeros"] == 3
    assert again["not_seen"] == report.not_seen
    assert np.shape(again["singular_values"]) == (30, 2)


def test_data_frames_have_a_row_for_each_layer_or_kernel(report):
    frame = report.to_pandas()
    assert list(frame["name"]) == [layer.name for layer in report.layers]
    assert frame["pre_std"][0] == report.layers[0].pre.std
    assert math.isnan(frame["pre_std"][1])
    kernels = report.to_pandas("kernels")
    assert isinstance(kernels, pandas.DataFrame) and kernels["sparsity"].iloc[-1] == 0.5
    with pytest.raises(ValueError, match="`part` must be one of 'layers', 'kernels'"):
        report.to_pandas("units")


def test_the_figure_has_what_the_report_has(report, tmp_path):
    figure = report.plot()
    signal, gradient, zeros, cosine = figure.axes
    np.testing.assert_allclose(signal.lines[1].get_ydata(), [layer.post.std for layer in report.layers])
    np.testing.assert_allclose(gradient.lines[0].get_ydata(), [layer.gradient_std for layer in report.layers])
    assert signal.get_yscale() == gradient.get_yscale() == "log"
    assert zeros.lines[0].get_ydata() == pytest.approx([report.layers[0].zero_fraction])
    assert len(cosine.lines[0].get_ydata()) == 3
    figure.savefig(tmp_path / "signal.png")
