"""Sparse orthogonal kernels: how long they take to make, and how networks train that begin with them.

    python benchmarks/orthogonal.py [--repeats 9] [--seeds 5] [--output benchmarks/results/orthogonal.json]

Times: a 1024x1024 kernel at 2% density by either construction, and Keras's dense `Orthogonal` of that shape, in turn;
the ratio is the median over repeats of the two times of a repeat. Accuracy: perceptrons of 784-300-100-10 and of ten
hidden layers of 64, relu or tanh, 95% sparse by ERK, on the embedded digits, 300 steps of 64 with momentum; exact
orthogonal kernels (gain sqrt 2 for relu, 1 for tanh) by their own masks, against random masks with kernels scaled per
unit by He's (relu) or LeCun's (tanh) rule. Mean and standard error over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_sparse_init import ExactOrthogonalInit, SparseScaledInit, sparsify
from keras_sparse_init.orthogonal import CONSTRUCTIONS
from keras_sparse_init.training import Dense, load_data, train

SIZE, DENSITY, SPARSITY, STEPS = 1024, 0.02, 0.95, 300
NETWORKS = {"300-100": (300, 100), "10 x 64": (64,) * 10}


def times(repeats: int) -> list[dict[str, Any]]:
    """Seconds for a kernel, and the ratio to Keras's."""
    makers = {c: ExactOrthogonalInit(1 - DENSITY, construction=c, seed=0) for c in CONSTRUCTIONS}
    makers["Keras's Orthogonal"] = keras.initializers.Orthogonal(seed=0)
    found = {name: np.empty(repeats) for name in makers}
    for maker in makers.values():
        maker((SIZE, SIZE))
    for repeat in range(repeats):
        for name, maker in makers.items():
            start = time.perf_counter()
            maker((SIZE, SIZE))
            found[name][repeat] = time.perf_counter() - start
    other = found["Keras's Orthogonal"]
    return [
        {"maker": name, "seconds": float(np.median(values)), "ratio": float(np.median(values / other))}
        for name, values in found.items()
    ]


def accuracies(activation: str, sizes: tuple[int, ...], name: str, seeds: int) -> dict[str, Any]:
    """The test accuracy of networks that begin in one way."""
    gain = math.sqrt(2) if activation == "relu" else 1.0
    init: Any = SparseScaledInit(gain**2) if name == "unit" else ExactOrthogonalInit(gain=gain, construction=name)
    data, found = load_data("digits"), []
    L = keras.layers
    for seed in range(seeds):
        hidden = [L.Dense(units, activation, name=f"hidden{i}") for i, units in enumerate(sizes)]
        dense = keras.Sequential([L.Input((28, 28, 1)), L.Flatten(), *hidden, L.Dense(10, name="logits")])
        model = sparsify(dense, SPARSITY, initializer=init, seed=seed)
        settings = {"steps": STEPS, "learning_rate": 0.05, "log_every": STEPS, "seed": seed}
        with tempfile.TemporaryDirectory() as directory:
            result = train(model, data, Dense("own"), output_dir=Path(directory) / "run", **settings)
        found.append(result.summary["test_accuracy"])
    error = float(np.std(found, ddof=1) / math.sqrt(seeds)) if seeds > 1 else None
    return {"activation": activation, "init": name, "accuracy": float(np.mean(found)), "standard_error": error}


def main() -> None:
    """Measures, prints two tables and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "orthogonal.json")
    arguments = parser.parse_args()
    made = times(arguments.repeats)
    table = Table("1024x1024, 2% density", "ms", "times Keras's dense one")
    for row in made:
        table.add_row(row["maker"], f"{1e3 * row['seconds']:.0f}", f"{row['ratio']:.3f}")
    Console(width=120).print(table)
    trained = [
        {"network": network, **accuracies(activation, sizes, name, arguments.seeds)}
        for network, sizes in NETWORKS.items()
        for activation in ("relu", "tanh")
        for name in ("unit", *CONSTRUCTIONS)
    ]
    table = Table("network", "activation", "kernels", "test accuracy", "standard error")
    for row in trained:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.1%}"
        table.add_row(row["network"], row["activation"], row["init"], f"{row['accuracy']:.1%}", error)
    Console(width=120).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"times": made, "training": trained}, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
