"""Finished runs side by side."""

import json

import pytest

from keras_sparse_init.training.report import format_table, report

_ROW = {
    "name": "conv1",
    "shape": [5, 5, 1, 6],
    "sparsity": 0.65,
    "fan_in_min": 4,
    "fan_in_mean": 8.667,
    "fan_in_max": 13,
    "dead_units": 2,
}


def _run(directory, **changes):
    directory.mkdir(parents=True)
    summary = {
        "network": "lenet5",
        "experiment": "scratch",
        "init": directory.name,
        "sparsity": 0.95,
        "seed": 0,
        "steps": 2000,
        "data": "digits",
        "method": "erk",
        "test_images": 360,
        "early": {"step": 100, "test_accuracy": 0.85},
        "test_accuracy": 0.9611,
        "loss": 0.00025,
        "seconds": 12.34,
        "table": {"rows": [_ROW]},
    }
    (directory / "summary.json").write_text(json.dumps(summary | changes))
    return directory


def test_runs_are_rows_in_the_order_given_with_their_numbers(tmp_path):
    runs = [_run(tmp_path / "unit"), _run(tmp_path / "dense", test_accuracy=0.5)]
    lines = report(runs).splitlines()
    assert lines[0].split("  ")[0] == "network" and "test accuracy" in lines[0]
    assert lines[2].split() == [
        "lenet5",
        "digits",
        "scratch",
        "unit",
        "95.00%",
        "erk",
        "0",
        "2000",
        "85.00%",
        "@100",
        "96.11%",
        "0.0003",
        "12.3",
        str(runs[0]),
    ]
    assert "50.00%" in lines[3] and lines[3].endswith(str(runs[1]))
    assert "360 test images (one is 0.28%)" in lines[5]


def test_runs_with_the_same_layers_share_their_table_and_others_have_their_own(tmp_path):
    same = [_run(tmp_path / "unit"), _run(tmp_path / "layer")]
    assert report(same).count("conv1") == 1
    assert "conv1  5x5x1x6    65.00%           4   8.7   13           2" in report(same)
    other = _run(tmp_path / "other", table={"rows": [_ROW | {"sparsity": 0.5}]})
    text = report([*same, other])
    assert text.count("conv1") == 2 and f"layers of {same[0]}, {same[1]}\n" in text and f"layers of {other}\n" in text


def test_a_directory_of_runs_stands_for_the_runs_in_it(tmp_path):
    for name in ("b", "a"):
        _run(tmp_path / name)
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
    with pytest.raises(ValueError, match="lacks 'test_images'"):
        report([tmp_path / "old"])
    (tmp_path / "old" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="not a run's summary"):
        report([tmp_path / "old"])


def test_columns_are_as_wide_as_they_need_numbers_to_the_right():
    table = format_table(["name", "n"], [["a", 5], ["longer", 1000]])
    assert table == "name       n\n------  ----\na          5\nlonger  1000"
