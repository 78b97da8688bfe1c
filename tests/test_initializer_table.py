"""The README's table of initializations is what their benchmark has measured, and the benchmark runs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
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


def test_what_one_training_leaves_is_no_matter_of_the_next(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "FEW", 3)
    monkeypatch.setattr(benchmark, "MANY", 6)
    data = benchmark.load_data("digits")

    def trained(trainer, seed, name="unit"):
        trainer.reset("uniform", 0.9, seed)
        benchmark.INITIALIZATIONS[name][1](trainer.model, seed, data.x_train, data.y_train)
        accuracies = trainer.train(seed, scaled=name == "mup")
        rates = set(getattr(trainer.optimizer, "rate_multipliers", (1.0,)))
        assert (len(rates) > 1) == (name == "mup")  # That of the masked kernels is 1 / density.
        right = np.argmax(trainer.model.predict(data.x_test, verbose=0), axis=1) == data.y_test
        assert accuracies[1] == pytest.approx(right.mean())
        return trainer.model.get_weights()

    used, fresh = benchmark.Trainer("mlp", data), benchmark.Trainer("mlp", data)
    for seed, name in ((0, "unit"), (2, "mup")):
        trained(used, seed, name)
    for one, other in zip(trained(used, 1), trained(fresh, 1), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_are_calibrated_by_the_method_that_they_name(benchmark, monkeypatch):
    trainer, methods = benchmark.Trainer("mlp", benchmark.load_data("digits")), []
    monkeypatch.setattr(
        benchmark, "calibrate_init", lambda model, x, method, **more: methods.append((method, set(more)))
    )
    for name in ("lsuv", "metainit", "bias"):
        benchmark.INITIALIZATIONS[name][1](trainer.model, 0, trainer.data.x_train, trainer.data.y_train)
    common = {"n_samples", "seed"}
    assert methods == [("lsuv", common), ("metainit", common | {"y", "loss"}), ("bias", common)]
