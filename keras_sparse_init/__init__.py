"""Initialization of sparse neural networks in Keras: scaled by what each unit is really connected to.

The names below are imported when they are first used (PEP 562), so that `import keras_sparse_init` alone imports
neither TensorFlow nor Keras.
"""

from __future__ import annotations

import importlib
from typing import Any

from keras_sparse_init import registration
from keras_sparse_init._version import __version__

_HOME = {
    "ApproximateIsometryInit": "orthogonal_initializers",
    "ConstantSparsity": "mask_updates.pruning",
    "DeltaOrthogonalInit": "orthogonal_initializers",
    "ExactOrthogonalInit": "orthogonal_initializers",
    "MagnitudePruning": "mask_updates.pruning",
    "MaskUpdate": "mask_updates.mask_update",
    "Masked": "layers",
    "OutputRange": "ranges.output_range",
    "PolynomialDecay": "mask_updates.pruning",
    "RigL": "mask_updates.updaters",
    "RigLInverted": "mask_updates.updaters",
    "SET": "mask_updates.updaters",
    "SignalMonitor": "signal.monitor",
    "SignalReport": "signal.report",
    "SparseGlorotNormal": "initializers",
    "SparseGlorotUniform": "initializers",
    "SparseHeNormal": "initializers",
    "SparseHeUniform": "initializers",
    "SparseLecunNormal": "initializers",
    "SparseLecunUniform": "initializers",
    "SparseMuP": "sparse_mup",
    "SparseScaledInit": "initializers",
    "UpdatePruningStep": "tfmot",
    "WeightNorm": "layers",
    "WeightNormConstraint": "constraints",
    "apply_constraints": "constraints",
    "apply_masks": "sparse_model",
    "approximate_isometry": "isometry",
    "calibrate_init": "calibration.calibrate",
    "compare_initializers": "comparison.compare",
    "count_relu_zeros": "signal.relu_zeros",
    "data_dependent_init": "calibration.data_dependent",
    "dense_gradients": "mask_updates.unmasked_gradients",
    "fans": None,
    "fix_precision": "tfmot",
    "fold_weight_norm": "folding",
    "gain": "variance",
    "generalization_gap": "calibration.generalization",
    "kernel_layout": "fans",
    "layer_sparsities": "masks",
    "magnitude_prune": "mask_updates.pruning",
    "masked_kernels": "sparse_model",
    "masks": None,
    "measure_signal": "signal.measure",
    "output_range": "ranges.output_range",
    "prune_at_init": "mask_updates.one_shot",
    "reinitialize": "sparse_model",
    "set_masks": "sparse_model",
    "sparsify": "sparse_model",
    "sparsity_table": "sparse_model",
    "static_wrapper": "tfmot",
    "strip": "sparse_model",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    module = importlib.import_module(f"{__name__}.{home or name}")
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# So that this import is all that loading a model of this package needs.
registration.register_when_imported()
