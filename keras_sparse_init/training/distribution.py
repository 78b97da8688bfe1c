"""Which devices a job trains on."""

from __future__ import annotations

import contextlib
from typing import Any


class Devices:
    """The devices of a job: one, or those of a strategy of `tf.distribute`.

    Args:
        strategy: "mirrored": all GPUs of this machine, else all of its logical CPU devices. None: the strategy in whose
            scope this is called, or one device.

    Attributes:
        replicas: How many train, each with its part of a batch.
    """

    def __init__(self, strategy: str | None) -> None:
        import tensorflow as tf

        self._strategy: Any = None
        if strategy == "mirrored":
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
            self._strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        elif tf.distribute.has_strategy():
            self._strategy = tf.distribute.get_strategy()
        self.replicas = 1 if self._strategy is None else self._strategy.num_replicas_in_sync

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The scope in which the model is made, compiled and trained."""
        return contextlib.nullcontext() if self._strategy is None else self._strategy.scope()
