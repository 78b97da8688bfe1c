"""The table of a sparse model: what its masks connect, kernel by kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_sparse_init.fans import KernelLayout, fan_in


@dataclasses.dataclass(frozen=True)
class SparsityRow:
    """The mask of one kernel in numbers.

    Attributes:
        name: The kernel's path in the model.
        shape: The kernel's shape.
        size: Number of weights.
        nonzeros: Number of weights whose mask is 1.
        sparsity: Fraction of weights whose mask is 0.
        fan_in_min: Fewest inputs of an output unit.
        fan_in_mean: Mean number of inputs of an output unit.
        fan_in_max: Most inputs of an output unit.
        units: Number of output units (of a recurrent kernel: units of all gates).
        dead_units: Output units without any input.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    nonzeros: int
    sparsity: float
    fan_in_min: int
    fan_in_mean: float
    fan_in_max: int
    units: int
    dead_units: int

    @classmethod
    def of(cls, name: str, mask: np.ndarray, layout: KernelLayout) -> SparsityRow:
        """The row of a boolean mask."""
        inputs = fan_in(mask, layout)
        nonzeros = int(np.count_nonzero(mask))
        return cls(
            name=name,
            shape=tuple(mask.shape),
            size=mask.size,
            nonzeros=nonzeros,
            sparsity=1.0 - nonzeros / mask.size,
            fan_in_min=int(inputs.min()),
            fan_in_mean=float(inputs.mean()),
            fan_in_max=int(inputs.max()),
            units=inputs.size,
            dead_units=int(np.count_nonzero(inputs == 0)),
        )


@dataclasses.dataclass(frozen=True)
class SparsityTotal:
    """The masked kernels of a model taken together."""

    size: int
    nonzeros: int
    sparsity: float
    dead_units: int


@dataclasses.dataclass(frozen=True)
class SparsityTable:
    """Rows of a model's masked kernels in model order; `str()` lays them out for reading."""

    rows: list[SparsityRow]

    @property
    def total(self) -> SparsityTotal:
        """Size, nonzeros, sparsity and dead units over all rows; the sparsity of no rows is 0."""
        size, nonzeros = sum(row.size for row in self.rows), sum(row.nonzeros for row in self.rows)
        sparsity = 1.0 - nonzeros / size if size else 0.0
        return SparsityTotal(size, nonzeros, sparsity, sum(row.dead_units for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The rows and the total as JSON-serializable dicts."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "total": dataclasses.asdict(self.total)}

    def __str__(self) -> str:
        if not self.rows:
            return "no masked kernels: see `Masked` and `sparsify`"
        header = ("kernel", "shape", "sparsity", "nonzeros", "fan-in min", "mean", "max", "dead units")
        lines = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                f"{row.sparsity:.2%}",
                f"{row.nonzeros:,}",
                str(row.fan_in_min),
                f"{row.fan_in_mean:.1f}",
                str(row.fan_in_max),
                f"{row.dead_units} of {row.units}",
            )
            for row in self.rows
        ]
        total = self.total
        lines.append(("total", "", f"{total.sparsity:.2%}", f"{total.nonzeros:,}", "", "", "", str(total.dead_units)))
        return laid_out([header, *lines], left=2)


def laid_out(table: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines of text, columns one below the other.

    Args:
        table: The rows, the header first.
        left: How many columns, from the first on, are names, which stand to the left; numbers stand to the right.

    Example:
        >>> from keras_sparse_init.table import laid_out
        >>> print(laid_out([("kernel", "size"), ("a", "1,200")]))
        kernel   size
        a       1,200
    """
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    padded = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in table
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)
