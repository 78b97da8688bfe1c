"""Settings that must stand before TensorFlow is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_finish(session):
    """Two virtual CPUs for test_distribution: possible only until TensorFlow runs its first operation."""
    if any(item.path.name == "test_distribution.py" for item in session.items):
        import contextlib

        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # Too late: the tests of that file say so.
            two = [tf.config.LogicalDeviceConfiguration()] * 2
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
