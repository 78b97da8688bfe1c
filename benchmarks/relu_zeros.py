"""How long counting the zeros of ReLUs takes, as ratios to a forward pass and to a loop over every entry.

    TF_NUM_INTRAOP_THREADS=1 python benchmarks/relu_zeros.py [--repeats 9] [--samples 10000] [--output FILE]

The network of the question, 784-750-320-50-10 with ReLU everywhere, on 10,000 samples. "forward" calls the model on the
same batches and keeps nothing. "loop" looks at every output of the layers in Python (at those of every 20th sample,
times 20) and counts those that are 0, not of which unit; "zeros" and "zeros and patterns" are what `count_relu_zeros`
does with the same outputs, of each unit. CPU times on one thread; each repeat measures all in turn, in another order
each time, and a ratio is the median over repeats. "forward again" tells how far a ratio can be trusted.
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

import keras
import numpy as np
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init import count_relu_zeros
from keras_sparse_init.signal.zero_counts import ZeroCounter, zeros_per_unit

BATCH = 1000
SHARE = 20
BOUNDS = {"count_relu_zeros / forward": 1.25, "loop / zeros": 100}


def loop(outputs: list[np.ndarray]) -> int:
    """Zeros of arrays, entry by entry."""
    zeros = 0
    for array in outputs:
        for row in array:
            for value in row:
                if value == 0:
                    zeros += 1
    return zeros


def counting(outputs: list[np.ndarray]) -> int:
    """The same arrays, zeros of each unit."""
    return sum(
        int(zeros_per_unit(array[start : start + BATCH, None] == 0).sum())
        for array in outputs
        for start in range(0, len(array), BATCH)
    )


def counting_patterns(outputs: list[np.ndarray]) -> ZeroCounter:
    """The same arrays, zeros of each unit and patterns."""
    counter = ZeroCounter()
    for start in range(0, len(outputs[0]), BATCH):
        counter.add({(str(i), 0): array[start : start + BATCH, None] == 0 for i, array in enumerate(outputs)})
    return counter


def measure(library: Any, samples: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each ratio."""
    layers = [library.layers.Dense(units, "relu") for units in (750, 320, 50, 10)]
    model = library.Sequential([library.layers.Input((784,)), *layers])
    x = np.random.default_rng(0).random((samples, 784), dtype=np.float32)
    outputs, value = [], x
    for layer in layers:
        value = np.asarray(layer(value))
        outputs.append(value)

    def forward() -> None:
        for start in range(0, samples, BATCH):
            model(x[start : start + BATCH], training=False)

    ways = {
        "forward": forward,
        "forward again": forward,
        "count_relu_zeros": lambda: count_relu_zeros(model, x, BATCH),
        "loop": lambda: loop([array[::SHARE] for array in outputs]),
        "zeros": lambda: counting(outputs),
        "zeros and patterns": lambda: counting_patterns(outputs),
    }
    assert counting(outputs) == loop(outputs)
    for way in ways.values():
        way()
    times = {name: np.empty(repeats) for name in ways}
    order = np.random.default_rng(1)
    for repeat in range(repeats):
        for name in order.permutation(list(ways)):
            start = time.process_time()
            ways[name]()
            times[name][repeat] = (time.process_time() - start) * (SHARE if name == "loop" else 1)
    pairs = [
        ("count_relu_zeros", "forward"),
        ("forward again", "forward"),
        ("loop", "zeros"),
        ("loop", "zeros and patterns"),
    ]
    return [
        {
            "keras": library.__name__,
            "ratio_of": f"{one} / {other}",
            "ratio": float(np.median(times[one] / times[other])),
            "bound": BOUNDS.get(f"{one} / {other}"),
            "seconds": [float(np.median(times[name])) for name in (one, other)],
        }
        for one, other in pairs
    ]


def main() -> None:
    """Measures all rows, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "relu_zeros.json")
    arguments = parser.parse_args()

    rows = [row for library in (tf_keras, keras) for row in measure(library, arguments.samples, arguments.repeats)]
    table = Table("keras", "ratio of", "seconds", "ratio", "bound")
    for row in rows:
        seconds = " / ".join(f"{value:.3f}" for value in row["seconds"])
        table.add_row(row["keras"], row["ratio_of"], seconds, f"{row['ratio']:.3g}", f"{row['bound'] or ''}")
    Console(width=110).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
