"""The shape of the code: imports run one way, and nothing heavy is imported before it is needed."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import keras_sparse_init

PACKAGE = Path(keras_sparse_init.__file__).parent

# A module or folder may import those above it, and what is in a folder may import one another one way.
ORDER = (
    "_version",
    "registration",
    "arguments",
    "blocks",
    "fans",
    "variance",
    "sampling",
    "choose",
    "densities",
    "masks",
    "schedules",
    "packing",
    "orthogonal",
    "isometry",
    "table",
    "figures",
    "compat",
    "initializers",
    "orthogonal_initializers",
    "matching",
    "tfmot_wrapper",
    "traversal",
    "tfmot_static",
    "tfmot",
    "layers",
    "masked_kernel",
    "constraints",
    "slots",
    "scaled_rates",
    "base_shapes",
    "sparse_mup",
    "folding",
    "watching",
    "batches",
    "samples",
    "topology",
    "wrapping",
    "sparse_model",
    "mask_updates",
    "signal",
    "calibration",
    "ranges",
    "comparison",
    "training",
    "cli",
)


def name_of(file: Path) -> str:
    """The module's name below the package, with dots."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imported_modules(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, by their names below the package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keras_sparse_init":
            home = node.module.removeprefix("keras_sparse_init").lstrip(".")
            # A name of the package that is no module (a function of `__init__`) would be an import upwards too.
            inside = {f"{home}.{alias.name}".lstrip(".") for alias in node.names}
            names.update(inside if not home else {name if name in MODULES else home for name in inside})
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.startswith("keras_sparse_init.")]
            names.update(name.removeprefix("keras_sparse_init.") for name in ours)
    return names


def first(name: str) -> str:
    return name.split(".")[0]


def test_imports_run_downwards():
    for name, file in MODULES.items():
        if name != "__init__":
            allowed = {*ORDER[: ORDER.index(first(name))], *([first(name)] if "." in name else [])}
            assert {first(imported) for imported in imported_modules(file)} <= allowed, file


def test_imports_within_a_folder_run_one_way():
    graph = {name: imported_modules(file) - {name} for name, file in MODULES.items() if "." in name}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_module_has_a_place_in_the_order():
    modules = {first(name) for name in MODULES} - {"__init__"}
    assert modules == set(ORDER)


def test_only_the_named_modules_import_gin_and_tfmot():
    users = {"gin": set(), "tensorflow_model_optimization": set()}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for root in roots:
                if root.split(".")[0] in users:
                    users[root.split(".")[0]].add(file.name)
    assert users["gin"] <= {"gin_registry.py", "cli.py"}
    assert users["tensorflow_model_optimization"] <= {"tfmot.py", "tfmot_static.py"}


def test_public_names_exist_and_importing_the_package_alone_imports_nothing_heavy():
    code = """
import sys, keras_sparse_init
heavy = {"tensorflow", "keras", "tf_keras", "numpy", "gin", "matplotlib", "jax", "torch"} & set(sys.modules)
assert not heavy, heavy
from keras_sparse_init import gain, masks, fans, kernel_layout, layer_sparsities
heavy = {"tensorflow", "keras", "tf_keras", "gin", "matplotlib", "jax", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in keras_sparse_init.__all__:
        assert getattr(keras_sparse_init, name) is not None
    assert set(keras_sparse_init.__all__) <= set(dir(keras_sparse_init))
