"""The signal-propagation experiment: what it measures, what it writes, and the command."""

import csv
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tf_keras

from keras_sparse_init import SparseScaledInit, cli, masks
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.training import SignalGrid
from keras_sparse_init.training.configs import config_root
from keras_sparse_init.training.gin_registry import make_signal
from keras_sparse_init.training.runs import read_runs
from keras_sparse_init.training.signal_probe import SHAPES, SignalProbe
from keras_sparse_init.training.signal_report import Network, SignalResult

FILES = {"signal.csv", "networks.csv", "results.json", "output_std.png", "unit_std.png"}


@pytest.fixture(scope="module")
def grid():
    return SignalGrid(sparsities=[0.8, 0.98], repeats=3, inputs=70, seed=3)


@pytest.fixture(scope="module")
def result(grid):
    return grid.run()


@pytest.fixture(scope="module")
def reference():
    """The same network in Keras: every activation of it, by kernels and inputs."""
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Input((28, 28, 3)),
            layers.Conv2D(6, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            *(layers.Dense(units, "relu") for units in (120, 84, 10)),
        ]
    )
    measured = tf_keras.Model(model.inputs, [layer.output for layer in model.layers[-3:]])
    with_kernels = [layer for layer in model.layers if hasattr(layer, "kernel")]

    def activations(kernels, images):
        for layer, kernel in zip(with_kernels, kernels, strict=True):
            layer.kernel.assign(kernel)
        return [output.numpy() for output in measured(images)]

    return activations


def test_the_numbers_are_those_of_a_keras_model_with_the_same_kernels(grid, result, reference):
    assert len(result.networks) == 2 * 2 * 3 * 3
    images = grid.images()
    for network in result.networks:
        kernels = grid.kernels(network.mask, network.sparsity, network.init, network.repeat)
        activations = reference(kernels, images)
        units = np.concatenate([activation.std(axis=0) for activation in activations])
        assert units.shape == (214,)
        assert network.output_std == pytest.approx(activations[-1].std(), rel=1e-4)
        assert network.unit_std == pytest.approx(units.mean(), rel=1e-4)
        assert network.dead == (not activations[-1].any()) == (network.output_std == 0)


def test_kernels_are_those_of_the_initializer_with_a_rule(grid):
    rules = {"uniform": masks.Random, "heterogeneous": masks.Heterogeneous}
    for family, init in itertools.product(grid.masks, grid.inits):
        drawn = grid.network_masks(family, 0.8, 1)
        for (name, shape), kernel, mask in zip(SHAPES.items(), grid.kernels(family, 0.8, init, 1), drawn, strict=True):
            initializer = SparseScaledInit(
                2.0,
                distribution="untruncated_normal",
                granularity=init,
                mask=rules[family](0.8),
                seed=derive_seed(3, f"{family}/0.8/1/{name}"),
            )
            np.testing.assert_array_equal(initializer(shape).numpy(), kernel)
            np.testing.assert_array_equal(kernel != 0, mask)


def test_a_network_does_not_depend_on_what_else_is_measured(grid, result):
    """Neither on the other networks in the same call nor on the blocks into which the images fall."""
    alone = SignalGrid(masks=["heterogeneous"], sparsities=[0.98], inits=["layer"], repeats=3, inputs=70, seed=3).run()
    same = [n for n in result.networks if (n.mask, n.sparsity, n.init) == ("heterogeneous", 0.98, "layer")]
    assert [n.repeat for n in same] == [0, 1, 2]
    for network, expected in zip(alone.networks, same, strict=True):
        assert network.output_std == pytest.approx(expected.output_std, rel=1e-5)
        assert (network.dead, network.repeat) == (expected.dead, expected.repeat)
    assert SignalGrid(repeats=1, inputs=2, seed=4).images()[0, 0, 0, 0] != grid.images()[0, 0, 0, 0]


def test_repeats_families_sparsities_and_layers_have_random_numbers_of_their_own(grid):
    first = [m for f, s, r in itertools.product(grid.masks, (0.8, 0.9), (0, 1)) for m in grid._seeds(f, s, r)]
    assert len(set(first)) == 2 * 2 * 2 * 5


