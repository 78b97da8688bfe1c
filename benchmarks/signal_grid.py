"""How long the signal-propagation grid takes, against a new wrapped model for every setting, measured side by side.

    python benchmarks/signal.py [--repeats 30] [--compared 60] [--output benchmarks/results/signal.json]

The grid is that of `keras-sparse-init signal`: 2 families of masks, 5 sparsities, 3 ways to scale the kernels. The
other way is that of a notebook: for every network a tf_keras model whose layers are wrapped in tfmot's
PruneLowMagnitude, masks and kernels assigned, called eagerly on the same inputs. Both draw the same masks and kernels
by the same functions. The grid is measured as a whole, from inputs to statistics, in parts that take turns with some of
the networks the other way; ratios are of the time for a network. CPU time depends less on what else is running.

Bounds: at least 15x faster, the full grid in less than 60 seconds on 2 cores, results equal to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init.training import SignalGrid
from keras_sparse_init.training.signal_report import Network

BOUND, SECONDS, TOLERANCE = 15, 60, 1e-4


class WrappedLeNet5(tf_keras.Model):
    """LeNet-5 with relu after every layer, every layer with a kernel in tfmot's wrapper; returns all activations."""

    def __init__(self) -> None:
        super().__init__()
        layers = tf_keras.layers
        never = tfmot.sparsity.keras.ConstantSparsity(0.0, begin_step=int(1e9))

        def wrapped(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
            return tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=never)

        self.parts = [
            wrapped(layers.Conv2D(6, 5, activation="relu")),
            layers.MaxPooling2D(),
            wrapped(layers.Conv2D(16, 5, activation="relu")),
            layers.MaxPooling2D(),
            layers.Flatten(),
            *(wrapped(layers.Dense(units, activation="relu")) for units in (120, 84, 10)),
        ]
        self.build((None, 28, 28, 3))

    def call(self, inputs: tf.Tensor) -> list[tf.Tensor]:
        """The activations of all layers."""
        activations = [inputs]
        for layer in self.parts:
            activations.append(layer(activations[-1]))
        return activations


def by_a_new_model(grid: SignalGrid, images: tf.Tensor, mask: str, sparsity: float, init: str, repeat: int) -> Network:
    """What the grid measures of a network, the notebook's way."""
    model = WrappedLeNet5()
    wrappers = [layer for layer in model.parts if hasattr(layer, "pruning_vars")]
    values = grid.network_masks(mask, sparsity, repeat), grid.kernels(mask, sparsity, init, repeat)
    for wrapper, new_mask, new_kernel in zip(wrappers, *values, strict=True):
        kernel, mask_variable, _ = wrapper.pruning_vars[0]
        mask_variable.assign(new_mask.astype(np.float32))
        kernel.assign(new_kernel)
    activations = [activation.numpy() for activation in model(images)[-3:]]
    outputs = activations[-1]
    stds = np.concatenate([np.std(activation, axis=0) for activation in activations])
    return Network(mask, sparsity, init, repeat, float(outputs.std()), float(stds.mean()), not outputs.any())


def difference(ours: float, theirs: float) -> float:
    """The relative difference; 0 for two zeros."""
    return abs(ours - theirs) / max(abs(ours), abs(theirs)) if ours != theirs else 0.0


def timed(function, *arguments):
    """`(result, wall seconds, CPU seconds)`."""
    start = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    """Measures both ways, prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--compared", type=int, default=60, help="networks that are measured the other way as well")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "signal.json")
    arguments = parser.parse_args()

    whole = SignalGrid(repeats=arguments.repeats)
    parts = [
        SignalGrid(masks=[m], sparsities=[s], repeats=whole.repeats) for m in whole.masks for s in whole.sparsities
    ]
    images = tf.constant(whole.images())
    by_a_new_model(whole, images, "uniform", 0.9, "unit", 0)  # What is made once in a process is not counted.
    ours, theirs, found = [], [], {}
    order = np.random.default_rng(0)
    for part in parts:  # The first traces the functions, which is counted.
        result, *seconds = timed(part.run)
        ours.append(seconds)
        found |= {(n.mask, n.sparsity, n.init, n.repeat): n for n in result.networks}
        for index in order.choice(len(result.networks), arguments.compared // len(parts), replace=False):
            n = result.networks[index]
            network, *seconds = timed(by_a_new_model, whole, images, n.mask, n.sparsity, n.init, n.repeat)
            theirs.append((network, *seconds))

    networks = len(found)
    own_wall, own_cpu = (sum(column) for column in zip(*ours, strict=True))
    other_wall, other_cpu = (float(np.mean([row[i] for row in theirs])) for i in (1, 2))
    pairs = [(found[n.mask, n.sparsity, n.init, n.repeat], n) for n, *_ in theirs]
    largest = {
        name: max(difference(getattr(a, name), getattr(b, name)) for a, b in pairs)
        for name in ("output_std", "unit_std")
    }
    results = {
        "networks": networks,
        "inputs": whole.inputs,
        "compared": len(theirs),
        "seconds": own_wall,
        "seconds_bound": SECONDS,
        "ms_per_network": {"grid": 1e3 * own_wall / networks, "new model": 1e3 * other_wall},
        "cpu_ms_per_network": {"grid": 1e3 * own_cpu / networks, "new model": 1e3 * other_cpu},
        "ratio": other_wall * networks / own_wall,
        "cpu_ratio": other_cpu * networks / own_cpu,
        "bound": BOUND,
        "largest_relative_difference": largest,
        "same_dead": all(a.dead == b.dead for a, b in pairs),
        "tolerance": TOLERANCE,
    }
    table = Table("way", "networks", "ms per network", "CPU ms per network")
    for way, count in (("grid", networks), ("new model", len(theirs))):
        times = (f"{results[name][way]:.1f}" for name in ("ms_per_network", "cpu_ms_per_network"))
        table.add_row(way, str(count), *times)
    Console(width=100).print(table)
    print(f"the grid of {networks} networks took {own_wall:.1f} s (bound {SECONDS} s for 900)")
    print(f"{results['ratio']:.1f}x faster, {results['cpu_ratio']:.1f}x by CPU time (bound {BOUND}x)")
    print(f"largest relative differences {largest} (bound {TOLERANCE}), dead alike: {results['same_dead']}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
