"""What an update of masks costs: against training steps, and against the reference's way to choose connections.

    python benchmarks/mask_updates.py [--repeats 15] [--output benchmarks/results/mask_updates.json]

Everything runs in one process, the ways in turn, so that a busy machine slows all of them; ratios are those of medians.

- LeNet-5, 95% sparse, batches of 128, SGD with momentum: an update of all masks by RigL (gradients of all weights on a
  batch, and the exchange) and by SET, in training steps of `fit`. Bound: 3 steps.
- Kernels of a million weights and more, 95% sparse: choosing which 30% of the connections to exchange, with the same
  new mask, and the whole update of kernel, mask and two slots; as ratios to the reference's way: a full `tf.math.top_k`
  of the drop scores, a scatter, a full `top_k` of the grow scores, a scatter (and there assignments of whole tensors).
  Bound for choosing: 1/50.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init import SET, Masked, RigL, masked_kernels, set_masks, sparsify
from keras_sparse_init.mask_updates.drop_grow import drop_and_grow
from keras_sparse_init.mask_updates.unmasked_gradients import DenseGradients
from keras_sparse_init.masks import random_mask
from keras_sparse_init.slots import slots_of
from keras_sparse_init.training.networks import lenet5

STEPS, FIFTIETH, SPARSITY, FRACTION = 3.0, 0.02, 0.95, 0.3
SHAPES = [(1024, 1024), (3, 3, 512, 512), (4096, 4096)]


def medians(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one call to warm up; the functions take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def against_steps(library: Any, wrapper: str, repeats: int) -> list[dict[str, Any]]:
    """Updates of all masks of LeNet-5, in training steps."""
    name, batch, steps = library.__name__, 128, 20
    model = sparsify(lenet5((28, 28, 1), 10, seed=0, keras=name), SPARSITY, wrapper=wrapper, seed=0)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, 28, 28, 1)).astype(np.float32), rng.integers(0, 10, batch)
    dataset = tf.data.Dataset.from_tensors((x, y)).repeat(steps).cache()
    gradients = DenseGradients(model)
    rigl, random = RigL(end_step=10**6), SET(end_step=10**6)
    timed = medians(
        {
            "steps": lambda: model.fit(dataset, verbose=0, shuffle=False),
            "RigL": lambda: rigl.update(model, 100, gradients(x, y)),
            "SET": lambda: random.update(model, 100),
        },
        repeats,
    )
    step = timed.pop("steps") / steps
    return [
        {"case": f"LeNet-5, {name}, {wrapper}: {way}", "seconds": t, "ratio": t / step, "of": "a step", "bound": STEPS}
        for way, t in timed.items()
    ]


def reference_mask(drop: tf.Tensor, grow: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The new mask by two full sorts."""
    size = tf.size(mask)
    active = tf.cast(tf.reduce_sum(mask), tf.int32)
    dropped = tf.cast(tf.cast(active, tf.float32) * FRACTION, tf.int32)

    def of_the_first(scores: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        order = tf.math.top_k(tf.reshape(scores, [-1]), k=size).indices
        return tf.scatter_nd(order[:, None], tf.cast(tf.range(size) < count, tf.float32), [size])

    kept = of_the_first(drop, active - dropped)
    lifted = tf.where(tf.reshape(kept, mask.shape) == 1, tf.reduce_min(grow) - 1, grow)
    return tf.reshape(kept + of_the_first(lifted, dropped), mask.shape)


def reference_update(kernel: tf.Variable, mask: tf.Variable, slots: list[tf.Variable], gradient: tf.Tensor) -> None:
    """The whole update: weights and slots of new connections become 0."""
    new = reference_mask(tf.abs(mask * kernel), tf.abs(gradient), mask)
    grown = tf.logical_and(new == 1, mask == 0)
    for variable in (kernel, *slots):
        variable.assign(tf.where(grown, 0.0, variable))
    mask.assign(new)


def against_sorts(shape: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Choosing the connections of one kernel, and the whole update, as ratios to the reference."""
    layer = tf_keras.layers.Dense(shape[-1], use_bias=False) if len(shape) == 2 else None
    layer = layer or tf_keras.layers.Conv2D(shape[-1], shape[:2], use_bias=False)
    model = tf_keras.Sequential([tf_keras.layers.Input((*(32,) * (len(shape) - 2), shape[-2])), Masked(layer)])
    set_masks(model, [random_mask(shape, SPARSITY, seed=0)])
    optimizer = tf_keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    (found,) = masked_kernels(model)
    old, rng = found.mask_value(), np.random.default_rng(0)
    # All different: at ties the two ways may choose differently.
    different = np.arange(1, old.size + 1, dtype=np.float32) / old.size
    weights, gradient = (rng.permutation(different).reshape(shape) for _ in range(2))
    weights *= old
    found.kernel.assign(weights)
    kernel, mask = tf.Variable(weights), tf.Variable(old.astype(np.float32))
    slots = [tf.Variable(tf.ones_like(weights)) for _ in slots_of(optimizer, found.kernel)]
    as_tensor = tf.constant(gradient)
    updater = RigL(end_step=-1, drop_fraction=FRACTION, schedule="constant")

    ours = drop_and_grow(weights, old, FRACTION, "largest", gradient).mask
    theirs = reference_mask(tf.abs(weights), tf.abs(as_tensor), mask).numpy() == 1
    differing = int(np.count_nonzero(ours != theirs))
    timed = medians(
        {
            "sorts": lambda: reference_mask(tf.abs(mask * weights), tf.abs(as_tensor), mask),
            "reference": lambda: reference_update(kernel, mask, slots, as_tensor),
            "choosing": lambda: drop_and_grow(weights, old, FRACTION, "largest", gradient),
            "choosing at random": lambda: drop_and_grow(weights, old, FRACTION, "random"),
            "whole update": lambda: updater.update(model, 1, [gradient], optimizer),
        },
        repeats,
    )
    return [
        {
            "case": f"{'x'.join(map(str, shape))}: {way}",
            "seconds": timed[way],
            "ratio": timed[way] / timed[baseline],
            "of": baseline,
            "bound": bound,
            "entries that differ": differing,
        }
        for way, baseline, bound in (
            ("choosing", "sorts", FIFTIETH),
            ("choosing at random", "sorts", FIFTIETH),
            ("whole update", "reference", None),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mask_updates.json")
    options = parser.parse_args()

    rows = []
    for library, wrapper in ((keras, "masked"), (tf_keras, "masked"), (tf_keras, "tfmot")):
        rows += against_steps(library, wrapper, options.repeats)
    for shape in SHAPES:
        rows += against_sorts(shape, max(options.repeats // 3, 3))
    table = Table("case", "ms", "ratio", "of", "bound", "differing", title=f"medians of {options.repeats}")
    for row in rows:
        bound = "" if row["bound"] is None else f"{row['bound']}"
        differing = str(row.get("entries that differ", ""))
        table.add_row(row["case"], f"{row['seconds'] * 1e3:.1f}", f"{row['ratio']:.4f}", row["of"], bound, differing)
    Console().print(table)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "tensorflow": tf.__version__}
    record = {"repeats": options.repeats, "cores": os.cpu_count(), "versions": versions, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
