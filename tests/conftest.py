"""Settings that must stand before TensorFlow is imported."""

import gc
import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# What the tests run on JAX they run once: to compile it well takes longer than it saves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_collection_finish(session):
    """What must happen after the imports of the test modules and before the first test."""
    # The imports have made many objects that stay: a full collection need not look through them each time.
    gc.freeze()
    # Two virtual CPUs for the tests of tf.distribute: possible only until TensorFlow runs its first operation.
    if any(item.path.name.endswith("distribution.py") for item in session.items):
        import contextlib

        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # Too late: those tests say so.
            two = [tf.config.LogicalDeviceConfiguration()] * 2
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)


@pytest.fixture(scope="session")
def strategy():
    """One for all tests: a second MirroredStrategy in a process gets into the way of the first."""
    import tensorflow as tf

    devices = tf.config.list_logical_devices("CPU")
    assert len(devices) == 2, "TensorFlow ran an operation while tests were collected, before it could be split"
    return tf.distribute.MirroredStrategy([device.name for device in devices])


@pytest.fixture(scope="session")
def data():
    """Images of three classes."""
    from small_jobs import small_data

    return small_data()


@pytest.fixture(scope="session")
def result(data, tmp_path_factory):
    """A finished run of a sparse network on these images."""
    from small_jobs import small_network, small_settings

    from keras_sparse_init.training import Scratch, train

    return train(small_network, data, Scratch(0.7), output_dir=tmp_path_factory.mktemp("run"), **small_settings())
