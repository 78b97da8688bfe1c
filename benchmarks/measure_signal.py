"""How long `measure_signal` and a measurement of `SignalMonitor` take, as ratios to a plain pass, side by side.

    TF_NUM_INTRAOP_THREADS=1 python benchmarks/measure_signal.py [--repeats 15] [--samples 1000] [--output FILE]

Networks of ten Dense layers with ReLU, and 1,000 samples. `measure_signal` is held against a plain eager forward and
backward pass (GradientTape, gradients of all trainable weights), a measurement of the callback against the same pass in
a `tf.function`. Ratios are of CPU times on one thread; each repeat runs all four, in another order each time, and the
ratio is the median over repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init import measure_signal
from keras_sparse_init.signal.measure import Signals

BOUNDS = {"measure_signal": 2.0, "monitor": 1.2}


def measure(library: Any, width: int, samples: int, repeats: int) -> list[dict[str, Any]]:
    """A row for `measure_signal` and one for the monitor, with the ratio to their plain passes."""
    L = library.layers
    hidden = [L.Dense(width, "relu", kernel_initializer="he_normal") for _ in range(9)]
    model = library.Sequential([L.Input((width,)), *hidden, L.Dense(10)])
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, width)).astype(np.float32)
    y = random.integers(0, 10, samples)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    tensors = tf.constant(x), tf.constant(y)
    variables = [v if isinstance(v, tf.Variable) else v.value for v in model.trainable_variables]

    def plain() -> Any:
        with tf.GradientTape() as tape:
            value = loss(tensors[1], model(tensors[0], training=False))
        return tape.gradient(value, variables)

    monitor = Signals(model, x, y, loss, batch_size=samples, seed=0, compiled=True)
    runs = {
        "eager": plain,
        "compiled": tf.function(plain),
        "measure_signal": lambda: measure_signal(model, x, y, loss),
        "monitor": monitor.measure,
    }
    for run in runs.values():
        run()
        run()
    times = {name: np.empty(repeats) for name in runs}
    order = np.random.default_rng(1)
    for repeat in range(repeats):
        for name in order.permutation(list(runs)):
            start = time.process_time()
            runs[name]()
            times[name][repeat] = time.process_time() - start
    rows = []
    for name, other in (("measure_signal", "eager"), ("monitor", "compiled")):
        rows.append(
            {
                "keras": library.__name__,
                "width": width,
                "what": name,
                "milliseconds": 1e3 * float(np.median(times[name])),
                "plain": 1e3 * float(np.median(times[other])),
                "ratio": float(np.median(times[name] / times[other])),
                "bound": BOUNDS[name],
            }
        )
    return rows


def main() -> None:
    """Measures all rows, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 256, 512])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "measure_signal.json")
    arguments = parser.parse_args()

    rows = []
    for library in (tf_keras, keras):
        for width in arguments.widths:
            rows += measure(library, width, arguments.samples, arguments.repeats)
    table = Table("keras", "width", "", "CPU ms", "plain pass", "ratio", "bound")
    for row in rows:
        cells = (row["keras"], str(row["width"]), row["what"], f"{row['milliseconds']:.1f}", f"{row['plain']:.1f}")
        table.add_row(*cells, f"{row['ratio']:.2f}", f"{row['bound']}")
    Console(width=120).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