def test_the_methods_agree_on_uniform_masks_and_per_unit_scaling_loses_on_heterogeneous_ones():
    """The bounds lie between the medians of 300 networks (1.72, 1.75; 0.40, 1.56; 0.03), many standard errors away."""
    result = SignalGrid(sparsities=[0.8], repeats=20, inputs=64).run()
    median = {(cell["mask"], cell["init"]): cell["output_std_median"] for cell in result.cells()}
    assert 0.85 < median["uniform", "unit"] / median["uniform", "layer"] < 1.15
    assert median["uniform", "dense"] < 0.05 * median["uniform", "layer"]
    assert median["heterogeneous", "unit"] < 0.45 * median["heterogeneous", "layer"]
    assert median["heterogeneous", "unit"] > 3 * median["heterogeneous", "dense"]


def test_the_probe_takes_any_number_of_networks_and_images():
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((4, *shape)) / math.sqrt(math.prod(shape[:-1])) for shape in SHAPES.values()]
    images = rng.standard_normal((130, 28, 28, 3))
    whole = SignalProbe(images)(kernels)
    single = [SignalProbe(images)([kernel[i : i + 1] for kernel in kernels]) for i in range(4)]
    for i, values in enumerate(whole):
        np.testing.assert_allclose(values, [parts[i][0] for parts in single], rtol=1e-5)
    assert whole[0].shape == (4,) and np.unique(whole[0]).size == 4


def made_up(values, **settings):
    """A result of one cell with these deviations of the output; those of the units are twice as large."""
    networks = [Network("uniform", 0.9, "unit", i, v, 2 * v, v == 0) for i, v in enumerate(values)]
    return SignalResult({"masks": ("uniform",), "sparsities": (0.9,), "inits": ("unit",)} | settings, networks, 1.0)


def test_a_cell_has_mean_median_quartiles_and_the_share_of_the_dead():
    (cell,) = made_up([0.0, 1.0, 2.0, 3.0, 10.0]).cells()
    assert cell == {
        **{"mask": "uniform", "sparsity": 0.9, "init": "unit", "networks": 5, "dead": 0.2},
        **{"output_std_mean": 3.2, "output_std_median": 2, "output_std_q25": 1, "output_std_q75": 3},
        **{"unit_std_mean": 6.4, "unit_std_median": 4, "unit_std_q25": 2, "unit_std_q75": 6},
    }
    line = str(made_up([0.0, 1.0, 2.0, 3.0, 10.0])).splitlines()[2].split()
    assert line == ["uniform", "90.0%", "unit", "2", "1", "to", "3", "3.2", "4", "2", "to", "6", "6.4", "20%"]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0, 1.0], [0.0]])
def test_a_figure_has_a_place_for_dead_networks(values, tmp_path):
    result = made_up(values)
    figure = result.figure("output_std")
    figure.savefig(tmp_path / "figure.png")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] > 0
    assert axes.get_xticklabels()[0].get_text() == f"90.0%\n{np.mean(np.equal(values, 0)):.0%} dead"
    line = axes.get_lines()[0].get_ydata()
    assert np.isnan(line[0]) == (np.median(values) == 0)
    with pytest.raises(ValueError, match="`measure` must be one of 'output_std', 'unit_std'"):
        result.figure("std")


