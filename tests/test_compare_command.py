"""`keras-sparse-init compare`: what it prints and leaves."""

import json
import math
import sys

import pytest
from small_jobs import rows_of

from keras_sparse_init import cli, compare_initializers
from keras_sparse_init.training.comparison_files import write_comparison
from keras_sparse_init.training.configs import config_root
from keras_sparse_init.training.gin_registry import make_comparison

_SMALL = ("SIZES=(8, 6, 5)", "SAMPLES=20", "EPOCHS=2", "INITIALIZERS=['zeros', 'he_normal']", "SPARSITY=0.5")
_CONFIG = config_root() / "compare.gin"
_HISTOGRAMS = ("pre_activation", "activation", "activation_gradient", "kernel_gradient")
_PLOTS = {"std.png", "mean.png", *(f"histograms_{quantity}.png" for quantity in _HISTOGRAMS)}
_NUMBERS = {"comparison.csv", "histograms.csv", "results.json", "operative_config.gin"}


def _bindings(*bindings):
    return [argument for binding in bindings for argument in ("--gin_bindings", binding)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The directory that the command leaves, and what it prints."""
    out = tmp_path_factory.mktemp("compared") / "out"
    printed = pytest.MonkeyPatch()
    lines = []
    printed.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
    code = cli.main(["compare", *_bindings(*_SMALL), "--output_dir", str(out)])
    printed.undo()
    assert code == 0, lines
    return out, "\n".join(lines)


def test_the_command_prints_the_table_and_leaves_numbers_and_plots(compared):
    out, printed = compared
    expected = compare_initializers(["zeros", "he_normal"], (8, 6, 5), samples=20, epochs=2, sparsity=0.5)
    assert printed == f"{expected}\n\nresults in {out}"
    assert {path.name for path in out.iterdir()} == _NUMBERS | _PLOTS
    content = json.loads((out / "results.json").read_text())
    assert content["experiment"] == "compare" and content["runs"] == expected.to_dict()["runs"]
    assert content["versions"]["keras"]
    rows = rows_of(out / "comparison.csv")
    assert len(rows) == 4 * 2 * 2
    for row, known in zip(rows, expected.rows, strict=True):
        assert (row["initializer"], int(row["layer"])) == (known.initializer, known.layer)
        assert float(row["activation_std"]) == known.activation_std
    bars = rows_of(out / "histograms.csv")
    known = [bar for h in expected.histograms for bar in zip(h.edges, h.edges[1:], h.counts, strict=False)]
    assert [(float(bar["from"]), float(bar["to"]), int(bar["count"])) for bar in bars] == known


def test_the_operative_config_makes_the_same_comparison_again(compared):
    out, _ = compared
    again, _ = make_comparison([out / "operative_config.gin"])
    assert again.to_dict()["runs"] == json.loads((out / "results.json").read_text())["runs"]


def test_the_config_is_the_functions_defaults_and_a_sparsity():
    comparison, _ = make_comparison([_CONFIG], ["INITIALIZERS=['zeros']", "EPOCHS=1"])
    defaults = compare_initializers(["zeros"], epochs=1, sparsity=0.9)
    assert comparison.settings == defaults.settings
    text = _CONFIG.read_text()
    assert "EPOCHS = 20\n" in text and "INITIALIZERS = None\n" in text


def test_initializers_may_be_named_by_bindings(tmp_path, monkeypatch):
    (tmp_path / "my_initializers.py").write_text(
        "import numpy as np\n\n\ndef ones():\n    return lambda shape, dtype: np.ones(shape, dtype)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    bindings = [*_SMALL, "INITIALIZERS={'ones': @ones(), 'ours': @SparseScaledInit()}", "SparseScaledInit.scale=8.0"]
    comparison, _ = make_comparison([_CONFIG], bindings, ["my_initializers"])
    assert comparison["ones"].values("kernel_mean") == [1, 1]
    assert comparison["ours"].values("kernel_std")[0] == pytest.approx(1, rel=0.5)


def test_without_matplotlib_there_are_all_numbers_and_a_word_on_the_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["compare", *_bindings(*_SMALL), "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("without plots: Plots need matplotlib: pip install matplotlib\n")
    assert {path.name for path in tmp_path.iterdir()} == _NUMBERS


def test_without_a_directory_results_are_under_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *_bindings(*_SMALL, "SEED=3", "ACTIVATION='tanh'")]) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.startswith("compare-tanh-seed3-") and directory.name in capsys.readouterr().out


def test_a_run_that_diverged_is_json_and_csv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    comparison = compare_initializers(["normal(1)"], (9, 9, 9, 9), "linear", epochs=30, samples=9, learning_rate=1.0)
    assert comparison["normal(1)"].diverged_at is not None
    write_comparison(comparison, tmp_path)
    losses = json.loads((tmp_path / "results.json").read_text())["runs"][0]["losses"]
    assert losses[-1] is None and losses[0] > 0
    rows = rows_of(tmp_path / "comparison.csv")
    assert not all(math.isfinite(float(row["kernel_gradient_std"])) for row in rows)
    assert not (tmp_path / "operative_config.gin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file", "lenet5/scratch.gin"], "scratch.gin is for the command 'compare'"),
        (_bindings("SIZES=(5,)"), "`sizes` must be at least two positive ints"),
        (_bindings("ACTIVATION='softmax'"), "`activation` must be one of"),
        (_bindings("EPOCH=3"), "Unknown name 'EPOCH'"),
        (_bindings("compare.epoch=3"), "doesn't have a parameter named 'epoch'"),
        (["--gin_file", "compares.gin"], "No gin file 'compares.gin'"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("keras-sparse-init: error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_train_refuses_the_config_of_a_comparison(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--gin_file", "compare.gin"]) == 2
    assert "compare.gin is for the command 'train'" in capsys.readouterr().err


def test_a_directory_that_holds_anything_is_refused_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    assert cli.main(["compare", "--output_dir", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_directory_that_cannot_be_made_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert cli.main(["compare", "--output_dir", str(tmp_path / "file" / "in" / "it")]) == 2
    assert "would lie in the file" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)  # Whoever runs the tests may be allowed everything.
    assert cli.main(["compare", "--output_dir", str(tmp_path / "new")]) == 2
    assert "no permission for" in capsys.readouterr().err
