"""A training job on two workers, two processes of this machine: as on one, equal on both, and resumed when one died."""

import json
import signal

import job_worker
import numpy as np
import pytest
from small_jobs import rows_of, small_data, small_network
from test_workers import run_workers

from keras_sparse_init.training import train
from keras_sparse_init.training.run_dir import read_masks

FILES = {"checkpoints", "job.json", "masks.npz", "metrics.csv", "model.keras", "summary.json", "tensorboard"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of the runs of two workers, and what each of them has printed."""
    directory = tmp_path_factory.mktemp("workers")
    processes, outputs = run_workers(job_worker.__file__, directory)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return directory, outputs


def test_weights_masks_and_slots_are_bitwise_equal_on_both(finished):
    first, second = (json.loads(text.split("RESULT")[1]) for text, _ in finished[1])
    assert (first.pop("chief"), second.pop("chief")) == (True, False)
    assert first == second and first["workers"] == 2 and len(first) == 4


@pytest.mark.parametrize("name", list(job_worker.EXPERIMENTS))
def test_the_results_are_those_of_one_process(finished, tmp_path, name):
    two = finished[0] / name
    train(small_network, small_data(), job_worker.EXPERIMENTS[name], output_dir=tmp_path, **job_worker.settings())
    for kernel, mask in read_masks(tmp_path).items():
        np.testing.assert_array_equal(read_masks(two)[kernel], mask)
    rows = [rows_of(path / "metrics.csv") for path in (tmp_path, two)]
    assert len(rows[0]) == len(rows[1]) == 5
    for one, other in zip(*rows, strict=True):
        for column in one:
            # The gradient of a batch is the mean of those of its halves, in another order of float32 sums.
            assert float(other[column]) == pytest.approx(float(one[column]), rel=1e-3, abs=1e-5), column


def test_the_chief_alone_writes_and_prints(finished):
    directory, ((_, chief_errors), (_, other_errors)) = finished
    assert {path.name for path in directory.iterdir()} == set(job_worker.EXPERIMENTS)
    for name in job_worker.EXPERIMENTS:
        assert {path.name for path in (directory / name).iterdir()} == FILES
    assert "step 40/40" in chief_errors and "step 40/40" not in other_errors


def test_a_run_goes_on_when_a_worker_was_killed(finished, tmp_path):
    processes, _ = run_workers(job_worker.__file__, tmp_path, 25, one_dies=True)
    assert processes[1].returncode == -signal.SIGKILL
    left = tmp_path / "rigl"
    assert not (left / "summary.json").exists()
    steps = sorted(int(path.stem.split("-")[1]) for path in (left / "checkpoints").glob("*.npz"))
    assert steps == [0, 10, 20]
    processes, outputs = run_workers(job_worker.__file__, tmp_path, 99)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    # Bit for bit what two workers have that were not killed.
    assert json.loads(outputs[0][0].split("RESULT")[1])["rigl"] == _rigl(finished)
    assert (left / "metrics.csv").read_text() == (finished[0] / "rigl" / "metrics.csv").read_text()


def _rigl(finished):
    return json.loads(finished[1][0][0].split("RESULT")[1])["rigl"]
