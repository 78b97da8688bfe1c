import json

import numpy as np
import pytest

from keras_sparse_init.fans import kernel_layout
from keras_sparse_init.table import SparsityRow, SparsityTable


def row(mask, layout="dense", name="layer/kernel"):
    mask = np.asarray(mask, bool)
    return SparsityRow.of(name, mask, kernel_layout(layout, mask.shape))


def test_a_row_counts_weights_inputs_and_dead_units():
    found = row([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1]])
    assert (found.shape, found.size, found.nonzeros, found.sparsity) == ((3, 4), 12, 5, 1 - 5 / 12)
    assert (found.fan_in_min, found.fan_in_mean, found.fan_in_max) == (0, 1.25, 3)
    assert (found.units, found.dead_units) == (4, 1)


def test_units_are_those_of_the_layout():
    mask = np.ones((3, 3, 5, 7), bool)
    mask[:, :, 2] = False
    convolution, transposed = row(mask, "conv"), row(mask, "conv_transpose")
    assert (convolution.units, convolution.dead_units, convolution.fan_in_max) == (7, 0, 36)
    assert (transposed.units, transposed.dead_units, transposed.fan_in_max) == (5, 1, 63)
    depthwise = row(np.ones((3, 3, 5, 2)), "depthwise")
    assert (depthwise.units, depthwise.fan_in_min, depthwise.fan_in_max) == (10, 9, 9)
    assert row(np.ones((6, 8)), "lstm").units == 8


def test_an_embedding_row_without_weights_is_counted_by_inputs_of_one():
    assert row(np.eye(4), "embedding").fan_in_mean == 1


def test_the_total_is_over_all_rows():
    table = SparsityTable([row(np.eye(2)), row(np.zeros((3, 4)))])
    assert (table.total.size, table.total.nonzeros, table.total.dead_units) == (16, 2, 4)
    assert table.total.sparsity == 1 - 2 / 16
    assert SparsityTable([]).total.sparsity == 0


def test_numbers_are_plain_and_go_into_json():
    table = SparsityTable([row(np.eye(3)), row(np.ones((2, 2, 3, 4)), "conv")])
    back = json.loads(json.dumps(table.to_dict()))
    assert back["rows"][0] == {
        "name": "layer/kernel",
        "shape": [3, 3],
        "size": 9,
        "nonzeros": 3,
        "sparsity": pytest.approx(2 / 3),
        "fan_in_min": 1,
        "fan_in_mean": 1.0,
        "fan_in_max": 1,
        "units": 3,
        "dead_units": 0,
    }
    assert back["total"]["size"] == 9 + 48


def test_the_text_has_a_line_for_each_row_and_the_total_and_columns_that_align():
    text = str(SparsityTable([row(np.eye(3), name="a"), row(np.zeros((1000, 2000)), name="a/long/name")]))
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == "kernel shape sparsity nonzeros fan-in min mean max dead units".split()
    assert lines[1].split() == ["a", "3x3", "66.67%", "3", "1", "1.0", "1", "0", "of", "3"]
    assert lines[2].split() == ["a/long/name", "1000x2000", "100.00%", "0", "0", "0.0", "0", "2000", "of", "2000"]
    assert lines[3].split() == ["total", "100.00%", "3", "2000"]
    assert (
        len({line.rindex(cell) + len(cell) for line, cell in zip(lines[1:3], ("66.67%", "100.00%"), strict=True)}) == 1
    )
    assert all(line == line.rstrip() for line in lines)
    assert str(SparsityTable([])) == "no masked kernels: see `Masked` and `sparsify`"
