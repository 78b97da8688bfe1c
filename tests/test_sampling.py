"""Randomness, tested once and here: distributions, independence, seeds, blocks and masks."""

from __future__ import annotations

import statistics

import ml_dtypes
import numpy as np
import pytest
from statistical import LIMIT, assert_distribution, assert_mean_0_and_variance_1, assert_uncorrelated

from keras_sparse_init import sampling
from keras_sparse_init.arguments import check_seed
from keras_sparse_init.blocks import BLOCK_SIZE, map_blocks, row_blocks
from keras_sparse_init.sampling import DISTRIBUTIONS, derive_seed, sample

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

# Several blocks, the last one smaller than the others; blocks consist of whole rows.
MANY_BLOCKS = (5 * BLOCK_SIZE // 2 // 1000, 1000)
SHAPES = {
    "scalar": (),
    "vector": (7,),
    "a vector of several blocks": (2 * BLOCK_SIZE + 3,),
    "rank 2": (5, 4),
    "rank 5": (2, 1, 3, 5, 4),
    "several blocks": MANY_BLOCKS,
    "rows that do not divide a block": (7, 3, BLOCK_SIZE // 7 + 11),
    "a row wider than a block": (3, BLOCK_SIZE + 5),
    "a column longer than a block": (BLOCK_SIZE + 5, 1),
}


def random_mask(shape, density, seed=0):
    return np.random.default_rng(seed).random(shape) < density


def std_of(varies, shape):
    """A std that varies along the columns (fan-in), the rows (fan-out), both (fan-avg), an inner axis, or not."""
    rng = np.random.default_rng(3)
    kept = {
        "nowhere": (1,) * len(shape),
        "columns": (1,) * (len(shape) - 1) + shape[-1:],
        "rows": (*shape[:-1], 1),
        "both": shape,
        "an inner axis": (1,) * (len(shape) - 2) + (shape[-2], 1),
    }[varies]
    return rng.uniform(0.1, 3, kept)


# Distributions.


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [None, 0.9, 0.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_have_the_distribution_asked_for(distribution, density, dtype):
    """A mask of 0.9 draws everything and of 0.3 the nonzeros alone."""
    mask = None if density is None else random_mask(MANY_BLOCKS, density)
    values = sample(0.25, MANY_BLOCKS, 1, mask, distribution, dtype)
    assert_distribution((values if mask is None else values[mask]) / 0.25, distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("other", DISTRIBUTIONS)
def test_the_test_of_distributions_tells_them_apart(distribution, other):
    if distribution != other:
        with pytest.raises(AssertionError):
            assert_distribution(sample(1.0, MANY_BLOCKS, 1, None, distribution), other)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda right: right * sampling.TRUNCATED_STD, id="truncation not made up for"),
        pytest.param(lambda right: np.clip(right, -2, 2), id="clipped at 2"),
        pytest.param(lambda right: right * 1.01, id="1% too wide"),
        pytest.param(lambda right: right + 0.01, id="off centre"),
        pytest.param(np.abs, id="one sign"),
    ],
)
def test_a_wrong_sample_fails_the_test_of_distributions(wrong):
    right = sample(1.0, MANY_BLOCKS, 1)
    assert_distribution(right, "truncated_normal")
    with pytest.raises(AssertionError):
        assert_distribution(wrong(right), "truncated_normal")


@pytest.mark.parametrize("distribution", ["truncated_normal", "uniform"])
def test_values_reach_the_limits_of_their_distribution_but_do_not_pass_them(distribution):
    """All of more than 500,000 values stay below 0.998 of the limit with probability exp(-200) at most."""
    largest = np.abs(sample(1.0, MANY_BLOCKS, 2, None, distribution, np.float64)).max()
    assert 0.998 * LIMIT[distribution] < largest <= LIMIT[distribution]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [None, 0.9, 0.3])
def test_half_types_are_float32_values_cast(dtype, distribution, density):
    mask = None if density is None else random_mask((300, 200), density)
    half = sample(0.5, (300, 200), 3, mask, distribution, dtype)
    full = sample(0.5, (300, 200), 3, mask, distribution, np.float32)
    assert half.dtype == dtype
    np.testing.assert_array_equal(half, full.astype(dtype))


# Standard deviations.


@pytest.mark.parametrize("varies", ["nowhere", "columns", "rows", "both", "an inner axis"])
@pytest.mark.parametrize("density", [None, 0.9, 0.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(30, 20), (3, 1, 30, 20), (1, 20), (30, 1), MANY_BLOCKS, (2, 2, *MANY_BLOCKS[:1], 300)]
)
def test_each_weight_is_multiplied_by_its_own_std(varies, density, dtype, shape):
    std = std_of(varies, shape)
    mask = None if density is None else random_mask(shape, density)
    of_unit_variance = sample(1.0, shape, 4, mask, dtype=dtype)
    np.testing.assert_array_equal(sample(std, shape, 4, mask, dtype=dtype), of_unit_variance * std.astype(dtype))


