"""The sparse maximal update parametrization: by its formulas, single steps of optimizers, and the coordinate check."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import (
    ApproximateIsometryInit,
    Masked,
    SparseGlorotNormal,
    SparseHeNormal,
    SparseMuP,
    SparseScaledInit,
    WeightNorm,
    compat,
    fans,
    masked_kernels,
    reinitialize,
    sparsify,
)
from keras_sparse_init.scaled_rates import with_rates
from keras_sparse_init.slots import slots_of

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
ENDS = ["first", "last"]


def mlp(library, width, depth=1, inputs=48, outputs=10):
    layers = library.layers
    inner = [layers.Dense(width, "relu", name=f"hidden_{i}") for i in range(depth)]
    first, last = layers.Dense(width, "relu", name="first"), layers.Dense(outputs, name="last")
    return library.Sequential([layers.Input((inputs,)), first, *inner, last])


def sparse_mlp(library, width, density, depth=1, seed=0):
    model = mlp(library, width, depth)
    return sparsify(model, 1 - density, "uniform", wrapper="masked", skip=ENDS, seed=seed)


def rows_of(mup, model):
    return {row.name: row for row in mup.table(model).rows}


def values_of(variables):
    return [compat.to_numpy("v", variable).copy() for variable in variables]


@BOTH
def test_a_base_of_one_width_or_a_model_gives_the_formulas(library):
    model = sparse_mlp(library, 64, 0.25)
    for base in (16, mlp(library, 16)):
        rows = rows_of(SparseMuP(base, base_density=0.5), model)
        # (m_d, m_rho, variance, Adam, SGD), m_d = 64 / 16 and m_rho = 0.25 / 0.5.
        expected = {
            "first/kernel": ("input", 1, 1, 1, 1, 4),
            "first/bias": ("vector", 1, 1, None, 1, 4),
            "hidden_0/kernel": ("hidden", 4, 0.5, 1 / 2, 1 / 2, 2),
            "hidden_0/bias": ("vector", 1, 1, None, 1, 4),
            "last/kernel": ("output", 4, 1, 1 / 16, 1 / 4, 1 / 4),
            "last/bias": ("vector", 1, 1, None, 1, 1),
        }
        assert list(rows) == list(expected)
        for name, (role, *numbers) in expected.items():
            row = rows[name]
            found = [row.width, row.density, row.variance, row.adam_rate, row.sgd_rate]
            assert row.role == role and found == pytest.approx(numbers), name
    text = str(SparseMuP(16, 0.5).table(model)).splitlines()
    assert text[3].split() == ["hidden_0/kernel", "hidden", "4", "0.5", "0.5", "0.5", "2"]
    assert SparseMuP(16, 0.5).table(model).to_dict()[0]["role"] == "input"


def test_without_a_base_only_the_density_counts_and_masks_at_the_ends_count_too():
    model = sparsify(mlp(keras, 64), 0.75, "uniform", wrapper="masked", seed=0)
    for row in SparseMuP().table(model).rows:
        kernel = row.variance is not None
        assert (row.width, row.adam_rate, row.sgd_rate) == (1, 4 if kernel else 1, 4 if kernel else 1)
        assert row.variance == (4 if kernel else None)


def test_a_masked_output_layer_is_scaled_by_width_and_density():
    model = sparsify(mlp(keras, 64), 0.75, "uniform", wrapper="masked", seed=0)
    row = SparseMuP(16).table(model).rows[-2]
    # m_d = 4, m_rho = 1/4: 1 / (m_d^2 m_rho), and 1 / (m_d m_rho) for both rates.
    assert (row.role, row.variance, row.adam_rate, row.sgd_rate) == ("output", 1 / 4, 1, 1)


@pytest.mark.parametrize("layer, gates", [("LSTM", 4), ("GRU", 3)])
def test_a_base_of_one_width_is_no_matter_of_inputs_and_outputs_of_several_times_it(layer, gates):
    layers = keras.layers

    def network(width):
        recurrent = getattr(layers, layer)(width)
        return keras.Sequential([layers.Input((5, gates * 32)), recurrent, layers.Dense(gates * 32)])

    model = network(32)
    assert SparseMuP(8).table(model) == SparseMuP(network(8)).table(model)
    assert [row.role for row in SparseMuP(8).table(model).rows if row.variance] == ["input", "hidden", "output"]


def test_the_slopes_of_an_image_are_as_many_times_more_as_its_channels():
    layers = keras.layers

    def network(width):
        stack = [layers.Conv2D(width, 3, padding="same"), layers.PReLU(), layers.GlobalMaxPooling2D(), layers.Dense(3)]
        return keras.Sequential([layers.Input((16, 16, 2)), *stack])

    model = network(16)  # 16 channels, of 16x16 places.
    for base in (4, network(4)):
        assert [row.sgd_rate for row in SparseMuP(base).table(model).rows if row.role == "vector"] == [4, 4, 1]


def test_convolutions_and_recurrent_layers_are_compared_by_their_fans():
    layers = keras.layers

    def network(width):
        return keras.Sequential(
            [
                layers.Input((6, 6, 3)),
                layers.Conv2D(width, 3, padding="same"),
                layers.DepthwiseConv2D(3, padding="same"),
                layers.BatchNormalization(),
                layers.Conv2D(2 * width, 3, padding="same"),
                layers.Flatten(),
                layers.Dense(5),
            ]
        )

    rows = list(rows_of(SparseMuP(network(4)), network(12)).values())
    found = [(row.role, row.width, row.adam_rate, row.sgd_rate) for row in rows]
    assert [numbers for numbers in found if numbers[0] != "vector"] == [
        ("input", 1, 1, 3),
        ("input", 1, 1, 3),
        ("hidden", 3, pytest.approx(1 / 3), 1),
        ("output", 3, pytest.approx(1 / 3), pytest.approx(1 / 3)),
    ]
    assert [row.sgd_rate for row in rows if row.role == "vector"] == [3, 3, 3, 3, 3, 1]

    def recurrent(width):
        embedding, gates = layers.Embedding(20, width), layers.LSTM(width, name="lstm")
        return keras.Sequential([layers.Input((7,)), embedding, gates, layers.Dense(3, name="out")])

    for base in (8, recurrent(8)):
        rows = list(rows_of(SparseMuP(base), recurrent(32)).values())
        found = [(row.role, row.width, row.adam_rate, row.sgd_rate) for row in rows]
        hidden = ("hidden", 4, 0.25, 1)
        ends = ("input", 1, 1, 4), ("output", 4, 0.25, 0.25)
        assert found == [ends[0], hidden, hidden, ("vector", 1, 1, 4), ends[1], ("vector", 1, 1, 1)]


def test_the_width_is_no_matter_of_the_receptive_field():
    layers = keras.layers

    def network(width):
        convolutions = [layers.Conv2D(width, 5, padding="same") for _ in range(2)]
        return keras.Sequential([layers.Input((8, 8, 2)), *convolutions, layers.GlobalMaxPooling2D(), layers.Dense(3)])

    for base in (10, network(10)):
        rows = SparseMuP(base).table(network(5)).rows
        assert [row.width for row in rows] == [1, 1, 0.5, 1, 0.5, 1]
        assert [row.sgd_rate for row in rows] == [0.5, 0.5, 1, 0.5, 2, 1]


@pytest.mark.parametrize(
    "library, wrapper",
    [(keras, "masked"), (tf_keras, "masked"), (tf_keras, "tfmot")],
    ids=["keras", "tf_keras", "tfmot"],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_kernels_have_the_variance_of_the_table(library, wrapper, fixed):
    model = sparsify(mlp(library, 256, 2), 0.75, "uniform", wrapper=wrapper, skip=["first"], seed=0)
    mup, base = SparseMuP(64), mlp(library, 64, 2)
    biases = values_of(v for v in model.trainable_variables if len(v.shape) == 1)
    initializer = (
        library.initializers.RandomNormal(stddev=0.02) if fixed else SparseScaledInit(3.0, granularity="layer")
    )
    mup.initialize(model, initializer, seed=1)
    masks = {id(kernel.kernel): kernel.mask_value() for kernel in masked_kernels(model)}
    for variable, of_base, row in zip(
        model.trainable_variables, base.trainable_variables, mup.table(model).rows, strict=True
    ):
        if row.variance is None:
            continue
        value, mask = compat.to_numpy("k", variable), masks.get(id(variable), True)
        assert not value[~np.broadcast_to(mask, value.shape)].any()
        active = value[np.broadcast_to(mask, value.shape)].astype(np.float64)
        expected = row.variance * (0.02**2 if fixed else 3.0 / fans.dense_fans(tuple(of_base.shape))[0])
        # Under a mask a fixed variance grows per unit: 1 / (fan-in) is on average above that of the mean fan-in, by
        # its squared spread, (1 - density) / (fan-in) = 1.2% of 64.
        expected *= 1.012 if fixed and mask is not True else 1.0
        # The squares of (truncated) normal values of variance v have a variance of at most 2 v^2; five standard errors.
        assert abs(np.mean(active**2) / expected - 1) < 5 * np.sqrt(2 / active.size), row.name
    after = values_of(v for v in model.trainable_variables if len(v.shape) == 1)
    assert all(map(np.array_equal, biases, after))
    first = values_of(model.trainable_variables)
    mup.initialize(model, initializer, seed=1)
    assert all(map(np.array_equal, first, values_of(model.trainable_variables)))
    mup.initialize(model, seed=2)
    assert not np.array_equal(first[0], values_of(model.trainable_variables)[0])


def test_the_seed_of_an_initializer_counts_where_none_is_given_and_its_mask_does_not():
    model = sparse_mlp(keras, 16, 0.5)

    def drawn(initializer, seed=None):
        SparseMuP().initialize(model, initializer, seed=seed)
        return values_of(model.trainable_variables)

    first = drawn(SparseHeNormal(granularity="layer", seed=3))
    assert all(map(np.array_equal, first, drawn(SparseHeNormal(granularity="layer", sparsity=0.9, seed=3))))
    assert all(map(np.array_equal, first, drawn(None, seed=3)))
    assert all(map(np.array_equal, first, drawn(SparseHeNormal(granularity="layer", seed=4), seed=3)))
    assert not np.array_equal(first[0], drawn(SparseHeNormal(granularity="layer", seed=4))[0])
    assert not np.array_equal(drawn(None)[0], drawn(None)[0])


def test_kernels_do_not_depend_on_the_numbers_that_keras_gives_to_layers():
    def drawn():
        layers = keras.layers
        model = keras.Sequential([layers.Input((9,)), layers.Dense(8), layers.Dense(8), layers.Dense(3)])
        SparseMuP().initialize(model, seed=0)
        return values_of(model.trainable_variables)

    one, other = drawn(), drawn()
    assert all(map(np.array_equal, one, other)) and not np.array_equal(one[2][:8], one[0][:8])


def test_embeddings_and_frozen_kernels_stay():
    layers = keras.layers
    model = keras.Sequential(
        [layers.Input((7,)), layers.Embedding(20, 8), layers.Flatten(), layers.Dense(6), layers.Dense(3, name="out")]
    )
    model.layers[-1].trainable = False
    kernels = [model.layers[0].embeddings, model.layers[2].kernel, model.layers[3].kernel]
    before = values_of(kernels)
    SparseMuP().initialize(model, seed=0)
    same = [np.array_equal(*pair) for pair in zip(before, values_of(kernels), strict=True)]
    assert same == [True, False, True]


def steps_of(library, optimizer, gradients, variables):
    convert = keras.ops.convert_to_tensor if library is keras else tf.convert_to_tensor
    for step in gradients:
        optimizer.apply_gradients([(convert(g), v) for g, v in zip(step, variables, strict=True)])


@BOTH
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adamax", "Nadam", "RMSprop", "Lion"])
def test_steps_are_those_of_an_optimizer_for_each_variable(library, name):
    model = sparse_mlp(library, 16, 0.5)
    rates = [row.sgd_rate if name == "SGD" else row.adam_rate for row in SparseMuP(8).table(model).rows]
    start = values_of(model.trainable_variables)
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=value.shape).astype("float32") for value in start] for _ in range(3)]
    make = getattr(library.optimizers, name)
    # Decoupled weight decay goes by the rate of the base, so that it is left out here.
    arguments = {"weight_decay": 0.0} if name == "AdamW" else {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    scaled = SparseMuP(8).optimizer(model, make(0.01, **arguments))
    assert isinstance(scaled, make) and len(set(rates)) >= 2
    steps_of(library, scaled, gradients, model.trainable_variables)
    for index, (variable, rate) in enumerate(zip(model.trainable_variables, rates, strict=True)):
        alone = keras.Variable(start[index]) if library is keras else tf.Variable(start[index])
        steps_of(library, make(0.01 * rate, **arguments), [[step[index]] for step in gradients], [alone])
        found, expected = compat.to_numpy("v", variable), compat.to_numpy("v", alone)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=str(index))


@BOTH
def test_schedules_clipping_and_what_does_not_decay_are_kept(library):
    model = sparse_mlp(library, 16, 0.5)

    class Own(library.optimizers.schedules.LearningRateSchedule):  # No Keras could find it by its name.
        def __init__(self, first):
            self.inner = library.optimizers.schedules.PiecewiseConstantDecay([1], [first, 0.0])

        def __call__(self, step):
            return self.inner(step)

        def get_config(self):
            return {"first": 0.1}

    optimizer = library.optimizers.SGD(Own(0.1), global_clipnorm=1.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if len(v.shape) < 2])
    scaled = SparseMuP(8).optimizer(model, optimizer)
    rates = [row.sgd_rate for row in SparseMuP(8).table(model).rows]
    for variable in model.trainable_variables:
        variable.assign(variable + 0.5)  # Biases that are 0 would not decay.
    start = values_of(model.trainable_variables)
    gradients = [np.ones_like(value) for value in start]
    norm = np.sqrt(sum(value.size for value in start))
    steps_of(library, scaled, [gradients], model.trainable_variables)
    after = values_of(model.trainable_variables)
    for before, value, rate in zip(start, after, rates, strict=True):
        # The decay comes first and goes by the learning rate itself; the norm is that over all variables.
        decayed = before * (1 - 0.1 * 0.5) if before.ndim > 1 else before
        np.testing.assert_allclose(value, decayed - 0.1 * rate / norm, rtol=0, atol=1e-6)
    # After two steps the schedule is at 0.
    steps_of(library, scaled, [gradients], model.trainable_variables)
    before = values_of(model.trainable_variables)
    steps_of(library, scaled, [gradients], model.trainable_variables)
    assert all(map(np.array_equal, before, values_of(model.trainable_variables)))


@BOTH
def test_outside_of_a_step_the_learning_rate_is_that_of_the_optimizer(library):
    variables = [(keras.Variable if library is keras else tf.Variable)(np.ones(2, np.float32)) for _ in range(2)]
    optimizer = with_rates(library.optimizers.SGD(0.1, weight_decay=0.5), (1.0, 3.0), [(2,)] * 2)
    for _ in range(2):
        steps_of(library, optimizer, [[np.ones(2, np.float32)] * 2], variables)
        assert float(optimizer.learning_rate) == pytest.approx(0.1)
    for variable, rate in zip(variables, (0.1, 0.3), strict=True):
        # w - 0.1 * 0.5 w - rate, twice.
        np.testing.assert_allclose(compat.to_numpy("v", variable), 0.95 * (0.95 - rate) - rate, rtol=1e-6)


def data(seed=0, count=256):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 48)).astype("float32"), rng.integers(0, 10, count)


def fitted(library, model, optimizer, steps=10, **compiled):
    x, y = data()
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **compiled)
    model.fit(x, y, batch_size=len(x), epochs=steps, verbose=0, shuffle=False)
    return model


@BOTH
def test_models_are_saved_with_it_and_train_on(library, tmp_path):
    def trained(steps):
        model = sparse_mlp(library, 16, 0.5)
        SparseMuP(8).initialize(model, seed=0)
        return fitted(library, model, SparseMuP(8).optimizer(model, library.optimizers.Adam(0.01)), steps)

    model = trained(3)
    model.save(tmp_path / "model.keras")
    loaded = library.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.rate_multipliers == model.optimizer.rate_multipliers
    assert type(loaded.optimizer) is type(model.optimizer)
    x, y = data()
    loaded.fit(x, y, batch_size=len(x), epochs=2, verbose=0, shuffle=False)
    for one, other in zip(values_of(loaded.variables), values_of(trained(5).variables), strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_models_come_back_from_h5(library, tmp_path):
    model = sparse_mlp(library, 16, 0.5)
    fitted(library, model, SparseMuP(8).optimizer(model, library.optimizers.Adam(0.01)), 1)
    model.save(tmp_path / "model.h5")
    loaded = library.models.load_model(tmp_path / "model.h5")
    assert loaded.optimizer.rate_multipliers == model.optimizer.rate_multipliers
    x, _ = data()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@BOTH
@pytest.mark.parametrize("compiled", [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}])
def test_ways_to_run_a_step_end_alike(library, compiled):
    def trained(**how):
        model = sparse_mlp(library, 16, 0.5)
        SparseMuP(8).initialize(model, seed=0)
        return fitted(library, model, SparseMuP(8).optimizer(model, library.optimizers.Adam(0.01)), 4, **how)

    for one, other in zip(values_of(trained().variables), values_of(trained(**compiled).variables), strict=True):
        # Adam divides by the root of a second moment: rounding of small gradients shows up to a part of a step.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@BOTH
def test_mixed_precision_scales_the_loss_around_it(library):
    layers = library.layers
    stack = [layers.Input((48,)), Masked(layers.Dense(16, "relu", dtype="mixed_float16"), sparsity=0.5, seed=0)]
    model = library.Sequential([*stack, layers.Dense(10, dtype="float32")])
    mup, before = SparseMuP(), values_of(model.trainable_variables)
    optimizer = mup.optimizer(model, library.optimizers.SGD(0.1))
    wrapped = (library.optimizers if library is keras else library.mixed_precision).LossScaleOptimizer(optimizer)
    fitted(library, model, wrapped, 1)
    masked = masked_kernels(model)[0]
    moved = compat.to_numpy("k", masked.kernel) - before[0]
    assert np.all(moved[masked.mask_value()] != 0) and not np.any(moved[~masked.mask_value()])


def signals(model):
    """The activations of the hidden layers and the outputs."""
    probe = keras.Model(model.inputs[0], [layer.output for layer in model.layers])
    return [np.array(values) for values in probe(data()[0])]


def activations(density, initialized, rates):
    """Mean |activation| of hidden layers after ten steps; initialized or trained as a dense model where not asked."""
    model = sparse_mlp(keras, 1024, density, depth=4)
    mup, optimizer = SparseMuP(), keras.optimizers.Adam(5e-4)
    mup.initialize(model, seed=0)
    if not initialized:
        reinitialize(model, SparseHeNormal(granularity="dense"), seed=0)
    fitted(keras, model, mup.optimizer(model, optimizer) if rates else optimizer)
    return np.array([np.abs(values).mean() for values in signals(model)[:-1]])


def test_the_coordinate_check_over_densities():
    dense = activations(1.0, True, True)
    both, standard, initialized, rates = (
        activations(1 / 16, *how) / dense for how in ((True, True), (False, False), (True, False), (False, True))
    )
    assert np.all(np.abs(np.log(both)) < np.log(1.3)), both
    assert standard[-1] < 1 / 30
    assert np.abs(np.log(initialized)).max() > np.log(1.5)
    assert np.abs(np.log(rates)).max() > np.log(1.5)


def changes(width, scaled, make, seeds):
    """How much ten steps change activations, mean |difference|, from outputs of 0 on, whose size is no matter then."""
    found = []
    for seed in range(seeds):
        model, mup = sparse_mlp(keras, width, 0.5, depth=2, seed=seed), SparseMuP(128)
        (mup if scaled else SparseMuP()).initialize(model, SparseHeNormal(granularity="layer"), seed=seed)
        model.layers[-1].kernel.assign(np.zeros(model.layers[-1].kernel.shape))
        before = signals(model)
        fitted(keras, model, mup.optimizer(model, make()) if scaled else make())
        found.append([np.abs(after - first).mean() for after, first in zip(signals(model), before, strict=True)])
    return np.mean(found, axis=0)


@pytest.mark.parametrize("name, rate", [("Adam", 1e-3), ("SGD", 0.05)])
def test_the_coordinate_check_over_widths(name, rate):
    make = functools.partial(getattr(keras.optimizers, name), rate)
    narrow = changes(128, True, make, seeds=4)
    scaled, standard = (changes(1024, how, make, seeds=1) / narrow for how in (True, False))
    assert np.all(np.abs(np.log(scaled)) < np.log(1.3)), scaled
    # The first layer, whose fan-in does not grow, is alike in both.
    assert np.all(standard[1:] > 1.5), standard


def test_frozen_layers_after_that_are_an_error():
    model = sparse_mlp(keras, 16, 0.5)
    optimizer = SparseMuP().optimizer(model, keras.optimizers.SGD())
    model.layers[0].trainable = False
    with pytest.raises(ValueError, match="6 variables of shapes .* Received: 4 of shapes"):
        fitted(keras, model, optimizer, 1)


@BOTH
def test_variables_in_another_order_are_an_error(library):
    model = sparse_mlp(library, 16, 0.5)
    optimizer = SparseMuP(8).optimizer(model, library.optimizers.SGD())
    variables = model.trainable_variables[::-1]
    with pytest.raises(ValueError, match="in this order. Received: 6 of shapes"):
        steps_of(library, optimizer, [[np.ones(v.shape, np.float32) for v in variables]], variables)


@BOTH
def test_the_learning_rate_may_be_a_function(library):
    model = sparse_mlp(library, 16, 0.5)
    optimizer = SparseMuP().optimizer(model, library.optimizers.SGD(lambda: 0.25))
    before = values_of(model.trainable_variables)
    steps_of(library, optimizer, [[np.ones_like(value) for value in before]], model.trainable_variables)
    rates = [row.sgd_rate for row in SparseMuP().table(model).rows]
    for variable, value, rate in zip(model.trainable_variables, before, rates, strict=True):
        np.testing.assert_allclose(compat.to_numpy("v", variable), value - 0.25 * rate, rtol=0, atol=1e-6)


def test_bad_arguments_are_named():
    for arguments, named in (
        ({"base": 0}, "`base`.*0"),
        ({"base_density": 0.0}, "`base_density`"),
        ({"base_density": 1.5}, r"`base_density`.*\(0, 1\].*1.5"),
    ):
        with pytest.raises(ValueError, match=named):
            SparseMuP(**arguments)
    with pytest.raises(ValueError, match="`model` must be built"):
        SparseMuP().table(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(TypeError, match="layer or model"):
        SparseMuP("small")


def test_models_that_cannot_be_scaled_are_refused():
    layers, model = keras.layers, sparse_mlp(keras, 16, 0.5)
    with pytest.raises(ValueError, match="`base` must have the layers of the model"):
        SparseMuP(mlp(keras, 8, 2)).table(model)
    fields = [
        keras.Sequential([layers.Input((8, 8, 2)), layers.Conv2D(4, n), layers.Flatten(), layers.Dense(3)])
        for n in (3, 5)
    ]
    with pytest.raises(ValueError, match="`base` must have the layers of the model"):
        SparseMuP(fields[0]).table(fields[1])
    two = keras.Sequential([layers.Input((48,)), layers.Dense(32), layers.Dense(16), layers.Dense(10)])
    with pytest.raises(ValueError, match=r"hidden widths \[16, 32\].*give the base as a model"):
        SparseMuP(8).table(two)
    with pytest.raises(ValueError, match=r"inputs and outputs \[10, 16\]"):
        SparseMuP(8).table(mlp(keras, 16, inputs=16))
    with pytest.raises(ValueError, match="at least two kernels"):
        SparseMuP(8).table(keras.Sequential([layers.Input((48,)), layers.Dense(16)]))
    normed = keras.Sequential([layers.Input((48,)), WeightNorm(layers.Dense(16)), layers.Dense(10)])
    spectral = keras.Sequential([layers.Input((48,)), layers.SpectralNormalization(layers.Dense(16)), layers.Dense(10)])
    unit = layers.Dense(16, kernel_constraint=keras.constraints.UnitNorm(), name="unit")
    constrained = keras.Sequential([layers.Input((48,)), unit, layers.Dense(10)])
    for model, named in (
        (normed, "a WeightNorm layer"),
        (spectral, "a SpectralNormalization layer"),
        (constrained, "UnitNorm of 'unit/kernel'"),
    ):
        with pytest.raises(ValueError, match=named):
            SparseMuP().table(model)
    with pytest.raises(TypeError, match="layer or model"):
        SparseMuP().table(5)
    group = keras.Sequential([layers.Input((48,)), layers.LayerNormalization(axis=1), layers.Dense(3)])
    assert [row.role for row in SparseMuP().table(group).rows] == ["vector", "vector", "hidden", "vector"]

    class Own(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(4, 4), name="table")

        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"how other weights scale is not known.*\(4, 4\)"):
        SparseMuP().table(keras.Sequential([layers.Input((48,)), Own(), layers.Dense(3)]))


@BOTH
def test_optimizers_and_initializers_that_do_not_fit_are_refused(library):
    model = sparse_mlp(library, 16, 0.5)
    other = keras if library is tf_keras else tf_keras
    for optimizer in (library.optimizers.Adagrad(), other.optimizers.Adam(), "adam"):
        with pytest.raises(ValueError, match="`optimizer` must be one of SGD, Adam"):
            SparseMuP().optimizer(model, optimizer)
    built = library.optimizers.Adam()
    built.build(model.trainable_variables)
    with pytest.raises(ValueError, match="must not be built"):
        SparseMuP().optimizer(model, built)
    before = values_of(model.variables)
    dense, effective = (SparseHeNormal(granularity=name) for name in ("dense", "effective"))
    for initializer in (SparseGlorotNormal(), dense, effective, ApproximateIsometryInit()):
        with pytest.raises(ValueError, match="`initializer` must scale by the fan-in"):
            SparseMuP().initialize(model, initializer)
    assert all(map(np.array_equal, before, values_of(model.variables)))


@BOTH
def test_slots_are_found_by_what_updates_masks(library):
    model = sparse_mlp(library, 16, 0.5)
    optimizer = SparseMuP().optimizer(model, library.optimizers.Adam())
    optimizer.build(model.trainable_variables)
    assert len(list(slots_of(optimizer, masked_kernels(model)[0].kernel))) == 2
