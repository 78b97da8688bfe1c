"""Finished runs side by side."""

import csv
import json
import math
import sys

import numpy as np
import pytest

from keras_sparse_init import cli
from keras_sparse_init.training import plots
from keras_sparse_init.training.report import FILES, format_table, report
from keras_sparse_init.training.runs import group_runs, mean_and_error, read_runs

_ROW = {
    "name": "conv1",
    "shape": [5, 5, 1, 6],
    "sparsity": 0.65,
    "fan_in_min": 4,
    "fan_in_mean": 8.667,
    "fan_in_max": 13,
    "dead_units": 2,
}
_METRICS = "step,loss,train_accuracy,test_accuracy,gradient_norm\n0,2.4,0.1,0.1,0.5\n100,0.4,0.9,{accuracy},2.0\n"


def _run(directory, metrics=None, **changes):
    directory.mkdir(parents=True)
    summary = {
        "network": "lenet5",
        "experiment": "scratch",
        "init": "unit",
        "sparsity": 0.95,
        "seed": 0,
        "steps": 2000,
        "batch": 64,
        "learning_rate": 0.1,
        "keras": "tf_keras",
        "parameters": 44426,
        "architecture": "0123456789abcdef",
        "data": "digits",
        "method": "erk",
        "test_images": 360,
        "early": {"step": 100, "test_accuracy": 0.85},
        "test_accuracy": 0.9611,
        "loss": 0.00025,
        "gradient_norm": {"initial": 0.5, "mean": 2.0},
        "distance_from_init": {"absolute": 3.0, "relative": 1.5},
        "mask_churn": 0.25,
        "seconds": 12.34,
        "table": {"rows": [_ROW]},
    } | changes
    (directory / "summary.json").write_text(json.dumps(summary))
    text = _METRICS.format(accuracy=summary["test_accuracy"]) if metrics is None else metrics
    (directory / "metrics.csv").write_text(text)
    return directory


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of one initialization, one run of another."""
    accuracies = {0: 0.90, 1: 0.92, 2: 0.97}
    unit = [_run(tmp_path / f"unit-{s}", seed=s, test_accuracy=a) for s, a in accuracies.items()]
    return [*unit, _run(tmp_path / "dense", init="dense", test_accuracy=0.5)]


def _csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_seeds_are_one_row_with_the_mean_and_its_standard_error(seeds):
    lines = report(seeds).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("network"))
    # (0.90 + 0.92 + 0.97) / 3 = 0.93; s^2 = (9 + 1 + 16) e-4 / 2; s / sqrt 3 = 0.02082.
    assert lines[header + 2].split() == [
        *("lenet5", "scratch", "unit", "95.00%", "0,1,2"),
        *("85.00%", "±", "0.00%", "@100", "93.00%", "±", "2.08%", "0.0003", "±", "0.0000"),
        *("0.5", "±", "0", "2", "±", "0", "1.5", "±", "0", "25.0%", "±", "0.0%", "12.3", "3", "runs"),
    ]
    assert lines[header + 3].split() == [
        *(
            "lenet5",
            "scratch",
            "dense",
            "95.00%",
            "0",
            "85.00%",
            "@100",
            "50.00%",
            "0.0003",
            "0.5",
            "2",
            "1.5",
            "25.0%",
        ),
        *("12.3", str(seeds[3])),
    ]
    assert "360 test images (one is 0.28%)" in report(seeds) and "± is the standard error over seeds" in report(seeds)
    assert "±" not in report([seeds[0]])


def test_settings_that_differ_are_columns_and_the_others_are_said_once(tmp_path):
    runs = [_run(tmp_path / str(rate), learning_rate=rate) for rate in (0.1, 0.05)]
    lines = report(runs).splitlines()
    assert lines[0] == "all with data digits, method erk, steps 2000, batch 64, keras tf_keras, parameters 44426"
    assert "learning_rate" in lines[2]
    assert [line.split()[4] for line in lines[4:6]] == ["0.1", "0.05"]
    pruned = [
        _run(tmp_path / f"p{begin}", experiment="prune", pruning={"begin_step": begin, "power": 3}) for begin in (5, 9)
    ]
    assert "prune.begin_step" in report(pruned) and "prune.power 3" in report(pruned).splitlines()[0]
    # What one experiment has and the other has not is told by the experiment.
    both = [pruned[0], _run(tmp_path / "s", initializer={"scale": 2.0})]
    header = report(both).splitlines()[2]
    assert "prune.power" not in report(both) and "init.scale" not in report(both) and "experiment" in header
    dynamic = [_run(tmp_path / f"r{n}", experiment="rigl", updates={"frequency": n}) for n in (50, 100)]
    assert "updates.frequency" in report(dynamic)


def test_a_run_counts_once_however_it_is_named_and_a_repeated_one_not_at_all(tmp_path, seeds):
    assert report([tmp_path, seeds[0]]) == report([tmp_path])
    again = _run(tmp_path / "zz", seed=1, test_accuracy=0.1)
    text = report([*seeds, again])
    assert f"{again} is left out: it has the settings and the seed of {seeds[1]}, though not its numbers" in text
    assert "93.00% ± 2.08%" in text
    copy = _run(tmp_path / "copy", seed=1, test_accuracy=0.92)
    assert f"{copy} is left out: it has the settings and the seed of {seeds[1]}\n" in report([*seeds, copy])


@pytest.mark.parametrize("change", [{"parameters": 9}, {"architecture": "ff"}, {"initializer": {"scale": 1.0}}])
def test_networks_and_initializers_that_differ_are_no_seeds_of_one_another(tmp_path, change):
    lines = report([_run(tmp_path / "a"), _run(tmp_path / "b", seed=1, **change)]).splitlines()
    (name, value), *_ = change.items()
    value = value["scale"] if name == "initializer" else value
    assert ("init.scale" if name == "initializer" else name) in lines[2]
    assert lines[5].split()[4] == str(value) != lines[4].split()[4]


def test_the_architecture_is_said_only_where_nothing_else_tells_networks_apart(tmp_path):
    runs = [_run(tmp_path / n, weight_norm=n, architecture=n) for n in ("reparam", "constraint")]
    header = report(runs).splitlines()[2]
    assert "weight_norm" in header and "architecture" not in header


def test_early_accuracies_of_other_steps_have_no_mean(tmp_path):
    runs = [_run(tmp_path / str(step), seed=step, early={"step": step, "test_accuracy": 0.5}) for step in (10, 100)]
    report(runs, tmp_path / "out")
    (row,) = _csv(tmp_path / "out" / "report.csv")
    assert (row["early_step"], row["early_test_accuracy"], row["early_test_accuracy_error"]) == ("", "", "")
    assert "50.00%" not in report(runs)


def test_runs_of_an_older_version_lack_the_gradient_and_nothing_else(tmp_path):
    metrics = "step,loss,train_accuracy,test_accuracy\n100,0.4,0.9,0.9\n"
    old = _run(tmp_path / "old", metrics, gradient_norm=None, distance_from_init=None, mask_churn=None)
    assert report([old]).splitlines()[4].split()[-6:-1] == ["-", "-", "-", "-", "12.3"]
    report([old], tmp_path / "out")
    (row,) = _csv(tmp_path / "out" / "curves.csv")
    assert (row["test_accuracy"], row["gradient_norm"], row["gradient_norm_error"]) == ("0.9", "", "")


def test_files_have_the_numbers_and_the_plots_are_pictures(seeds, tmp_path):
    out = tmp_path / "report"
    assert report(seeds, out) == report(seeds)
    assert {path.name for path in out.iterdir()} == set(FILES)
    unit, dense = _csv(out / "report.csv")
    assert (unit["runs"], unit["seeds"], unit["init"], unit["sparsity"]) == ("3", "0,1,2", "unit", "0.95")
    assert float(unit["test_accuracy"]) == pytest.approx(0.93)
    assert float(unit["test_accuracy_error"]) == pytest.approx(math.sqrt(13e-4 / 3))
    assert (dense["runs"], dense["test_accuracy_error"]) == ("1", "")
    assert (unit["group"], unit["early_step"]) == ("init unit", "100")
    curves = {(row["group"], int(row["step"])): row for row in _csv(out / "curves.csv")}
    assert set(curves) == {(f"init {init}", step) for init in ("unit", "dense") for step in (0, 100)}
    assert float(curves["init unit", 100]["test_accuracy"]) == pytest.approx(0.93)
    assert curves["init unit", 100]["n"] == "3" and float(curves["init unit", 0]["gradient_norm"]) == 0.5
    for name in ("curves.png", "accuracy.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_the_figures_draw_a_line_for_each_group_at_its_means(seeds, tmp_path):
    sparser = _run(tmp_path / "sparser", sparsity=0.98, test_accuracy=0.7)
    groups, _ = group_runs(read_runs([*seeds, sparser]))
    figure = plots.figure_of_curves(groups)
    accuracy, loss, gradient = figure.axes
    drawn = [line.get_ydata() for line in accuracy.lines]
    np.testing.assert_allclose(drawn, [[0.1, 0.93], [0.1, 0.5], [0.1, 0.7]])
    assert list(accuracy.lines[0].get_xdata()) == [0, 100]
    assert (accuracy.get_yscale(), loss.get_yscale(), gradient.get_yscale()) == ("linear", "log", "log")
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["init unit, 95.00% sparse", "init dense, 95.00% sparse", "init unit, 98.00% sparse"]
    (axes,) = plots.figure_of_accuracies(groups).axes
    bars = [container.lines[2][0].get_segments() for container in axes.containers]
    np.testing.assert_allclose(bars[0][0], [[0.95, 0.93 - 0.02082], [0.95, 0.93 + 0.02082]], atol=1e-5)
    # A single run has no error, not one of 0.
    assert [[len(segment) > 0 for segment in segments] for segments in bars] == [[True, False], [False]]
    series = {container.get_label(): list(container[0].get_ydata()) for container in axes.containers}
    assert series == {"init unit": pytest.approx([0.93, 0.7]), "init dense": [0.5]}


def test_a_loss_of_zero_and_errors_larger_than_the_mean_can_be_drawn(tmp_path):
    metrics = "step,loss,train_accuracy,test_accuracy,gradient_norm\n0,{},0.1,0.1,{}\n100,{},0.9,0.9,nan\n"
    for name, first, second in (("zero", 0.0, 0.1), ("wide", 1.0, 0.1)):
        runs = [
            _run(tmp_path / f"{name}{seed}", metrics.format(first, 10.0**seed, second), seed=seed) for seed in (0, 3)
        ]
        report(runs, tmp_path / f"{name}-report")


def test_a_network_without_gradient_leaves_the_axis_of_the_others_logarithmic(tmp_path):
    metrics = "step,loss,train_accuracy,test_accuracy,gradient_norm\n0,2.3,0.1,0.1,{}\n100,0.1,0.9,0.9,1e-3\n"
    runs = [_run(tmp_path / str(norm), metrics.format(norm), init=f"i{norm}") for norm in (0.0, 5.0)]
    gradient = plots.figure_of_curves(group_runs(read_runs(runs))[0]).axes[2]
    assert gradient.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in gradient.lines] == [[1e-3], [5.0, 1e-3]]


@pytest.mark.parametrize("count", [1, 4, 30])
def test_legends_fit_into_their_figures(tmp_path, count):
    dense = _run(tmp_path / "dense", experiment="dense", init="own", method="none", sparsity=0.0, data="$a_{b$.npz")
    pruned = {"begin_step": None, "power": 3}
    runs = [_run(tmp_path / str(i), learning_rate=0.01 * (i + 1), init=f"i{i}", pruning=pruned) for i in range(count)]
    groups, _ = group_runs(read_runs([dense, *runs]))
    assert not any("None" in label for label in plots.labels(groups))
    for figure in (plots.figure_of_curves(groups), plots.figure_of_accuracies(groups)):
        figure.savefig(tmp_path / "drawn.png")
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0
        assert all(axes.get_window_extent().height > 200 for axes in figure.axes)
        looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
        assert len(looks) >= count + 1


def test_reports_are_not_overwritten(seeds, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "curves.csv").write_text("precious")
    with pytest.raises(FileExistsError, match="curves.csv' is there already"):
        report(seeds, out)
    assert [path.name for path in out.iterdir()] == ["curves.csv"] and (out / "curves.csv").read_text() == "precious"


def test_without_matplotlib_there_are_tables_and_no_files(seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "93.00%" in report(seeds)
    assert cli.main(["report", *map(str, seeds), "--output_dir", str(tmp_path / "out")]) == 2
    assert "Plots need matplotlib: pip install matplotlib\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_with_the_same_layers_share_their_table_and_others_have_their_own(tmp_path):
    same = [_run(tmp_path / "unit"), _run(tmp_path / "layer", init="layer")]
    assert report(same).count("conv1") == 1
    assert "conv1  5x5x1x6    65.00%           4   8.7   13           2" in report(same)
    other = _run(tmp_path / "other", init="dense", table={"rows": [_ROW | {"sparsity": 0.5}]})
    text = report([*same, other])
    assert text.count("conv1") == 2 and f"layers of {same[0]}, {same[1]}\n" in text and f"layers of {other}\n" in text
    seed = _run(tmp_path / "seed", seed=1, table={"rows": [_ROW | {"sparsity": 0.6}]})
    for runs in ([*same, seed], [seed, *same]):
        assert "60.00%" not in report(runs)  # The lowest seed of a row shows its layers.


def test_a_directory_of_runs_stands_for_the_runs_in_it(tmp_path):
    for name in ("b", "a"):
        _run(tmp_path / name, init=name)
    assert report([tmp_path]) == report([tmp_path / "a", tmp_path / "b"])


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no summary.json"):
        report([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such directory"):
        report([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="At least one"):
        report([])
    _run(tmp_path / "old")
    (tmp_path / "old" / "summary.json").write_text('{"network": "lenet5"}')
    with pytest.raises(ValueError, match="lacks 'data', .*'test_images'"):
        report([tmp_path / "old"])
    (tmp_path / "old" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="not a run's summary"):
        report([tmp_path / "old"])
    (tmp_path / "old" / "summary.json").write_text("3")
    with pytest.raises(ValueError, match="old' lacks 'network'"):
        report([tmp_path / "old"])
    for change, name in (
        ({"early": {}}, "early.step"),
        ({"table": {}}, "table.rows"),
        ({"table": {"rows": [{}]}}, "table.rows.shape"),
    ):
        with pytest.raises(ValueError, match=f"lacks .*'{name}'"):
            report([_run(tmp_path / name, **change)])


@pytest.mark.parametrize(
    "metrics",
    [
        *("loss\n0.5\n", "step,loss\n1,half\n", "step,loss\n,\n", "step,loss\n1,2,3\n", "step,loss\n1,2\n", ""),
        "step,loss,train_accuracy,test_accuracy\n",
        "step,loss,train_accuracy,test_accuracy\n2,1,1,1\n2,1,1,1\n",
    ],
)
def test_metrics_that_are_damaged_or_missing_are_named(tmp_path, metrics):
    run = _run(tmp_path / "run", metrics)
    with pytest.raises(ValueError, match="metrics.csv' is damaged"):
        report([run], tmp_path / "out")
    (run / "metrics.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"run' has no metrics.csv"):
        report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_standard_error_needs_two_values_and_a_mean_one():
    assert mean_and_error([3.0, 5.0]) == (4.0, 1.0)
    assert mean_and_error([3.0, math.nan, 5.0]) == (4.0, 1.0)
    for values, mean in (([3.0], 3.0), ([], math.nan)):
        assert mean_and_error(values) == pytest.approx((mean, math.nan), nan_ok=True)


def test_columns_are_as_wide_as_they_need_numbers_to_the_right():
    table = format_table(["name", "n"], [["a", 5], ["longer", 1000]])
    assert table == "name       n\n------  ----\na          5\nlonger  1000"
