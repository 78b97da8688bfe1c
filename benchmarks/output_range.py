"""Can the exact range of a network's outputs be found, and for how sparse a network?

    python benchmarks/output_range.py [--networks 5] [--limit 60] [--output benchmarks/results/output_range.json]

Perceptrons 64-64-32-2 with ReLU, He's initialization for their masks (the same sparsity in every layer, new masks and
kernels for each network), inputs between -1 and 1. For each sparsity: how many activations are open over the box
(median over networks), of how many networks all 4 ends of the 2 outputs are found within the limit, how many ends in
all, the seconds it took (median and the slowest), and the width of the certified bounds in multiples of that of the
attained values: of intervals, linear bounds, the program (medians).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_sparse_init import OutputRange, SparseHeNormal, output_range, sparsify

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)


def network(sparsity: float, seed: int) -> keras.Model:
    """A perceptron with random masks."""
    layers = [keras.layers.Dense(units, activation="relu") for units in (64, 32)]
    model = keras.Sequential([keras.layers.Input((64,)), *layers, keras.layers.Dense(2)])
    return sparsify(model, sparsity, method="uniform", initializer=SparseHeNormal(), seed=seed)


def ends_found(found: OutputRange) -> int:
    """How many ends of the outputs' ranges are known."""
    return int(np.sum(found.lower == found.attained_lower) + np.sum(found.upper == found.attained_upper))


def row_of(sparsity: float, networks: int, limit: float) -> dict[str, Any]:
    """What was measured on networks of one sparsity."""
    ends, results = [], []
    for seed in range(networks):
        model = network(sparsity, seed)
        exact = output_range(model, -1, 1, "exact", time_limit=limit)
        attained = max(np.sum(exact.attained_upper - exact.attained_lower), 1e-30)
        found = {method: output_range(model, -1, 1, method) for method in ("ibp", "crown")} | {"exact": exact}
        ends.append(ends_found(exact))
        results.append(
            (exact.unstable, exact.seconds, *(float(np.sum(f.upper - f.lower) / attained) for f in found.values()))
        )
    medians = dict(
        zip(("open activations", "seconds", "ibp", "crown", "exact"), np.median(results, axis=0).tolist(), strict=True)
    )
    return {
        "sparsity": sparsity,
        "networks": networks,
        "solved": ends.count(4),
        "ends found": ends,
        "slowest": max(seconds for _, seconds, *_ in results),
        **medians,
    }


def main() -> None:
    """Measures all sparsities, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "output_range.json")
    arguments = parser.parse_args()

    rows = [row_of(sparsity, arguments.networks, arguments.limit) for sparsity in SPARSITIES]
    table = Table(
        *("sparsity", "open activations", "solved", "ends found", "seconds", "slowest", "ibp", "crown", "exact")
    )
    for row in rows:
        table.add_row(
            f"{row['sparsity']:.0%}",
            f"{row['open activations']:.0f}",
            f"{row['solved']} of {row['networks']}",
            f"{sum(row['ends found'])} of {4 * row['networks']}",
            f"{row['seconds']:.1f}",
            f"{row['slowest']:.1f}",
            *(f"{row[method]:.2f}" for method in ("ibp", "crown", "exact")),
        )
    Console(width=110).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
