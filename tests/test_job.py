"""The training job as a library."""

import json
import zipfile

import keras
import numpy as np
import pytest
import tf_keras
from small_jobs import rows_of, small_network, small_settings

from keras_sparse_init import SparseHeNormal
from keras_sparse_init.sparse_model import masked_kernels
from keras_sparse_init.training import Dense, Job, Scratch, make_data, mlp, train
from keras_sparse_init.training.fit import Fit
from keras_sparse_init.training.optimizers import make_optimizer
from keras_sparse_init.training.progress import Progress


def test_a_run_leaves_its_files_and_no_others(result):
    names = {path.name for path in result.directory.iterdir()}
    assert names == {
        "metrics.csv",
        "summary.json",
        "model.keras",
        "masks.npz",
        "job.json",
        "checkpoints",
        "tensorboard",
    }


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
    rows = rows_of(result.directory / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [0, 20, 40, 60]
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
    again = train(small_network, data, Scratch(0.7), output_dir=tmp_path, **small_settings())
    for first, second in zip(result.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (tmp_path / "metrics.csv").read_text() == (result.directory / "metrics.csv").read_text()


def test_a_job_changes_no_global_seed(data):
    np.random.seed(7)
    Job(small_network, data, Scratch(0.7))
    found = np.random.random()
    np.random.seed(7)
    assert found == np.random.random()


def test_masks_depend_on_the_seed(data):
    first, second = (masked_kernels(Job(small_network, data, Scratch(0.7), seed=seed).model) for seed in (0, 1))
    assert not np.array_equal(first[0].mask, second[0].mask)


def test_batches_are_epochs_of_all_images_without_a_break(data):
    job = Job(small_network, data, Scratch(0.7), **small_settings(steps=15, batch=8))
    batches = [x.numpy() for x, _ in Fit(job.model, data, job.settings).batches()]
    assert len(batches) == 15 and {len(batch) for batch in batches} == {8}
    images = [image.tobytes() for image in np.concatenate(batches)]
    everything = {image.tobytes() for image in data.x_train}
    assert set(images[:60]) == set(images[60:120]) == everything
    assert images[:60] != images[60:120]


def test_the_order_of_the_images_depends_on_the_seed(data):
    model = Job(small_network, data, Scratch(0.7)).model
    first, again, other = (
        np.concatenate(
            [x.numpy() for x, _ in Fit(model, data, Job(small_network, data, **settings).settings).batches()]
        )
        for settings in (small_settings(seed=seed, steps=3) for seed in (1, 1, 2))
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_train_step_without_the_accuracy_is_a_clear_error(data, tmp_path):
    class Own(tf_keras.Sequential):
        def train_step(self, data):
            return {"loss": super().train_step(data)["loss"]}

    model = Own([tf_keras.layers.Input((6, 6, 1)), tf_keras.layers.Flatten(), tf_keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="`train_step` must return 'loss' and 'accuracy'. It lacks.*accuracy"):
        train(model, data, Dense(), output_dir=tmp_path, **small_settings())


def test_a_model_of_the_users_own_is_trained(data, tmp_path):
    inputs = tf_keras.Input((6, 6, 1))
    flat = tf_keras.layers.Flatten()(inputs)
    hidden = tf_keras.layers.Dense(9, activation="relu", name="hidden")(flat)
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(3, name="out")(hidden), name="mine")
    result = train(model, data, Scratch(0.5, method="uniform"), output_dir=tmp_path, **small_settings(steps=2))
    assert result.summary["network"] == "mine"
    assert [row["sparsity"] for row in result.summary["table"]["rows"]] == pytest.approx([0.5, 0.5], abs=0.02)


def test_the_default_directory_says_what_the_run_is(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(small_network, data, Scratch(0.75, method="uniform"), **small_settings(steps=1))
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
        train(small_network, data, Scratch(0.7), output_dir=tmp_path, **small_settings(learning_rate=1e30))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "`model` must be a Keras model or a function.*None"),
        ({"data": None}, "`data` must be a Data, a name or the path.*None"),
        ({"experiment": "scratch"}, "`experiment` must be an experiment.*'scratch'"),
        ({"experiment": Scratch}, "`experiment` must be an experiment.*Scratch"),
    ],
)
def test_arguments_of_another_type_are_refused(data, changes, message):
    with pytest.raises(TypeError, match=message):
        Job(**{"model": small_network, "data": data, "experiment": Scratch(0.7)} | changes)


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
        Job(**{"model": small_network, "data": data, "experiment": Scratch(0.7)} | changes)


class _Log(list):
    """Keeps what an event log would write."""

    write, close = list.append, lambda self: None


def test_rows_follow_the_executions_when_these_do_not_end_at_the_log_steps(tmp_path, capsys):
    resets, log, first = [], _Log(), (0, 2.0, 0.1, 0.1, 5.0)
    measure = {"measure": lambda: (0.5, 3.0), "reset": lambda: resets.append(1)}
    with Progress(tmp_path / "m.csv", 110, 40, **measure, log=log, rows=[first]) as progress:
        for step in (25, 50, 75, 100, 110):
            progress.on_step(step, {"loss": 1.0 / step, "accuracy": 0.25})
    rows = rows_of(tmp_path / "m.csv")
    assert [int(row["step"]) for row in rows] == [0, 50, 100, 110] and len(resets) == 3
    assert [{name: float(value) for name, value in row.items()} for row in rows] == log == progress.rows_by_name()
    assert log[1] == {"step": 50, "loss": 0.02, "train_accuracy": 0.25, "test_accuracy": 0.5, "gradient_norm": 3.0}
    assert capsys.readouterr().err.count("\n") == 3  # No terminal: a line for each row.


def test_a_model_that_does_not_fit_the_images_is_refused_before_anything_is_written(data, tmp_path):
    inputs = tf_keras.Input((6, 6, 1))
    flat = tf_keras.layers.Flatten()(inputs)
    two = tf_keras.Model(inputs, [tf_keras.layers.Dense(3)(flat), tf_keras.layers.Dense(3)(flat)])
    keras_layers = [keras.layers.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    inputs3 = keras.Input((6, 6, 1))
    flat3 = keras.layers.Dense(3)(keras.layers.Flatten()(inputs3))
    frozen = keras.Sequential(keras_layers, name="frozen")
    frozen.trainable = False

    class Subclassed(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.flat, self.dense = tf_keras.layers.Flatten(), tf_keras.layers.Dense(7)

        def call(self, x):
            return self.dense(self.flat(x))

    subclassed = Subclassed()
    subclassed(data.x_test)
    layers = tf_keras.layers
    softmax = layers.Dense(3, activation="softmax", name="probabilities")
    for model, message in (
        (tf_keras.Sequential([layers.Flatten(), layers.Dense(3)], name="new"), "The model 'new' must be built"),
        (tf_keras.Sequential([layers.Input((6, 6, 1)), layers.Flatten(), softmax]), "logits.*'probabilities'"),
        (lambda *_: keras.Sequential([*keras_layers, keras.layers.Softmax(name="s")]), "must return logits.*'s'"),
        (lambda *_: mlp((5, 5, 1), 3), r"must take images of shape \(6, 6, 1\).*\(None, 5, 5, 1\)"),
        (two, "one logit for each of the 3 classes"),
        (keras.Sequential([*keras_layers[:1], keras.layers.Conv2D(3, 3)]), r"one logit.*shape \(1, 4, 4, 3\)"),
        (keras.Model(inputs3, {"a": flat3}), "one logit.*dict"),
        (subclassed, r"one logit for each of the 3 classes of columns.*shape \(1, 7\)"),
        (frozen, "must have trainable weights.*'frozen', all frozen"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, data, Scratch(0.5), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_decay_shrinks_kernels_and_leaves_biases(data, tmp_path):
    """Without gradients (all images 0 reach no kernel of the first layer), a step leaves 1 - rate * decay of it."""
    zeros = make_data("zeros", np.zeros((30, 6, 6), np.float32), data.y_train[:30], data.x_test, data.y_test)
    settings = small_settings(steps=1, weight_decay=0.25, optimizer="sgd", learning_rate=0.5)
    job = Job(small_network, zeros, Scratch(0.5), **settings)
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


def test_networks_share_their_architecture_but_for_seeds_and_the_names_of_keras(data):
    def functional(units=9, activation="relu", seed=None):
        inputs = keras.Input((6, 6, 1))
        hidden = keras.layers.Dense(units, activation, kernel_initializer=SparseHeNormal(seed=seed))
        return keras.Model(inputs, keras.layers.Dense(3)(hidden(keras.layers.Flatten()(inputs))))

    def said(network):
        job = Job(network, data, Scratch(0.5))
        return job._architecture

    same = [said(functional(seed=seed)) for seed in (0, 1)]
    assert same[0] == same[1] and same[0]["parameters"] == 36 * 9 + 9 + 9 * 3 + 3
    assert len({said(small_network)["architecture"] for _ in range(2)}) == 1  # Of tf_keras, its inputs numbered.
    others = [functional(units=8), functional(activation="tanh"), small_network((6, 6, 1), 3)]
    others += [mlp((6, 6, 1), 3, (20, 10), batch_norm=True)]
    assert len({said(network)["architecture"] for network in [functional(), *others]}) == 5
    lstm = [
        keras.Sequential(
            [keras.Input((6, 6, 1)), keras.layers.Reshape((6, 6)), keras.layers.LSTM(3, go_backwards=back)]
        )
        for back in (False, False, True)
    ]
    assert said(lstm[0]) == said(lstm[1]) != said(lstm[2])
