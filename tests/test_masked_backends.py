"""`Masked` and `WeightNorm` on Keras 3's other backends, in one process each; torch where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import keras
import masked_checks
import pytest


@pytest.fixture(scope="module", params=["jax", "torch"])
def results(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": request.param, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, masked_checks.__file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr
    return request.param, json.loads(run.stdout.splitlines()[-1])


def test_masks_and_kernels_have_the_bits_of_those_on_tensorflow(results):
    backend, result = results
    assert keras.backend.backend() == "tensorflow"
    assert result["backend"] == backend
    assert result["digests"] == masked_checks.digests()


@pytest.mark.parametrize("check", masked_checks.CHECKS)
def test_on_another_backend(results, check):
    _, result = results
    assert not result[check], result[check]


# What test_masked and test_masked_saving do not check on TensorFlow anyway.
@pytest.mark.parametrize("check", ["check_masks_that_a_callback_changes_take_effect"])
def test_on_tensorflow(check):
    masked_checks.CHECKS[check]()
