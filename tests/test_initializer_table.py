"""The README's table of initializations is what their benchmark has measured, and the benchmark runs."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("initializers_benchmark", ROOT / "benchmarks" / "initializers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_initialization_was_measured_with_five_seeds(benchmark):
    results = json.loads(benchmark.RESULTS.read_text())
    found = {(row["network"], row["masks"], row["sparsity"], row["init"]) for row in results["rows"]}
    wanted = {
        (network, family, sparsity, name)
        for network in benchmark.NETWORKS
        for family in benchmark.FAMILIES
        for sparsity in benchmark.SPARSITIES
        for name in benchmark.INITIALIZATIONS
        if name != "orthogonal" or family == "uniform"
    }
    assert found == wanted and results["seeds"] >= 5


def test_the_readme_has_the_table_of_the_results(benchmark):
    readme = (ROOT / "README.md").read_text()
    table = benchmark.readme_table(json.loads(benchmark.RESULTS.read_text()))
    assert f"{benchmark.BEGIN}{table}{benchmark.END}" in readme
    assert table.count("\n") == len(benchmark.INITIALIZATIONS) + 2


@pytest.mark.parametrize("network", ["mlp", "lenet5"])
def test_the_benchmark_runs(benchmark, network, monkeypatch):
    monkeypatch.setattr(benchmark, "FEW", 2)
    monkeypatch.setattr(benchmark, "MANY", 4)
    monkeypatch.setattr(benchmark, "SPARSITIES", (0.9,))
    names = ("unit", "orthogonal", "mup") if network == "mlp" else ("unit", "lsuv")
    few = {name: benchmark.INITIALIZATIONS[name] for name in names}
    monkeypatch.setattr(benchmark, "INITIALIZATIONS", few)
    rows = benchmark.measured(network, seeds=2)
    assert [(row["masks"], row["init"]) for row in rows] == [
        (family, name)
        for family in ("uniform", "heterogeneous")
        for name in names
        if (family, name) != ("heterogeneous", "orthogonal")
    ]
    for row in rows:
        assert 0 <= row["few"] <= 1 and 0 <= row["many"] <= 1 and row["time"] > 0
    again = benchmark.measured(network, seeds=2)
    assert [(row["few"], row["many"]) for row in again] == [(row["few"], row["many"]) for row in rows]