def test_a_figure_has_a_panel_for_each_family_and_a_line_for_each_method(result):
    figure = result.figure("unit_std")
    assert [axes.get_title() for axes in figure.axes] == [
        f"mean(std per unit), {family} masks" for family in ("uniform", "heterogeneous")
    ]
    for axes, family in zip(figure.axes, ("uniform", "heterogeneous"), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        for init in ("dense", "unit", "layer"):
            cells = [c for c in result.cells() if (c["mask"], c["init"]) == (family, init)]
            np.testing.assert_allclose(lines[init], [cell["unit_std_median"] for cell in cells])


def test_the_command_prints_the_table_and_leaves_every_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bindings = ["REPEATS=2", "SPARSITIES=(0.8,)", "INITS=('unit', 'layer')", "INPUTS=16", "SEED=7"]
    arguments = ["signal", *(part for binding in bindings for part in ("--gin_bindings", binding))]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"signal-seed7-\d{8}-\d{6}", directory.name)
    assert printed.endswith(f"results in runs/{directory.name}\n") and "heterogeneous     80.0%  layer" in printed
    assert {path.name for path in directory.iterdir()} == {*FILES, "operative_config.gin"}
    expected = SignalGrid(sparsities=[0.8], inits=["unit", "layer"], repeats=2, inputs=16, seed=7).run()
    content = json.loads((directory / "results.json").read_text())
    assert content["repeats"] == 2 and content["inits"] == ["unit", "layer"] and content["versions"]["numpy"]
    found = [(c["mask"], c["init"], c["output_std_mean"]) for c in content["cells"]]
    assert found == [(c["mask"], c["init"], pytest.approx(c["output_std_mean"], rel=1e-5)) for c in expected.cells()]
    for name, rows in (("signal.csv", content["cells"]), ("networks.csv", map(dataclasses.asdict, expected.networks))):
        written = list(csv.DictReader((directory / name).read_text().splitlines()))
        for row, known in zip(written, rows, strict=True):
            assert row.keys() == known.keys() and (row["mask"], row["init"]) == (known["mask"], known["init"])
            for column in ("output_std", "unit_std") if name == "networks.csv" else ("output_std_q25", "unit_std_mean"):
                assert float(row[column]) == pytest.approx(known[column], rel=1e-5)
    again, config = make_signal([directory / "operative_config.gin"])
    assert (again.repeats, again.seed, again.inits) == (2, 7, ("unit", "layer"))
    assert config == (directory / "operative_config.gin").read_text()

    # It is no run, and reports pass over it.
    with pytest.raises(ValueError, match="At least one directory of a finished run"):
        read_runs([directory])
    before = sorted(directory.iterdir())
    assert cli.main([*arguments, "--output_dir", str(directory)]) == 2
    assert "is not empty; results are never overwritten" in capsys.readouterr().err
    assert sorted(directory.iterdir()) == before


def test_without_matplotlib_everything_but_the_plots_is_written(result, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install matplotlib" in result.write(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"signal.csv", "networks.csv", "results.json"}


def test_settings_of_numpys_types_are_written_too(tmp_path):
    ones = {"repeats": np.int64(1), "inputs": np.int32(2), "seed": np.int64(1), "scale": np.float32(2)}
    SignalGrid(masks=["uniform"], sparsities=np.array([0.5], np.float32), **ones).run().write(tmp_path)
    with pytest.raises(FileExistsError, match="is not empty; results are never overwritten"):
        made_up([1.0]).write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert {name: content[name] for name in ones} == {"repeats": 1, "inputs": 2, "seed": 1, "scale": 2.0}


def test_the_config_is_the_default_grid_as_its_header_says():
    text = (config_root() / "signal.gin").read_text()
    grid, config = make_signal([config_root() / "signal.gin"])
    assert grid == SignalGrid()
    np.testing.assert_allclose(grid.sparsities, np.linspace(0.8, 0.98, 5))
    assert str(grid).startswith("signal of 900 LeNet-5 networks") and "# Networks: 900, of 2 families" in text
    macros = re.findall(r"^([A-Z]+) =", config, flags=re.MULTILINE)
    assert macros == sorted(["MASKS", "SPARSITIES", "INITS", "REPEATS", "INPUTS", "SEED"])
    header = text.split("\n\n")[0]
    assert all(macro in header for macro in macros)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("SPARSITIES=(1.0,)", "`sparsities` must be a float in .*1.0"),
        ("SPARSITIES=0.9", "`sparsities` must be a list of one or more.*0.9"),
        ("SPARSITIES=()", "`sparsities` must be a list of one or more"),
        ("SPARSITIES=(0.9, 0.9)", "`sparsities` must differ"),
        ("MASKS=('random',)", "`masks` must be one of 'uniform', 'heterogeneous'.*'random'"),
        ("MASKS='uniform'", "`masks` must be a list of one or more"),
        ("INITS=('units',)", "`inits` must be one of 'unit', 'effective', .*'units'"),
        ("REPEATS=0", "`repeats` must be a positive integer.*0"),
        ("INPUTS=2.5", "`inputs` must be a positive integer.*2.5"),
        ("SEED=-1", "`seed` must be a non-negative int"),
        ("signal.scale=0", "`scale` must be a positive float"),
        ("REPEAT=3", "Unknown name 'REPEAT'.*REPEATS"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(binding, message, tmp_path, capsys):
    arguments = ["signal", "--gin_bindings", binding, "--output_dir", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert re.match(f"keras-sparse-init: error: .*{message}", printed) and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_benchmark_hides_no_module_of_the_standard_library():
    directory = Path(__file__).parents[1] / "benchmarks"
    code = f"import sys; sys.path.insert(0, {str(directory)!r}); import signal; print(int(signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
