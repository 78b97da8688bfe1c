"""Runs that were interrupted, and what is kept of a run."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_jobs import rows_of, small_network, small_settings
from tensorflow.core.util import event_pb2

from keras_sparse_init import SparseHeNormal, compat
from keras_sparse_init.training import Dense, Job, Prune, Scratch, checkpoints, make_data, mlp, run_dir, train
from keras_sparse_init.training.optimizers import OPTIMIZERS
from keras_sparse_init.training.progress import Progress


class Stopped(Exception):
    """Stands for whatever ends a process."""


def _stop_at(monkeypatch, step, error=Stopped):
    on_step = Progress.on_step

    def stopping(self, now, logs):
        wrote = on_step(self, now, logs)
        if self.step >= step:
            raise error
        return wrote

    monkeypatch.setattr(Progress, "on_step", stopping)


def _stopped(data, directory, monkeypatch, step, error=Stopped, **changes):
    """An unfinished run of 90 steps with rows every 10 and checkpoints every 20."""
    with monkeypatch.context() as patch:
        _stop_at(patch, step, error)
        with pytest.raises(error):
            _go_on(data, directory, **changes)


def _go_on(data, directory, **changes):
    settings = small_settings(steps=90, log_every=10, checkpoint_every=20) | changes
    return train(small_network, data, Scratch(0.7), output_dir=directory, **settings)


def _check_resumed(data, directory, monkeypatch, experiment, network=small_network, **changes):
    """That a run which stops after step 50, its last checkpoint at 40, ends as one that does not stop."""
    settings = small_settings(steps=90, log_every=10, checkpoint_every=20) | changes
    whole = train(network, data, experiment, output_dir=directory / "whole", **settings)
    with monkeypatch.context() as patch:
        _stop_at(patch, 50)
        with pytest.raises(Stopped):
            train(network, data, experiment, output_dir=directory / "stopped", **settings)
    assert checkpoints.last(directory / "stopped").name == "step-000000040.npz"
    resumed = train(network, data, experiment, output_dir=directory / "stopped", **settings)
    for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert rows_of(resumed.directory / "metrics.csv") == rows_of(whole.directory / "metrics.csv")
    for name in ("early", "gradient_norm", "sparsity", "test_accuracy"):
        assert resumed.summary[name] == whole.summary[name]


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_stopped_goes_on_to_the_same_weights_and_metrics(data, tmp_path, monkeypatch, optimizer, keras):
    settings = {"optimizer": optimizer, "weight_decay": 0.01, "clip_norm": 0.5, "keras": keras}
    _check_resumed(data, tmp_path, monkeypatch, Scratch(0.7), **settings)


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
@pytest.mark.parametrize("end_step", [37, 45])
def test_a_run_that_stopped_while_it_pruned_or_after_goes_on_to_the_same(data, tmp_path, monkeypatch, end_step, keras):
    experiment = Prune(0.8, begin_step=5, end_step=end_step, frequency=4)
    _check_resumed(data, tmp_path, monkeypatch, experiment, keras=keras)


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
def test_batch_normalization_goes_on_with_its_statistics(data, tmp_path, monkeypatch, keras):
    def network(input_shape, classes, keras):
        return mlp(input_shape, classes, hidden_sizes=(20, 10), batch_norm=True, seed=0, keras=keras)

    _check_resumed(data, tmp_path, monkeypatch, Scratch(0.7), network, keras=keras)


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_half_precision_goes_on_to_the_same(data, tmp_path, monkeypatch, policy, keras):
    """Kernels are never rounded by an evaluation, and half-precision weights are kept in checkpoints."""

    def network(input_shape, classes):
        library = compat.library(keras)
        layers = library.layers
        dtype = library.mixed_precision.Policy(policy) if keras == "tf_keras" else policy
        hidden = layers.Dense(20, "relu", dtype=dtype, kernel_initializer=SparseHeNormal(seed=1))
        last = layers.Dense(classes, dtype="float32", kernel_initializer=SparseHeNormal(seed=2))
        return library.Sequential([layers.Input(input_shape), layers.Flatten(), hidden, last])

    _check_resumed(data, tmp_path, monkeypatch, Prune(0.8, begin_step=5, end_step=45, frequency=4), network)


def test_dropout_of_keras_3_goes_on_with_its_random_state(data, tmp_path, monkeypatch):
    def network(input_shape, classes):
        layers = keras.layers
        last = layers.Dense(classes, kernel_initializer=SparseHeNormal(seed=1))
        return keras.Sequential([layers.Input(input_shape), layers.Flatten(), layers.Dropout(0.5, seed=2), last])

    _check_resumed(data, tmp_path, monkeypatch, Dense(), network)


def test_of_many_checkpoints_the_first_and_the_newest_two_are_kept(data, tmp_path):
    run = _go_on(data, tmp_path)
    names = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert names == [f"step-{step:09d}.npz" for step in (0, 80, 90)]


def test_a_run_is_not_resumed_in_the_other_keras(data, tmp_path, monkeypatch):
    _stopped(data, tmp_path, monkeypatch, 50)
    with pytest.raises(FileExistsError, match="differ in keras, weights: 'tf_keras' there, 'keras' now"):
        _go_on(data, tmp_path, keras="keras")


def test_a_run_that_stopped_after_its_last_step_is_only_finished(result, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("keras_sparse_init.training.run_dir.write_summary", lambda *_: exec("raise Stopped", globals()))
        with pytest.raises(Stopped):
            train(small_network, data, Scratch(0.7), output_dir=tmp_path, **small_settings())
    finished = train(small_network, data, Scratch(0.7), output_dir=tmp_path, **small_settings())
    for weight, expected in zip(finished.model.get_weights(), result.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert finished.summary["loss"] == result.summary["loss"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"settings": {"learning_rate": 0.2}}, "learning_rate"),
        ({"settings": {"seed": 4}}, "masks, seed"),
        ({"experiment": Scratch(0.6)}, "masks"),
        ({"model": lambda shape, classes: mlp(shape, classes, (20, 11))}, "weights"),
        ({"data": make_data("columns", *[np.ones((9, 6, 6, 1), np.float32), np.arange(9) % 3] * 2)}, "data_digest"),
    ],
)
def test_an_unfinished_run_of_another_job_is_refused_and_left_alone(data, tmp_path, monkeypatch, changes, name):
    with monkeypatch.context() as patch:
        _stop_at(patch, 20)
        with pytest.raises(Stopped):
            train(small_network, data, Scratch(0.7), output_dir=tmp_path, **small_settings())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    job = {"model": small_network, "data": data, "experiment": Scratch(0.7)} | {
        key: value for key, value in changes.items() if key != "settings"
    }
    with pytest.raises(FileExistsError, match=f"another configuration.*differ in .*{name}"):
        train(**job, output_dir=tmp_path, **small_settings(**changes.get("settings", {})))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_finished_run_is_refused(result, data):
    with pytest.raises(FileExistsError, match="holds a finished run"):
        train(small_network, data, Scratch(0.7), output_dir=result.directory, **small_settings())


def test_the_checkpoints_of_the_beginning_and_the_end_are_kept(result, data):
    names = sorted(path.name for path in (result.directory / "checkpoints").iterdir())
    assert names == ["step-000000000.npz", "step-000000060.npz"]
    beginning = Job(small_network, data, Scratch(0.7), **small_settings()).model
    with np.load(result.directory / "checkpoints" / names[0]) as archive:
        weights = [v for v in beginning.variables if v.name.split("/")[-1][:-2] in ("kernel", "bias")]
        assert sum(name.startswith("model/") for name in archive.files) == len(weights) == 6
        for number, variable in enumerate(weights):
            np.testing.assert_array_equal(archive[f"model/{number}"], variable)


def test_rows_outlive_a_second_stop_and_whatever_becomes_of_the_file(data, tmp_path, monkeypatch):
    whole = _go_on(data, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    _stopped(data, stopped, monkeypatch, 50)
    on_disk = []
    with monkeypatch.context() as patch:

        def die(self, step, logs):
            on_disk.append((stopped / "metrics.csv").read_text())
            raise Stopped

        patch.setattr(Progress, "on_step", die)
        with pytest.raises(Stopped):
            _go_on(data, stopped)
    assert [int(line.split(",")[0]) for line in on_disk[0].splitlines()[1:]] == [0, 10, 20, 30, 40]
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("step,loss\n10,0.")):
        damage(stopped / "metrics.csv")
        _stopped(data, stopped, monkeypatch, 70)
    resumed = _go_on(data, stopped)
    assert (stopped / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert resumed.summary["early"] == whole.summary["early"]


def test_ctrl_c_between_two_rows_keeps_the_steps_and_their_share_of_the_next_row(data, tmp_path, monkeypatch):
    settings = {"steps": 120, "log_every": 60, "checkpoint_every": 500}
    whole = _go_on(data, tmp_path / "whole", **settings)
    _stopped(data, tmp_path / "stopped", monkeypatch, 25, KeyboardInterrupt, **settings)
    assert checkpoints.last(tmp_path / "stopped").name == "step-000000025.npz"
    resumed = _go_on(data, tmp_path / "stopped", **settings)
    for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    for row, expected in zip(*(rows_of(r.directory / "metrics.csv") for r in (resumed, whole)), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in expected.items()})


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(data, tmp_path, monkeypatch):
    whole = _go_on(data, tmp_path / "whole")
    _stopped(data, tmp_path / "stopped", monkeypatch, 75)
    newest = checkpoints.last(tmp_path / "stopped")
    for content in (newest.read_bytes()[:1000], b"", b"no archive"):
        newest.write_bytes(content)
        with pytest.raises(ValueError, match=f"{newest.name}' is damaged"):
            _go_on(data, tmp_path / "stopped")
    newest.unlink()
    assert checkpoints.last(tmp_path / "stopped").name == "step-000000040.npz"
    resumed = _go_on(data, tmp_path / "stopped")
    for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_a_job_runs_once(data, tmp_path):
    job = Job(small_network, data, Scratch(0.7), **small_settings(steps=1))
    job.run(tmp_path / "first")
    with pytest.raises(RuntimeError, match="runs once"):
        job.run(tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_directory_that_a_killed_run_had_only_begun_is_taken(data, tmp_path):
    (tmp_path / "job.tmp").write_text("{")
    train(small_network, data, Scratch(0.7), output_dir=tmp_path, **small_settings(steps=1))
    assert not (tmp_path / "job.tmp").exists()


def test_tensorboard_shows_the_rows_of_metrics_once_after_a_stop_too(data, tmp_path, monkeypatch):
    _stopped(data, tmp_path, monkeypatch, 50)
    run = _go_on(data, tmp_path)
    files = [str(path) for path in (run.directory / "tensorboard").iterdir()]
    found = {}
    for record in tf.data.TFRecordDataset(files):
        event = event_pb2.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            assert (event.step, value.tag) not in found
            found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    rows = rows_of(run.directory / "metrics.csv")
    expected = {(int(row["step"]), name): float(row[name]) for row in rows for name in row if name != "step"}
    assert found == pytest.approx(expected) and len(rows) == 10


def test_two_processes_do_not_run_in_one_directory(data, tmp_path):
    """While a run is under way, another process is refused and leaves it alone."""
    script = """
import sys
from pathlib import Path
from keras_sparse_init.training import run_dir
with run_dir.sole_use(Path(sys.argv[1])):
    print("running", flush=True)
    sys.stdin.read()
"""
    (tmp_path / "run").mkdir()
    directory = run_dir.claim(
        tmp_path / "run", Job(small_network, data, Scratch(0.7), **small_settings())._identity(None)
    )
    command = [sys.executable, "-c", script, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        with pytest.raises(FileExistsError, match="Another process is running in the output directory"):
            train(small_network, data, Scratch(0.7), output_dir=directory, **small_settings())
        assert [path.name for path in directory.iterdir()] == ["job.json"]
    train(small_network, data, Scratch(0.7), output_dir=directory, **small_settings())  # It is over.
