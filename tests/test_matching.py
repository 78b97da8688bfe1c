import keras
import numpy as np
import pytest
import tf_keras
from statistical import normal_bound

from keras_sparse_init import SparseHeUniform, SparseScaledInit
from keras_sparse_init.fans import kernel_layout
from keras_sparse_init.matching import mask_aware, unaware

# Not square, so that a fan-in taken for a fan-out shows; Keras's fans of such kernels are right.
SHAPES = {"dense": (300, 200), "conv": (3, 5, 40, 70)}

RANDOM = [
    ("HeNormal", {}),
    ("HeUniform", {}),
    ("GlorotNormal", {}),
    ("GlorotUniform", {}),
    ("LecunNormal", {}),
    ("LecunUniform", {}),
    ("VarianceScaling", {"scale": 0.3, "mode": "fan_out", "distribution": "untruncated_normal"}),
    ("VarianceScaling", {"scale": 3.0, "mode": "fan_avg", "distribution": "uniform"}),
    ("RandomNormal", {"stddev": 0.2}),
    ("TruncatedNormal", {"stddev": 0.2}),
    ("RandomUniform", {"minval": -0.3, "maxval": 0.3}),
    ("Orthogonal", {"gain": 1.7}),
]


def matched(initializer, shape, layout="conv"):
    return mask_aware(initializer, "layer/kernel", shape, kernel_layout(layout, shape))


def variance_and_kurtosis(values):
    values = np.asarray(values, np.float64)
    return np.mean(values**2), np.mean(values**4) / np.mean(values**2) ** 2


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(("name", "settings"), RANDOM, ids=[f"{name}-{len(s)}" for name, s in RANDOM])
def test_at_density_1_the_law_is_that_of_keras(library, layout, name, settings):
    """The mean squares of two samples of n differ by at most z * sqrt((2 k - 2) / n) of their value, k the kurtosis."""
    shape = SHAPES[layout]
    original = getattr(library.initializers, name)(seed=1, **settings)
    ours = matched(original, shape, layout)
    theirs = variance_and_kurtosis(original(shape, dtype="float32"))
    own = variance_and_kurtosis(ours.draw(shape, "float32", np.ones(shape, bool), layout, 0))
    bound = normal_bound() * np.sqrt(2 * (own[1] - 1) / np.prod(shape))
    assert own[0] == pytest.approx(theirs[0], rel=bound)
    if name != "Orthogonal":
        # The kurtoses of the laws are 1.8, 2.36 and 3; theirs within 0.1 tells them apart.
        assert own[1] == pytest.approx(theirs[1], abs=0.15)
    assert ours.seed == 1


@pytest.mark.parametrize("name", ["he_normal", "glorot_uniform", "orthogonal", "random_normal", "HeNormal"])
def test_a_name_stands_for_the_initializer(name):
    assert isinstance(matched(name, (30, 20), "dense"), SparseScaledInit)


@pytest.mark.parametrize("initializer", [tf_keras.initializers.HeNormal, keras.initializers.HeNormal, SparseHeUniform])
def test_a_class_stands_for_an_initializer_of_its_own(initializer):
    ours = matched(initializer, (30, 20), "dense")
    assert (ours.scale, ours.mode) == (2.0, "fan_in")


def test_the_variance_of_a_fixed_one_grows_as_the_fan_in_shrinks():
    shape = (400, 300)
    ours = matched(tf_keras.initializers.RandomUniform(-0.5, 0.5), shape, "dense")
    mask = np.zeros(shape, bool)
    mask[:100] = True  # A quarter: the limit doubles.
    values = np.abs(ours.draw(shape, "float32", mask, "dense", 0))
    assert 0.99 < values.max() <= 1 + 1e-6


def test_one_that_knows_masks_is_taken_as_it_is():
    initializer = SparseHeUniform(negative_slope=0.1)
    assert matched(initializer, (30, 20), "dense") is initializer


@pytest.mark.parametrize(
    "initializer",
    [
        "zeros",
        "ones",
        "identity",
        tf_keras.initializers.Constant(0.1),
        keras.initializers.Constant(0.1),
        tf_keras.initializers.RandomNormal(mean=1.0),
        tf_keras.initializers.TruncatedNormal(mean=1.0),
        tf_keras.initializers.RandomUniform(0.0, 1.0),
        lambda shape, dtype=None: np.ones(shape),
        None,
        3.0,
    ],
    ids=lambda initializer: initializer if isinstance(initializer, str) else type(initializer).__qualname__,
)
def test_one_without_a_variance_to_scale_is_refused_by_the_kernel_it_is_for(initializer):
    with pytest.raises(ValueError, match="layer/kernel.*variance"):
        matched(initializer, (30, 30), "dense")


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_the_way_back_gives_an_initializer_of_keras_with_the_same_settings(library):
    plain = unaware(SparseScaledInit(3.0, "fan_avg", "uniform", seed=5, sparsity=0.5), library)
    assert type(plain) is library.initializers.VarianceScaling
    assert (plain.scale, plain.mode, plain.distribution, plain.seed) == (3.0, "fan_avg", "uniform", 5)
    assert "sparse" not in str(library.saving.serialize_keras_object(plain))