@pytest.mark.parametrize("std", [0.5, np.float32(0.5), np.full((1,), 0.5), np.full((1, 1), 0.5), np.full((4,), 0.5)])
@pytest.mark.parametrize("density", [None, 0.3])
def test_a_std_of_lower_rank_broadcasts(std, density):
    mask = None if density is None else random_mask((5, 4), density)
    expected = sample(np.full((5, 4), 0.5), (5, 4), 0, mask)
    np.testing.assert_array_equal(sample(std, (5, 4), 0, mask), expected)


def test_the_variance_of_a_tenth_of_the_weights_is_exact_too():
    """At a density of 0.1, as for the whole: scaling happens before the values are put in place."""
    std = std_of("columns", MANY_BLOCKS)
    mask = random_mask(MANY_BLOCKS, 0.1)
    values = sample(std, MANY_BLOCKS, 8, mask)
    assert_mean_0_and_variance_1((values / std)[mask], "truncated_normal")
    with pytest.raises(AssertionError):
        assert_mean_0_and_variance_1((values / std[:, ::-1])[mask], "truncated_normal")


# Masks.


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_values_are_exactly_0_off_the_mask_and_nowhere_else(shape, density, distribution):
    mask = np.asarray(random_mask(shape, density))
    values = sample(0.1, shape, 0, mask, distribution)
    assert values.shape == shape and values.dtype == np.float32
    np.testing.assert_array_equal(values != 0, mask)
    assert not np.signbit(values[~mask]).any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mask_of", [np.zeros, np.ones])
def test_empty_and_full_masks(shape, mask_of):
    mask = mask_of(shape, bool)
    np.testing.assert_array_equal(sample(0.1, shape, 0, mask) != 0, mask)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_all_ones_mask_gives_the_values_of_no_mask(shape):
    np.testing.assert_array_equal(sample(0.1, shape, 0, np.ones(shape, bool)), sample(0.1, shape, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [None, 0.9, 0.3])
@pytest.mark.parametrize("std", [0.0, 1e-9, 1e-44])
def test_no_weight_on_the_mask_vanishes_by_rounding(dtype, density, std):
    """`kernel != 0` is read as the mask; subnormal numbers, which processors may flush to 0, do not appear at std 0."""
    mask = np.ones((50, 40), bool) if density is None else random_mask((50, 40), density)
    values = sample(std, (50, 40), 0, None if density is None else mask, dtype=dtype)
    np.testing.assert_array_equal(values != 0, mask)
    if std == 0:
        assert set(values[mask].tolist()) == {float(ml_dtypes.finfo(dtype).smallest_normal)}


def test_a_masks_memory_order_does_not_matter():
    mask = random_mask((300, 200), 0.3)
    expected = sample(1.0, (300, 200), 0, mask)
    for variant in (np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2], mask[::-1].copy()[::-1]):
        np.testing.assert_array_equal(sample(1.0, (300, 200), 0, variant), expected)


def test_the_arguments_stay_as_they_were():
    mask, std = random_mask((300, 200), 0.9), np.full((300, 1), 0.5)
    before = mask.copy(), std.copy()
    sample(std, (300, 200), 0, mask)
    np.testing.assert_array_equal(mask, before[0])
    np.testing.assert_array_equal(std, before[1])


# Independence.


def assert_neighbours_are_independent(values):
    """Values of variance 1, in rows."""
    assert_uncorrelated(values[:, :-1], values[:, 1:])
    assert_uncorrelated(values[:-1], values[1:])
    height = max(1, BLOCK_SIZE // values.shape[1])
    assert_uncorrelated(values[:-height], values[height:])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [MANY_BLOCKS, (3, BLOCK_SIZE + 5)])
def test_values_are_independent_of_their_neighbours_and_of_other_blocks(distribution, shape):
    assert_neighbours_are_independent(sample(1.0, shape, 5, None, distribution))


def test_one_block_repeated_fails_the_test_of_independence():
    height = BLOCK_SIZE // MANY_BLOCKS[1]
    repeated = sample(1.0, MANY_BLOCKS, 5).copy()
    repeated[height : 2 * height] = repeated[:height]
    with pytest.raises(AssertionError):
        assert_neighbours_are_independent(repeated)


