"""Jobs whose masks change in training, or are found before it: densities, both Kerases, and going on after a stop."""

import numpy as np
import pytest
from small_jobs import small_network, small_settings

from keras_sparse_init import SparseScaledInit, compat, masked_kernels, prune_at_init
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.training import AtInit, Dynamic, Job, Scratch, train
from keras_sparse_init.training.configs import config_root
from keras_sparse_init.training.gin_registry import make_job
from keras_sparse_init.training.progress import Progress
from keras_sparse_init.training.run_dir import read_masks
from keras_sparse_init.training.run_model import load_run
from keras_sparse_init.wrapping import wrap_kernels


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize(("updater", "keras"), [("rigl", "tf_keras"), ("set", "keras"), ("rigl_inverted", "keras")])
def test_masks_change_and_keep_their_density_and_a_stopped_run_goes_on_to_the_same(
    data, tmp_path, monkeypatch, updater, keras
):
    experiment = Dynamic(sparsity=0.7, updater=updater, frequency=10, gradient_batch=20)
    settings = small_settings(steps=60, log_every=10, checkpoint_every=20, keras=keras)
    whole = train(small_network, data, experiment, output_dir=tmp_path / "whole", **settings)
    first = {
        k.seed_name: k.mask_value() for k in masked_kernels(Job(small_network, data, experiment, **settings).model)
    }
    last = read_masks(whole.directory)
    for name, mask in first.items():
        assert last[name].sum() == mask.sum()
    new = sum(int((last[name].astype(bool) & ~mask).sum()) for name, mask in first.items())
    assert whole.summary["mask_churn"] == pytest.approx(new / sum(int(mask.sum()) for mask in first.values()))
    assert new > 0
    begun = load_run(whole.directory, "start", data).model.get_weights()
    ended = whole.model.get_weights()
    moved = np.sqrt(sum(np.sum((w - v) ** 2.0) for v, w in zip(begun, ended, strict=True)))
    length = np.sqrt(sum(np.sum(v**2.0) for v in begun))
    assert whole.summary["distance_from_init"] == pytest.approx(
        {"absolute": moved, "relative": moved / length}, rel=1e-5
    )
    assert whole.summary["experiment"] == updater and whole.summary["updates"]["frequency"] == 10

    on_step = Progress.on_step

    def stopping(self, now, logs):
        wrote = on_step(self, now, logs)
        if self.step >= 35:
            raise Stopped
        return wrote

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step", stopping)
        with pytest.raises(Stopped):
            train(small_network, data, experiment, output_dir=tmp_path / "stopped", **settings)
    resumed = train(small_network, data, experiment, output_dir=tmp_path / "stopped", **settings)
    for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)
    for name, mask in read_masks(resumed.directory).items():
        np.testing.assert_array_equal(mask, last[name])


def test_a_dynamic_network_begins_as_a_static_one_and_updates_end_after_three_quarters(data):
    settings = small_settings(keras="keras")
    dynamic = Job(small_network, data, Dynamic(sparsity=0.7), **settings)
    static = Job(small_network, data, Scratch(sparsity=0.7), **settings)
    for one, other in zip(dynamic.model.get_weights(), static.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    asked = {"seed": 0, "steps": 100, "data": data, "learning_rate": 0.1}
    (callback,) = dynamic.experiment.callbacks(dynamic.model, **asked)
    assert (callback.updater.end_step, callback.updater.drop_fraction) == (75, 0.3)
    (callback,) = Dynamic(sparsity=0.7, schedule="learning_rate").callbacks(dynamic.model, **asked)
    assert callback.updater.initial_learning_rate == 0.1


@pytest.mark.parametrize(("method", "keras"), [("snip", "tf_keras"), ("grasp", "keras"), ("magnitude", "keras")])
def test_masks_before_training_are_those_of_prune_at_init_and_kernels_are_drawn_for_them(data, method, keras):
    settings = small_settings(keras=keras)
    job = Job(small_network, data, AtInit(0.8, method, images=30, keep_layers=True), **settings)
    network = small_network(data.input_shape, data.classes, keras=keras)
    own = [compat.to_numpy("weight", variable).copy() for variable in network.trainable_variables]
    masked = wrap_kernels(network)
    order = np.random.default_rng(derive_seed(settings["seed"], "images of the scores")).permutation(60)
    chosen = np.sort(order[:30])
    cross_entropy = compat.library(keras).losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(y, logits):
        return cross_entropy(y, logits / {"snip": 1, "grasp": 200, "magnitude": 1}[method])

    seed = derive_seed(settings["seed"], "scores")
    x, y = data.x_train[chosen], data.y_train[chosen]
    prune_at_init(masked, 0.8, method, x, y, loss, keep_layers=True, seed=seed)
    kernels = masked_kernels(job.model)
    for kernel, expected in zip(kernels, masked_kernels(masked), strict=True):
        np.testing.assert_array_equal(kernel.mask_value(), expected.mask_value())
    total = sum(kernel.mask_value().size for kernel in kernels)
    assert sum(kernel.mask_value().sum() for kernel in kernels) == total - int(0.8 * total)
    for kernel, value in zip(kernels, own[::2], strict=True):
        np.testing.assert_array_equal(compat.to_numpy("kernel", kernel.kernel), value * kernel.mask_value())

    redrawn = Job(
        small_network, data, AtInit(0.8, method, images=30, keep_layers=True, initializer=SparseScaledInit), **settings
    )
    for kernel, before in zip(masked_kernels(redrawn.model), kernels, strict=True):
        mask, values = kernel.mask_value(), compat.to_numpy("kernel", kernel.kernel)
        np.testing.assert_array_equal(mask, before.mask_value())
        np.testing.assert_array_equal(values != 0, mask)
        assert (values[mask] != compat.to_numpy("kernel", before.kernel)[mask]).all()
    assert (job.experiment.describe()["init"], redrawn.experiment.describe()["init"]) == ("own", "unit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dynamic(sparsity=0.9, updater="deep"), "`updater` must be one of 'set', 'rigl', 'rigl_inverted'"),
        (lambda: Dynamic(sparsity=0.9, drop_fraction=2.0), "`drop_fraction` must be in"),
        (lambda: Dynamic(sparsity=0.9, gradient_batch=0), "`gradient_batch` must be a positive int"),
        (lambda: Dynamic(), "Give either `sparsity` or `masks_from`"),
        (lambda: AtInit(1.5), "`sparsity` must be"),
        (lambda: AtInit(0.9, "best"), "`method` must be one of"),
        (lambda: AtInit(0.9, temperature=0.0), "`temperature` must be a positive float"),
        (lambda: AtInit(0.9, images=0), "`images` must be a positive int or None"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("network", "rate", "decay"), [("lenet5", 0.05, 5e-4), ("mlp", 0.2, 1e-4)])
def test_published_hyperparameters_override_those_of_an_experiment(network, rate, decay):
    files = [config_root() / network / name for name in ("prune.gin", "published.gin")]
    job, _ = make_job(files, ["DATA='digits'"])
    found = {name: job.settings[name] for name in ("steps", "batch", "learning_rate", "weight_decay", "momentum")}
    assert found == {"steps": 11719, "batch": 128, "learning_rate": rate, "weight_decay": decay, "momentum": 0.9}
    schedule = job.experiment.schedule(11719)
    assert (schedule.begin_step, schedule.end_step, schedule.frequency) == (3000, 7000, 100)
    assert job.experiment.sparsity == {"lenet5": 0.95, "mlp": 0.98}[network]
