"""The callback: what `measure_signal` says, at the right steps, without a change to training, in both Kerases."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import SignalMonitor, compat, measure_signal, sparsify
from keras_sparse_init.signal.measure import Signals

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(40, 6)).astype(np.float32)
_Y = _RANDOM.normal(size=(40, 1)).astype(np.float32)


def _model(library, **options):
    L = library.layers
    layers = [L.Dense(8, "relu", name="a"), L.Dropout(0.5, seed=1, name="drop"), L.Dense(1, name="b")]
    dense = library.Sequential([L.Input((6,)), *layers])
    for variable in dense.trainable_variables:
        values = np.random.default_rng(1).normal(size=variable.shape)
        compat.assign(variable, values)
    model = sparsify(dense, 0.5, initializer="he_normal", seed=0)
    model.compile("sgd", "mse", **options)
    return model


def _flat(report):
    entries = [*report.layers, *report.kernels]
    return {(entry.name, key): value for entry in entries for key, value in entry.row().items()}


def _assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Sums in float32: of a mean the error is one of the values, whose size is about 1.
        assert found[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), key


@BOTH
def test_it_measures_what_measure_signal_does_every_n_steps_and_training_stays_the_same(library, tmp_path):
    monitor = SignalMonitor(_X, _Y, "mse", every=4, output_dir=tmp_path / "new" / "signal", batch_size=25)
    model = _model(library)
    at_first = measure_signal(model, _X, _Y, "mse", batch_size=25)
    model.fit(_X, _Y, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[monitor])
    assert list(monitor.reports) == [0, 4, 8]
    _assert_close(_flat(monitor.reports[0]), _flat(at_first))
    found, expected = monitor.reports[8], at_first
    assert found["a"].pre.std != expected["a"].pre.std
    model.fit(_X, _Y, batch_size=8, epochs=1, verbose=0, shuffle=False, callbacks=[monitor])
    assert list(monitor.reports) == [0, 4, 8, 10, 12]
    # A further `fit` begins with what has become of the model.
    if library is keras:  # tf_keras does not give the state of its dropout away.
        plain = _model(library)
        plain.fit(_X, _Y, batch_size=8, epochs=3, verbose=0, shuffle=False)
        for weight, other in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, other)
    with (tmp_path / "new" / "signal" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["name"]) for row in rows] == [
        (str(step), name) for step in (0, 4, 8, 10, 12) for name in ("a", "drop", "b")
    ]
    assert float(rows[6]["pre_std"]) == found["a"].pre.std and rows[1]["pre_std"] == ""
    with (tmp_path / "new" / "signal" / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows[:2]] == ["a/kernel", "b/kernel"]
    assert float(rows[0]["gradient_flow"]) == pytest.approx(at_first.kernels[0].gradient_flow)
    (events,) = (tmp_path / "new" / "signal" / "tensorboard").iterdir()
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        for value in event.summary.value:
            found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    assert found[8, "a/pre_std"] == pytest.approx(monitor.reports[8]["a"].pre.std)
    assert found[0, "a/kernel/sparsity"] == pytest.approx(at_first.kernels[0].topology.sparsity)


@BOTH
def test_with_several_steps_in_an_execution_none_is_left_out(library):
    monitor = SignalMonitor(_X, every=5)
    model = _model(library, steps_per_execution=3)
    model.fit(_X, _Y, batch_size=4, epochs=2, verbose=0, callbacks=[monitor])
    # Executions of 3, 3, 3 and 1 steps.
    assert list(monitor.reports) == [0, 6, 10, 16, 20]


def test_the_model_is_traced_once():
    traced = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            traced.append(1)
            return x

    model = keras.Sequential([keras.layers.Input((6,)), Counting(), keras.layers.Dense(1)])
    monitor = SignalMonitor(_X, every=1)
    monitor.set_model(model)
    model.compile("sgd", "mse")
    monitor.on_train_begin()
    before = len(traced)
    for step in range(1, 4):
        model.optimizer.iterations.assign(step)
        monitor.on_train_batch_begin(step)
        monitor.on_train_batch_end(step)
    assert list(monitor.reports) == [0, 1, 2, 3]
    assert len(traced) == before


@BOTH
def test_a_model_that_is_not_built_is_measured_after_its_first_step(library):
    model = library.Sequential([library.layers.Dense(1, name="a")])
    model.compile("sgd", "mse")
    monitor = SignalMonitor(_X, every=100)
    model.fit(_X, _Y, batch_size=20, verbose=0, callbacks=[monitor])
    assert list(monitor.reports) == [1]


def test_bad_arguments_are_named_and_results_are_never_overwritten(tmp_path):
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"`every` must be a positive int. Received: every={every}"):
            SignalMonitor(_X, every=every)
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="not empty|is a file"):
            SignalMonitor(_X, output_dir=directory)


def _assert_like_measure_signal(model, x, y, loss, **options):
    """What the traced function sums by itself is what NumPy makes of all values."""
    signals = Signals(model, x, y, loss, seed=0, compiled=True, batch_size=options.get("batch_size", 1024))
    for _ in range(2):  # The second time without a trace.
        report = signals.measure()
        _assert_close(_flat(report), _flat(measure_signal(model, x, y, loss, **options)))
    return signals


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "float64"])
def test_sums_made_inside_the_traced_function_are_those_of_all_values(library, dtype):
    L = library.layers
    policy = dtype if library is keras else tf_keras.mixed_precision.Policy(dtype)
    inputs = L.Input((6, 6, 2))
    h = L.ReLU(name="relu", dtype=policy)(L.Conv2D(4, 3, name="conv", dtype=policy)(inputs))
    h = L.TimeDistributed(L.Dense(3, "tanh", dtype=policy), dtype=policy, name="rows")(h)
    outputs = L.Dense(2, name="out", dtype="float32")(L.Flatten(dtype=policy)(h))
    tokens = L.Lambda(lambda x: x > 0, name="tokens", **({"output_shape": (2,)} if library is keras else {}))(outputs)
    model = library.Model(inputs, [outputs, tokens])
    x = _RANDOM.normal(0.3, 1, size=(40, 6, 6, 2)).astype(np.float32)
    signals = _assert_like_measure_signal(model, x, None, None, batch_size=25)
    assert len(signals._probes) == (1 if dtype == "float64" else 2)  # float64 is left to NumPy.


@BOTH
def test_what_float32_has_no_room_for_is_summed_by_numpy(library):
    L = library.layers
    for kernel, bias in ((1e-20, 0.0), (1.0, 1e4), (0.0, 0.0), (np.nan, 0.0)):
        layers = [L.Dense(5, "relu", name="a"), L.Dense(1, name="b")]
        model = library.Sequential([L.Input((6,)), *layers])
        layers[0].set_weights([np.full((6, 5), kernel), np.full(5, bias)])
        signals = Signals(model, _X, _Y, "mse", batch_size=40, seed=0, compiled=True)
        found, expected = _flat(signals.measure()), _flat(measure_signal(model, _X, _Y, "mse"))
        assert found == {k: pytest.approx(v, nan_ok=True) if isinstance(v, float) else v for k, v in expected.items()}
        assert len(signals._probes) == 1


# Of the last batch, of 3 samples, 1 or 8, 6 rows are as many for each, but for 8.
@pytest.mark.parametrize("batch_size", [37, 39, 16])
def test_a_layer_that_is_not_called_on_samples_is_not_seen_whatever_the_batches(batch_size):
    """A table of positions, whose rows look like those of one sample: batches differ in what can be summed."""

    normal = keras.initializers.HeNormal(seed=0)

    class Positions(keras.layers.Layer):
        def build(self, input_shape):
            self.table = keras.layers.Dense(4, "relu", kernel_initializer=normal, name="table")
            self.table.build((6, 6))
            self.built = True

        def call(self, x):
            return x + self.table(np.eye(6, dtype=np.float32))

    L = keras.layers
    layers = [L.Reshape((6, 1), name="column"), Positions(name="positions"), L.Flatten(name="flat")]
    model = keras.Sequential([L.Input((6,)), *layers, L.Dense(1, kernel_initializer=normal)])
    signals = _assert_like_measure_signal(model, _X, _Y, "mse", batch_size=batch_size)
    report = signals.measure()
    assert len(signals._probes) == 2  # None of it is left to NumPy.
    assert list(report.not_seen) == ["positions/table"]
    assert [layer.name for layer in report.layers][:3] == ["column", "positions", "flat"]


@pytest.mark.parametrize("case", ["offset", "tiny", "huge", "sample of zeros", "no gradient", "equal gradients"])
def test_each_of_what_float32_has_no_room_for_is_noticed_by_itself(case):
    """Values and gradients that nothing else than this is wrong with."""
    L, random = keras.layers, np.random.default_rng(2)
    model = keras.Sequential([L.Input((6,)), L.Dense(5, name="a"), L.Dense(3, name="b")])
    first, second = random.normal(size=(6, 5)), random.normal(size=(5, 3))
    bias, x, loss = np.zeros(5), _X.copy(), None
    if case == "offset":
        bias[2] = 1e4
    elif case in ("tiny", "huge"):
        first *= 1e-20 if case == "tiny" else 1e22
        loss = "linear"
    elif case == "sample of zeros":
        x[7] = 0
    elif case == "no gradient":
        loss = "linear"
    else:
        second[:], loss = 1.0, "linear"
    for layer, kernel, offset in ((model.layers[0], first, bias), (model.layers[1], second, np.ones(3))):
        layer.set_weights([kernel, offset])
    loss = None if loss is None else lambda y, outputs: keras.ops.sum(outputs * y, axis=-1)
    y = (
        None
        if loss is None
        else {"no gradient": np.zeros((40, 3)), "equal gradients": np.ones((40, 3))}.get(
            case, random.normal(size=(40, 3))
        )
    )
    signals = Signals(model, x, y, loss, seed=0, compiled=True, batch_size=40)
    _assert_close(_flat(signals.measure()), _flat(measure_signal(model, x, y, loss)))
    assert len(signals._probes) == 1
