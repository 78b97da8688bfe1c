"""Every initialization side by side: the test accuracy of sparse networks that begin with it, and its time.

    python benchmarks/initializers.py [--seeds 5] [--networks mlp lenet5] [--output FILE.json]
    python benchmarks/initializers.py --readme   # writes the table of benchmarks/results/initializers.json to README.md

Networks: the perceptron 784-300-100-10 and LeNet-5, on the embedded digits. Masks: random ("uniform") and
`masks.Heterogeneous` ("heterogeneous"), spread over layers by ERK; the logits stay dense, as many heterogeneous units
have no input at all. Training: 1008 steps of 64 images (45 epochs), momentum 0.9, learning rate 0.05 along a half
cosine; the accuracy after 112 steps (5 epochs) and at the end, with standard errors over seeds. A seed means the same
masks and batches for all but the exact orthogonal kernels, which make their own masks (random ones only).

Initializations: He's normal with the dense fan-in, per layer, per unit, over live inputs; Keras's own default (Glorot
uniform, dense fans) and per unit; LeCun's per unit; approximate isometries and exact orthogonal kernels (gain sqrt 2);
per unit, then LSUV, MetaInit or biases by a quantile on 256 training images; sparse muP, its variances and its learning
rates. Left out: the same rules with the other distribution, and `DeltaOrthogonalInit`, which takes no masks.

Time: of initializing the network for masks that it has, as a ratio to drawing the kernels by Keras's HeNormal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from keras_sparse_init import (
    ApproximateIsometryInit,
    ExactOrthogonalInit,
    SparseGlorotUniform,
    SparseHeNormal,
    SparseLecunNormal,
    SparseMuP,
    calibrate_init,
    compat,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsify,
)
from keras_sparse_init.slots import slots_of
from keras_sparse_init.training import load_data
from keras_sparse_init.training.networks import lenet5, mlp

SPARSITIES, FAMILIES = (0.9, 0.95, 0.98), {"uniform": masks.Random, "heterogeneous": masks.Heterogeneous}
NETWORKS = {"mlp": mlp, "lenet5": lenet5}
FEW, MANY, BATCH, RATE, SAMPLES = 112, 9 * 112, 64, 0.05, 256
GAIN = math.sqrt(2)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "initializers.json"
BEGIN, END = "<!-- benchmarks/initializers.py writes this table -->\n", "<!-- end -->\n"


def drawn(initializer: Any) -> Callable[..., None]:
    """Draws the masked kernels by an initializer."""
    return lambda model, seed, x, y: reinitialize(model, initializer, seed=seed)


def calibrated(method: str) -> Callable[..., None]:
    """Draws them per unit, and calibrates the model on training images."""

    def initialize(model: Any, seed: int, x: Any, y: Any) -> None:
        reinitialize(model, SparseHeNormal(), seed=seed)
        more = {"y": y[:SAMPLES], "loss": LOSS} if method == "metainit" else {}
        calibrate_init(model, x[:SAMPLES], method, n_samples=SAMPLES, seed=seed, **more)

    return initialize


def orthogonal(model: Any, seed: int, x: Any, y: Any) -> None:
    """Makes exact orthogonal kernels of the sparsities that the masks have, and their masks."""
    initializer, values = ExactOrthogonalInit(gain=GAIN, spread=True), []
    for number, kernel in enumerate(masked_kernels(model)):
        # Each row and column has a weight.
        least = max(kernel.shape[-2:]) / math.prod(kernel.shape)
        sparsity = 1 - max(float(kernel.mask_value().mean()), least)
        values.append(initializer.draw_with_mask(kernel.shape, "float32", 1000 * seed + number, sparsity))
    set_masks(model, [mask for _, mask in values])
    for kernel, (value, _) in zip(masked_kernels(model), values, strict=True):
        compat.assign(kernel.kernel, value)


INITIALIZATIONS: dict[str, tuple[str, Callable[..., None]]] = {
    "glorot dense": (
        "Glorot uniform, masks ignored (Keras's default)",
        drawn(SparseGlorotUniform(granularity="dense")),
    ),
    "dense": ("He normal, masks ignored", drawn(SparseHeNormal(granularity="dense"))),
    "layer": ("He normal, per layer", drawn(SparseHeNormal(granularity="layer"))),
    "unit": ("He normal, per unit", drawn(SparseHeNormal())),
    "effective": ("He normal, live inputs", drawn(SparseHeNormal(granularity="effective"))),
    "glorot unit": ("Glorot uniform, per unit", drawn(SparseGlorotUniform())),
    "lecun unit": ("LeCun normal, per unit", drawn(SparseLecunNormal())),
    "isometry": ("approximate isometry", drawn(ApproximateIsometryInit(gain=GAIN))),
    "orthogonal": ("exact orthogonal, own masks", orthogonal),
    "lsuv": ("per unit, then LSUV", calibrated("lsuv")),
    "metainit": ("per unit, then MetaInit", calibrated("metainit")),
    "bias": ("per unit, then biases by a quantile", calibrated("bias")),
    "mup": ("sparse muP, rates too", lambda model, seed, x, y: SparseMuP().initialize(model, seed=seed)),
}


class Trainer:
    """One model that is trained again and again from other kernels and masks, compiled once."""

    def __init__(self, network: str, data: Any) -> None:
        self.data = data
        dense = NETWORKS[network](data.x_train.shape[1:], classes=10, seed=0, keras="keras")
        self.model = sparsify(dense, 0.5, skip=["logits"], seed=0)
        self.first = [compat.to_numpy("w", weight).copy() for weight in self.model.weights]
        self.jit = network == "mlp"  # XLA makes convolutions slower on a CPU.
        self.rates: tuple[float, ...] = ()

    def reset(self, family: str, sparsity: float, seed: int) -> None:
        """The masks of a seed, biases of 0, and the first logits."""
        for weight, value in zip(self.model.weights, self.first, strict=True):
            compat.assign(weight, value)
        kernels = masked_kernels(self.model)
        levels = masks.layer_sparsities({kernel.name: kernel.shape for kernel in kernels}, sparsity)
        rule = FAMILIES[family]
        set_masks(self.model, {name: rule(level) for name, level in levels.items()}, seed=seed)
        logits = self.model.get_layer("logits").kernel
        value = SparseHeNormal().draw(tuple(logits.shape), "float32", None, None, seed)
        compat.assign(logits, value)

    def train(self, seed: int, scaled: bool) -> tuple[float, float]:
        """The test accuracies after few and many steps."""
        optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(RATE, MANY), momentum=0.9)
        rates = (1.0,)
        if scaled:
            optimizer = SparseMuP().optimizer(self.model, optimizer)
            rates = optimizer.rate_multipliers
        if rates != self.rates:
            self.rates, self.optimizer, self.steps = rates, optimizer, self._compiled(optimizer)
        self.optimizer.iterations.assign(0)
        for variable in self.model.trainable_variables:
            for slot, initial in slots_of(self.optimizer, variable):
                slot.assign(tf.fill(slot.shape, initial))
        rng, count = np.random.default_rng(seed), len(self.data.x_train)
        order = np.concatenate([rng.permutation(count) for _ in range(MANY * BATCH // count + 1)])
        order = order[: MANY * BATCH].reshape(MANY, BATCH).astype(np.int32)
        x, y = tf.constant(self.data.x_train), tf.constant(self.data.y_train)
        found = []
        for start in range(0, MANY, FEW):
            # Picked outside the function: XLA copies what it picks from.
            rows = tf.constant(order[start : start + FEW])
            self.steps(tf.gather(x, rows), tf.gather(y, rows))
            if start in (0, MANY - FEW):
                logits = keras.ops.convert_to_numpy(self.model(self.data.x_test))
                found.append(float(np.mean(np.argmax(logits, axis=1) == self.data.y_test)))
        return found[0], found[1]

    def _compiled(self, optimizer: Any) -> Any:
        optimizer.build(self.model.trainable_variables)

        @tf.function(jit_compile=self.jit)
        def steps(batches: Any, targets: Any) -> None:
            for number in tf.range(FEW):
                with tf.GradientTape() as tape:
                    loss = LOSS(targets[number], self.model(batches[number], training=True))
                variables = self.model.trainable_variables
                optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

        return steps


def measured(network: str, seeds: int) -> list[dict[str, Any]]:
    """The rows of a network."""
    trainer, rows = Trainer(network, load_data("digits")), []
    for family in FAMILIES:
        for sparsity in SPARSITIES:
            for name, (_, initialize) in INITIALIZATIONS.items():
                if name == "orthogonal" and family != "uniform":
                    continue
                accuracies, ratios = [], []
                for seed in range(seeds):
                    trainer.reset(family, sparsity, seed)
                    plain = seconds(draw_as_keras, trainer.model)
                    taken = seconds(initialize, trainer.model, seed, trainer.data.x_train, trainer.data.y_train)
                    ratios.append(taken / plain)
                    accuracies.append(trainer.train(seed, scaled=name == "mup"))
                few, many = np.array(accuracies).T
                rows.append({
                    "network": network, "masks": family, "sparsity": sparsity, "init": name,
                    "few": float(few.mean()), "few_error": error(few), "many": float(many.mean()),
                    "many_error": error(many), "time": float(np.median(ratios)),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def draw_as_keras(model: Any) -> None:
    """Kernels of the shapes of the masked ones, by Keras."""
    for kernel in masked_kernels(model):
        keras.initializers.HeNormal(0)(kernel.shape)


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def error(values: np.ndarray) -> float | None:
    """The standard error of a mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def readme_table(results: dict[str, Any]) -> str:
    """The table of README.md: accuracies at 95%, with the best of each column and what is within its error in bold."""
    columns = [(n, f, when) for n in ("mlp", "lenet5") for f in FAMILIES for when in ("few", "many")]
    found = {(r["network"], r["masks"], r["init"]): r for r in results["rows"] if r["sparsity"] == 0.95}
    names = {"mlp": "MLP", "lenet5": "LeNet-5", "uniform": "random", "heterogeneous": "heterogeneous"}
    names |= {"few": "5", "many": "45"}
    heads = [f"{names[n]}, {names[f]}, {names[when]} epochs" for n, f, when in columns]
    lines = ["| at 95% sparsity | " + " | ".join(heads) + " | time |", "|---|" + "--:|" * (len(columns) + 1)]
    best = {}
    for network, family, when in columns:
        top = max((r for (n, f, _), r in found.items() if (n, f) == (network, family)), key=lambda r: r[when])
        best[network, family, when] = top[when] - (top[f"{when}_error"] or 0.0)
    for name, (words, _) in INITIALIZATIONS.items():
        cells = []
        for network, family, when in columns:
            row = found.get((network, family, name))
            if row is None:
                cells.append("")
                continue
            text = f"{100 * row[when]:.1f} ± {100 * (row[f'{when}_error'] or 0.0):.1f}"
            cells.append(f"**{text}**" if row[when] >= best[network, family, when] else text)
        times = [row["time"] for (network, family, init), row in found.items() if init == name]
        time_taken = np.median(times)
        lines.append(f"| {words} | " + " | ".join(cells) + f" | {time_taken:{',.0f' if time_taken >= 10 else '.2g'}} |")
    return "\n".join(lines) + "\n"


def write_readme() -> None:
    """Puts the table of the results into README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    table = readme_table(json.loads(RESULTS.read_text(encoding="utf-8")))
    readme.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")


def main() -> None:
    """Measures, prints a table and writes JSON; or writes the table of README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    if arguments.readme:
        write_readme()
        return
    rows = [row for network in arguments.networks for row in measured(network, arguments.seeds)]
    table = Table("network", "masks", "sparsity", "initialization", "5 epochs", "45 epochs", "time")
    for row in rows:
        cells = [f"{100 * row[when]:.1f} ± {100 * (row[f'{when}_error'] or 0):.1f}" for when in ("few", "many")]
        table.add_row(row["network"], row["masks"], f"{row['sparsity']:.0%}", row["init"], *cells, f"{row['time']:.3g}")
    Console(width=120).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"seeds": arguments.seeds, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
