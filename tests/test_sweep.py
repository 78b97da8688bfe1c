"""Sweeps: which runs there are, which are left to do, and what becomes of those that fail or are stopped."""

import io
import json
import re
import shlex
import sys

import pytest
from rich.console import Console
from small_jobs import rows_of

from keras_sparse_init import cli
from keras_sparse_init.training import sweep as module
from keras_sparse_init.training.sweep import Sweep

# In the place of `keras-sparse-init`: takes the arguments of `train`, writes what a run of it leaves, and "FAIL=True"
# makes it fail. Each start is a line in the file "started".
_FAKE = """
import json, pathlib, sys
directory = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
with (directory.parent / "logs" / "started").open("a") as file:
    print(directory.name, file=file)
print("step 2/2", flush=True)
if "FAIL=True" in sys.argv:
    sys.exit("no such thing")
directory.mkdir(exist_ok=True)
(directory / "metrics.csv").write_text("step,loss\\n0,1.0\\n2,0.5\\n")
(directory / "summary.json").write_text(json.dumps({"test_accuracy": 0.75}))
"""


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "_program", lambda: [sys.executable, "-S", "-c", _FAKE])


def _started(path):
    return sorted((path / "logs" / "started").read_text().split())


def test_there_is_a_run_for_every_combination_in_order_and_its_name_says_which(tmp_path):
    grid = ["SPARSITY=[0.8, None]", "train.optimizer = ['adam', '1', 1, 'a/b']"]
    sweep = Sweep(tmp_path / "s", grid, [3], ["mlp/scratch.gin"], ["STEPS=2", "DATA='digits'"], ["mine"])
    assert [run.bindings for run in sweep.runs] == [
        (f"SPARSITY={sparsity!r}", f"train.optimizer={name!r}", "SEED=3")
        for sparsity in (0.8, None)
        for name in ("adam", "1", 1, "a/b")
    ]
    names = [run.directory.name for run in sweep.runs]
    assert len(set(names)) == 8  # '1' and 1 too.
    assert names[0] == "SPARSITY=0.8,train.optimizer=adam,SEED=3"
    assert names[3].startswith("SPARSITY=0.8,train.optimizer=a_b,SEED=3-")
    assert names == [run.directory.name for run in Sweep(tmp_path / "s", grid, [3]).runs]
    arguments = cli._parser().parse_args(shlex.split(sweep.runs[3].command)[1:])
    assert arguments.gin_bindings == ["STEPS=2", "DATA='digits'", *sweep.runs[3].bindings]
    assert (arguments.gin_file, arguments.imports) == (["mlp/scratch.gin"], ["mine"])
    assert arguments.output_dir == str(sweep.runs[3].directory)
    assert not (tmp_path / "s").exists()
    assert len(Sweep(tmp_path / "long", [f"x{i}=[{10**30}]" for i in range(9)]).runs[0].directory.name) < 140


def test_finished_runs_are_left_alone_failed_ones_are_told_and_the_rest_is_done(tmp_path, fake, capsys):
    command = ["sweep", "--gin_file", "mlp/scratch.gin", "--output_dir", str(tmp_path / "s"), "--seeds", "0", "1"]
    assert cli.main([*command, "--grid", "FAIL=[False]", "--jobs", "2"]) == 0
    assert "FAIL=False,SEED=1: finished, test accuracy 75.00%" in capsys.readouterr().out
    assert cli.main([*command, "--grid", "FAIL=[False, True]"]) == 1  # The grid may grow.
    captured = capsys.readouterr()
    assert "FAIL=False,SEED=0: " not in captured.out and "FAIL=True,SEED=1: failed" in captured.out
    assert "2 of 4 runs failed" in captured.err
    assert "no such thing" in (tmp_path / "s" / "logs" / "FAIL=True,SEED=0.log").read_text()
    both = ["FAIL=False,SEED=0", "FAIL=False,SEED=1", "FAIL=True,SEED=0", "FAIL=True,SEED=1"]
    assert _started(tmp_path / "s") == both
    assert cli.main([*command, "--grid", "FAIL=[False, True]"]) == 1  # What has failed is tried again.
    assert _started(tmp_path / "s") == sorted(both + both[2:])
    assert (tmp_path / "s" / "logs" / "FAIL=True,SEED=0.log").read_text().count("no such thing") == 2
    capsys.readouterr()
    assert cli.main([*command, "--grid", "FAIL=[False, True]", "--print_commands"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2].rstrip("'") for line in commands] == both[2:]
    assert _started(tmp_path / "s") == sorted(both + both[2:])


