"""The training job: data, networks, experiments, reports. Names are imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Data": "data",
    "load_data": "data",
    "make_data": "data",
    "lenet5": "networks",
    "mlp": "networks",
    "AtInit": "sparse_experiments",
    "Dense": "experiments",
    "Dynamic": "sparse_experiments",
    "Lottery": "experiments",
    "Prune": "experiments",
    "Scratch": "experiments",
    "SignalGrid": "signal_grid",
    "interpolate": "interpolation",
    "hessian": "hessian_spectrum",
    "Job": "job",
    "TrainResult": "job",
    "train": "job",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
