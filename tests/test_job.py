"""The training job as a library."""

import csv
import json
import zipfile

import numpy as np
import pytest
import tf_keras

from keras_sparse_init import SparseScaledInit
from keras_sparse_init.sparse_model import masked_kernels
from keras_sparse_init.training import Job, Scratch, checkpoints, make_data, mlp, train
from keras_sparse_init.training.optimizers import OPTIMIZERS, make_optimizer
from keras_sparse_init.training.progress import Progress


def _network(input_shape, classes):
    return mlp(input_shape, classes, hidden_sizes=(20, 10), seed=0)


def _settings(**changes):
    return {"steps": 60, "batch": 16, "log_every": 20, "learning_rate": 0.1, "seed": 3} | changes


def _rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def data():
    """Three classes that a small network can tell apart: each has one bright column."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 3
    x = rng.uniform(0, 0.5, (80, 6, 6)).astype(np.float32)
    x[np.arange(80), :, 2 * y] += 0.5
    return make_data("columns", x[:60], y[:60], x[60:], y[60:])


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
    return train(_network, data, Scratch(0.7), output_dir=tmp_path_factory.mktemp("run"), **_settings())


def test_a_run_leaves_its_files_and_no_others(result):
    names = {path.name for path in result.directory.iterdir()}
    assert names == {"metrics.csv", "summary.json", "model.keras", "masks.npz", "job.json", "checkpoints"}


def test_the_saved_weights_are_exactly_zero_where_the_masks_are_and_hardly_elsewhere(result):
    saved = tf_keras.models.load_model(result.directory / "model.keras")
    with np.load(result.directory / "masks.npz") as masks:
        assert set(masks) == {"dense1/kernel", "dense2/kernel", "logits/kernel"}
        for name, mask in masks.items():
            kernel = saved.get_layer(name.split("/")[0]).kernel.numpy()
            assert mask.shape == kernel.shape
            assert np.all(kernel[mask == 0] == 0) and np.mean(kernel[mask != 0] != 0) > 0.99
        size, nonzeros = (sum(count(mask) for mask in masks.values()) for count in (np.size, np.count_nonzero))
    assert 1 - nonzeros / size == result.summary["sparsity"] == pytest.approx(0.7, abs=0.01)


def test_the_saved_model_is_plain(result):
    with zipfile.ZipFile(result.directory / "model.keras") as archive:
        config = archive.read("config.json").decode()
    assert "PruneLowMagnitude" not in config and "keras_sparse_init" not in config


def test_the_saved_model_has_the_test_accuracy_of_the_summary(result, data):
    saved = tf_keras.models.load_model(result.directory / "model.keras")
    predicted = saved.predict(data.x_test, verbose=0).argmax(axis=1)
    assert np.mean(predicted == data.y_test) == pytest.approx(result.summary["test_accuracy"])


def test_training_learns(result):
    assert result.summary["train_accuracy"] > 0.9 and result.summary["test_accuracy"] > 0.9


def test_metrics_have_a_row_every_so_many_steps_and_end_with_the_summary(result):
    rows = _rows(result.directory / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert float(rows[-1]["loss"]) == result.summary["loss"] < float(rows[0]["loss"])
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(result.summary["test_accuracy"])


def test_the_summary_says_what_was_run_and_with_what(result):
    summary = json.loads((result.directory / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    expected = {"network": "mlp", "experiment": "scratch", "init": "unit", "method": "erk", "data": "columns"}
    assert expected.items() <= summary.items()
    assert {"steps": 60, "batch": 16, "learning_rate": 0.1, "momentum": 0.9, "seed": 3}.items() <= summary.items()
    assert summary["seconds"] > 0
    assert [row["name"] for row in summary["table"]["rows"]] == ["dense1/kernel", "dense2/kernel", "logits/kernel"]
    packages = ["keras", "keras_sparse_init", "numpy", "python", "tensorflow", "tf_keras", "tfmot"]
    assert sorted(summary["versions"]) == packages and all(summary["versions"].values())


def test_the_same_seed_gives_the_same_run_whatever_the_global_seeds(result, data, tmp_path):
    np.random.seed(1)
    tf_keras.utils.set_random_seed(5)
    again = train(_network, data, Scratch(0.7), output_dir=tmp_path, **_settings())
    for first, second in zip(result.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (tmp_path / "metrics.csv").read_text() == (result.directory / "metrics.csv").read_text()


def test_a_job_changes_no_global_seed(data):
    np.random.seed(7)
    Job(_network, data, Scratch(0.7))
    found = np.random.random()
    np.random.seed(7)
    assert found == np.random.random()


def test_initializations_share_the_masks_and_differ_in_the_kernels(data):
    models = {
        init: masked_kernels(
            Job(_network, data, Scratch(0.7, initializer=SparseScaledInit(2.0, granularity=init))).model
        )
        for init in ("unit", "layer", "dense")
    }
    for other in ("layer", "dense"):
        for unit_kernel, other_kernel in zip(models["unit"], models[other], strict=True):
            np.testing.assert_array_equal(unit_kernel.mask, other_kernel.mask)
            dense = unit_kernel.mask.numpy().all()  # Where nothing is masked the three are the same.
            assert np.array_equal(unit_kernel.kernel, other_kernel.kernel) == dense


def test_masks_depend_on_the_seed(data):
    first, second = (masked_kernels(Job(_network, data, Scratch(0.7), seed=seed).model) for seed in (0, 1))
    assert not np.array_equal(first[0].mask, second[0].mask)


def test_batches_are_epochs_of_all_images_without_a_break(data):
    job = Job(_network, data, Scratch(0.7), **_settings(steps=15, batch=8))
    batches = [x.numpy() for x, _ in job._batches()]
    assert len(batches) == 15 and {len(batch) for batch in batches} == {8}
    images = [image.tobytes() for image in np.concatenate(batches)]
    everything = {image.tobytes() for image in data.x_train}
    assert set(images[:60]) == set(images[60:120]) == everything
    assert images[:60] != images[60:120]


def test_a_model_of_the_users_own_is_trained(data, tmp_path):
    inputs = tf_keras.Input((6, 6, 1))
    flat = tf_keras.layers.Flatten()(inputs)
    hidden = tf_keras.layers.Dense(9, activation="relu", name="hidden")(flat)
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(3, name="out")(hidden), name="mine")
    result = train(model, data, Scratch(0.5, method="uniform"), output_dir=tmp_path, **_settings(steps=2))
    assert result.summary["network"] == "mine"
    assert [row["sparsity"] for row in result.summary["table"]["rows"]] == pytest.approx([0.5, 0.5], abs=0.02)


def test_the_default_directory_says_what_the_run_is(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(_network, data, Scratch(0.75, method="uniform"), **_settings(steps=1))
    assert result.directory.parent.name == "runs"
    assert result.directory.name.startswith("mlp-scratch-unit-0.7") and "-seed3-2" in result.directory.name


def test_a_directory_with_anything_in_it_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "precious").write_text("result")
    with pytest.raises(FileExistsError, match="not empty; results are never overwritten"):
        train(None, "no such data", output_dir=tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        train(None, "no such data", output_dir=tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "result"


def test_a_loss_that_is_lost_stops_the_run_with_a_clear_error(data, tmp_path):
    with pytest.raises(FloatingPointError, match="The loss is .* at step .*smaller learning rate"):
        train(_network, data, Scratch(0.7), output_dir=tmp_path, **_settings(learning_rate=1e30))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be a positive integer"),
        ({"steps": True}, "`steps` must be a positive integer"),
        ({"batch": 1.5}, "`batch` must be a positive integer"),
        ({"log_every": -1}, "`log_every` must be a positive integer"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a positive number"),
        ({"learning_rate": "fast"}, "`learning_rate` must be a positive number"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
        ({"optimizer": "lion"}, "`optimizer` must be one of 'momentum', 'sgd', 'adam', 'rmsprop'.*'lion'"),
        ({"optimizer": ["sgd"]}, "`optimizer` must be one of"),
        ({"weight_decay": -1e-4}, "`weight_decay` must be a number of at least 0"),
        ({"clip_norm": 0.0}, "`clip_norm` must be a positive number or None"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be a positive integer"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
        ({"experiment": Scratch(1.0)}, "`sparsity` must be"),
        ({"experiment": Scratch(0.5, method="fair")}, "`method` must be one of"),
        ({"data": "imagenet"}, "`data` must be one of"),
        ({"model": lambda shape, classes: mlp(shape, classes + 1)}, "one logit for each of the 3 classes of columns"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_reason(data, changes, message):
    with pytest.raises(ValueError, match=message):
        Job(**{"model": _network, "data": data, "experiment": Scratch(0.7)} | changes)


def test_rows_follow_the_executions_when_these_do_not_end_at_the_log_steps(tmp_path, capsys):
    resets = []
    with Progress(tmp_path / "m.csv", 110, 40, evaluate=lambda: 0.5, reset=lambda: resets.append(1)) as progress:
        for step in (25, 50, 75, 100, 110):
            progress.on_batch_end(step - 1, {"loss": 1.0 / step, "accuracy": 0.25})
    rows = _rows(tmp_path / "m.csv")
    assert [int(row["step"]) for row in rows] == [50, 100, 110] and len(resets) == 3
    assert capsys.readouterr().err.count("\n") == 3  # No terminal: a line for each row.


class Stopped(Exception):
    """Stands for whatever ends a process."""


def _stop_at(monkeypatch, step, error=Stopped):
    on_batch_end = Progress.on_batch_end

    def stopping(self, batch, logs):
        wrote = on_batch_end(self, batch, logs)
        if self.step >= step:
            raise error
        return wrote

    monkeypatch.setattr(Progress, "on_batch_end", stopping)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_stopped_goes_on_to_the_same_weights_and_metrics(data, tmp_path, monkeypatch, optimizer):
    settings = _settings(
        steps=90, log_every=10, checkpoint_every=20, optimizer=optimizer, weight_decay=0.01, clip_norm=0.5
    )
    whole = train(_network, data, Scratch(0.7), output_dir=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        _stop_at(patch, 50)
        with pytest.raises(Stopped):
            train(_network, data, Scratch(0.7), output_dir=tmp_path / "stopped", **settings)
    assert checkpoints.last(tmp_path / "stopped").name == "step-000000040.npz"
    resumed = train(_network, data, Scratch(0.7), output_dir=tmp_path / "stopped", **settings)
    for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert _rows(resumed.directory / "metrics.csv") == _rows(whole.directory / "metrics.csv")
    assert resumed.summary["early"] == whole.summary["early"]


def test_a_run_that_stopped_after_its_last_step_is_only_finished(result, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("keras_sparse_init.training.run_dir.write_summary", lambda *_: exec("raise Stopped", globals()))
        with pytest.raises(Stopped):
            train(_network, data, Scratch(0.7), output_dir=tmp_path, **_settings())
    finished = train(_network, data, Scratch(0.7), output_dir=tmp_path, **_settings())
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
            train(_network, data, Scratch(0.7), output_dir=tmp_path, **_settings())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    job = {"model": _network, "data": data, "experiment": Scratch(0.7)} | {
        key: value for key, value in changes.items() if key != "settings"
    }
    with pytest.raises(FileExistsError, match=f"another configuration.*differ in .*{name}"):
        train(**job, output_dir=tmp_path, **_settings(**changes.get("settings", {})))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_finished_run_is_refused(result, data):
    with pytest.raises(FileExistsError, match="holds a finished run"):
        train(_network, data, Scratch(0.7), output_dir=result.directory, **_settings())


def test_the_checkpoints_of_the_beginning_and_the_end_are_kept(result, data):
    names = sorted(path.name for path in (result.directory / "checkpoints").iterdir())
    assert names == ["step-000000000.npz", "step-000000060.npz"]
    beginning = Job(_network, data, Scratch(0.7), **_settings()).model
    with np.load(result.directory / "checkpoints" / names[0]) as archive:
        for number, variable in enumerate(beginning.variables):
            np.testing.assert_array_equal(archive[f"model/{number}"], variable)


def test_weight_decay_shrinks_kernels_and_leaves_biases(data, tmp_path):
    """Without gradients (all images 0 reach no kernel of the first layer), a step leaves 1 - rate * decay of it."""
    zeros = make_data("zeros", np.zeros((30, 6, 6), np.float32), data.y_train[:30], data.x_test, data.y_test)
    settings = _settings(steps=1, weight_decay=0.25, optimizer="sgd", learning_rate=0.5)
    job = Job(_network, zeros, Scratch(0.5), **settings)
    kernel = masked_kernels(job.model)[0]
    before = kernel.kernel.numpy()
    bias = job.model.trainable_variables[-1]
    job.run(tmp_path)
    np.testing.assert_allclose(kernel.kernel.numpy(), before * (1 - 0.5 * 0.25), rtol=1e-6)
    assert np.any(bias.numpy() != 0)


def test_vectors_do_not_decay_and_gradients_are_clipped_to_the_norm():
    kernel, bias = tf_keras.backend.variable(np.ones((2, 2))), tf_keras.backend.variable(np.ones(2))
    optimizer = make_optimizer("sgd", 1.0, 10, [kernel, bias], weight_decay=0.5, clip_norm=0.1)
    # Global norm of (3, 0, 0, 0) and (4, 0) is 5.
    gradients = [np.array([[3.0, 0.0], [0.0, 0.0]], np.float32), np.array([4.0, 0.0], np.float32)]
    optimizer.apply_gradients(zip([tf_keras.backend.constant(g) for g in gradients], [kernel, bias], strict=True))
    np.testing.assert_allclose(kernel.numpy(), 0.5 - gradients[0] * 0.1 / 5, rtol=1e-6)
    np.testing.assert_allclose(bias.numpy(), 1 - gradients[1] * 0.1 / 5, rtol=1e-6)


def test_masks_are_taken_from_a_run_and_drawn_for_anew(result, data):
    job = Job(_network, data, Scratch(masks_from=result.directory), **_settings(seed=8))
    with np.load(result.directory / "masks.npz") as masks:
        for kernel in masked_kernels(job.model):
            np.testing.assert_array_equal(kernel.mask, masks[kernel.name])
            active = masks[kernel.name]
            assert np.array_equal(kernel.kernel.numpy() != 0, active)
            # Drawn for the mask: |w| <= 2 sigma / 0.8796 with the fan-in of its own unit, and close to it somewhere.
            bound = 2 * np.sqrt(2 / np.maximum(active.sum(axis=0), 1)) / 0.87962566
            relative = np.abs(kernel.kernel.numpy()) / bound
            assert 0.8 < relative.max() <= 1 + 1e-6
    assert str(job).count("sparse by taken") == 1


def test_shuffled_masks_keep_the_counts_of_each_kernel_alone(result, data):
    jobs = [
        Job(_network, data, Scratch(masks_from=result.directory, shuffled=True), **_settings(seed=seed))
        for seed in (1, 1, 2)
    ]
    first, again, other = ([k.mask_value() for k in masked_kernels(job.model)] for job in jobs)
    with np.load(result.directory / "masks.npz") as taken:
        for mask, expected in zip(first, taken.values(), strict=True):
            assert mask.sum() == expected.sum()
            assert expected.all() or not np.array_equal(mask, expected)
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))


def test_masks_that_are_not_there_or_do_not_fit_are_clear_errors(result, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no masks.npz"):
        Job(_network, data, Scratch(masks_from=tmp_path))
    with pytest.raises(ValueError, match="dense1/kernel.*shape"):
        Job(lambda shape, classes: mlp(shape, classes, (21, 10)), data, Scratch(masks_from=result.directory))
    with pytest.raises(ValueError, match="either `sparsity` or `masks_from`"):
        Scratch()
    with pytest.raises(ValueError, match="either `sparsity` or `masks_from`"):
        Scratch(0.5, masks_from="runs/a")
    with pytest.raises(ValueError, match="`shuffled` must be"):
        Scratch(0.5, shuffled=True)


def _stopped(data, directory, monkeypatch, step, error=Stopped, **changes):
    """An unfinished run of 90 steps with rows every 10 and checkpoints every 20."""
    with monkeypatch.context() as patch:
        _stop_at(patch, step, error)
        with pytest.raises(error):
            _go_on(data, directory, **changes)


def _go_on(data, directory, **changes):
    settings = _settings(steps=90, log_every=10, checkpoint_every=20) | changes
    return train(_network, data, Scratch(0.7), output_dir=directory, **settings)


def test_rows_outlive_a_second_stop_and_whatever_becomes_of_the_file(data, tmp_path, monkeypatch):
    whole = _go_on(data, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    _stopped(data, stopped, monkeypatch, 50)
    on_disk = []
    with monkeypatch.context() as patch:

        def die(self, batch, logs):
            on_disk.append((stopped / "metrics.csv").read_text())
            raise Stopped

        patch.setattr(Progress, "on_batch_end", die)
        with pytest.raises(Stopped):
            _go_on(data, stopped)
    assert [int(line.split(",")[0]) for line in on_disk[0].splitlines()[1:]] == [10, 20, 30, 40]
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
    for row, expected in zip(*(_rows(r.directory / "metrics.csv") for r in (resumed, whole)), strict=True):
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
    job = Job(_network, data, Scratch(0.7), **_settings(steps=1))
    job.run(tmp_path / "first")
    with pytest.raises(RuntimeError, match="runs once"):
        job.run(tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_model_that_does_not_fit_the_images_is_refused_before_anything_is_written(data, tmp_path):
    inputs = tf_keras.Input((6, 6, 1))
    flat = tf_keras.layers.Flatten()(inputs)
    two = tf_keras.Model(inputs, [tf_keras.layers.Dense(3)(flat), tf_keras.layers.Dense(3)(flat)])
    for model, message in (
        (lambda *_: mlp((5, 5, 1), 3), r"must take images of shape \(6, 6, 1\).*\(None, 5, 5, 1\)"),
        (two, "one logit for each of the 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, data, Scratch(0.5), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_a_killed_run_had_only_begun_is_taken(data, tmp_path):
    (tmp_path / "job.tmp").write_text("{")
    train(_network, data, Scratch(0.7), output_dir=tmp_path, **_settings(steps=1))
    assert not (tmp_path / "job.tmp").exists()
