"""What an experiment does to a network before and while it is trained."""

import shutil
from typing import ClassVar

import numpy as np
import pytest
from small_jobs import small_network, small_settings

from keras_sparse_init import SparseScaledInit, compat, sparsity_table
from keras_sparse_init.sparse_model import masked_kernels
from keras_sparse_init.training import Dense, Job, Lottery, Prune, Scratch, mlp, train


def test_initializations_share_the_masks_and_differ_in_the_kernels(data):
    models = {
        init: masked_kernels(
            Job(small_network, data, Scratch(0.7, initializer=SparseScaledInit(2.0, granularity=init))).model
        )
        for init in ("unit", "layer", "dense")
    }
    for other in ("layer", "dense"):
        for unit_kernel, other_kernel in zip(models["unit"], models[other], strict=True):
            np.testing.assert_array_equal(unit_kernel.mask, other_kernel.mask)
            dense = unit_kernel.mask.numpy().all()  # Where nothing is masked the three are the same.
            assert np.array_equal(unit_kernel.kernel, other_kernel.kernel) == dense


def test_masks_are_taken_from_a_run_and_drawn_for_anew(result, data):
    job = Job(small_network, data, Scratch(masks_from=result.directory), **small_settings(seed=8))
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
        Job(small_network, data, Scratch(masks_from=result.directory, shuffled=True), **small_settings(seed=seed))
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
        Job(small_network, data, Scratch(masks_from=tmp_path))
    with pytest.raises(ValueError, match="dense1/kernel.*shape"):
        Job(lambda shape, classes: mlp(shape, classes, (21, 10)), data, Scratch(masks_from=result.directory))
    with pytest.raises(ValueError, match="either `sparsity` or `masks_from`"):
        Scratch()
    with pytest.raises(ValueError, match="either `sparsity` or `masks_from`"):
        Scratch(0.5, masks_from="runs/a")
    with pytest.raises(ValueError, match="`shuffled` must be"):
        Scratch(0.5, shuffled=True)
    with pytest.raises(ValueError, match="`masks_from` must be the directory.*5"):
        Scratch(masks_from=5)


@pytest.fixture(scope="module")
def pruned_runs(data, tmp_path_factory):
    """In either Keras a run that pruned at steps 10, 15, ..., 40 of 60."""
    experiment = Prune(0.8, begin_step=10, end_step=40, frequency=5)
    return {
        keras: train(
            small_network, data, experiment, output_dir=tmp_path_factory.mktemp(keras), **small_settings(keras=keras)
        )
        for keras in ("tf_keras", "keras")
    }


@pytest.fixture(params=["tf_keras", "keras"])
def pruned(request, pruned_runs):
    return pruned_runs[request.param]


def _masks(run):
    with np.load(run.directory / "masks.npz") as masks:
        return dict(masks)


def test_pruning_ends_with_the_sparsity_in_every_kernel_and_zeros_in_what_is_saved(pruned):
    saved = compat.library(pruned.summary["keras"]).models.load_model(pruned.directory / "model.keras")
    masks = _masks(pruned)
    assert len(masks) == 3
    for name, mask in masks.items():
        kernel = np.asarray(saved.get_layer(name.split("/")[0]).kernel)
        assert mask.sum() == round(0.2 * mask.size)
        np.testing.assert_array_equal(kernel != 0, mask)
    assert pruned.summary["sparsity"] == pytest.approx(0.8) and pruned.summary["test_accuracy"] > 0.9
    assert [row["sparsity"] for row in pruned.summary["table"]["rows"]] == pytest.approx([0.8] * 3)


def test_pruning_starts_dense_with_the_networks_own_kernels(pruned, data):
    job = Job(small_network, data, Prune(0.8), **small_settings(keras=pruned.summary["keras"]))
    own = small_network(data.input_shape, data.classes)
    for kernel, layer in zip(masked_kernels(job.model), ("dense1", "dense2", "logits"), strict=True):
        assert kernel.mask_value().all()
        np.testing.assert_array_equal(np.asarray(kernel.kernel), own.get_layer(layer).kernel)
    assert "0.0% sparse by uniform, pruned to 80.0%" in str(job)


class _Watched(Prune):
    """Keeps the sparsity after each step."""

    found: ClassVar[list[float]] = []

    def callbacks(self, model, **asked):
        class Watch(compat.Callback):
            def on_train_batch_end(watch, batch, logs=None):
                self.found.append(sparsity_table(watch.model).total.sparsity)

        return [*super().callbacks(model, **asked), Watch()]


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
def test_pruning_updates_the_masks_right_before_the_steps_of_the_schedule_and_no_others(data, tmp_path, keras):
    experiment = _Watched(0.8, begin_step=4, end_step=10, frequency=3)
    experiment.found.clear()
    # In executions of one step, each is seen. That others do the same: test_steps.py.
    settings = small_settings(steps=12, log_every=1, keras=keras)
    train(small_network, data, experiment, output_dir=tmp_path, **settings)
    # 0.8 - 0.8 (1 - p)^3 at p = 0, 1/2, 1; a kernel of 6 x 20 or less is rounded.
    assert experiment.found == pytest.approx([0] * 6 + [0.7] * 3 + [0.8] * 3, abs=0.01)


