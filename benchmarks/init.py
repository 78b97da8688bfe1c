"""How long initializing a sparse kernel takes, as ratios to Keras's dense HeNormal, measured side by side.

    python benchmarks/init.py [--repeats 9] [--output benchmarks/results/init.json]

Every row alternates the two in one process and compares medians. Ours is the default truncated normal, per-unit
fan-in, returned as a TensorFlow tensor, with the mask given (as the uint8 array that rules return, and as the float32
array that pruning wrappers hold); lists of kernels on two threads, as `reinitialize` draws a model's. "limit" is one
pass on two threads that reads the mask and writes an output of that size: no initializer can take less.

Bounds (the uint8 mask): 4096x4096 at 95% sparsity at least 6x faster, at 98% 10x, dense 1.3x; the convolutions of a
ResNet-50 at 95% 6x; 784x300 at 95% 2000x faster than a Python loop that draws every nonzero with TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from keras_sparse_init import SparseHeNormal, masks
from keras_sparse_init.blocks import map_blocks, row_blocks


def resnet50_kernels() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 53 convolution kernels."""
    shapes, channels = [(7, 7, 3, 64)], 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                shapes.append((1, 1, channels, 4 * width))
            channels = 4 * width
    return shapes


def loop_over_nonzeros(mask: np.ndarray) -> tf.Tensor:
    """He's normal initialization of a masked matrix, one nonzero after another, as a straightforward script does it."""
    values = np.zeros(mask.shape, np.float32)
    for i, j in zip(*np.nonzero(mask), strict=True):
        fan_in = np.count_nonzero(mask[:, j])
        values[i, j] = tf.random.truncated_normal([], stddev=np.sqrt(2.0 / fan_in) / 0.87962566)
    return tf.constant(values)


def read_and_write(kernel_masks: list[np.ndarray]) -> None:
    """The least work: every mask read once, an output of every kernel written once."""
    for mask in kernel_masks:
        flat, out = mask.reshape(-1), np.empty(mask.size, np.float32)
        parts = row_blocks(mask.size, 1)
        map_blocks(lambda part, flat=flat, out=out: np.copyto(out[part], flat[part]), parts)


def medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turns after one round that does not count."""
    times = np.empty((repeats + 1, len(functions)))
    for row in times:
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            row[i] = time.perf_counter() - start
    return np.median(times[1:], axis=0).tolist()


def measure(name: str, shapes: list[tuple[int, ...]], sparsity: float, dtype: str, bound: float | None, repeats: int):
    """A row: our initializer against Keras's dense one on a list of kernels."""
    ours, keras_he = SparseHeNormal(seed=0), keras.initializers.HeNormal(seed=0)
    kernel_masks = [masks.random_mask(shape, sparsity, seed=0).astype(dtype) for shape in shapes]
    dense = [None] * len(shapes)
    baseline, seconds, limit = medians(
        repeats,
        lambda: [keras_he(shape) for shape in shapes],
        # As `reinitialize` draws the kernels of a model.
        lambda: map_blocks(lambda s, m: ours(s, mask=m), shapes, kernel_masks if sparsity else dense),
        lambda: read_and_write(kernel_masks),
    )
    return {
        "kernel": name,
        "sparsity": sparsity,
        "mask": dtype if sparsity else "none",
        "baseline": "keras HeNormal, dense",
        "baseline_seconds": baseline,
        "seconds": seconds,
        "speedup": baseline / seconds,
        "bound": bound,
        "times_the_limit": seconds / limit,
    }


def measure_loop(repeats: int) -> dict[str, object]:
    """The row of the Python loop over nonzeros."""
    mask = masks.random_mask((784, 300), 0.95, seed=0)
    ours = SparseHeNormal(seed=0)
    loop = medians(1, lambda: loop_over_nonzeros(mask))[0]
    seconds, limit = medians(max(repeats, 20), lambda: ours(mask.shape, mask=mask), lambda: read_and_write([mask]))
    return {
        "kernel": "784x300",
        "sparsity": 0.95,
        "mask": "uint8",
        "baseline": "Python loop over nonzeros",
        "baseline_seconds": loop,
        "seconds": seconds,
        "speedup": loop / seconds,
        "bound": 2000,
        "times_the_limit": seconds / limit,
    }


def main() -> None:
    """Measures all rows, prints them as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "init.json")
    arguments = parser.parse_args()

    square, resnet = [(4096, 4096)], resnet50_kernels()
    rows = [
        measure("4096x4096", square, sparsity, dtype, bound if dtype == "uint8" else None, arguments.repeats)
        for sparsity, bound in ((0.95, 6), (0.98, 10))
        for dtype in ("uint8", "float32")
    ]
    rows.append(measure("4096x4096", square, 0.0, "uint8", 1.3, arguments.repeats))
    rows += [
        measure("ResNet-50 convolutions", resnet, 0.95, dtype, bound, arguments.repeats)
        for dtype, bound in (("uint8", 6), ("float32", None))
    ]
    rows.append(measure_loop(arguments.repeats))

    table = Table(
        "kernel", "sparsity", "mask", "against", "baseline ms", "ours ms", "speedup", "bound", "times the limit"
    )
    for row in rows:
        table.add_row(
            row["kernel"],
            f"{row['sparsity']:.0%}",
            row["mask"],
            row["baseline"],
            f"{1e3 * row['baseline_seconds']:.1f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['speedup']:.1f}x",
            f"{row['bound']}x" if row["bound"] else "",
            f"{row['times_the_limit']:.1f}",
        )
    Console(width=140).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