def test_on_a_terminal_a_table_shows_how_far_each_run_is(tmp_path, fake):
    sweep = Sweep(tmp_path / "s", ["FAIL=[False, True]", "X=[1]"])
    sweep.run()
    console = Console(width=200, record=True, file=io.StringIO())
    states = {sweep.runs[0]: "finished", sweep.runs[1]: "waiting"}
    console.print(module._table(states))
    printed = console.export_text()
    assert "1 of 2 runs finished" in printed
    row = next(line for line in printed.splitlines() if "FAIL=False" in line)
    assert [cell.strip() for cell in row.split("│")[1:5]] == ["FAIL=False,X=1", "finished", "2", "75.00%"]


def test_ctrl_c_stops_the_runs_as_it_stops_train(tmp_path, monkeypatch):
    script = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("told")
"""
    monkeypatch.setattr(module, "_program", lambda: [sys.executable, "-S", "-c", script])
    sweep = Sweep(tmp_path / "s", ["X=[1, 2, 3]"])
    logs = [run.log for run in sweep.runs]

    def interrupt(seconds):
        if all(log.exists() and "begun" in log.read_text() for log in logs[:2]):
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(jobs=2)
    assert [log.read_text() for log in logs[:2]] == ["begun\ntold\n"] * 2
    assert not logs[2].exists()


def test_a_directory_of_anything_else_is_refused(tmp_path, fake):
    Sweep(tmp_path / "s", ["X=[1]"], bindings=["STEPS=2"]).run()
    with pytest.raises(FileExistsError, match=r"other gin_bindings.*\['STEPS=2'\] there, \['STEPS=3'\] now"):
        Sweep(tmp_path / "s", ["X=[1]"], bindings=["STEPS=3"])
    (tmp_path / "s" / "sweep.json").write_text("[")
    with pytest.raises(FileExistsError, match="sweep.json that is none"):
        Sweep(tmp_path / "s", ["X=[1]"], bindings=["STEPS=2"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        Sweep(tmp_path / "mine", ["X=[1]"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "SPARSITY=0.9"], r"NAME=\[VALUE, ...\].*Received: 'SPARSITY=0.9'"),
        (["--grid", "X=[@a]"], "Python literals"),
        (["--grid", "X=[]"], "Python literals"),
        (["--grid", "X=[1, 1]"], "values of X must be different"),
        (["--seeds", "1", "1"], "values of seeds must be different"),
        (["--seeds", "1", "--gin_bindings", "SEED=2"], "SEED is bound twice"),
        (["--jobs", "0"], "`jobs` must be a positive int"),
        (["--gin_file", "nowhere.gin"], "nowhere.gin"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys):
    assert cli.main(["sweep", *arguments, "--output_dir", str(tmp_path / "s")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras-sparse-init: error: ")
    assert re.search(message, line)
    assert not (tmp_path / "s").exists()
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--grid", "X=[1]"])
    assert "--output_dir" in capsys.readouterr().err


def test_a_real_sweep_leaves_runs_that_train_would_leave(tmp_path, capsys):
    bindings = ["STEPS=2", "mlp.hidden_sizes=(8,)", "train.log_every=1"]
    arguments = [part for binding in bindings for part in ("--gin_bindings", binding)]
    out = tmp_path / "s"
    assert (
        cli.main(["sweep", "--gin_file", "mlp/scratch.gin", *arguments, "--seeds", "5", "--output_dir", str(out)]) == 0
    )
    summary = json.loads((out / "SEED=5" / "summary.json").read_text())
    assert (summary["seed"], summary["steps"], summary["network"]) == (5, 2, "mlp")
    assert [row["step"] for row in rows_of(out / "SEED=5" / "metrics.csv")] == ["0", "1", "2"]
    assert "keras-sparse-init report" in capsys.readouterr().out
    assert cli.main(["report", str(out)]) == 0
