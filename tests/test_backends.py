"""Keras 3 on TensorFlow, on JAX and, where it is installed, on torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import backend_checks
import keras
import pytest


def run_on(backend):
    """One process for all checks on another backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, backend_checks.__file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["jax", "torch"])
def results(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param, run_on(request.param)


def test_the_process_runs_on_the_backend_asked_for(results):
    backend, result = results
    assert result["backend"] == backend


def test_values_have_the_bits_of_those_on_tensorflow(results):
    _, result = results
    assert keras.backend.backend() == "tensorflow"
    assert result["digests"] == backend_checks.digests()


@pytest.mark.parametrize("check", backend_checks.CHECKS)
def test_on_another_backend(results, check):
    _, result = results
    assert not result[check], result[check]


@pytest.mark.parametrize("check", [name for name in backend_checks.CHECKS if "jax" not in name])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_on_tensorflow(check):
    backend_checks.CHECKS[check]()
