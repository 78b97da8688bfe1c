"""Training jobs on two virtual CPUs, which conftest makes: the same results as on one, the same masks on both."""

import numpy as np
import pytest
from small_jobs import rows_of, small_network, small_settings

from keras_sparse_init.training import Dynamic, Job, Prune, Scratch, train
from keras_sparse_init.training.progress import Progress
from keras_sparse_init.training.run_dir import read_masks


@pytest.mark.parametrize(
    ("experiment", "keras"),
    [(Scratch(0.7), "keras"), (Prune(0.7), "tf_keras"), (Dynamic(0.7, frequency=10), "tf_keras")],
    ids=["scratch", "prune", "rigl"],
)
def test_two_devices_train_as_one(strategy, data, tmp_path, experiment, keras):
    settings = small_settings(steps=30, log_every=10, keras=keras)
    one = train(small_network, data, experiment, output_dir=tmp_path / "one", **settings)
    with strategy.scope():
        two = train(small_network, data, experiment, output_dir=tmp_path / "two", **settings)
    assert two.summary["replicas"] == 2 and "replicas" not in one.summary
    for name, mask in read_masks(one.directory).items():
        np.testing.assert_array_equal(read_masks(two.directory)[name], mask)
    for weight, expected in zip(two.model.get_weights(), one.model.get_weights(), strict=True):
        # The gradient of a batch is the mean of those of its halves, in another order of float32 sums.
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-5)
    rows = [rows_of(run.directory / "metrics.csv") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 4
    for row, expected in zip(rows[1], rows[0], strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-3, abs=1e-5
        )


def test_masks_and_weights_are_bitwise_equal_on_both_and_a_stopped_run_goes_on(strategy, data, tmp_path, monkeypatch):
    settings = small_settings(steps=30, log_every=10, checkpoint_every=10)
    experiment = Dynamic(0.7, frequency=5)
    on_step = Progress.on_step

    def stopping(self, now, logs):
        wrote = on_step(self, now, logs)
        if self.step >= 20:
            raise KeyboardInterrupt
        return wrote

    with strategy.scope():
        whole = Job(small_network, data, experiment, **settings)
        expected = whole.run(tmp_path / "whole").model.get_weights()
        for variable in whole.model.variables:
            first, second = (replica.numpy() for replica in variable.values)
            np.testing.assert_array_equal(first, second)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Progress, "on_step", stopping)
            train(small_network, data, experiment, output_dir=tmp_path / "stopped", **settings)
        resumed = train(small_network, data, experiment, output_dir=tmp_path / "stopped", **settings)
    for weight, other in zip(resumed.model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, other)


def test_bad_input_is_named(strategy, data):
    with strategy.scope(), pytest.raises(ValueError, match="`batch` must be a multiple of the number of devices, 2"):
        Job(small_network, data, Scratch(0.7), **small_settings(batch=15))
    with strategy.scope(), pytest.raises(ValueError, match="`gradient_penalty` must be 0 but on one device.*2 devices"):
        Job(small_network, data, Scratch(0.7), gradient_penalty=0.1)
    with pytest.raises(ValueError, match="`strategy` must be one of 'mirrored', 'multi_worker'"):
        Job(small_network, data, Scratch(0.7), strategy="tpu")
