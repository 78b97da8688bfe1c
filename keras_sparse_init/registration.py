"""Loading models that use this package, without importing more of it than they use.

Each Keras keeps a table of names of custom classes. A light stand-in for each of ours goes into it; the class itself is
imported when a model asks for it. Nothing here imports a Keras: the table is filled as soon as one is there.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from types import ModuleType
from typing import Any

PACKAGE = "keras_sparse_init"

_INITIALIZERS = (
    "SparseGlorotNormal",
    "SparseGlorotUniform",
    "SparseHeNormal",
    "SparseHeUniform",
    "SparseLecunNormal",
    "SparseLecunUniform",
    "SparseScaledInit",
)

_OPTIMIZERS = tuple(f"SparseMuP{name}" for name in ("Adam", "AdamW", "Adamax", "Lion", "Nadam", "RMSprop", "SGD"))

# The class names of each Keras, with the module that each comes from. A layer has one class for each Keras there, an
# optimizer's module several, by the name of that Keras in the module's `CLASSES`.
_SHARED = {
    **dict.fromkeys(_INITIALIZERS, f"{PACKAGE}.initializers"),
    **dict.fromkeys(_OPTIMIZERS, f"{PACKAGE}.scaled_rates"),
    "ApproximateIsometryInit": f"{PACKAGE}.orthogonal_initializers",
    "DeltaOrthogonalInit": f"{PACKAGE}.orthogonal_initializers",
    "ExactOrthogonalInit": f"{PACKAGE}.orthogonal_initializers",
    "Masked": f"{PACKAGE}.layers.masked",
    "WeightNorm": f"{PACKAGE}.layers.weight_norm",
    "WeightNormConstraint": f"{PACKAGE}.constraints",
}
_CLASSES: dict[str, dict[str, str]] = {
    "keras": _SHARED,
    "tf_keras": {
        **_SHARED,
        "StaticPruneLowMagnitude": f"{PACKAGE}.tfmot_static",
        # tfmot does not register its own.
        "PruneLowMagnitude": "tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper",
    },
}


def register_when_imported() -> None:
    """Fills the tables of the Kerases that are imported already, and of others at their import."""
    waiting = set()
    for library in _CLASSES:
        if library in sys.modules:
            register(library)
        else:
            waiting.add(library)
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def register(library: str) -> None:
    """Fills the table of `keras` or `tf_keras`, which must be imported; names already in it stay as they are."""
    saving = getattr(sys.modules[library], "saving", None)
    if saving is None:
        return
    custom_objects = saving.get_custom_objects()
    for name, module in _CLASSES[library].items():
        proxy = _proxy(name, module, library)
        # tf_keras writes the short name into h5 files, the long one elsewhere.
        for key in (name, f"{PACKAGE}>{name}") if module.startswith(PACKAGE) else (name,):
            custom_objects.setdefault(key, proxy)


def _proxy(name: str, module: str, library: str) -> type:
    """A class that makes instances of the class of that name in that module, the one for that Keras."""

    def real() -> Any:
        imported = importlib.import_module(module)
        found = imported.CLASSES[library] if hasattr(imported, "CLASSES") else vars(imported)
        return found[name] if isinstance(found, dict) else found

    def from_config(cls: type, config: dict[str, Any]) -> Any:
        return real().from_config(config)

    return type(
        name,
        (),
        {
            "__doc__": f"Stands for `{module}.{name}` until a model asks for it.",
            "__module__": module,
            "__new__": lambda cls, *args, **kwargs: real()(*args, **kwargs),
            "from_config": classmethod(from_config),
            "get_config": lambda self: {},
        },
    )


class _AfterImport(importlib.abc.MetaPathFinder):
    """An import hook that registers with a Keras right after its import."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        """The module's own spec, whose loader registers when it is done."""
        if name not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                # Only now: TensorFlow looks for tf_keras when it is imported, without importing it.
                self.waiting.discard(name)
                register(name)

            spec.loader.exec_module = exec_module
        return spec
