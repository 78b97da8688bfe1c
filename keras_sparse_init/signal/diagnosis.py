"""What is wrong with a signal report, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

# How many times smaller or larger a signal may become. Of a healthy network it stays within about 3.
_FACTOR = 10.0
# Samples whose directions agree so well are one sample to what follows: they differ by 1% of their length. What ReLUs
# and pooling over an image put out agrees to 0.999 in healthy networks.
_SAME = 0.9999
# Networks with ReLU have a few dead units by chance, more of them deep inside; one of few samples is often 0.
_DEAD = 0.25
_SAMPLES_FOR_DEAD = 10
# What attention does with its kernels is no chain: queries and keys do not become its outputs.
_BESIDES = ("EinsumDense",)
_OFF_PATH = 0.25


def diagnose(report: Any) -> list[str]:
    """The faults of a `SignalReport`, one sentence each; empty when there is none to be seen.

    Looked at are the pre-activations of layers with kernels (all others say little: pooling and softmax make a signal
    small as they should; those inside attention stand beside each other), their gradients, ReLU zeros and masks.
    Bounds: a factor of 10 in the root mean square, cosine 0.9999 between samples, a quarter of the units of a layer
    dead or on no path. Normalization is taken to bring a signal back to size; batch normalization does so in training.
    """
    faults = [
        *_not_finite(report),
        *_changes(report, "signal", ("shrinks", "grows"), lambda layer: layer.pre.rms if layer.pre else layer.post.rms),
        *_at_the_output(report),
        *_gradients(report),
        *_dead(report),
        *_same_direction(report),
        *_masks(report),
    ]
    if faults and not report.training and any("BatchNormalization" in layer.kind for layer in report.layers):
        faults.append(
            "Batch normalization ran with its running statistics, which at initialization are not those of the data: "
            "see measure_signal(..., training=True) too."
        )
    return faults


def _not_finite(report: Any) -> Iterator[str]:
    for what, entries in (
        ("signal", [(layer.name, _sum(layer.pre) + _sum(layer.post)) for layer in report.layers]),
        ("gradient", [(layer.name, layer.gradient_std or 0.0) for layer in report.layers]),
        ("gradient", [(kernel.name, kernel.gradient_std or 0.0) for kernel in report.kernels]),
    ):
        if bad := [name for name, value in entries if not math.isfinite(value)]:
            others = f", and of {len(bad) - 1} after it" if len(bad) > 1 else ""
            yield f"The {what} of {bad[0]!r} is not finite{others}."


def _sum(spread: Any) -> float:
    return 0.0 if spread is None else spread.mean + spread.std


def _changes(
    report: Any, what: str, verbs: tuple[str, str], size: Callable[[Any], float | None], back: bool = False
) -> Iterator[str]:
    """The largest shrinking and the largest growth between two layers with kernels, one after the other."""
    # A normalization, None here, sets the size anew: what is before it cannot be held against what is after.
    normalized = [layer.has_kernel or "Normalization" in layer.kind for layer in report.layers]
    layers = [
        layer for layer, counts in zip(report.layers, normalized, strict=True) if counts and layer.kind not in _BESIDES
    ]
    entries = [(layer.name, size(layer) if layer.has_kernel else None) for layer in layers]
    entries = [(name, value) for name, value in entries if value is None or math.isfinite(value)]
    for verb, sign in zip(verbs, (1.0, -1.0), strict=True):
        best, start = (0.0, "", ""), None
        for name, value in reversed(entries) if back else entries:
            if value is None:
                start = None
                continue
            level = sign * (math.log(value) if value > 0 else -math.inf)
            if start is not None and start[1] - level > best[0]:
                best = (start[1] - level, start[0], name)
            if math.isfinite(level) and (start is None or level > start[1]):
                start = (name, level)
        change, first, last = best
        if change > math.log(_FACTOR):
            if math.isinf(change):
                yield f"The {what} is 0 at {last!r}; it is not at {first!r}."
            else:
                factor = _times(math.exp(min(change, 700.0)))
                yield f"The {what} {verb} {factor} from {first!r} to {last!r}."


def _times(factor: float) -> str:
    return f"{factor:.0f} times" if factor < 1e4 else f"{factor:.0e} times"


def _as_if_dense(report: Any) -> list[str]:
    """Masked kernels whose weights have the variance that their initializer gives to a dense kernel."""
    found = []
    for kernel in report.kernels:
        if not kernel.scale or not kernel.scale_as_dense:
            continue
        # Between what it should be and what it would be as a dense one, in ratio, with a margin for chance.
        if kernel.scale_for_mask / kernel.scale_as_dense > 1.5 and kernel.scale < math.sqrt(
            kernel.scale_for_mask * kernel.scale_as_dense
        ):
            found.append(kernel.name)
    return found


def _at_the_output(report: Any) -> Iterator[str]:
    if report.output_is_constant and report.samples > 1:
        yield "The output is the same for all samples: the network is dead, or the samples are alike."


def _gradients(report: Any) -> Iterator[str]:
    def size(layer: Any) -> float | None:
        # The length of a sample's gradient: that of an entry falls as there are more entries.
        if layer.gradient_std is None:
            return None
        return math.hypot(layer.gradient_mean, layer.gradient_std) * math.sqrt(layer.size)

    yield from _changes(report, "gradient", ("vanishes, it shrinks", "explodes, it grows"), size, back=True)


def _dead(report: Any) -> Iterator[str]:
    for layer in report.layers if report.samples >= _SAMPLES_FOR_DEAD else ():
        if layer.dead_units is not None and layer.dead_units > _DEAD * layer.units:
            yield f"{layer.dead_units} of {layer.units} units of {layer.name!r} are 0 for every sample."


def _same_direction(report: Any) -> Iterator[str]:
    # A sample that is a single number has no direction but its sign.
    seen = (layer for layer in report.layers if layer.has_kernel and layer.size > 1)
    same = [layer for layer in seen if layer.cosine is not None and layer.cosine > _SAME]
    if same:
        first = same[0]
        yield (
            f"All samples have nearly the same direction at {first.name!r}{' and after' if len(same) > 1 else ''}: "
            f"mean cosine {first.cosine:.4f}."
        )


def _masks(report: Any) -> Iterator[str]:
    names = _as_if_dense(report)
    if names:
        yield (
            f"{_listed(names)} {'have' if len(names) > 1 else 'has'} the variance of a dense kernel, too small for a "
            "mask: initialized as if dense? Use reinitialize(model)."
        )
    for kernel in report.kernels:
        topology = kernel.topology
        if topology is None or topology.off_input is None:
            continue
        if topology.off_input > _OFF_PATH * topology.units:
            yield f"{topology.off_input} of {topology.units} units of {kernel.name!r} are on no path from an input."
        if topology.off_output > _OFF_PATH * topology.units:
            yield f"{topology.off_output} of {topology.units} units of {kernel.name!r} are on no path to an output."


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
