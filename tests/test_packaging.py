"""The wheel: what it holds, and that it trains where there is no checkout."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from keras_sparse_init._version import __version__

_ROOT = Path(__file__).parents[1]


def _run(*command, cwd, **env):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(_ROOT), cwd=target)
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_holds_the_configs_the_digits_the_type_marker_and_the_licences(wheel):
    assert wheel.name == f"keras_sparse_init-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    configs = {path.relative_to(_ROOT / "gin_configs").as_posix() for path in (_ROOT / "gin_configs").rglob("*.gin")}
    assert {f"keras_sparse_init/gin_configs/{name}" for name in configs} <= set(
        names
    ) and "lenet5/scratch.gin" in configs
    assert {"keras_sparse_init/py.typed", "keras_sparse_init/training/digits.npz"} <= set(names)
    info = f"keras_sparse_init-{__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(names)
    assert not [name for name in names if not name.startswith(("keras_sparse_init/", info))]


def test_the_wheel_trains_with_its_own_configs_in_an_empty_directory(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    _run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=empty
    )
    # An editable install in this environment comes after PYTHONPATH; `-P` keeps the empty directory itself out.
    where = _run(
        sys.executable, "-P", "-c", "import keras_sparse_init as k; print(k.__file__)", cwd=empty, PYTHONPATH=str(site)
    )
    assert Path(where.strip()).is_relative_to(site)
    _run(
        *(sys.executable, "-m", "keras_sparse_init.cli", "train", "--gin_file", "mlp/scratch.gin"),
        *("--gin_bindings", "STEPS=3", "--output_dir", "out"),
        cwd=empty,
        PYTHONPATH=str(site),
    )
    summary = json.loads((empty / "out" / "summary.json").read_text())
    assert (summary["network"], summary["steps"], summary["data"]) == ("mlp", 3, "digits")


def test_ci_runs_make_test_and_nothing_else():
    lines = (_ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[1] == "set -euo pipefail" and lines[-1] == "make test" and len(lines) == 4
    assert os.access(_ROOT / ".ci" / "run", os.X_OK)


def test_the_licence_is_the_one_that_the_metadata_names():
    assert "Version 2.0, January 2004" in (_ROOT / "LICENSE").read_text()
    assert re.search(r'^license = "Apache-2.0"$', (_ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    notice = (_ROOT / "NOTICE").read_text()
    assert "digits.npz" in notice and "CC BY 4.0" in notice and "Alpaydin" in notice
