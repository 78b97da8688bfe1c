"""How well sparse training does: masks that stay, that are updated, or that are chosen at initialization, on digits.

    python benchmarks/sparse_training.py [--sparsity 0.99 0.995] [--seeds 3] [--epochs 30] [--output FILE]

A perceptron 784-300-100-10 on the embedded digits, SGD with momentum 0.9 and learning rate 0.1, batches of 64. Static
masks and those that are updated start as random ones spread by ERK; one-shot pruning starts from the dense network, all
kernels together, with the weights as they were. For GraSP the logits are divided by 200. Printed are the test accuracy
and the training loss at the end, in the mean over seeds with the standard error.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tf_keras
from rich.console import Console
from rich.table import Table

from keras_sparse_init import SET, MaskUpdate, RigL, RigLInverted, SparseHeNormal, prune_at_init, sparsify
from keras_sparse_init.training import load_data
from keras_sparse_init.training.networks import mlp

BATCH = 64
CROSS_ENTROPY = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def scratch(data: Any, sparsity: float, seed: int) -> Any:
    model = mlp(data.input_shape, data.classes, seed=seed)
    return sparsify(model, sparsity, initializer=SparseHeNormal(), wrapper="masked", seed=seed)


def one_shot(method: str) -> Callable[[Any, float, int], Any]:
    temperature = 200 if method == "grasp" else 1

    def make(data: Any, sparsity: float, seed: int) -> Any:
        model, x, y = scratch(data, 0.0, seed), data.x_train[:512], data.y_train[:512]

        def loss(y: Any, outputs: Any) -> Any:
            return CROSS_ENTROPY(y, outputs / temperature)

        prune_at_init(model, sparsity, method, x, y, loss, keep_layers=True, seed=seed)
        return model

    return make


def run(
    data: Any, make: Callable[[Any, float, int], Any], updater: Any, sparsity: float, seed: int, epochs: int
) -> Any:
    """The test accuracy and the training loss."""
    model = make(data, sparsity, seed)
    tf_keras.utils.set_random_seed(seed)
    model.compile(tf_keras.optimizers.SGD(0.1, momentum=0.9), CROSS_ENTROPY, metrics=["accuracy"])
    update = [] if updater is None else [MaskUpdate(updater, data.x_train, data.y_train)]
    settings = {"batch_size": BATCH, "epochs": epochs, "verbose": 0, "callbacks": update}
    loss = model.fit(data.x_train, data.y_train, **settings).history["loss"][-1]
    return model.evaluate(data.x_test, data.y_test, verbose=0)[1], loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.99, 0.995])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sparse_training.json")
    options = parser.parse_args()

    data = load_data("digits")
    steps = -(-len(data.x_train) // BATCH)
    when = {"end_step": options.epochs * steps * 3 // 4, "frequency": steps}
    ways = {
        "static": (scratch, None),
        "SET": (scratch, SET(**when)),
        "RigL": (scratch, RigL(**when)),
        "RigL, grow_init='scaled'": (scratch, RigL(**when, grow_init="scaled")),
        "RigLInverted": (scratch, RigLInverted(**when)),
        **{f"one shot: {method}": (one_shot(method), None) for method in ("snip", "grasp", "magnitude", "random")},
    }
    rows, table = [], Table("sparsity", "masks", "test accuracy", "training loss", title=f"{options.seeds} seeds")
    for sparsity in options.sparsity:
        for name, (make, updater) in ways.items():
            found = np.array([run(data, make, updater, sparsity, s, options.epochs) for s in range(options.seeds)])
            error = found[:, 0].std(ddof=1) / options.seeds**0.5 if options.seeds > 1 else float("nan")
            accuracy, loss = found.mean(axis=0)
            rows.append(
                {"sparsity": sparsity, "masks": name, "accuracy": accuracy, "standard error": error, "loss": loss}
            )
            table.add_row(f"{sparsity:g}", name, f"{accuracy:.3f} +- {error:.3f}", f"{loss:.3f}")
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"seeds": options.seeds, "epochs": options.epochs, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
