"""What masks cost: the time to make each kind of mask, as a ratio to Keras's dense HeNormal draw of the same size.

One process; the cases take turns and the medians are compared, so that a busy machine slows all of them alike. At
16 million weights (4096 x 4096) the bounds are

- Random masks, at any density: a quarter of the dense draw;
- constant fan-in, N:M and block masks: half of it.

Usage: python benchmarks/masks.py [--size 4096] [--repeats 7] [--output benchmarks/results/masks.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Its eager draws are done when the call returns; JAX's are not.
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_sparse_init import masks

BASELINE = "keras HeNormal, dense"
QUARTER, HALF = 0.25, 0.5


def cases(size: int) -> dict[str, tuple[float | None, Callable[[], object]]]:
    shape = (size, size)
    he_normal = keras.initializers.HeNormal(seed=1)
    rules = [(QUARTER, f"Random, density {d}", masks.Random(1 - d)) for d in (0.5, 0.1, 0.05, 0.02)]
    rules += [(HALF, f"ConstantFanIn, density {d}", masks.ConstantFanIn(1 - d)) for d in (0.5, 0.05)]
    rules += [(HALF, f"NM {n}:{m}", masks.NM(n, m)) for n, m in ((2, 4), (1, 4), (4, 8), (1, 8), (1, 16))]
    rules += [(HALF, "NM 2:4, last axis", masks.NM(2, 4, axis=-1))]
    rules += [(HALF, f"Block {b}x{b}, density 0.05", masks.Block(0.95, b)) for b in (4, 16)]
    timed = {BASELINE: (None, lambda: he_normal(shape))}
    return timed | {name: (bound, lambda rule=rule: rule(shape, 1)) for bound, name, rule in rules}


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one call to warm up; the functions take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the mask")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "masks.json")
    options = parser.parse_args()

    timed = cases(options.size)
    seconds = measure({name: function for name, (_, function) in timed.items()}, options.repeats)
    table = Table(
        "case", "ms", "ratio", "bound", title=f"{options.size} x {options.size}, medians of {options.repeats}"
    )
    rows = []
    for name, (bound, _) in timed.items():
        ratio = seconds[name] / seconds[BASELINE]
        rows.append({"case": name, "seconds": seconds[name], "ratio": ratio, "bound": bound})
        table.add_row(name, f"{seconds[name] * 1e3:.1f}", f"{ratio:.3f}", "" if bound is None else f"{bound}")
    Console().print(table)

    versions = {"python": platform.python_version(), "numpy": np.__version__, "keras": keras.__version__}
    record = {
        "size": options.size,
        "repeats": options.repeats,
        "backend": keras.backend.backend(),
        "cores": os.cpu_count(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**record, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
