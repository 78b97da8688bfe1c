"""The shape of the code: imports run one way, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import keras_sparse_init

PACKAGE = Path(keras_sparse_init.__file__).parent

# A module may import those above it.
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
    "magnitude",
    "drop_grow",
    "schedules",
    "packing",
    "table",
    "figures",
    "zero_counts",
    "piecewise",
    "bounds",
    "extremes",
    "exact_range",
    "patches",
    "unit_programs",
    "unit_solvers",
    "calibration_report",
    "compat",
    "initializers",
    "matching",
    "tfmot_wrapper",
    "traversal",
    "tfmot_static",
    "tfmot",
    "layers",
    "masked_kernel",
    "constraints",
    "slots",
    "folding",
    "watching",
    "rectifiers",
    "batches",
    "relu_zeros",
    "data_dependent",
    "relu_layers",
    "calibrate",
    "generalization",
    "wrapping",
    "sparse_model",
    "mask_callback",
    "pruning",
    "moments",
    "connectivity",
    "links",
    "graph",
    "topology",
    "kernel_scale",
    "diagnosis",
    "signal_plot",
    "signal_report",
    "probe",
    "layer_sums",
    "graph_sums",
    "samples",
    "unmasked_gradients",
    "mask_updaters",
    "mask_updates",
    "one_shot",
    "objective",
    "jacobian",
    "signal",
    "event_log",
    "signal_monitor",
    "affine_layers",
    "affine_chain",
    "ranges",
    "gradients",
    "affine_stack",
    "comparison_plots",
    "comparison_report",
    "comparison",
    "training",
    "cli",
)


def imported_modules(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, by their first name below the package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "keras_sparse_init":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_sparse_init."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("keras_sparse_init."))
    return names


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_downwards():
    for file in PACKAGE.rglob("*.py"):
        module = module_of(file)
        if module == "__init__":
            continue
        allowed = set(ORDER[: ORDER.index(module)])
        if module in ("layers", "training"):
            allowed.add(module)
        # A name of the package that is no module (a function of `__init__`) would be an import upwards too.
        assert imported_modules(file) <= allowed, file


def test_every_module_has_a_place_in_the_order():
    modules = {module_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
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