def test_masked_values_of_different_blocks_differ():
    mask = np.tile(random_mask((1, 1000), 0.3), (MANY_BLOCKS[0], 1))
    values = sample(1.0, MANY_BLOCKS, 5, mask)[mask].reshape(MANY_BLOCKS[0], -1)
    height = BLOCK_SIZE // 1000
    assert_uncorrelated(values[:-height], values[height:])


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("seeds", [(0, 1), (0, 2**32), (7, 2**63), (2**64, 0)])
def test_different_seeds_give_independent_values(density, seeds):
    mask = None if density is None else random_mask((300, 200), density)
    first, second = (sample(1.0, (300, 200), seed, mask) for seed in seeds)
    if mask is not None:
        first, second = first[mask], second[mask]
    assert_uncorrelated(first, second)
    assert (first != second).mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_seed_gives_the_same_bits(shape, distribution):
    first, second = (sample(1.0, shape, 6, None, distribution) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("density", [None, 0.9, 0.3])
@pytest.mark.parametrize("order", [1, -1], ids=["one after the other", "the last block first"])
def test_values_do_not_depend_on_the_threads(monkeypatch, density, order):
    mask = None if density is None else random_mask(MANY_BLOCKS, density)
    threaded = sample(1.0, MANY_BLOCKS, 7, mask)
    calls = []

    def serially(function, *items):
        for args in list(zip(*items, strict=True))[::order]:
            calls.append(args)
            function(*args)

    monkeypatch.setattr(sampling, "map_blocks", serially)
    assert sample(1.0, MANY_BLOCKS, 7, mask).tobytes() == threaded.tobytes()
    assert len(calls) == 3


def test_sampling_leaves_numpys_and_pythons_global_generators_alone():
    import random

    states = np.random.get_state()[1].tobytes(), random.getstate()
    sample(1.0, (300, 200), 0)
    assert (np.random.get_state()[1].tobytes(), random.getstate()) == states


# Blocks.


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (1, 10 * BLOCK_SIZE), (1000, 3), (3, BLOCK_SIZE), (3 * BLOCK_SIZE + 1, 1), (5000, 777)]
)
def test_blocks_are_whole_rows_without_gap_or_overlap(rows, width):
    blocks = row_blocks(rows, width)
    np.testing.assert_array_equal(np.concatenate([np.arange(rows)[block] for block in blocks]), np.arange(rows))
    for block in blocks:
        assert (block.stop - block.start) * width <= max(BLOCK_SIZE, width)


def test_map_blocks_keeps_the_order_and_passes_errors_on():
    assert map_blocks(lambda a, b: a - b, range(20), range(0, 40, 2)) == [-i for i in range(20)]
    assert map_blocks(lambda a: -a, [3]) == [-3]
    assert map_blocks(lambda a: -a, []) == []
    with pytest.raises(ZeroDivisionError):
        map_blocks(lambda a: 1 / a, [1, 0, 2])
    with pytest.raises(ValueError):
        map_blocks(lambda a, b: a, [1, 2], [1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_array_is_new_writable_contiguous_and_aligned_for_dlpack(shape, dtype):
    values = sample(1.0, shape, 0, dtype=dtype)
    assert values.shape == shape and values.dtype == dtype
    assert values.ctypes.data % 64 == 0
    assert values.flags.c_contiguous and values.flags.writeable
    assert not np.shares_memory(values, sample(1.0, shape, 0, dtype=dtype))


# Seeds.


def test_derived_seeds_are_the_same_in_every_process_and_differ_by_name_and_seed():
    assert derive_seed(0, "conv1/kernel") == 1795674479
    seeds = {derive_seed(seed, f"layer{i}/kernel") for seed in range(20) for i in range(50)}
    assert len(seeds) == 1000, "a collision among 1000 seeds of 31 bits has probability 2e-4, and these are fixed"
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_derived_seeds_do_not_confuse_seed_and_name():
    assert derive_seed(1, "1") != derive_seed(11, "")


@pytest.mark.parametrize("seed", [0, 1, 2**64, np.int64(3), np.uint8(3)])
def test_non_negative_integers_are_seeds(seed):
    assert check_seed(seed) == seed
    assert type(check_seed(seed)) is int


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError), (None, TypeError)]
)
def test_other_seeds_are_errors_that_name_them(seed, error):
    with pytest.raises(error, match=f"`seed` must be a non-negative int. Received: seed={seed!r}"):
        check_seed(seed)


def test_the_table_of_quantiles_is_that_of_the_truncated_normal():
    """In the middle of each cell, where a straight line is furthest from the curve, and at its start."""
    starts, slopes = sampling._quantiles()
    normal = statistics.NormalDist()
    low, share = normal.cdf(-2.0), normal.cdf(2.0) - normal.cdf(-2.0)
    for within in (0.0, 0.5):
        exact = [normal.inv_cdf(low + share * (cell + within) / len(starts)) for cell in range(len(starts))]
        found = starts.astype(np.float64) + slopes * within * 2**32 / len(starts)
        assert np.abs(found - np.array(exact) / 0.87962566103423978).max() < 6e-6