def test_both_kerases_train_the_same_weights(result, pruned_runs, data, tmp_path):
    """One source of values, masks and batches: what differs is who computes the steps."""

    def run(experiment, keras):
        directory = tmp_path / f"{type(experiment).__name__}-{keras}"
        return train(small_network, data, experiment, output_dir=directory, **small_settings(keras=keras))

    dense = [run(Dense(), keras) for keras in ("tf_keras", "keras")]
    for runs in ([result, run(Scratch(0.7), "keras")], list(pruned_runs.values()), dense):
        assert [run.summary["keras"] for run in runs] == ["tf_keras", "keras"]
        weights = [run.model.get_weights() for run in runs]
        for one, other in zip(*weights, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        assert all(map(np.array_equal, *(_masks(run).values() for run in runs)))
        assert runs[0].summary["gradient_norm"] == pytest.approx(runs[1].summary["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
@pytest.mark.parametrize("weight_norm", ["reparam", "constraint"])
def test_networks_with_normalized_weights_are_pruned_and_saved_plain(data, tmp_path, weight_norm, keras):
    def network(input_shape, classes, keras):
        return mlp(input_shape, classes, hidden_sizes=(20, 10), weight_norm=weight_norm, seed=0, keras=keras)

    settings = small_settings(keras=keras)
    pruned = train(network, data, Prune(0.8), output_dir=tmp_path / "pruned", **settings)
    assert pruned.summary["weight_norm"] == weight_norm and pruned.summary["test_accuracy"] > 0.9
    saved = compat.library(keras).models.load_model(pruned.directory / "model.keras")
    for layer, mask in zip(saved.layers[1:], _masks(pruned).values(), strict=True):
        assert type(layer).__name__ == "Dense"
        kernel = np.asarray(layer.kernel)
        np.testing.assert_array_equal(kernel != 0, mask)
        if weight_norm == "constraint":
            np.testing.assert_allclose(np.linalg.norm(kernel, axis=0)[mask.any(axis=0)], 1, rtol=1e-4)
    predicted = np.asarray(saved(data.x_test)).argmax(axis=1)
    assert np.mean(predicted == data.y_test) == pytest.approx(pruned.summary["test_accuracy"])
    job = Job(network, data, Lottery(pruned.directory), **settings | {"steps": 2})
    masks = {kernel.seed_name: kernel.mask_value() for kernel in masked_kernels(job.model)}
    if weight_norm == "reparam":  # A constraint makes no difference to what the masks are in.
        masks = _masks(job.run(tmp_path / "ticket"))
    assert all(map(np.array_equal, masks.values(), _masks(pruned).values()))


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
def test_a_lottery_ticket_has_the_masks_of_the_end_and_the_weights_of_the_beginning(pruned, data, keras):
    """In either Keras, whichever the pruned run was trained in."""
    job = Job(small_network, data, Lottery(pruned.directory), **small_settings(keras=keras, seed=99))
    beginning, masks = small_network(data.input_shape, data.classes), _masks(pruned)
    for kernel in masked_kernels(job.model):
        np.testing.assert_array_equal(kernel.mask_value(), masks[kernel.name])
        initial = beginning.get_layer(kernel.name.split("/")[0]).kernel.numpy()
        np.testing.assert_array_equal(np.asarray(kernel.kernel), initial * masks[kernel.name])


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
def test_a_ticket_takes_every_weight_of_the_beginning_by_its_name_and_keeps_its_masks(data, tmp_path, keras):
    """Biases and statistics too, drawn at random here; layers of equal shape may be listed in another order."""
    layers = compat.library(keras).layers

    def network(order):
        def make(input_shape, classes):
            norm = layers.BatchNormalization(beta_initializer="normal", moving_mean_initializer="normal", name="norm")
            blocks = [layers.Dense(10, "relu", bias_initializer="normal", name=name) for name in order]
            ends = layers.Flatten(name="flat"), layers.Dense(classes, name="logits")
            parts = [layers.Input(input_shape), ends[0], layers.Dense(10, name="in"), norm, *blocks, ends[1]]
            return compat.library(keras).Sequential(parts)

        return make

    pruned = train(network("abc"), data, Prune(0.8), output_dir=tmp_path / "pruned", **small_settings(steps=20))
    with np.load(tmp_path / "pruned" / "checkpoints" / "step-000000000.npz") as archive:
        beginning = {str(name): archive[f"model/{i}"] for i, name in enumerate(archive["names"])}
    assert np.any(beginning["norm/moving_mean"] != 0) and np.any(beginning["b/bias"] != 0) and len(beginning) == 14
    masks = _masks(pruned)
    job = Job(network("cab"), data, Lottery(pruned.directory), **small_settings(steps=20))
    for layer in job.model.layers:
        plain = getattr(layer, "layer", layer)
        for name in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"):
            if getattr(plain, name, None) is not None:
                key = f"{plain.name}/{name}"
                found = compat.to_numpy(name, getattr(plain, name))
                np.testing.assert_array_equal(found, beginning.pop(key) * masks.get(key, 1))
    assert not beginning
    ticket = job.run(tmp_path / "ticket")
    assert all(np.array_equal(mask, masks[name]) for name, mask in _masks(ticket).items())
    for name, mask in masks.items():
        assert np.all(np.asarray(ticket.model.get_layer(name.split("/")[0]).kernel)[~mask] == 0)


@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
def test_tickets_and_masks_are_taken_whatever_numbers_keras_gave_to_the_layers(data, tmp_path, keras):
    """A network of the user's own, made anew in one process; attention and mixed precision are pruned too."""
    library = compat.library(keras)
    layers = library.layers

    def network(input_shape, classes):
        half = library.mixed_precision.Policy("mixed_bfloat16") if keras == "tf_keras" else "mixed_bfloat16"
        inputs = library.Input(input_shape)
        rows = layers.Reshape((6, 6))(inputs)
        flat = layers.Flatten()(layers.MultiHeadAttention(2, 3)(rows, rows))
        hidden = layers.Dense(8, "relu", dtype=half)(flat)
        return library.Model(inputs, layers.Dense(classes, dtype="float32")(hidden))

    settings = small_settings(steps=8)
    pruned = train(network, data, Prune(0.7), output_dir=tmp_path / "pruned", **settings)
    assert len(_masks(pruned)) == 6 and pruned.summary["sparsity"] == pytest.approx(0.7, abs=0.02)
    for experiment in (Lottery(pruned.directory), Scratch(masks_from=pruned.directory)):
        job = Job(network, data, experiment, **settings)
        taken = {kernel.seed_name: kernel.mask_value() for kernel in masked_kernels(job.model)}
        assert taken.keys() == _masks(pruned).keys()
        for name, mask in _masks(pruned).items():
            np.testing.assert_array_equal(taken[name], mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(1.0), "`sparsity` must be"),
        (lambda: Prune(0.5, begin_step=0), "`begin_step` must be a positive integer or None"),
        (lambda: Prune(0.5, frequency=2.5), "`frequency` must be a positive integer or None"),
        (lambda: Prune(0.5, power=0), "`power` must be a positive number"),
        (lambda: Prune(0.5).schedule(3), "at least 4 steps"),
        (lambda: Prune(0.5, end_step=50).schedule(40), "within the 40 steps.*end_step=50"),
        (lambda: Prune(0.5, begin_step=30).schedule(40), "begin_step=30, end_step=24"),
        (lambda: Prune(0.5, begin_step=1, end_step=8, frequency=2).schedule(9), "`frequency` must divide"),
        (lambda: Lottery(), "`pruned_run` must be the directory"),
        (lambda: Lottery(""), "`pruned_run` must be the directory"),
    ],
)
def test_what_cannot_be_pruned_or_rewound_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("steps", [4, 7, 40, 100, 2000, 11719])
def test_a_schedule_that_is_not_given_fits_the_steps_and_ends_with_an_update(steps):
    schedule = Prune(0.9).schedule(steps)
    updates = [step for step in range(1, steps + 1) if schedule(step)[0]]
    assert steps // 4 in (updates[0], updates[0] - 1) and steps // 3 <= updates[-1] <= steps * 3 // 5
    assert schedule(updates[-1]) == (True, pytest.approx(0.9)) and len(updates) <= 60


def test_a_run_that_is_no_ticket_for_the_network_is_a_clear_error(result, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no masks.npz"):
        Job(small_network, data, Lottery(tmp_path))
    with pytest.raises(ValueError, match="another network"):
        Job(lambda shape, classes: mlp(shape, classes, (20, 11)), data, Lottery(result.directory))
    with pytest.raises(ValueError, match="The masks are of another network: of .*'dense1/kernel'"):
        Job(lambda shape, classes: mlp(shape, classes, (20, 10, 5)), data, Scratch(masks_from=result.directory))
    shutil.copytree(result.directory, tmp_path / "copy")
    (tmp_path / "copy" / "masks.npz").write_text("junk")
    with pytest.raises(ValueError, match="masks.npz' is damaged"):
        Job(small_network, data, Lottery(tmp_path / "copy"))
    dense = train(small_network, data, Dense(), output_dir=tmp_path / "dense", **small_settings(steps=1))
    with pytest.raises(ValueError, match="is dense: it has no masks"):
        Job(small_network, data, Lottery(dense.directory))
