"""Zeros of ReLUs: how many, of which units, and how many patterns of them a data set has. Pure NumPy."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_sparse_init.table import laid_out

# The most ones that a sum of 8 bits can hold.
_ROWS = 255


@dataclasses.dataclass(frozen=True, eq=False)
class ReluZeros:
    """Zeros of a model's ReLUs on a data set; `str()` lays them out for reading.

    A unit is an output of a dense layer, a channel of a convolution: the last axis of a layer's output, the first after
    the samples in a layer with `data_format="channels_first"`. Its outputs at all positions (pixels, time steps) and in
    all calls of its layer count. When a layer without weights (a shared `ReLU()`) is called on several numbers of
    units, these stand one after the other.

    Attributes:
        samples: Number of samples.
        patterns: Number of distinct activation patterns among the samples: two samples have the same pattern when each
            output of each ReLU is 0 for both or for neither.
        per_unit: Layer name to number of zeros of each of its units.
        outputs_per_unit: Layer name to number of outputs of each of its units, zeros and others.
        not_counted: Layer name to what it is, for layers with other activations and those that cannot be seen.
    """

    samples: int
    patterns: int
    per_unit: dict[str, np.ndarray]
    outputs_per_unit: dict[str, np.ndarray]
    not_counted: dict[str, str]

    @property
    def per_layer(self) -> dict[str, int]:
        """Layer name to number of zeros."""
        return {name: int(zeros.sum()) for name, zeros in self.per_unit.items()}

    @property
    def outputs(self) -> dict[str, int]:
        """Layer name to number of outputs, zeros and others."""
        return {name: int(outputs.sum()) for name, outputs in self.outputs_per_unit.items()}

    @property
    def total(self) -> int:
        """Number of zeros of all layers."""
        return sum(self.per_layer.values())

    @property
    def fraction(self) -> float:
        """Zeros of all layers divided by their outputs."""
        return self.total / sum(self.outputs.values())

    @property
    def fraction_per_layer(self) -> dict[str, float]:
        """Layer name to zeros divided by outputs."""
        return {name: zeros / self.outputs[name] for name, zeros in self.per_layer.items()}

    @property
    def dead_units(self) -> dict[str, int]:
        """Layer name to number of units that are 0 for all samples."""
        return {name: int((zeros == self.outputs_per_unit[name]).sum()) for name, zeros in self.per_unit.items()}

    @property
    def always_on_units(self) -> dict[str, int]:
        """Layer name to number of units that are 0 for no sample."""
        return {name: int((zeros == 0).sum()) for name, zeros in self.per_unit.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable values."""
        layers = {
            name: {
                "zeros": self.per_layer[name],
                "outputs": self.outputs[name],
                "fraction": self.fraction_per_layer[name],
                "units": zeros.size,
                "dead_units": self.dead_units[name],
                "always_on_units": self.always_on_units[name],
                "zeros_per_unit": zeros.tolist(),
            }
            for name, zeros in self.per_unit.items()
        }
        return {
            "samples": self.samples,
            "patterns": self.patterns,
            "total": self.total,
            "fraction": self.fraction,
            "layers": layers,
            "not_counted": dict(self.not_counted),
        }

    def __repr__(self) -> str:
        return f"ReluZeros(samples={self.samples}, total={self.total}, patterns={self.patterns})"

    def __str__(self) -> str:
        table = [("layer", "units", "outputs", "zeros", "fraction", "dead units", "always on")]
        for name, row in self.to_dict()["layers"].items():
            counts = (f"{row[key]:,}" for key in ("units", "outputs", "zeros"))
            shares = (f"{row['fraction']:.2%}", f"{row['dead_units']:,}", f"{row['always_on_units']:,}")
            table.append((name, *counts, *shares))
        units = sum(zeros.size for zeros in self.per_unit.values())
        counts = (f"{number:,}" for number in (units, sum(self.outputs.values()), self.total))
        dead, always = sum(self.dead_units.values()), sum(self.always_on_units.values())
        table.append(("total", *counts, f"{self.fraction:.2%}", f"{dead:,}", f"{always:,}"))
        lines = [laid_out(table), f"{self.patterns:,} activation patterns of {self.samples:,} samples"]
        lines += [f"not counted: {name} ({what})" for name, what in self.not_counted.items()]
        return "\n".join(lines)


class ZeroCounter:
    """Counts zeros and patterns batch after batch, in memory that grows by 16 bytes for each sample.

    Attributes:
        counts: (layer name, number of the call) to the zeros of each unit so far.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, int], np.ndarray] = {}
        self._outputs: dict[tuple[str, int], int] = {}
        self._digests = bytearray()

    def add(self, batch: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Counts a batch.

        Args:
            batch: (layer name, number of the call) to where the outputs are 0, a boolean array of shape (samples,
                positions, units).

        Raises:
            ValueError: When a layer has another number of units than in the batches before.
        """
        for key, zeros in batch.items():
            count = zeros_per_unit(zeros)
            if self.counts.setdefault(key, np.zeros_like(count)).size != count.size:
                sizes = f"{count.size} units in one batch and {self.counts[key].size} in another"
                raise ValueError(f"The layer {key[0]!r} must have the same units in all batches. Received: {sizes}")
            self.counts[key] += count
            self._outputs[key] = self._outputs.get(key, 0) + zeros.size // count.size
        packed = [np.packbits(zeros.reshape(len(zeros), -1), axis=1) for zeros in batch.values()]
        for row in np.concatenate(packed, axis=1):
            # 128 bits: among 10^9 samples two different patterns are taken for one with a probability of 10^-21.
            self._digests += hashlib.blake2b(row, digest_size=16).digest()

    def result(self, not_counted: Mapping[str, str]) -> ReluZeros:
        """What was counted so far, layers in the order of their calls."""
        digests = np.frombuffer(bytes(self._digests), np.uint64).reshape(-1, 2)
        calls = {name: [key for key in self.counts if key[0] == name] for name, _ in self.counts}
        outputs = {key: np.full_like(count, self._outputs[key]) for key, count in self.counts.items()}
        return ReluZeros(
            samples=len(digests),
            patterns=_distinct(digests),
            per_unit={name: _joined([self.counts[key] for key in keys]) for name, keys in calls.items()},
            outputs_per_unit={name: _joined([outputs[key] for key in keys]) for name, keys in calls.items()},
            not_counted=dict(not_counted),
        )


def zeros_per_unit(zeros: np.ndarray) -> np.ndarray:
    """How many entries are True of each unit.

    Args:
        zeros: A boolean array of shape (samples, positions, units).

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.signal.zero_counts import zeros_per_unit
        >>> zeros_per_unit(np.array([[[True, False]], [[True, True]]])).tolist()
        [2, 1]
    """
    samples, positions, units = zeros.shape
    rows = zeros.view(np.uint8).reshape(samples, positions * units)
    count = np.zeros(positions * units, np.int64)
    for start in range(0, samples, _ROWS):
        # Sums of single bytes are ten times as fast as others.
        count += rows[start : start + _ROWS].sum(axis=0, dtype=np.uint8)
    return count.reshape(positions, units).sum(axis=0)


def _joined(calls: list[np.ndarray]) -> np.ndarray:
    """What several calls of a layer count: together for the same units."""
    same = len({count.size for count in calls}) == 1
    return np.sum(calls, axis=0) if same else np.concatenate(calls)


def _distinct(rows: np.ndarray) -> int:
    rows = rows[np.lexsort(rows.T)]
    return 1 + int((rows[1:] != rows[:-1]).any(axis=1).sum())
