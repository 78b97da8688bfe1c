"""Which devices a job trains on: one, several of this machine, or those of several machines."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

Strategy = Literal["mirrored", "multi_worker"]
STRATEGIES = get_args(Strategy)


class Devices:
    """The devices of a job: one, or those of a strategy of `tf.distribute`.

    Args:
        strategy: "mirrored": all GPUs of this machine, else all of its logical CPU devices. "multi_worker": those of
            all workers that the environment variable TF_CONFIG names. None: the strategy in whose scope this is called,
            or one device.

    Attributes:
        replicas: How many train, each with its part of a batch.
        workers: How many processes they are in.
        is_chief: Whether this process is the one that writes.

    Raises:
        RuntimeError: When TensorFlow has been used before, and "multi_worker" is too late.
    """

    def __init__(self, strategy: str | None) -> None:
        import tensorflow as tf

        self._strategy: Any = None
        if strategy == "mirrored":
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
            self._strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        elif strategy == "multi_worker":
            try:
                self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
            except RuntimeError as error:
                raise RuntimeError(
                    "With `strategy='multi_worker'` the job must be made before anything else of TensorFlow in its "
                    f"process, models and tensors too, and once. TensorFlow says: {error}"
                ) from error
        elif tf.distribute.has_strategy():
            self._strategy = tf.distribute.get_strategy()
        self.replicas = 1 if self._strategy is None else self._strategy.num_replicas_in_sync
        resolver = getattr(self._strategy, "cluster_resolver", None)
        cluster = {} if resolver is None else resolver.cluster_spec().as_dict()
        workers = {job: addresses for job, addresses in cluster.items() if job in ("chief", "worker")}
        self.workers = max(sum(map(len, workers.values())), 1)
        first = "chief" if "chief" in workers else "worker"
        self.is_chief = self.workers == 1 or (resolver.task_type, resolver.task_id) == (first, 0)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The scope in which the model is made, compiled and trained."""
        return contextlib.nullcontext() if self._strategy is None else self._strategy.scope()

    def from_chief(self, number: int) -> int:
        """The number that the chief has given, on all workers; all must call it."""
        if self.workers == 1:
            return number
        import tensorflow as tf

        def value(context: Any) -> Any:
            # All replicas are added up.
            gives = self.is_chief and context.replica_id_in_sync_group == 0
            return tf.constant(number if gives else 0, tf.int64)

        values = self._strategy.experimental_distribute_values_from_function(value)
        return int(self._strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None))

    def shares(self, order: Any, x: Any, y: Any) -> Any:
        """Batches as each replica of several workers gets its part of them, the first that of the first, in `fit`.

        Args:
            order: For each step the numbers of the samples of its batch, of shape (steps, batch).
            x: All samples.
            y: Their targets.
        """
        import tensorflow as tf

        def share(context: Any) -> tf.data.Dataset:
            of_worker = order.reshape(len(order), context.num_input_pipelines, -1)[:, context.input_pipeline_id]
            rows = of_worker.reshape(-1, order.shape[1] // self.replicas)
            images, labels = tf.constant(x), tf.constant(y)
            dataset = tf.data.Dataset.from_tensor_slices(rows)
            return dataset.map(lambda part: (tf.gather(images, part), tf.gather(labels, part))).prefetch(2)

        return self._strategy.distribute_datasets_from_function(share)
