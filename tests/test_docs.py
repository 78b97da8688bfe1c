"""The examples of all docstrings, and the Python of the README, run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import keras_sparse_init

README = pathlib.Path(__file__).parents[1] / "README.md"
MODULES = ["keras_sparse_init"] + sorted(
    module.name for module in pkgutil.walk_packages(keras_sparse_init.__path__, "keras_sparse_init.")
)


def examples_of(name):
    """The module's docstrings that have examples, found without importing it."""
    source = importlib.util.find_spec(name).origin
    return ">>> " in pathlib.Path(source).read_text(encoding="utf-8")


def python_blocks():
    """`(line, code)` of each fenced block of Python; blocks after `<!-- not run -->` are left out."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()]
        if not before.rstrip().endswith("<!-- not run -->"):
            yield pytest.param(before.count("\n") + 2, match[1], id=f"line {before.count(chr(10)) + 2}")


@pytest.mark.parametrize("name", [name for name in MODULES if examples_of(name)])
def test_the_examples_of_a_module_are_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples differ; they are printed above"


@pytest.mark.parametrize("name", [name for name in keras_sparse_init.__all__ if not name.startswith("__")])
def test_every_public_name_has_a_docstring_with_an_example(name):
    public = getattr(keras_sparse_init, name)
    assert public.__doc__, name
    if callable(public):
        assert ">>> " in public.__doc__


@pytest.mark.parametrize(("line", "code"), list(python_blocks()))
def test_the_python_of_the_readme_runs(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    # Empty lines before it, so that a traceback shows the README's line numbers.
    exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)
