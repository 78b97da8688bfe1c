"""How long a training step of a weight-normalized network takes, as ratios to the plain one, measured side by side.

    TF_NUM_INTRAOP_THREADS=1 python benchmarks/weight_norm.py [--repeats 15] [--steps 20] [--output FILE]

A perceptron 784-1024-1024-10 (batches of 128) and a convnet of four 3x3 convolutions on images of 32x32x3 (batches of
64), plain SGD, every layer with a kernel in `WeightNorm`. Ratios are of CPU times on one thread; each repeat trains
every variant in turn, in another order each time, and the ratio is the median over repeats. "plain again" is a second
plain network: how far it is from 1 is how far the others can be trusted. With tensorflow_probability installed its
`WeightNorm` runs beside ours in tf_keras.
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
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init import WeightNorm

BOUNDS = {("mlp", False): 1.32, ("mlp", True): 1.20, ("convnet", False): 1.06}


def network(library: Any, name: str, wrap: Callable[[Any], Any]) -> Any:
    """The perceptron or the convnet with each layer that has a kernel wrapped."""
    layers = library.layers
    if name == "mlp":
        parts = [layers.Input((784,)), *(wrap(layers.Dense(1024, activation="relu")) for _ in range(2))]
    else:
        convolutions = [wrap(layers.Conv2D(filters, 3, activation="relu")) for filters in (32, 32, 64, 64)]
        parts = [layers.Input((32, 32, 3)), *convolutions, layers.GlobalAveragePooling2D()]
    return library.Sequential([*parts, wrap(layers.Dense(10))])


def measure(library: Any, name: str, jit: bool, repeats: int, steps: int) -> list[dict[str, Any]]:
    """A row for each variant: CPU seconds per step and the ratio to the plain network."""
    wraps = {"plain": lambda layer: layer, "plain again": lambda layer: layer, "WeightNorm": WeightNorm}
    if library is tf_keras and not jit:
        try:
            from tensorflow_probability.python.layers.weight_norm import WeightNorm as OfProbability

            wraps["tensorflow_probability"] = lambda layer: OfProbability(layer, data_init=False)
        except ImportError:
            pass
    batch, shape = (128, (784,)) if name == "mlp" else (64, (32, 32, 3))
    random = np.random.default_rng(0)
    x = random.normal(size=(batch * steps, *shape)).astype(np.float32)
    y = random.integers(0, 10, batch * steps)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch).cache()
    models = {}
    for kind, wrap in wraps.items():
        models[kind] = model = network(library, name, wrap)
        loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(library.optimizers.SGD(0.01), loss, jit_compile=jit)
        model.fit(dataset, epochs=2, verbose=0, shuffle=False)  # Traces the step and fills the cache.
    times = {kind: np.empty(repeats) for kind in models}
    order = np.random.default_rng(1)
    for repeat in range(repeats):
        for kind in order.permutation(list(models)):
            start = time.process_time()
            models[kind].fit(dataset, verbose=0, shuffle=False)
            times[kind][repeat] = time.process_time() - start
    return [
        {
            "keras": library.__name__,
            "network": name,
            "jit": jit,
            "kind": kind,
            "seconds_per_step": float(np.median(times[kind])) / steps,
            "ratio": float(np.median(times[kind] / times["plain"])),
            "bound": BOUNDS.get((name, jit)) if kind == "WeightNorm" else None,
        }
        for kind in models
    ]


def main() -> None:
    """Measures all rows, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "weight_norm.json")
    arguments = parser.parse_args()

    rows = []
    for library in (tf_keras, keras):
        for name, jit in (("mlp", False), ("mlp", True), ("convnet", False)):
            rows += measure(library, name, jit, arguments.repeats, arguments.steps)

    table = Table("keras", "network", "jit", "layers", "CPU ms per step", "times the plain", "bound")
    for row in rows:
        table.add_row(
            row["keras"],
            row["network"],
            "yes" if row["jit"] else "no",
            row["kind"],
            f"{1e3 * row['seconds_per_step']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['bound']}" if row["bound"] else "",
        )
    Console(width=120).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
