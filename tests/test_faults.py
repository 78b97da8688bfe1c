"""What becomes of a run that is killed at the worst moments, of a full disk, and of weights that are lost.

A copy of the run's directory at a moment is what a process leaves that is killed then.
"""

import errno
import shutil

import numpy as np
import pytest
import tf_keras
from small_jobs import rows_of, small_network, small_settings

from keras_sparse_init import MaskUpdate, compat
from keras_sparse_init.training import AtInit, Dense, Dynamic, Lottery, Prune, Scratch, checkpoints, run_dir, train
from keras_sparse_init.training.progress import Progress


def _go_on(data, directory, experiment, **changes):
    settings = small_settings(steps=30, log_every=10, checkpoint_every=10, momentum=0.9) | changes
    return train(small_network, data, experiment, output_dir=directory, **settings)


def _same(result, expected):
    for weight, other in zip(result.model.get_weights(), expected.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)
    assert rows_of(result.directory / "metrics.csv") == rows_of(expected.directory / "metrics.csv")
    with np.load(result.directory / run_dir.MASKS) as masks, np.load(expected.directory / run_dir.MASKS) as others:
        assert set(masks) == set(others)
        for name in masks:
            np.testing.assert_array_equal(masks[name], others[name])
    timed = ("seconds",)
    assert {k: v for k, v in result.summary.items() if k not in timed} == {
        k: v for k, v in expected.summary.items() if k not in timed
    }


@pytest.fixture(scope="module")
def moments(data, tmp_path_factory):
    """A run with RigL, and what it would have left had it been killed at certain moments, by their names."""
    folder = tmp_path_factory.mktemp("faults")
    whole, copies, counts = folder / "whole", {}, {}

    def keep(name, number=1):
        """Copies the directory the `number`-th time that this is called with a name."""
        counts[name] = counts.get(name, 0) + 1
        if counts[name] == number:
            copies[name] = shutil.copytree(whole, folder / name.replace(" ", "-"))

    savez, savez_compressed = np.savez, np.savez_compressed
    assign_at, change_masks, on_step = compat.assign_at, MaskUpdate.change_masks, Progress.on_step
    write_json, save = run_dir.write_json, tf_keras.Sequential.save

    def half_a_checkpoint(file, **arrays):
        savez(file, **arrays)
        file.flush()
        size = file.tell()
        file.truncate(size // 2)
        keep("half a checkpoint", 2)
        keep("half the first checkpoint")
        file.seek(0)
        file.truncate()
        savez(file, **arrays)
        file.flush()
        keep("a checkpoint of another name", 3)

    def updating(self, step, due):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compat, "assign_at", between_masks_and_weights)
            change_masks(self, step, due)

    def between_masks_and_weights(variable, places, values):
        assign_at(variable, places, values)
        keep("a mask update", 5)

    def half_a_row(self, now, logs):
        wrote = on_step(self, now, logs)
        if now == 20:
            with (whole / "metrics.csv").open("rb+") as file:
                text = file.read()
                file.seek(len(text) - 9)
                file.truncate()
                keep("half a row")
                file.write(text[-9:])
        return wrote

    def half_the_masks(file, **arrays):
        file.write_bytes(b"PK")
        keep("half the masks")
        savez_compressed(file, **arrays)

    def half_the_model(self, path, *args, **kwargs):
        path.write_bytes(b"PK")
        keep("half the model")
        save(self, path, *args, **kwargs)

    def half_the_summary(path, content):
        if path.name == run_dir.SUMMARY:
            path.with_suffix(".tmp").write_text("{")
            keep("half the summary")
        write_json(path, content)

    experiment = Dynamic(0.7, frequency=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "savez", half_a_checkpoint)
        patch.setattr(np, "savez_compressed", half_the_masks)
        patch.setattr(MaskUpdate, "change_masks", updating)
        patch.setattr(Progress, "on_step", half_a_row)
        patch.setattr(tf_keras.Sequential, "save", half_the_model)
        patch.setattr(run_dir, "write_json", half_the_summary)
        result = _go_on(data, whole, experiment)
    return experiment, result, copies


MOMENTS = (
    *("half the first checkpoint", "half a checkpoint", "a checkpoint of another name", "a mask update", "half a row"),
    *("half the masks", "half the model", "half the summary"),
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_at_the_worst_moment_ends_as_if_it_had_not_been(moments, data, tmp_path, moment):
    experiment, expected, copies = moments
    assert set(copies) == set(MOMENTS)
    _same(_go_on(data, shutil.copytree(copies[moment], tmp_path / "run"), experiment), expected)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["dense", "scratch", "prune", "snip", "lottery", "set"])
def test_any_experiment_that_was_killed_between_checkpoints_ends_as_if_it_had_not_been(moments, data, tmp_path, name):
    experiment = {
        "dense": Dense(),
        "scratch": Scratch(0.7),
        "prune": Prune(0.7, begin_step=2, end_step=20, frequency=3),
        "snip": AtInit(0.7, method="snip"),
        "lottery": Lottery(moments[1].directory),
        "set": Dynamic(0.7, frequency=4, updater="set"),
    }[name]
    whole, on_step = tmp_path / "whole", Progress.on_step

    def copying(self, now, logs):
        wrote = on_step(self, now, logs)
        if now == 25:
            shutil.copytree(whole, tmp_path / "killed")
        return wrote

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step", copying)
        expected = _go_on(data, whole, experiment)
    _same(_go_on(data, tmp_path / "killed", experiment), expected)


def test_a_full_disk_is_named_and_what_was_written_stays(data, tmp_path):
    savez, written = np.savez, []

    def full(file, **arrays):
        savez(file, **arrays)
        written.append(file.name)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = _go_on(data, tmp_path / "expected", Scratch(0.7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="step-000000020.npz' cannot be written .*No space left on device"):
            _go_on(data, tmp_path / "run", Scratch(0.7))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000000.npz", "step-000000010.npz"]
    _same(_go_on(data, tmp_path / "run", Scratch(0.7)), expected)


def test_lost_weights_are_never_kept_and_the_last_good_ones_are(data, tmp_path):
    """A step of which the loss is finite and the update is not: the loss would tell in the next step only."""
    save = checkpoints.save

    def losing(directory, model, step, **progress):
        if step == 20:
            model.trainable_variables[1].assign_add(np.inf * np.ones_like(model.trainable_variables[1]))
        return save(directory, model, step, **progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", losing)
        with pytest.raises(FloatingPointError, match="Weights are not finite after step 20: a smaller learning rate"):
            _go_on(data, tmp_path, Scratch(0.7))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000000.npz",
        "step-000000010.npz",
    ]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\0" * 4000], ids=["empty", "cut", "zeros"])
def test_a_checkpoint_that_is_none_is_named_and_kept(moments, data, tmp_path, content):
    experiment, _, copies = moments
    run = shutil.copytree(copies["half the summary"], tmp_path / "run")
    last = checkpoints.last(run)
    last.write_bytes(content)
    with pytest.raises(ValueError, match="'.*step-000000030.npz' is damaged .*without it the run goes on from the one"):
        _go_on(data, run, experiment)
    assert last.read_bytes() == content


def test_a_directory_that_cannot_be_made_or_holds_other_things_is_named_before_anything_is_trained(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("folder", "is not empty"), ("file/run", "[Nn]ot a directory")):
        with pytest.raises(OSError, match=message):
            _go_on(data, tmp_path / name, Scratch(0.7))
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "notes.txt"]
