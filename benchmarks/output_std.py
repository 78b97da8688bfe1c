"""Does the signal reach the output of a sparse network? The table at the top of the README.

    python benchmarks/output_std.py [--networks 30] [--output benchmarks/results/output_std.json]

LeNet-5 (6, 16, 120, 84, relu) on N(0, 1) inputs of 28x28x1, random masks of the same sparsity in every layer. For each
sparsity and each way of scaling He's normal initialization, the median over networks (new masks, new kernels) of the
standard deviation of the 10 outputs over inputs and units. A healthy network keeps it near that of the dense one.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init import SparseHeNormal, masks, reinitialize, set_masks, sparsify
from keras_sparse_init.training.networks import lenet5

SPARSITIES = (0.0, 0.8, 0.9, 0.95, 0.98)
GRANULARITIES = ("dense", "layer", "unit")


def output_stds(model: tf_keras.Model, x: np.ndarray, granularity: str, sparsity: float, networks: int) -> list[float]:
    """Standard deviation of the output of several networks of one kind."""
    stds = []
    for seed in range(networks):
        set_masks(model, masks.Random(sparsity), seed=seed)
        reinitialize(model, SparseHeNormal(granularity=granularity), seed=seed)
        stds.append(float(np.std(model(x, training=False))))
    return stds


def main() -> None:
    """Measures the grid, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "output_std.json")
    arguments = parser.parse_args()

    x = np.random.default_rng(0).standard_normal((256, 28, 28, 1)).astype(np.float32)
    model = sparsify(lenet5((28, 28, 1), 10), 0.5, method="uniform", seed=0)
    results = {
        granularity: {
            sparsity: float(np.median(output_stds(model, x, granularity, sparsity, arguments.networks)))
            for sparsity in SPARSITIES
        }
        for granularity in GRANULARITIES
    }
    table = Table("initialization", *(f"{sparsity:.0%} sparse" for sparsity in SPARSITIES))
    for granularity, row in results.items():
        table.add_row(granularity, *(f"{row[sparsity]:.2g}" for sparsity in SPARSITIES))
    Console(width=110).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
