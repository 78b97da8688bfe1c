"""Paths between trained networks: what lies at both ends and between, against weights computed by hand."""

import json

import numpy as np
import pytest
import tf_keras
from small_jobs import rows_of, small_network, small_settings

from keras_sparse_init import cli
from keras_sparse_init.training import Scratch, interpolate, mlp, train
from keras_sparse_init.training.run_model import load_run


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two runs whose masks differ, in tf_keras; the second has a checkpoint in between."""
    settings = [small_settings(seed=seed, steps=40, checkpoint_every=20) for seed in (3, 4)]
    return [
        train(small_network, data, Scratch(0.5), output_dir=tmp_path_factory.mktemp("run"), **s).directory
        for s in settings
    ]


def _evaluate(model, data):
    logits = model(data.x_test).numpy().astype(np.float64)
    log_sums = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return (log_sums - logits[np.arange(len(logits)), data.y_test]).mean(), (logits.argmax(1) == data.y_test).mean()


def test_networks_on_the_line_are_those_of_the_mixed_weights(runs, data):
    found = interpolate(*runs, points=8, curve_steps=0, data=data)
    a, b = (tf_keras.models.load_model(run / "model.keras", compile=False) for run in runs)
    ends = a.get_weights(), b.get_weights()
    assert [point.t for point in found.points] == pytest.approx(np.linspace(-0.2, 1.2, 8))
    assert (found.points[1].t, found.points[6].t) == (0, 1)
    for point in found.points:
        a.set_weights([(1 - point.t) * v + point.t * w for v, w in zip(*ends, strict=True)])
        assert (point.test_loss, point.test_accuracy) == pytest.approx(_evaluate(a, data), rel=1e-5)
    summary = json.loads((runs[1] / "summary.json").read_text())
    assert found.points[6].test_accuracy == pytest.approx(summary["test_accuracy"])
    losses = [point.train_loss for point in found.points[1:7]]
    above = np.array(losses) - np.linspace(losses[0], losses[-1], 6)
    assert found.barrier("line") == pytest.approx(above.max())


@pytest.mark.parametrize(("mask", "of"), [("first", 0), ("second", 1)])
def test_the_mask_of_one_run_is_that_of_all_networks(runs, data, mask, of):
    found = interpolate(*runs, points=2, lower=0.0, upper=1.0, mask=mask, curve_steps=0, data=data)
    loaded = [load_run(run, data=data) for run in runs]
    for point, run in zip(found.points, loaded, strict=True):
        for variable, m in zip(run.model.trainable_variables, loaded[of].masks, strict=True):
            variable.assign(variable.numpy() * m)
        assert point.test_loss == pytest.approx(_evaluate(run.model, data)[0], rel=1e-5)


def test_the_learned_curve_has_the_same_ends_and_less_loss_between(runs, data):
    found, again = (interpolate(*runs, points=5, lower=0, upper=1, curve_steps=60, data=data) for _ in range(2))
    assert found.points == again.points
    line, curve = ([p for p in found.points if p.path == path] for path in ("line", "curve"))
    for end in (0, -1):
        assert curve[end].train_loss == pytest.approx(line[end].train_loss, rel=1e-5)
    assert np.mean([p.train_loss for p in curve]) < np.mean([p.train_loss for p in line])


def test_checkpoints_of_one_run_are_ends_too(runs, data):
    found = interpolate(
        runs[1], runs[1], checkpoints=("start", 20), points=2, lower=0, upper=1, curve_steps=0, data=data
    )
    assert found.settings["checkpoints"] == [0, 20]
    rows = {int(row["step"]): float(row["test_accuracy"]) for row in rows_of(runs[1] / "metrics.csv")}
    assert [p.test_accuracy for p in found.points] == pytest.approx([rows[0], rows[20]])


def test_networks_of_keras_3_and_with_batch_normalization(data, tmp_path):
    def network(input_shape, classes):
        return mlp(input_shape, classes, hidden_sizes=(6,), batch_norm=True, seed=0, keras="keras")

    run = train(network, data, Scratch(0.5), output_dir=tmp_path / "run", **small_settings(steps=4)).directory
    found = interpolate(run, run, checkpoints=("start", "end"), points=2, lower=0, upper=1, curve_steps=1, data=data)
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert found.points[1].test_accuracy == found.points[3].test_accuracy == pytest.approx(accuracy)


def test_the_command_prints_the_table_and_leaves_numbers_and_a_plot(runs, data, tmp_path, capsys):
    archive = tmp_path / "data.npz"
    np.savez(archive, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    command = ["interpolate", *map(str, runs), "--points", "3", "--curve_steps", "2", "--data", str(archive)]
    assert cli.main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    assert "on the curve" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "interpolation.csv",
        "interpolation.png",
        "results.json",
    ]
    rows = rows_of(tmp_path / "out" / "interpolation.csv")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [float(row["train_loss"]) for row in rows] == [point["train_loss"] for point in results["points"]]
    assert results["barriers"].keys() == {"line", "curve"}
    assert cli.main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_bad_input_is_named(runs, data, tmp_path, capsys):
    for options, message in (
        ({"mask": "both"}, "`mask` must be one of"),
        ({"points": 1}, "`points` must be an int of at least 2"),
        ({"lower": 1, "upper": 0}, "`lower` must be less than `upper`"),
        ({"checkpoints": ("end",)}, "`checkpoints` must be two"),
        ({"checkpoints": ("end", "middle")}, "`checkpoint` must be 'end', 'start' or a step"),
    ):
        with pytest.raises(ValueError, match=message):
            interpolate(*runs, data=data, **options)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7. There are those of steps 0, 20, 40"):
        interpolate(*runs, checkpoints=(7, "end"), data=data)
    with pytest.raises(FileNotFoundError, match="not the directory of a finished run"):
        interpolate(tmp_path, runs[0], data=data)
    other = train(
        lambda *a: mlp(*a, hidden_sizes=(5,)), data, Scratch(0.5), output_dir=tmp_path / "o", **small_settings(steps=1)
    )
    with pytest.raises(ValueError, match="must be of the same network"):
        interpolate(runs[0], other.directory, data=data)
    with pytest.raises(SystemExit):
        cli.main(["interpolate", "a", "b", "--checkpoints", "end", "middle"])
    assert 'must be "start", "end" or a step, not \'middle\'' in capsys.readouterr().err
