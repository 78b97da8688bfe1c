"""Runs that were interrupted, and what is kept of a run."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from small_jobs import rows_of, small_network, small_settings
from tensorflow.core.util import event_pb2

from keras_sparse_init import SparseHeNormal, compat
from keras_sparse_init.training import Job, Prune, Scratch, checkpoints, make_data, mlp, run_dir, train
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
    """An unfinished run of 50 steps with rows every 10 and checkpoints every 20."""
    with monkeypatch.context() as patch:
        _stop_at(patch, step, error)
        with pytest.raises(error):
            _go_on(data, directory, **changes)


def _go_on(data, directory, model=small_network, experiment=None, **changes):
    settings = small_settings(steps=50, log_every=10, checkpoint_every=20) | changes
    return train(model, data, experiment or Scratch(0.7), output_dir=directory, **settings)


def _run_and_copies(data, directory, **job):
    """A run, and by step copies of its directory as it was then: what a process leaves that is killed."""
    whole, on_step = directory / "whole", Progress.on_step
    copies = {step: directory / f"at-{step}" for step in (30, 50)}

    def copying(self, now, logs):
        wrote = on_step(self, now, logs)
        if self.step in copies:
            shutil.copytree(whole, copies[self.step])
        return wrote

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step", copying)
        return _go_on(data, whole, **job), copies


@pytest.fixture(scope="module")
def run_and_copies(data, tmp_path_factory):
    return _run_and_copies(data, tmp_path_factory.mktemp("resuming"))


@pytest.fixture
def whole(run_and_copies):
    """The run of `_go_on`, finished."""
    return run_and_copies[0]


@pytest.fixture
def killed(run_and_copies, tmp_path):
    """The directory of that run as it was after step 30, its last checkpoint at 20."""
    return shutil.copytree(run_and_copies[1][30], tmp_path / "killed")


_PRUNED_WHILE_IT_STOPPED, _PRUNED_BEFORE = (Prune(0.8, begin_step=5, end_step=end, frequency=4) for end in (25, 17))


# Each optimizer, experiment and kind of layer in each Keras; half precision is pruned, since masks change kernels then.
@pytest.mark.parametrize(
    ("library", "optimizer", "experiment", "policy", "layers"),
    [
        ("tf_keras", "momentum", _PRUNED_WHILE_IT_STOPPED, "mixed_bfloat16", []),
        ("tf_keras", "sgd", Scratch(0.7), "float32", ["BatchNormalization"]),
        ("tf_keras", "adam", _PRUNED_WHILE_IT_STOPPED, "mixed_float16", []),
        ("tf_keras", "rmsprop", _PRUNED_BEFORE, "bfloat16", []),
        ("keras", "momentum", _PRUNED_BEFORE, "mixed_float16", []),
        ("keras", "sgd", _PRUNED_WHILE_IT_STOPPED, "bfloat16", []),
        # Of dropout, Keras 2 does not give away the random state.
        ("keras", "adam", Scratch(0.7), "float32", ["BatchNormalization", "Dropout"]),
        ("keras", "rmsprop", _PRUNED_WHILE_IT_STOPPED, "mixed_bfloat16", []),
    ],
)
def test_a_run_that_stopped_goes_on_to_the_same_weights_and_metrics(
    data, tmp_path, library, optimizer, experiment, policy, layers
):
    """Statistics and random states go on too; kernels of half precision are never rounded by an evaluation."""

    def network(input_shape, classes):
        keras = compat.library(library)
        L = keras.layers
        dtype = keras.mixed_precision.Policy(policy) if library == "tf_keras" else policy
        more = {"BatchNormalization": L.BatchNormalization, "Dropout": lambda: L.Dropout(0.5, seed=2)}
        return keras.Sequential(
            [
                L.Input(input_shape),
                L.Flatten(),
                L.Dense(20, "relu", dtype=dtype, kernel_initializer=SparseHeNormal(seed=1)),
                *(more[name]() for name in layers),
                L.Dense(classes, dtype="float32", kernel_initializer=SparseHeNormal(seed=2)),
            ]
        )

    # Keras 2 takes no norm over variables of several dtypes.
    clip_norm = None if policy == "bfloat16" else 0.5
    job = {"model": network, "experiment": experiment, "optimizer": optimizer, "weight_decay": 0.01}
    job["clip_norm"] = clip_norm
    whole, copies = _run_and_copies(data, tmp_path, **job)
    assert checkpoints.last(copies[30]).name == "step-000000020.npz"
    resumed = _go_on(data, copies[30], **job)
    for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert rows_of(resumed.directory / "metrics.csv") == rows_of(whole.directory / "metrics.csv")
    for name in ("early", "gradient_norm", "sparsity", "test_accuracy"):
        assert resumed.summary[name] == whole.summary[name]


def test_of_many_checkpoints_the_first_and_the_newest_two_are_kept(whole):
    names = sorted(path.name for path in (whole.directory / "checkpoints").iterdir())
    assert names == [f"step-{step:09d}.npz" for step in (0, 40, 50)]


def test_a_run_is_not_resumed_in_the_other_keras(data, killed):
    with pytest.raises(FileExistsError, match="differ in keras, weights: 'tf_keras' there, 'keras' now"):
        _go_on(data, killed, keras="keras")


def test_a_run_that_stopped_after_its_last_step_is_only_finished(whole, data, tmp_path, monkeypatch):
    stopped = shutil.copytree(whole.directory, tmp_path / "stopped")
    (stopped / "summary.json").unlink()  # It is written last.
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step", lambda *_: pytest.fail("a step was made"))
        finished = _go_on(data, stopped)
    for weight, expected in zip(finished.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert finished.summary["loss"] == whole.summary["loss"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"learning_rate": 0.2}, "learning_rate"),
        ({"seed": 4}, "masks, seed"),
        ({"experiment": Scratch(0.6)}, "masks"),
        ({"model": lambda shape, classes: mlp(shape, classes, (20, 11))}, "weights"),
        ({"data": make_data("columns", *[np.ones((9, 6, 6, 1), np.float32), np.arange(9) % 3] * 2)}, "data_digest"),
    ],
)
def test_an_unfinished_run_of_another_job_is_refused_and_left_alone(data, killed, changes, name):
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=f"another configuration.*differ in .*{name}"):
        _go_on(**{"data": data} | changes, directory=killed)
    assert before == {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}


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


def test_rows_outlive_a_second_stop_and_whatever_becomes_of_the_file(whole, killed, data, monkeypatch):
    on_disk = []
    with monkeypatch.context() as patch:

        def die(self, step, logs):
            on_disk.append((killed / "metrics.csv").read_text())
            raise Stopped

        patch.setattr(Progress, "on_step", die)
        with pytest.raises(Stopped):
            _go_on(data, killed)
    assert [int(line.split(",")[0]) for line in on_disk[0].splitlines()[1:]] == [0, 10, 20]
    (killed / "metrics.csv").unlink()
    _stopped(data, killed, monkeypatch, 50)
    (killed / "metrics.csv").write_text("step,loss\n10,0.")
    resumed = _go_on(data, killed)
    assert (killed / "metrics.csv").read_text() == (whole.directory / "metrics.csv").read_text()
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


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(run_and_copies, data, tmp_path):
    whole, copies = run_and_copies
    killed = shutil.copytree(copies[50], tmp_path / "killed")
    newest = checkpoints.last(killed)
    for content in (newest.read_bytes()[:1000], b"", b"no archive"):
        newest.write_bytes(content)
        with pytest.raises(ValueError, match=f"{newest.name}' is damaged"):
            _go_on(data, killed)
    newest.unlink()
    assert checkpoints.last(killed).name == "step-000000020.npz"
    resumed = _go_on(data, killed)
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
    _stopped(data, tmp_path, monkeypatch, 30)
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
    assert found == pytest.approx(expected) and len(rows) == 6


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
        tmp_path / "run", Job(small_network, data, Scratch(0.7), **small_settings(steps=1))._identity(None)
    )
    command = [sys.executable, "-c", script, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        with pytest.raises(FileExistsError, match="Another process is running in the output directory"):
            train(small_network, data, Scratch(0.7), output_dir=directory, **small_settings(steps=1))
        assert [path.name for path in directory.iterdir()] == ["job.json"]
    train(small_network, data, Scratch(0.7), output_dir=directory, **small_settings(steps=1))  # It is over.
