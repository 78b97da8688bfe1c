import hashlib
import itertools
import json
import math
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import pytest

from keras_sparse_init import blocks, masks
from keras_sparse_init import choose as choose_module
from keras_sparse_init.choose import choose
from keras_sparse_init.fans import KernelLayout, fans, kernel_layout
from keras_sparse_init.sampling import sample

FALSE_ALARM = 1e-6
RULES = (
    masks.Random(0.7),
    masks.ConstantFanIn(0.7),
    masks.NM(2, 4),
    masks.NM(1, 8, axis=-1),
    masks.Block(0.6, (2, 4)),
    masks.Heterogeneous(0.7),
)
SPARSITIES = (0.0, 0.1, 0.29, 0.5, 0.6, 0.9, 0.98, 0.999999)


def normal_bound(comparisons=1):
    """The |z| that one of so many standard normal statistics exceeds with probability 1e-6 at most (Bonferroni)."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * comparisons))


def chi_square_bound(degrees):
    """The 1 - 1e-6 quantile of the chi-square law (Wilson and Hilferty's approximation, good to 1% here)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NormalDist().inv_cdf(1 - FALSE_ALARM) * math.sqrt(spread)) ** 3


def chi_square(outcomes, count):
    """Pearson's statistic of outcomes 0..count-1 against the uniform law."""
    expected = outcomes.size / count
    return float(((np.bincount(outcomes, minlength=count) - expected) ** 2 / expected).sum())


def subset_indices(columns, k):
    """For each column of an (n, columns) array with k ones, the index of its subset among all subsets."""
    n = columns.shape[0]
    index = {sum(1 << i for i in subset): j for j, subset in enumerate(itertools.combinations(range(n), k))}
    words = (columns.astype(np.int64) << np.arange(n)[:, None]).sum(axis=0)
    lookup = np.zeros(2**n, np.int64)
    lookup[list(index)] = list(index.values())
    return lookup[words]


def violations(draws, k):
    """Names of the marks of the uniform law over k-subsets that these (times, n) draws do not bear.

    The bounds: each position's count is Binomial(times, k/n); the mean of a statistic over the independent draws is
    normal, with the standard error estimated from the draws. Quantiles at 1e-6.
    """
    times, n = draws.shape
    draws = draws.astype(np.float64)
    p, pair = k / n, k * (k - 1) / (n * (n - 1))
    found = []
    z = (draws.sum(axis=0) - times * p) / math.sqrt(times * p * (1 - p))
    if np.abs(z).max() > normal_bound(n):
        found.append("inclusion")
    half = n // 2
    variance = half * p * (1 - p) * (n - half) / (n - 1)
    statistics = {"dispersion": ((draws[:, :half].sum(axis=1) - half * p) ** 2, variance)}
    for lag in (1, 7, n // 3):
        statistics[f"pairs {lag}"] = (draws[:, lag:] * draws[:, :-lag]).sum(axis=1), (n - lag) * pair
    for name, (values, expected) in statistics.items():
        if abs(values.mean() - expected) > normal_bound(len(statistics)) * values.std() / math.sqrt(times) + 1e-9:
            found.append(name)
    return found


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks of work in small masks."""
    monkeypatch.setattr(choose_module, "_BLOCK", 256)


# Counts


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (100,), (255, 1), (16, 16), (257,), (5, 5, 6, 16), (784, 300), (2**20 + 1,), (1100, 1000), ()]
)
def test_random_masks_have_the_exact_count(shape, sparsity):
    size = math.prod(shape)
    mask = masks.random_mask(shape, sparsity, seed=3)
    assert mask.shape == shape and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    assert size - int(mask.sum()) == math.floor(sparsity * size)


def test_counts_are_floors_of_the_product_as_floating_point_has_it():
    assert (masks.random_mask((100,), 0.29, seed=0) == 0).sum() == 28  # 0.29 * 100 = 28.999999999999996


LAYOUTS = [
    (None, (40, 30)),
    (None, (300, 12)),
    (None, (9,)),
    ("conv", (3, 3, 8, 6)),
    ("conv", (3, 3, 64, 6)),
    ("conv_transpose", (3, 3, 6, 8)),
    ("conv_transpose", (4, 4, 5, 20)),
    ("depthwise", (3, 3, 8, 2)),
    ("depthwise", (17, 17, 4, 2)),
    ("lstm", (12, 32)),
    ("ab,bcd->acd", (20, 3, 4)),
    ("abc,dec->abde", (3, 4, 20)),
    ("abcd,cde->abe", (4, 6, 5)),
    ("ab,cbd->acd", (3, 20, 4)),
    (kernel_layout("conv", (3, 8, 6), groups=2), (3, 8, 6)),
]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS, ids=str)
def test_constant_fan_in_gives_every_unit_the_same_number_of_inputs(layout, shape, sparsity):
    mask = masks.constant_fan_in_mask(shape, sparsity, 1, layout)
    inputs = math.prod(shape[axis] for axis in kernel_layout(layout, shape).fan_in_axes)
    fan_in, _ = fans(mask, layout)
    assert mask.shape == shape and mask.dtype == np.uint8 and mask.flags.c_contiguous
    assert np.unique(fan_in).tolist() == [inputs - math.floor(sparsity * inputs)]


def test_constant_fan_in_of_an_embedding_counts_the_tokens_of_each_dimension():
    mask = masks.constant_fan_in_mask((50, 8), 0.9, 0, "embedding")
    assert mask.sum(axis=0).tolist() == [5] * 8


def test_constant_fan_in_depends_on_the_layout():
    mask = masks.constant_fan_in_mask((3, 3, 16, 16), 0.5, 0, "conv_transpose")
    assert np.unique(mask.sum(axis=(0, 1, 3))).tolist() == [72]
    assert np.unique(mask.sum(axis=(0, 1, 2))).size > 1


@pytest.mark.parametrize(
    ("layout", "shape", "axis", "resolved"),
    [
        (None, (24, 10), "input", 0),
        (None, (24, 10), 0, 0),
        (None, (10, 24), -1, 1),
        (None, (24,), 0, 0),
        (None, (3, 3, 24, 10), "input", 2),
        ("conv", (3, 24, 10), "input", 1),
        ("conv_transpose", (3, 3, 10, 24), "input", 3),
        ("depthwise", (3, 3, 24, 1), 2, 2),
        ("embedding", (24, 10), "input", 0),
        ("gru", (24, 30), "input", 0),
        ("ab,cbd->acd", (3, 24, 4), "input", 1),
        ("abcd,cde->abe", (4, 24, 5), "input", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 4), (3, 4), (1, 8), (4, 4), (5, 24), (24, 24)])
def test_nm_masks_have_n_nonzeros_in_every_m_along_the_axis(layout, shape, axis, resolved, n, m):
    mask = masks.nm_mask(shape, n, m, 2, axis, layout)
    groups = np.moveaxis(mask, resolved, -1).reshape(-1, m)
    assert mask.shape == shape and mask.dtype == np.uint8 and mask.flags.c_contiguous
    assert np.unique(groups.sum(axis=1)).tolist() == [n]


def test_nm_groups_may_be_long():
    mask = masks.nm_mask((1024, 6), 37, 512, seed=0)
    assert np.unique(mask.reshape(2, 512, 6).sum(axis=1)).tolist() == [37]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(
    ("shape", "block_size", "extents"),
    [
        ((32, 48), 4, (4, 4)),
        ((32, 48), (8, 3), (8, 3)),
        ((32, 48), (16,), (1, 16)),
        ((3, 3, 8, 8), 2, (1, 1, 2, 2)),
        ((3, 3, 8, 8), (3, 3, 8, 1), (3, 3, 8, 1)),
        ((12,), (3,), (3,)),
        ((32, 48), 1, (1, 1)),
    ],
)
def test_block_masks_are_whole_blocks_in_the_exact_number(shape, block_size, extents, sparsity):
    mask = masks.block_mask(shape, sparsity, block_size, seed=4)
    split = [length for pair in zip(shape, extents, strict=True) for length in (pair[0] // pair[1], pair[1])]
    inside = tuple(range(1, 2 * len(shape), 2))
    sums = mask.reshape(split).sum(axis=inside)
    assert mask.shape == shape and mask.dtype == np.uint8
    assert set(np.unique(sums)) <= {0, math.prod(extents)}
    assert (sums == 0).sum() == math.floor(sparsity * sums.size)


# Uniformity


@pytest.mark.parametrize("short", [0, 255])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 2), (5, 1), (6, 3), (8, 5), (11, 3), (12, 6)])
def test_every_subset_is_equally_likely(n, k, short, monkeypatch):
    monkeypatch.setattr(choose_module, "_SHORT", short)
    columns = choose(n, 200_000, k, seed=5)
    # Pearson's statistic of independent columns is chi-square with one degree less than there are subsets.
    subsets = math.comb(n, k)
    assert chi_square(subset_indices(columns, k), subsets) < chi_square_bound(subsets - 1)


@pytest.mark.parametrize("short", [0, 255])
def test_columns_are_independent(short, monkeypatch, small_blocks):
    monkeypatch.setattr(choose_module, "_SHORT", short)
    subsets = subset_indices(choose(4, 100_000, 2, seed=6), 2)
    for lag in (1, 3, 50_000):
        pairs = subsets[:-lag] * 6 + subsets[lag:]
        # One pair of columns in two, so that no column counts twice: chi-square with 35 degrees.
        starts = np.flatnonzero(np.arange(pairs.size) // lag % 2 == 0)
        assert chi_square(pairs[starts], 36) < chi_square_bound(35)


@pytest.mark.parametrize("size", [200, 1000])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.6, 0.9])
def test_random_masks_bear_the_marks_of_the_uniform_law(size, sparsity, small_blocks):
    draws = np.stack([masks.random_mask((size,), sparsity, seed) for seed in range(1000)])
    assert violations(draws, size - math.floor(sparsity * size)) == []


@pytest.mark.parametrize("inputs", [60, 400])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_constant_fan_in_units_bear_the_marks_of_the_uniform_law(inputs, sparsity, small_blocks):
    units = np.concatenate([masks.constant_fan_in_mask((inputs, 20), sparsity, seed).T for seed in range(100)])
    assert violations(units, inputs - math.floor(sparsity * inputs)) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nm_groups_are_uniform_along_every_axis(axis):
    mask = masks.nm_mask((40, 60, 80), 2, 4, seed=1, axis=axis)
    groups = np.moveaxis(mask, axis, 0)
    subsets = subset_indices(groups.reshape(-1, 4, groups[0].size).swapaxes(0, 1).reshape(4, -1), 2)
    assert chi_square(subsets, 6) < chi_square_bound(5)


def test_blocks_bear_the_marks_of_the_uniform_law():
    draws = np.stack([masks.block_mask((40, 30), 0.7, (2, 3), seed)[::2, ::3].ravel() for seed in range(1500)])
    assert violations(draws, 200 - 140) == []


def test_wrong_choices_do_not_bear_the_marks():
    n, k, times = 400, 120, 1500
    rng = np.random.default_rng(0)

    def rows(choose_one):
        draws = np.zeros((times, n), bool)
        for row in draws:
            row[choose_one()] = True
        return draws

    right = rows(lambda: rng.choice(n, k, replace=False))
    runs = rows(lambda: (rng.integers(n) + np.arange(k)) % n)
    halves = rows(lambda: np.r_[rng.choice(200, 60, replace=False), 200 + rng.choice(200, 60, replace=False)])
    repeated = rows(lambda: np.add.outer([0, 200], rng.choice(200, 60, replace=False)).ravel())
    # A count that is put right from the front: independent entries, then the first that are missing or too many.
    front = rng.random((times, n)) < k / n
    for row in front:
        surplus = int(row.sum()) - k
        row[np.flatnonzero(row == (surplus > 0))[: abs(surplus)]] = surplus < 0
    # Without the correction: the count is not fixed.
    independent = rng.random((times, n)) < k / n
    assert violations(right, k) == []
    assert "pairs 1" in violations(runs, k)
    assert "dispersion" in violations(halves, k)
    assert "dispersion" in violations(repeated, k)
    assert "inclusion" in violations(front, k)
    assert violations(independent, k) != []


def test_blocks_of_work_do_not_repeat_each_other():
    size = 2**20
    mask = masks.random_mask((3, size), 0.5, seed=0).astype(np.int64)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        # The overlap of independent halves is Binomial(size, 1/4) to first order.
        assert abs((mask[i] & mask[j]).sum() - size / 4) < normal_bound(3) * math.sqrt(size * 3 / 16)


def test_masks_share_no_random_words_with_kernels_drawn_from_the_same_seed():
    size = 2**20
    mask = masks.random_mask((size,), 0.5, seed=7).astype(bool)
    values = sample(1.0, (size,), 7, distribution="uniform")
    # From the same words, the four bytes of a value's word would decide four entries: its high byte shows in the value.
    for kept in (mask, *(mask[byte::4] for byte in range(4))):
        drawn = values[: kept.size]
        error = drawn.std() * math.sqrt(1 / kept.sum() + 1 / (~kept).sum())
        assert abs(drawn[kept].mean() - drawn[~kept].mean()) < normal_bound(5) * error


# Heterogeneous masks


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS, ids=str)
def test_heterogeneous_masks_have_the_exact_count(layout, shape, sparsity):
    mask = masks.heterogeneous_mask(shape, sparsity, 3, layout)
    assert mask.shape == shape and mask.dtype == np.uint8 and mask.flags.c_contiguous
    assert (mask == 0).sum() == math.floor(sparsity * mask.size) and set(np.unique(mask)) <= {0, 1}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.98])
def test_the_fan_in_of_a_heterogeneous_unit_rises_with_its_index_as_its_law_says(sparsity):
    """The threshold t is that of which sum_j max(0, 1 - t / (j + 1)) = (1 - sparsity) * units."""
    inputs, units = 100_000, 12
    fan_in = masks.heterogeneous_mask((inputs, units), sparsity, 0).sum(axis=0)
    low, high = 0.0, float(units)
    for _ in range(60):
        middle = (low + high) / 2
        kept = np.maximum(0, 1 - middle / np.arange(1, units + 1))
        low, high = (middle, high) if kept.sum() > (1 - sparsity) * units else (low, middle)
    # Each is Binomial(inputs, kept_j) but for the threshold, which the total fixes: that only narrows the spread.
    errors = np.abs(fan_in - inputs * kept)
    assert np.all(
        errors <= normal_bound(units) * np.sqrt(inputs * kept * (1 - kept)) + normal_bound() * 100 * (kept > 0)
    )
    assert np.all(fan_in[kept == 0] <= normal_bound() * 100)


def test_as_many_units_have_no_input_as_in_the_notebook_of_the_paper():
    """Of the units of LeNet-5, 44% at sparsity 0.8, 81% at 0.98; for wide layers 1 - r + r ln(r) = 1 - sparsity."""
    shapes = ((5, 5, 3, 6), (5, 5, 6, 16), (256, 120), (120, 84), (84, 10))
    for sparsity, expected in ((0.8, 0.44), (0.98, 0.81)):
        drawn = [masks.heterogeneous_mask(shape, sparsity, seed) for shape in shapes for seed in range(20)]
        dead = np.concatenate([mask.reshape(-1, mask.shape[-1]).sum(axis=0) == 0 for mask in drawn])
        assert np.mean(dead) == pytest.approx(expected, abs=0.01)
        r = np.mean(masks.heterogeneous_mask((1000, 1000), sparsity, 0).sum(axis=0) == 0)
        assert 1 - r + r * math.log(r) == pytest.approx(1 - sparsity, abs=0.004)


def test_the_inputs_of_a_heterogeneous_unit_bear_the_marks_of_the_uniform_law():
    last = np.stack([masks.heterogeneous_mask((200, 3), 0.6, seed)[:, 2] for seed in range(1500)])
    by_count = {int(k): last[last.sum(axis=1) == k] for k in np.unique(last.sum(axis=1))}
    k, draws = max(by_count.items(), key=lambda item: len(item[1]))
    assert len(draws) > 50 and violations(draws, k) == []


def test_the_units_of_a_heterogeneous_mask_are_those_of_the_layout():
    mask = masks.heterogeneous_mask((3, 3, 16, 32), 0.8, 0, "conv_transpose")
    by_unit = mask.sum(axis=(0, 1, 3))
    assert by_unit[0] == 0 and by_unit[-1] > 2 * mask.size / 16 * 0.2
    by_input = mask.sum(axis=(0, 1, 2))
    assert by_input.min() > 0
    depthwise = masks.heterogeneous_mask((9, 9, 4, 2), 0.8, 0, "depthwise").sum(axis=(0, 1)).reshape(-1)
    assert depthwise[0] == 0 and np.all(np.diff(depthwise[-4:]) > -20) and depthwise[-1] > 2 * 81 * 0.2 * 0.8


# Rules of one's own


def test_a_rule_of_ones_own_is_called_with_the_layout_only_if_it_takes_one():
    layout = kernel_layout("dense", (4, 2))

    def plain(shape, seed):
        return shape, seed

    def aware(shape, seed, kernel_layout=None):
        return shape, seed, kernel_layout

    assert masks.draw(plain, (4, 2), 3, layout) == ((4, 2), 3)
    assert masks.draw(aware, (4, 2), 3, layout) == ((4, 2), 3, layout)
    assert masks.draw(lambda *args: args, (4, 2), 3, layout) == ((4, 2), 3, layout)
    np.testing.assert_array_equal(
        masks.draw(masks.NM(1, 2), (4, 2), 3, layout), masks.nm_mask((4, 2), 1, 2, 3, kernel_layout=layout)
    )


# Determinism


def digest(mask):
    return hashlib.sha256(mask.tobytes()).hexdigest()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_number_of_threads_changes_no_bit(rule, monkeypatch):
    digests = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(blocks, "_pool", lambda threads=threads: ThreadPoolExecutor(threads))
        digests.add(digest(rule((1600, 2000), 11)))
    assert len(digests) == 1


def test_a_new_process_without_tensorflow_draws_the_same_bits():
    code = (
        "import sys, hashlib; from keras_sparse_init import masks\n"
        f"for rule in {[masks.serialize(rule) for rule in RULES]!r}:\n"
        "    print(hashlib.sha256(masks.deserialize(rule)((1200, 1000), 13).tobytes()).hexdigest())\n"
        "print(sorted({'tensorflow', 'keras', 'tf_keras', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [digest(rule((1200, 1000), 13)) for rule in RULES] + ["[]"]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_masks_depend_on_the_seed_and_on_nothing_else(rule):
    shape = (64, 64)
    np.random.seed(0)
    random.seed(0)
    before = str(np.random.get_state()), random.getstate()
    first = rule(shape, 1)
    assert (str(np.random.get_state()), random.getstate()) == before
    np.random.seed(5)
    np.testing.assert_array_equal(first, rule(shape, np.int64(1)))
    np.testing.assert_array_equal(first, rule(list(shape), np.uint8(1)))
    assert len({digest(rule(shape, seed)) for seed in (0, 1, 2, 2**32 + 1, 2**100)}) == 5
    first[:] = 7
    assert rule(shape, 1).max() == 1


# Rules


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_immutable_comparable_and_serializable(rule):
    config = json.loads(json.dumps(masks.serialize(rule)))
    again = masks.deserialize(config)
    assert again == rule and hash(again) == hash(rule) and type(again) is type(rule)
    assert type(rule).from_config(rule.get_config()) == rule == pickle.loads(pickle.dumps(rule))
    assert eval(repr(rule), vars(masks)) == rule
    assert isinstance(rule, masks.MaskRule)
    assert len({*RULES, again}) == len(RULES)
    with pytest.raises(AttributeError):
        rule.n = 1
    with pytest.raises(AttributeError):
        rule.sparsity = 0.1


def test_rules_equal_their_functions():
    shape = (3, 3, 16, 32)
    for rule, mask in [
        (masks.Random(0.8), masks.random_mask(shape, 0.8, 9)),
        (masks.ConstantFanIn(0.8), masks.constant_fan_in_mask(shape, 0.8, 9, "conv_transpose")),
        (masks.NM(2, 8), masks.nm_mask(shape, 2, 8, 9, "input", "conv_transpose")),
        (masks.NM(2, 8, axis=2), masks.nm_mask(shape, 2, 8, 9, 2)),
        (masks.Block(0.8, (16, 4)), masks.block_mask(shape, 0.8, (16, 4), 9)),
        (masks.Heterogeneous(0.8), masks.heterogeneous_mask(shape, 0.8, 9, "conv_transpose")),
    ]:
        np.testing.assert_array_equal(rule(shape, 9, "conv_transpose"), mask)
        np.testing.assert_array_equal(rule(shape, 9, kernel_layout("conv_transpose", shape)), mask)


def test_the_same_rule_at_another_sparsity():
    assert masks.Random(0.1).with_sparsity(0.9) == masks.Random(0.9)
    assert masks.ConstantFanIn(0.1).with_sparsity(0.9) == masks.ConstantFanIn(0.9)
    assert masks.Block(0.1, 4).with_sparsity(0.9) == masks.Block(0.9, (4, 4))
    assert masks.Heterogeneous(0.1).with_sparsity(0.9) == masks.Heterogeneous(0.9)
    assert masks.NM(2, 4, axis=1).with_sparsity(0.75) == masks.NM(1, 4, axis=1)
    assert masks.NM(2, 4).with_sparsity(0.99) == masks.NM(1, 4)
    assert masks.NM(2, 4).with_sparsity(0) == masks.NM(4, 4)
    with pytest.raises(ValueError, match=r"`sparsity` must be a float in \[0, 1\)"):
        masks.NM(2, 4).with_sparsity(1)


def test_an_nm_rule_at_its_own_sparsity_is_itself():
    for m in range(1, 129):
        for n in range(1, m + 1):
            rule = masks.NM(n, m)
            assert rule.sparsity == 1 - n / m and rule.with_sparsity(rule.sparsity) == rule


def test_numpy_arguments_become_python_numbers():
    rules = masks.Random(np.float32(0.5)), masks.NM(np.int64(2), np.int64(4), axis=np.int64(0)), masks.Block(0, [2, 2])
    assert rules == (masks.Random(0.5), masks.NM(2, 4, axis=0), masks.Block(0.0, 2))
    assert json.dumps([rule.get_config() for rule in rules])


# Errors


@pytest.mark.parametrize("sparsity", [1, 1.0, 1.5, -0.1, float("nan"), float("inf"), True, False, "0.5", None, [0.5]])
@pytest.mark.parametrize(
    "make",
    [
        masks.Random,
        masks.ConstantFanIn,
        lambda sparsity: masks.Block(sparsity, 2),
        masks.Random(0.5).with_sparsity,
        lambda sparsity: masks.random_mask((4, 4), sparsity, 0),
        lambda sparsity: masks.constant_fan_in_mask((4, 4), sparsity, 0),
        lambda sparsity: masks.block_mask((4, 4), sparsity, 2, 0),
        masks.Heterogeneous,
        lambda sparsity: masks.heterogeneous_mask((4, 4), sparsity, 0),
        lambda sparsity: masks.layer_sparsities({"a": (4, 4)}, sparsity),
    ],
)
def test_bad_sparsities_are_named(make, sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must be a float in \[0, 1\)\. Received: sparsity="):
        make(sparsity)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 0), (2.0, 4), (2, 4.0), (True, 4), ("2", 4)])
def test_bad_n_and_m_are_named(n, m):
    for make in (lambda: masks.NM(n, m), lambda: masks.nm_mask((8, 8), n, m, 0)):
        with pytest.raises(ValueError, match=r"1 <= n <= m\. Received: n="):
            make()


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True, "2", None, (), (2, 0), (2, 2.0), (True, 1)])
def test_bad_block_sizes_are_named(block_size):
    for make in (lambda: masks.Block(0.5, block_size), lambda: masks.block_mask((8, 8), 0.5, block_size, 0)):
        with pytest.raises(ValueError, match="`block_size` must be a positive int"):
            make()


@pytest.mark.parametrize(("shape", "block_size"), [((8, 9), 2), ((9, 8), 2), ((8,), 2), ((8, 8), (2, 2, 2))])
def test_blocks_must_divide_the_shape(shape, block_size):
    with pytest.raises(ValueError, match=r"`block_size` must divide the last axes.*shape="):
        masks.Block(0.5, block_size)(shape, 0)


@pytest.mark.parametrize("axis", ["output", 1.0, None, True, (0,)])
def test_bad_axes_are_named(axis):
    with pytest.raises(ValueError, match="`axis` must be 'input' or an int"):
        masks.NM(2, 4, axis)


def test_nm_masks_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"`m` must divide .* m=4 for axis 0, of length 10, of shape=\(10, 8\)"):
        masks.NM(2, 4)((10, 8), 0)
    with pytest.raises(ValueError, match=r"`axis` must be an axis of the kernel\. Received: axis=2"):
        masks.NM(2, 4, axis=2)((8, 8), 0)
    with pytest.raises(ValueError, match="'depthwise' has no input axis apart from its units: give `axis`"):
        masks.NM(2, 4)((3, 3, 8, 1), 0, "depthwise")
    with pytest.raises(ValueError, match="'vector' has no input axis"):
        masks.NM(2, 4)((8,), 0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_bad_seeds_are_named(rule):
    for seed in (1.0, True, np.True_, None, "1", np.float64(1)):
        with pytest.raises(TypeError, match="`seed` must be a non-negative int"):
            rule((64, 64), seed)
    with pytest.raises(ValueError, match=r"`seed` must be a non-negative int\. Received: seed=-1"):
        rule((64, 64), -1)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_bad_shapes_are_named(rule):
    for shape in ((0, 8), (None, 8), (-8, 8)):
        with pytest.raises(ValueError, match="`shape` must have positive integer dimensions"):
            rule(shape, 0)


def test_layouts_must_fit():
    with pytest.raises(ValueError, match="kernel_layout"):
        masks.ConstantFanIn(0.5)((8, 8), 0, "no such layout")
    with pytest.raises(ValueError, match="rank 2"):
        masks.ConstantFanIn(0.5)((8, 8), 0, KernelLayout("x", 3, (0, 1), (2,), (1,)))


def test_unknown_rules_are_not_serialized():
    with pytest.raises(ValueError, match="must be one of Random, ConstantFanIn, NM, Block, Heterogeneous"):
        masks.deserialize({"class_name": "Magnitude", "config": {}})
    with pytest.raises(ValueError, match="must be one of Random, ConstantFanIn, NM, Block, Heterogeneous"):
        masks.deserialize("Random")
    with pytest.raises(ValueError, match="`rule` must be an instance of one of Random"):
        masks.serialize(masks.MaskRule())


# Sparsities of layers

METHODS = ("erk", "er", "uniform", "uniform_plus", "igq")
LENET = {"conv1": (5, 5, 1, 6), "conv2": (5, 5, 6, 16), "fc1": (256, 120), "fc2": (120, 84), "out": (84, 10)}


def nonzeros(shapes, sparsities):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(sizes[name] - math.floor(sparsities[name] * sizes[name]) for name in shapes)


def random_networks(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        ranks = rng.integers(1, 5, size=rng.integers(1, 8))
        yield {f"layer{i}": tuple(map(int, rng.integers(1, 40, size=rank))) for i, rank in enumerate(ranks)}, rng


def reference(shapes, sparsity, score, fixed):
    """Bisection over the scale, with the densities clipped at 1."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    budget -= sum(sizes[name] - math.floor(value * sizes[name]) for name, value in fixed.items())
    free = [name for name in shapes if name not in fixed]
    low, high = 0.0, max(1 / score(shapes[name]) for name in free)
    for _ in range(200):
        scale = (low + high) / 2
        kept = sum(sizes[name] * min(1.0, scale * score(shapes[name])) for name in free)
        low, high = (scale, high) if kept < budget else (low, scale)
    return {name: fixed[name] if name in fixed else 1 - min(1.0, high * score(shapes[name])) for name in shapes}


SCORES = {
    "erk": lambda shape: sum(shape) / math.prod(shape),
    "er": lambda shape: (shape[-2] + shape[-1]) / (shape[-2] * shape[-1]) if len(shape) > 1 else 1 + 1 / shape[0],
    "uniform": lambda shape: 1,
}


@pytest.mark.parametrize("method", SCORES)
def test_layer_sparsities_match_a_bisection_of_their_definition(method):
    capped = with_fixed = 0
    for shapes, rng in random_networks(300):
        sparsity = float(rng.choice([0.05, 0.3, 0.5, 0.8, 0.95]))
        fixed = {name: sparsity for name in shapes if rng.random() < 0.3}
        if len(fixed) == len(shapes):
            continue
        solved = masks.layer_sparsities(shapes, sparsity, method, fixed)
        expected = reference(shapes, sparsity, SCORES[method], fixed)
        assert list(solved) == list(shapes)
        assert solved == pytest.approx(expected, abs=1e-9)
        capped += 0.0 in solved.values()
        with_fixed += bool(fixed)
    assert with_fixed > 50 and (capped > 50 or method == "uniform")


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_to_the_rounding_of_each_layer(method):
    met = 0
    for shapes, rng in random_networks(300):
        sparsity = float(rng.uniform(0, 0.99))
        try:
            solved = masks.layer_sparsities(shapes, sparsity, method)
        except ValueError:
            assert method == "uniform_plus"  # Its exceptions can exceed the budget of a small network.
            continue
        met += 1
        budget = (1 - sparsity) * sum(math.prod(shape) for shape in shapes.values())
        assert abs(nonzeros(shapes, solved) - budget) <= len(shapes)
        assert all(type(value) is float and 0 <= value < 1 for value in solved.values())
        for name, shape in shapes.items():
            assert masks.random_mask(shape, solved[name], 0).any()
    assert met == 300 or (method == "uniform_plus" and met > 100)


def test_erk_by_hand():
    # Budget 8470 of 84700; scores 884/78400 and 163/6300. All stay below density 1.
    shapes = {"a": (784, 100), "b": (100, 63)}
    scale = 8470 / (884 + 163)
    expected = {"a": 1 - scale * 884 / 78400, "b": 1 - scale * 163 / 6300}
    assert masks.layer_sparsities(shapes, 0.9) == pytest.approx(expected, abs=1e-12)
    # LeNet-300-100 at 90%: with the scale 26620 / 1594 the last layer's density would be 1.8, so it is dense and the
    # first two share what is left.
    shapes = {"a": (784, 300), "b": (300, 100), "c": (100, 10)}
    scale = (26620 - 1000) / (1084 + 400)
    expected = {"a": 1 - scale * 1084 / 235200, "b": 1 - scale * 400 / 30000, "c": 0.0}
    assert masks.layer_sparsities(shapes, 0.9) == pytest.approx(expected, abs=1e-12)


def test_er_ignores_the_kernel_extents_and_erk_does_not():
    flat, tall = {"a": (1, 1, 64, 64), "b": (64, 64)}, {"a": (5, 5, 64, 64), "b": (64, 64)}
    er = masks.layer_sparsities(tall, 0.9, "er")
    assert er["a"] == er["b"] == pytest.approx(0.9)
    erk = masks.layer_sparsities(tall, 0.9, "erk")
    assert erk["a"] > 0.9 > erk["b"]
    assert masks.layer_sparsities(flat, 0.9, "er")["a"] == pytest.approx(0.9)


def test_igq_densities_have_one_factor():
    for shapes, rng in random_networks(100):
        sparsity = float(rng.uniform(0.01, 0.99))
        solved = masks.layer_sparsities(shapes, sparsity, "igq")
        factors = [(1 / (1 - solved[name]) - 1) / math.prod(shape) for name, shape in shapes.items()]
        assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-6)
        kept = sum((1 - solved[name]) * math.prod(shape) for name, shape in shapes.items())
        assert kept == pytest.approx((1 - sparsity) * sum(map(math.prod, shapes.values())))


@pytest.mark.parametrize("method", ["uniform", "uniform_plus"])
def test_uniform_is_the_sparsity_itself_to_the_last_bit(method):
    for sparsity in np.random.default_rng(1).random(100) * 0.8:
        solved = masks.layer_sparsities({"a": (7, 9), "b": (9, 5)}, sparsity, method)
        assert solved == {"a": sparsity, "b": sparsity}


def test_uniform_plus_keeps_the_first_convolution_and_spares_the_last_dense_layer():
    solved = masks.layer_sparsities(LENET, 0.9, "uniform_plus")
    rest = {solved[name] for name in ("conv2", "fc1", "fc2")}
    assert solved["conv1"] == 0 and solved["out"] == 0.8 and len(rest) == 1
    # 44190 weights, of which conv1 keeps 150 and out 168.
    assert rest.pop() == pytest.approx(1 - (4419 - 150 - 168) / (2400 + 30720 + 10080), abs=1e-12)


def test_uniform_plus_leaves_the_last_layer_uniform_while_that_is_below_80_percent():
    solved = masks.layer_sparsities(LENET, 0.7, "uniform_plus")
    assert solved["conv1"] == 0 and solved["out"] == solved["fc1"] == solved["conv2"] < 0.8


def test_uniform_plus_has_only_the_exceptions_whose_layers_exist():
    solved = masks.layer_sparsities({"a": (100, 50), "b": (50, 40), "c": (40, 10)}, 0.9, "uniform_plus")
    assert solved["c"] == 0.8 and solved["a"] == solved["b"] == pytest.approx(1 - (740 - 80) / 7000)
    solved = masks.layer_sparsities({"a": (100, 50), "b": (3, 4, 5), "c": (50, 40)}, 0.7, "uniform_plus")
    assert solved["b"] == 0 and solved["a"] == solved["c"] == pytest.approx(1 - (0.3 * 7060 - 60) / 7000)
    solved = masks.layer_sparsities({"a": (3, 3, 2, 4), "b": (3, 3, 4, 8), "c": (3, 3, 8, 8)}, 0.9, "uniform_plus")
    assert solved["a"] == 0 and solved["b"] == solved["c"] == pytest.approx(1 - (93.6 - 72) / 864)


def test_uniform_plus_leaves_fixed_layers_to_the_user():
    solved = masks.layer_sparsities(LENET, 0.9, "uniform_plus", fixed={"conv1": 0.5, "out": 0.95})
    assert (solved["conv1"], solved["out"]) == (0.5, 0.95)
    solved = masks.layer_sparsities({"a": (20, 10), "b": (10, 10)}, 0.9, "uniform_plus", fixed={"a": 0.95})
    assert solved["b"] == 0.8


@pytest.mark.parametrize("method", METHODS)
def test_fixed_layers_keep_their_sparsity_and_count_in_the_budget(method):
    fixed = {"conv2": 0.25, "out": 0.0}
    solved = masks.layer_sparsities(LENET, 0.8, method, fixed=fixed)
    assert {name: solved[name] for name in fixed} == fixed
    assert abs(nonzeros(LENET, solved) - 0.2 * 44190) <= len(LENET)
    assert masks.layer_sparsities(LENET, 0.8, method, fixed={name: 0.8 for name in LENET}) == dict.fromkeys(LENET, 0.8)


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_is_dense_and_an_empty_network_is_empty(method):
    assert masks.layer_sparsities(LENET, 0, method) == dict.fromkeys(LENET, 0.0)
    assert masks.layer_sparsities({}, 0.5, method) == {}
    assert masks.layer_sparsities({"a": (20, 30)}, 0.75, method)["a"] == pytest.approx(0.75)


def test_vectors_are_kept_before_matrices():
    shapes = {"kernel": (100, 100), "bias": (100,)}
    for method in ("erk", "er", "igq"):
        solved = masks.layer_sparsities(shapes, 0.5, method)
        assert solved["bias"] < 0.05 and solved["kernel"] > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_impossible_budgets_raise(method):
    shapes = {"a": (10, 10), "b": (10, 10)}
    for sparsity, fixed in [
        (0.9, {"a": 0.0}),  # The fixed layer alone exceeds the budget.
        (0.9, {"a": 0.8}),  # Nothing is left for the other one.
        (0.2, {"a": 0.9}),  # Even a dense layer cannot make up for it.
        (0.0, {"a": 0.1}),
        (0.5, {"a": 0.5, "b": 0.9}),
        (0.5, {"a": 0.5, "b": 0.1}),
    ]:
        with pytest.raises(ValueError, match="`sparsity` cannot be met"):
            masks.layer_sparsities(shapes, sparsity, method, fixed)


def test_uniform_plus_raises_when_its_exceptions_exceed_the_budget():
    with pytest.raises(ValueError, match="`sparsity` cannot be met"):
        masks.layer_sparsities({"only": (100, 100)}, 0.9, "uniform_plus")


def test_layer_sparsities_name_bad_arguments():
    with pytest.raises(ValueError, match="must be one of 'erk', 'er', 'uniform', 'uniform_plus', 'igq'.*'ERK'"):
        masks.layer_sparsities(LENET, 0.5, "ERK")
    with pytest.raises(ValueError, match=r"`fixed` must name layers among .*Received: \['conv9'\]"):
        masks.layer_sparsities(LENET, 0.5, fixed={"conv9": 0.5})
    with pytest.raises(ValueError, match=r"`fixed\['out'\]` must be a float in \[0, 1\)"):
        masks.layer_sparsities(LENET, 0.5, fixed={"out": 1.0})
    with pytest.raises(ValueError, match="positive integer dimensions"):
        masks.layer_sparsities({"a": (0, 3)}, 0.5)
