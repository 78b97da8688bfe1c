"""How long a training step of a statically masked network takes, as ratios to the dense one, measured side by side.

    python benchmarks/train.py [--repeats 25] [--steps 50] [--output benchmarks/results/train.json]

LeNet-5 and the multilayer perceptron 784-300-100-10 on images of 28x28, batches of 64, SGD with momentum, every kernel
masked to 90% sparsity: by `Masked` in both Kerases, and by the static wrapper of tfmot in tf_keras. Each repeat runs
`fit` for the same steps on every variant in turn, so that a busy machine slows all of them; the ratio is the median
over repeats of the two times of a repeat. The ratio of CPU times, beside it, depends less on what else is running.
`jit` is Keras's `jit_compile`: Keras 3 compiles by default, tf_keras does not.

Bound: 1.15 times the dense step.
"""

from __future__ import annotations

import argparse
import json
import os
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

from keras_sparse_init import Masked, masks, set_masks
from keras_sparse_init.tfmot import static_wrapper

BATCH, SPARSITY, BOUND = 64, 0.9, 1.15


def network(library: Any, name: str, wrap: Callable[[Any], Any]) -> Any:
    """LeNet-5 or the perceptron with each layer that has a kernel wrapped."""
    layers = library.layers
    if name == "lenet5":
        parts = [
            layers.Input((28, 28, 1)),
            wrap(layers.Conv2D(6, 5, activation="relu")),
            layers.MaxPooling2D(),
            wrap(layers.Conv2D(16, 5, activation="relu")),
            layers.MaxPooling2D(),
            layers.Flatten(),
            wrap(layers.Dense(120, activation="relu")),
            wrap(layers.Dense(84, activation="relu")),
        ]
    else:
        parts = [
            layers.Input((28, 28, 1)),
            layers.Flatten(),
            wrap(layers.Dense(300, activation="relu")),
            wrap(layers.Dense(100, activation="relu")),
        ]
    return library.Sequential([*parts, wrap(layers.Dense(10))])


def measure(library: Any, name: str, jit: bool, repeats: int, steps: int) -> list[dict[str, Any]]:
    """A row for each way to mask: seconds per step and the ratio to the dense network."""
    wraps = {"dense": lambda layer: layer, "Masked": Masked}
    if library is tf_keras:
        wraps["tfmot, static"] = static_wrapper
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH * steps, 28, 28, 1)).astype(np.float32)
    y = random.integers(0, 10, BATCH * steps)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache()
    models = {}
    for kind, wrap in wraps.items():
        models[kind] = model = network(library, name, wrap)
        if kind != "dense":
            set_masks(model, masks.Random(SPARSITY), seed=0)
        loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(library.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=jit)
        model.fit(dataset, epochs=2, verbose=0, shuffle=False)  # Traces the step and fills the cache.
    times = {kind: np.empty((2, repeats)) for kind in models}
    for repeat in range(repeats):
        # In another order each time: what comes first may find the caches cold.
        for kind in list(models)[:: 1 if repeat % 2 else -1]:
            start = np.array([time.perf_counter(), time.process_time()])
            models[kind].fit(dataset, verbose=0, shuffle=False)
            times[kind][:, repeat] = (time.perf_counter(), time.process_time()) - start
    rows = []
    for kind in models:
        ratio, cpu_ratio = np.median(times[kind] / times["dense"], axis=1)
        rows.append(
            {
                "keras": library.__name__,
                "network": name,
                "jit": jit,
                "kind": kind,
                "seconds_per_step": float(np.median(times[kind][0])) / steps,
                "ratio": float(ratio),
                "cpu_ratio": float(cpu_ratio),
                "bound": None if kind == "dense" else BOUND,
            }
        )
    return rows


def main() -> None:
    """Measures all rows, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train.json")
    arguments = parser.parse_args()

    rows = []
    for library, jit in ((keras, True), (keras, False), (tf_keras, False), (tf_keras, True)):
        for name in ("lenet5", "mlp"):
            rows += measure(library, name, jit, arguments.repeats, arguments.steps)

    table = Table("keras", "network", "jit", "kernels", "ms per step", "times the dense", "CPU time", "bound")
    for row in rows:
        table.add_row(
            row["keras"],
            row["network"],
            "yes" if row["jit"] else "no",
            row["kind"],
            f"{1e3 * row['seconds_per_step']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            f"{row['bound']}" if row["bound"] else "",
        )
    Console(width=120).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
