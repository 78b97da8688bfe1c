"""The command line, the configs, and what gin may and may not change."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tf_keras

from keras_sparse_init import ApproximateIsometryInit, ExactOrthogonalInit, SparseScaledInit, cli, sparsify
from keras_sparse_init._version import __version__
from keras_sparse_init.sparse_model import masked_kernels
from keras_sparse_init.training import checkpoints
from keras_sparse_init.training.configs import config_root, find_config
from keras_sparse_init.training.gin_registry import make_job
from keras_sparse_init.training.networks import lenet5, mlp

# Of the command `train`: one directory for each network. What is published is given after another.
_FILES = [path for path in config_root().glob("*/*.gin") if path.stem != "published"]
_CONFIGS = sorted(path.relative_to(config_root()).as_posix() for path in _FILES)


def _python(*arguments, cwd):
    """Runs Python as a user would: in a directory of their own, without the settings of the tests."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TF_CPP")}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def _bindings(*bindings):
    return [argument for binding in bindings for argument in ("--gin_bindings", binding)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a train command in an empty directory prints and leaves."""
    directory = tmp_path_factory.mktemp("empty")
    arguments = [*_bindings("STEPS=4", "train.log_every=2", "INIT='layer'"), "--output_dir", "out"]
    process = _python("-m", "keras_sparse_init.cli", "train", *arguments, cwd=directory)
    assert process.returncode == 0, process.stderr
    return process, directory / "out"


def test_help_imports_neither_tensorflow_nor_gin_nor_numpy(tmp_path):
    script = """
import sys
from keras_sparse_init.cli import main
names = ("train", "signal", "compare", "sweep", "report", "hessian", "interpolate")
commands = [[name, "--help"] for name in names]
for arguments in (["--help"], *commands, ["--version"]):
    try:
        main(arguments)
    except SystemExit as exit:
        assert not exit.code, exit
heavy = {"absl", "gin", "keras", "numpy", "rich", "tensorflow", "tensorflow_model_optimization", "tf_keras"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    process = _python("-c", script, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "HEAVY []" in process.stdout
    assert "--gin_bindings" in process.stdout and __version__ in process.stdout


def test_train_leaves_every_file_and_its_summary_says_what_was_bound(trained):
    _, out = trained
    names = {path.name for path in out.iterdir()}
    assert names == {
        "operative_config.gin",
        "metrics.csv",
        "summary.json",
        "model.keras",
        "masks.npz",
        "job.json",
        "checkpoints",
        "tensorboard",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["init"], summary["network"], summary["seed"]) == (4, "layer", "lenet5", 0)
    assert summary["sparsity"] == pytest.approx(0.95, abs=0.001)
    assert 0 <= summary["test_accuracy"] <= 1 and summary["versions"]["keras_sparse_init"] == __version__


def test_train_saves_exact_zeros_off_the_masks(trained):
    _, out = trained
    model = tf_keras.models.load_model(out / "model.keras")
    with np.load(out / "masks.npz") as masks:
        assert len(masks) == 5
        for name, mask in masks.items():
            kernel = model.get_layer(name.split("/")[0]).kernel.numpy()
            assert np.all(kernel[mask == 0] == 0) and np.all(kernel[mask != 0] != 0)


def test_train_prints_the_layers_the_accuracy_and_where_the_results_lie_and_no_log_of_tensorflow(trained):
    process, out = trained
    assert all(name in process.stdout for name in ("conv1", "conv2", "dense1", "dense2", "logits", "256x120"))
    accuracy = json.loads((out / "summary.json").read_text())["test_accuracy"]
    assert process.stdout.endswith(f"test accuracy {accuracy:.2%}\nresults in out\n")
    # Nothing but a line for each row of metrics.csv: neither TensorFlow's log nor warnings.
    assert [line.split("  ")[0] for line in process.stderr.splitlines()] == ["step 2/4", "step 4/4"]


# So many steps that a signal comes before the last of them.
_RESUMED = ("train.log_every=20", "train.checkpoint_every=20", "mlp.hidden_sizes=(10,)", "LEARNING_RATE=0.01")
_RESUMED_ARGUMENTS = ["train", "--gin_file", "mlp/scratch.gin", *_bindings(*_RESUMED, "STEPS=400"), "--output_dir"]


def _interrupted(directory, signal_number):
    """Starts a run that checkpoints every 20 steps, and sends it a signal at about step 40."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    # Where the tests run in the background, their children start with SIGINT ignored.
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "from keras_sparse_init.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *_RESUMED_ARGUMENTS, "out"]
    with subprocess.Popen(command, cwd=directory, env=env, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 40/"):
                process.send_signal(signal_number)
                break
        rest = process.stderr.read()
    return process.returncode, rest


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory):
    """The weights of that run when nothing ends it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main([*_RESUMED_ARGUMENTS, str(out)]) == 0
    return tf_keras.models.load_model(out / "model.keras").get_weights()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_run_that_was_killed_or_interrupted_goes_on_and_ends_with_the_same_weights(
    number, code, never_interrupted, tmp_path, capsys
):
    returned, printed = _interrupted(tmp_path, number)
    assert returned == code
    told = "interrupted; to go on, give this command with --output_dir out\n"
    assert number != signal.SIGINT or printed.endswith(told)
    out = tmp_path / "out"
    checkpoint = checkpoints.last(out)
    assert checkpoint.name >= "step-000000020.npz" and not (out / "summary.json").exists()

    # Another configuration does not take the directory over.
    assert cli.main([*_RESUMED_ARGUMENTS, str(out), *_bindings("SPARSITY=0.5")]) == 2
    assert "unfinished run of another configuration" in capsys.readouterr().err
    assert checkpoints.last(out) == checkpoint

    assert cli.main([*_RESUMED_ARGUMENTS, str(out)]) == 0
    first = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("step "))
    assert int(re.match(r"step (\d+)", first)[1]) > 20  # It did not begin again.
    resumed = tf_keras.models.load_model(out / "model.keras").get_weights()
    for weight, expected in zip(resumed, never_interrupted, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_the_operative_config_makes_the_same_job_again(trained):
    _, out = trained
    job, config = make_job([out / "operative_config.gin"])
    assert config == (out / "operative_config.gin").read_text()
    with np.load(out / "masks.npz") as masks:
        for kernel in masked_kernels(job.model):
            np.testing.assert_array_equal(kernel.mask, masks[kernel.name])


def test_the_masks_of_a_run_are_taken_by_bindings(trained):
    _, out = trained
    bindings = ["SPARSITY=None", f"scratch.masks_from='{out}'", "SEED=5"]
    job, _ = make_job([find_config("lenet5/scratch.gin")], bindings)
    with np.load(out / "masks.npz") as masks:
        for kernel in masked_kernels(job.model):
            np.testing.assert_array_equal(kernel.mask, masks[kernel.name])


@pytest.mark.parametrize(
    "initializer",
    [ApproximateIsometryInit(gain=1.5, steps=7), ExactOrthogonalInit(gain=1.5, construction="matchings")],
)
def test_a_job_begins_with_the_initializer_that_a_binding_names(initializer):
    name = type(initializer).__name__
    own = {"gain": 1.5, **({"steps": 7} if name.startswith("Approx") else {"construction": "matchings"})}
    bindings = [f"scratch.initializer=@{name}", *(f"{name}.{key}={value!r}" for key, value in own.items())]
    job, config = make_job([find_config("mlp/scratch.gin")], [*bindings, "SPARSITY=0.9"])
    described = job.experiment.describe()
    assert (described["init"], described["initializer"]) == (name, own)
    assert f"scratch.initializer = @{name}" in config
    expected = sparsify(mlp((28, 28, 1), classes=10, seed=0), 0.9, initializer=initializer, seed=0)
    for ours, other in zip(masked_kernels(job.model), masked_kernels(expected), strict=True):
        np.testing.assert_array_equal(ours.kernel, other.kernel)


def test_report_of_a_trained_run_has_its_numbers(trained, capsys):
    _, out = trained
    assert cli.main(["report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "layer" in printed and "94.99%" in printed and "dense1" in printed and str(out) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_bindings("trian.steps=3"), "No configurable matching 'trian'.*line 1"),
        (_bindings("train.stepz=3"), "'train' doesn't have a parameter named 'stepz'.*line 1"),
        (_bindings("SPARSTY=0.9"), "Unknown name 'SPARSTY'.*BATCH, DATA, INIT.*SPARSITY"),
        (_bindings("train.steps=3", "STEPS=4"), "Unknown name 'STEPS': nothing in .* uses it"),
        (_bindings("SPARSITY=%NOTHING"), "No value is given for %NOTHING"),
        (_bindings("SPARSITY=0.9x"), "'SPARSITY=0.9x' has a value that cannot be read"),
        (_bindings("METHOD=uniform"), "'METHOD=uniform' has a value that cannot be read; text needs quotes"),
        (_bindings("SPARSITY"), "must have the form NAME=value"),
        (_bindings("SPARSITY=1.0"), "`sparsity` must be .*1.0"),
        (_bindings("SPARSITY=-0.1"), "`sparsity` must be .*-0.1"),
        (_bindings("METHOD='fair'"), "`method` must be one of .*'fair'"),
        (_bindings("INIT='units'"), "`granularity` must be one of .*'units'"),
        (_bindings("STEPS=0"), "`steps` must be a positive integer"),
        (_bindings("train.keras='keras2'"), "`keras` must be one of 'tf_keras', 'keras'.*'keras2'"),
        (_bindings("lenet5.batch_norm='yes'"), "`batch_norm` must be a bool"),
        (["--gin_file", "mlp/lottery.gin"], "`pruned_run` must be the directory of a finished run"),
        (["--gin_file", "mlp/lottery.gin", *_bindings("PRUNED_RUN='no'")], "'no' is not the directory of a finished"),
        (["--gin_file", "mlp/prune.gin", *_bindings("prune.end_step=4000")], "within the 2000 steps.*end_step=4000"),
        (
            _bindings("DATA='imagenet'"),
            "`data` must be one of 'digits', 'mnist', 'fashion_mnist', 'cifar10' or the path of an .npz file",
        ),
        (_bindings("DATA='nowhere.npz'"), "No data file 'nowhere.npz'"),
        (["--gin_file", "nowhere.gin"], "No gin file 'nowhere.gin' in .* packaged configs are .*lenet5/dense.gin"),
        (["--gin_file", "lenet5"], "No gin file 'lenet5' in"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments, "--output_dir", "out"]) == 2
    printed = capsys.readouterr()
    assert re.match(f"keras-sparse-init: error: .*{message}", printed.err)
    assert printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_file_names_the_file_and_the_line(tmp_path, capsys):
    mine = tmp_path / "mine.gin"
    for text, message in [
        ("train.stepz = 4", 'stepz.*mine.gin", line 2'),
        ("STEPS = 4 4", r"\(mine.gin, line 2\)"),
        ('include "nowhere/scratch.gin"', 'Unable to open file: nowhere/scratch.gin.*mine.gin", line 2'),
        ("import no_such_module", 'no_such_module.*mine.gin", line 2'),
    ]:
        mine.write_text(f'include "lenet5/scratch.gin"\n{text}\n')
        assert cli.main(["train", "--gin_file", str(mine)]) == 2
        printed = capsys.readouterr().err
        assert re.search(message, printed) and printed.count("\n") == 1


def test_an_output_directory_with_anything_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("result")
    assert cli.main(["train", "--gin_file", "lenet5/scratch.gin", "--output_dir", str(tmp_path)]) == 2
    assert "not empty; results are never overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_report_of_what_is_no_run_is_one_clear_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not the directory of a finished run" in capsys.readouterr().err


def test_a_loss_that_is_lost_is_one_line_and_exit_code_1(tmp_path, capsys):
    arguments = ["--gin_file", "mlp/scratch.gin", *_bindings("LEARNING_RATE=1e30", "STEPS=50")]
    assert cli.main(["train", *arguments, "--output_dir", str(tmp_path / "out")]) == 1
    assert "error: The loss is" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_in_the_working_directory_comes_before_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("lenet5/scratch.gin") == config_root() / "lenet5" / "scratch.gin"
    (tmp_path / "lenet5").mkdir()
    (tmp_path / "lenet5" / "scratch.gin").write_text("")
    assert find_config("lenet5/scratch.gin").resolve() == tmp_path / "lenet5" / "scratch.gin"


def test_a_users_config_may_include_a_packaged_one_and_bindings_come_last(tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text('include "mlp/scratch.gin"\nSPARSITY = 0.5\nSTEPS = 7\nmlp.hidden_sizes = (12,)\n')
    job, _ = make_job([mine], ["STEPS=9"])
    assert (job.network, job.settings["steps"]) == ("mlp", 9)
    assert job.table().total.sparsity == pytest.approx(0.5, abs=0.01)
    assert job.model.count_params() > 0 and [row.shape for row in job.table().rows] == [(784, 12), (12, 10)]


def test_a_setting_itself_may_be_overridden_in_place_of_the_name_it_has_in_the_config(tmp_path):
    assert make_job(["mlp/scratch.gin"], ["train.steps=9"])[0].settings["steps"] == 9
    mine = tmp_path / "mine.gin"
    mine.write_text('include "mlp/scratch.gin"\ntrain.steps = 7\n')
    assert make_job([mine])[0].settings["steps"] == 7


def test_bindings_change_no_plain_call():
    make_job([find_config("lenet5/scratch.gin")], ["INIT='dense'", "lenet5.hidden_sizes=(1, 2, 3, 4)"])
    assert SparseScaledInit().granularity == "unit" and SparseScaledInit().scale == 1.0
    assert lenet5((28, 28, 1), 10).get_layer("conv1").filters == 6


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    """The bindings that a config cannot do without, by its name."""
    bindings = {}
    for network in ("lenet5", "mlp"):
        out = tmp_path_factory.mktemp(network) / "pruned"
        arguments = ["--gin_file", f"{network}/prune.gin", *_bindings("STEPS=8")]
        assert cli.main(["train", *arguments, "--output_dir", str(out)]) == 0
        bindings[f"{network}/lottery.gin"] = [f"PRUNED_RUN='{out}'"]
    return bindings


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_config_does_what_its_header_says(name, tickets):
    text = (config_root() / name).read_text()
    header = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    claims = dict(re.findall(r"^# (Network|Sparsity|Steps): (\S+)", "\n".join(header), flags=re.MULTILINE))
    needed = tickets.get(name, [])
    job, config = make_job([config_root() / name], needed)
    network, experiment = name.removesuffix(".gin").split("/")
    assert job.network == claims["Network"] == network and job.settings["keras"] == "tf_keras"
    assert job.experiment.name == experiment
    sparsity = job.experiment.sparsity if experiment == "prune" else job.table().total.sparsity
    assert sparsity == pytest.approx(float(claims["Sparsity"].strip(",")), abs=0.001)
    steps = job.settings["steps"]
    assert steps == int(claims["Steps"]) and f"of {job.settings['batch']} images" in "\n".join(header)
    if experiment == "prune":
        schedule = job.experiment.schedule(steps)
        said = f"from step {schedule.begin_step} to {schedule.end_step}, every {schedule.frequency}"
        assert said in "\n".join(header)
    macros = re.findall(r"^([A-Z_]+) =", config, flags=re.MULTILINE)
    own = {
        "scratch": ["INIT", "METHOD", "SPARSITY"],
        "prune": ["SPARSITY"],
        "lottery": ["PRUNED_RUN"],
        "weight_norm": ["WEIGHT_NORM"],
        **dict.fromkeys(("set", "rigl", "rigl_inverted"), ["INIT", "METHOD", "SPARSITY"]),
        **dict.fromkeys(("snip", "grasp"), ["INIT", "SPARSITY"]),
    }
    assert macros == sorted(["BATCH", "DATA", "LEARNING_RATE", "SEED", "STEPS", *own.get(experiment, [])])
    assert macros == sorted(re.findall(r"^([A-Z_]+) =", text, flags=re.MULTILINE))
    example = next(line for line in header if "keras-sparse-init train" in line).removeprefix("#")
    arguments = cli._parser().parse_args(shlex.split(example)[1:])
    assert arguments.gin_file == [name]
    make_job([find_config(name)], [*arguments.gin_bindings, *needed])


_EXPERIMENTS = sorted({name.split("/")[1] for name in _CONFIGS})


# Each experiment in both, and each network.
@pytest.mark.parametrize(
    ("name", "keras"),
    [
        (name, ("tf_keras", "keras")[(_EXPERIMENTS.index(name.split("/")[1]) + name.startswith("mlp")) % 2])
        for name in _CONFIGS
    ],
)
def test_every_config_runs_in_either_keras(name, keras, tickets, tmp_path, capsys):
    bindings = [f"train.keras='{keras}'", "STEPS=4", *tickets.get(name, [])]
    assert cli.main(["train", "--gin_file", name, *_bindings(*bindings), "--output_dir", str(tmp_path / "out")]) == 0
    assert "dense1/kernel" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    network, experiment = name.removesuffix(".gin").split("/")
    printed = capsys.readouterr().out
    assert network in printed and experiment in printed and "dense1/kernel" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["keras"], summary["backend"]) == (keras, "tensorflow")


@pytest.mark.parametrize("network", ["lenet5", "mlp"])
def test_dense_networks_learn_at_the_rate_of_their_configs(network, tmp_path):
    """A rate at which sparse networks learn may be too high for dense ones: they are thrown off and stay at 10%."""
    arguments = ["--gin_file", f"{network}/dense.gin", *_bindings("STEPS=200"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *arguments]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["test_accuracy"] > 0.8


def test_a_network_of_the_users_own_is_named_by_bindings(tmp_path, monkeypatch, capsys):
    """In a module of the working directory, in either Keras, with its parameters bound."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks.py").write_text(
        "import keras\n"
        "from keras import layers\n"
        "def tiny(input_shape, classes, units=5):\n"
        "    flat = [layers.Input(input_shape), layers.Flatten()]\n"
        "    return keras.Sequential([*flat, layers.Dense(units, 'relu', name='a'), layers.Dense(classes)])\n"
    )
    arguments = ["train", "--import", "my_networks", "--gin_file", "mlp/scratch.gin"]
    bindings = _bindings("train.model=@tiny", "tiny.units=7", "SPARSITY=0.5", "STEPS=2")
    for out in ("out", "again"):  # A module is imported and registered once in a process.
        assert cli.main([*arguments, *bindings, "--output_dir", out]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["network"], summary["keras"]) == ("tiny", "keras")
    assert summary["table"]["rows"][0]["shape"] == [784, 7]
    import my_networks

    assert my_networks.tiny((2,), 3).layers[1].units == 5  # A plain call knows of no binding.
    capsys.readouterr()
    for extra, message in (
        (["--import", "no_such_networks"], "No module named 'no_such_networks'"),
        (_bindings("train.keras='tf_keras'"), "`keras` must be that of the model, 'keras'.*'tf_keras'"),
        (_bindings("tiny.unitz=3"), "'tiny' doesn't have a parameter named 'unitz'"),
    ):
        assert cli.main([*arguments, *bindings, *extra]) == 2
        printed = capsys.readouterr().err
        assert re.search(message, printed) and printed.count("\n") == 1


@pytest.mark.parametrize("network", ["lenet5", "mlp"])
def test_the_small_dense_network_has_hardly_fewer_weights_than_the_sparse_one_has_nonzeros(network):
    small, sparse = (make_job([config_root() / network / f"{name}.gin"])[0] for name in ("small_dense", "scratch"))
    assert 0.95 < small.table().total.size / sparse.table().total.nonzeros <= 1
    header = (config_root() / network / "small_dense.gin").read_text()
    assert f"{small.table().total.size:,} weights, against {sparse.table().total.nonzeros:,} nonzeros" in header
