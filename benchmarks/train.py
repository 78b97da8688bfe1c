"""How long a training step takes: of a statically masked network against a dense one, and of the job against `fit`.

    python benchmarks/train.py [--repeats 25] [--steps 50] [--output benchmarks/results/train.json]

LeNet-5 and the multilayer perceptron 784-300-100-10 on images of 28x28, batches of 64, SGD with momentum, every kernel
masked to 90% sparsity: by `Masked` in both Kerases, and by the static wrapper of tfmot in tf_keras. Each repeat runs
`fit` for the same steps on every variant in turn, so that a busy machine slows all of them; the ratio is the median
over repeats of the two times of a repeat. The ratio of CPU times, beside it, depends less on what else is running.
`jit` is Keras's `jit_compile`: Keras 3 compiles by default, tf_keras does not.

Bound: 1.15 times the dense step.

The training job (`keras-sparse-init train`) with its default settings, dense and 95% sparse, is held against plain
`fit(x, y, batch_size=64)` of the same dense network in tf_keras, compiled with the same optimizer, loss and metric;
beside it stands `fit` on a cached, shuffled and prefetched tf.data.Dataset. Each repeat is an epoch of 200 steps of all
in turn; the first steps of the job, in which its function is traced, do not count, as the others are traced before.
Bounds: 1.6 times as many images a second for LeNet-5 as plain `fit`, 3 times as many for the perceptron; a sparse step
of the job 1.1 times a dense one.
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
from keras_sparse_init.training import Data, Dense, Job, Scratch, lenet5, mlp
from keras_sparse_init.training.fit import Fit

BATCH, SPARSITY, BOUND = 64, 0.9, 1.15
EPOCH = 200  # Steps.
JOB_BOUNDS = {"lenet5": 1.6, "mlp": 3.0}


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


def plain_fits(network: Callable[..., Any], data: Data) -> dict[str, Callable[[], float]]:
    """`fit` of a dense network as users write it, on arrays and on a dataset: seconds per step of an epoch."""
    dataset = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train)).cache()
    dataset = dataset.shuffle(len(data.x_train)).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    runs = {}
    for name, given in (("arrays", (data.x_train, data.y_train, BATCH)), ("dataset", (dataset,))):
        model = network(data.input_shape, data.classes, keras="tf_keras")
        optimizer = tf_keras.optimizers.SGD(tf_keras.optimizers.schedules.CosineDecay(0.05, 10**5), momentum=0.9)
        model.compile(optimizer, tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])

        def run(model: Any = model, given: Any = given) -> float:
            start = time.perf_counter()
            model.fit(*given, verbose=0)
            return (time.perf_counter() - start) / EPOCH

        run()
        runs[f"fit on {name}"] = run
    return runs


def job(network: Callable[..., Any], data: Data, experiment: Any, library: str) -> Callable[[], float]:
    """The job's own loop over an epoch: seconds per step after the first block."""
    made = Job(network, data, experiment, steps=EPOCH + 25, batch=BATCH, learning_rate=0.05, keras=library)
    fit = Fit(made.model, data, made.settings)

    def run() -> float:
        times: list[tuple[int, float]] = []
        fit._train(0, lambda step, logs: times.append((step, time.perf_counter())))
        (first, start), (last, end) = times[0], times[-1]
        return (end - start) / (last - first)

    return run


def measure_jobs(repeats: int) -> list[dict[str, Any]]:
    """A row for each way to train each network: seconds per step, images a second against plain fits."""
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH * EPOCH, 28, 28, 1)).astype(np.float32)
    y = random.integers(0, 10, BATCH * EPOCH).astype(np.int32)
    data = Data("noise", x, y, x[:500], y[:500], classes=10)
    rows = []
    for name, network in (("lenet5", lenet5), ("mlp", mlp)):
        runs = plain_fits(network, data)
        for library in ("tf_keras", "keras"):
            for kind, experiment in (("dense", Dense()), ("sparse", Scratch(0.95))):
                runs[f"job in {library}, {kind}"] = job(network, data, experiment, library)
        order, times = np.random.default_rng(1), {kind: np.empty(repeats) for kind in runs}
        for repeat in range(repeats):
            for kind in order.permutation(list(runs)):
                times[kind][repeat] = runs[kind]()
        for kind, found in times.items():
            dense = times[kind.replace("sparse", "dense")]
            rows.append(
                {
                    "network": name,
                    "kind": kind,
                    "seconds_per_step": float(np.median(found)),
                    "speed": float(np.median(times["fit on arrays"] / found)),
                    "speed_to_dataset": float(np.median(times["fit on dataset"] / found)),
                    "bound": JOB_BOUNDS[name] if kind.endswith("dense") else None,
                    "to_dense": float(np.median(found / dense)) if kind.endswith("sparse") else None,
                }
            )
    return rows


def main() -> None:
    """Measures all rows, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--job_repeats", type=int, default=9)
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
    jobs = measure_jobs(arguments.job_repeats)
    table = Table("network", "training", "ms", "images/s, times fit(x, y)", "bound", "fit(dataset)", "times dense step")
    for row in jobs:
        bound, ratio = row["bound"], row["to_dense"]
        cells = (row["network"], row["kind"], f"{1e3 * row['seconds_per_step']:.2f}", f"{row['speed']:.2f}")
        to_dataset = f"{row['speed_to_dataset']:.2f}"
        table.add_row(*cells, f"{bound}" if bound else "", to_dataset, f"{ratio:.2f}" if ratio else "")
    Console(width=120).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"steps": rows, "jobs": jobs}, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
