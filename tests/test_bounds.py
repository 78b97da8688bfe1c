"""Bounds of piecewise linear networks: against sampled inputs, rational arithmetic and a linear program per region."""

from fractions import Fraction
from itertools import product
from time import monotonic

import numpy as np
import pytest
from scipy import optimize, sparse

from keras_sparse_init.ranges import exact_range
from keras_sparse_init.ranges.bounds import _Step, crown_bounds, interval_bounds
from keras_sparse_init.ranges.exact_range import solve
from keras_sparse_init.ranges.extremes import Extremes, attained
from keras_sparse_init.ranges.piecewise import Affine, chain, forward


def random_network(seed, sizes, slope=0.0, density=1.0):
    random = np.random.default_rng(seed)
    layers = []
    for i, (inputs, units) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        mask = random.random((units, inputs)) < density
        weight = random.normal(0, np.sqrt(2 / inputs / density), (units, inputs)) * mask
        layers.append(Affine.of(weight, random.normal(0, 0.3, units), slope if i < len(sizes) - 2 else 1.0))
    return chain(layers)


def random_box(seed, size):
    random = np.random.default_rng(seed)
    lower = random.normal(size=size)
    return lower, lower + random.exponential(size=size)


def solved(network, box, deadline=None):
    linear = crown_bounds(network, *box, deadline)
    found = attained(network, box, linear.bounds[-1], linear.slopes, deadline)
    solve(network, box, linear, found, deadline)
    return found


def by_regions(network, box):
    """(lowest, highest) value of the single output: a linear program for each pattern of active units."""
    hidden = [layer.bias.size for layer in network[:-1]]
    values = []
    for pattern in product((False, True), repeat=sum(hidden)):
        weight, bias = np.eye(box[0].size), np.zeros(box[0].size)
        rows, limits, start = [], [], 0
        for layer, size in zip(network[:-1], hidden, strict=True):
            active = np.array(pattern[start : start + size])
            start += size
            weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
            sign = np.where(active, -1.0, 1.0)
            rows.append(sign[:, None] * weight)
            limits.append(-sign * bias)
            slope = np.where(active, 1.0, layer.slope)
            weight, bias = slope[:, None] * weight, slope * bias
        weight, bias = network[-1].weight @ weight, network[-1].weight @ bias + network[-1].bias
        for sign in (1, -1):
            limits_of_x = np.stack(box, axis=1)
            result = optimize.linprog(
                sign * weight[0], np.concatenate(rows), np.concatenate(limits), bounds=limits_of_x
            )
            if result.status == 0:
                values.append(sign * result.fun + bias[0])
    return min(values), max(values)


def test_folding_keeps_the_function_and_merges_what_is_linear():
    random = np.random.default_rng(0)
    sizes = (3, 5, 4, 6, 2)
    layers = [
        Affine.of(random.normal(size=(n, m)), random.normal(size=n), slope)
        for m, n, slope in zip(sizes[:-1], sizes[1:], (1.0, 0.2, 1.0, 0.0), strict=True)
    ]
    x = random.normal(size=(20, 3))
    folded = chain(layers)
    assert [layer.bias.size for layer in folded] == [4, 2, 2] and folded[-1].linear
    np.testing.assert_allclose(forward(folded, x), forward(layers, x), rtol=1e-12)


def test_of_large_matrices_with_few_entries_only_these_are_kept():
    weight = np.zeros((50, 40))
    weight[::7, ::5] = 1.5
    dense, few = Affine.of(weight[:20]), Affine.of(weight)
    assert isinstance(dense.weight, np.ndarray) and sparse.issparse(few.weight)
    assert isinstance(Affine.of(sparse.csr_array(np.ones((3, 2)))).weight, np.ndarray)


@pytest.mark.parametrize(("slope", "density"), [(0.0, 1.0), (0.0, 0.05), (0.3, 0.4)])
def test_no_input_is_outside_and_linear_bounds_are_at_least_as_tight(slope, density):
    for seed in range(20):
        network = random_network(seed, (6, 30, 40, 20, 3), slope, density)
        box = random_box(seed, 6)
        intervals, linear = interval_bounds(network, *box), crown_bounds(network, *box).bounds
        random = np.random.default_rng(seed)
        y = random.uniform(*box, (500, 6))
        y[250:] = np.where(random.random((250, 6)) < 0.5, *box)
        for layer, (low, high), (tight_low, tight_high) in zip(network, intervals, linear, strict=True):
            z = layer.pre_activation(y)
            y = layer.activation(z)
            assert np.all(low <= tight_low) and np.all(tight_high <= high)
            rounding = 1e-13 * np.abs(z).max()  # That of this forward pass.
            assert np.all(tight_low <= z.min(axis=0) + rounding) and np.all(z.max(axis=0) - rounding <= tight_high)


def test_linear_bounds_are_exact_where_no_activation_is_open_and_tighter_where_some_are():
    network = random_network(1, (4, 8, 6, 2))
    point = np.array([0.3, -0.2, 0.8, 0.1])
    low, high = crown_bounds(network, point - 1e-4, point + 1e-4).bounds[-1]
    corners = forward(network, point + 1e-4 * np.array(list(product((-1, 1), repeat=4))))
    np.testing.assert_allclose(np.stack([low, high]), [corners.min(axis=0), corners.max(axis=0)], atol=1e-13)
    low, high = crown_bounds(network, -np.ones(4), np.ones(4)).bounds[-1]
    wide_low, wide_high = interval_bounds(network, -np.ones(4), np.ones(4))[-1]
    assert np.sum(high - low) < 0.85 * np.sum(wide_high - wide_low)


@pytest.mark.parametrize("bounds", [interval_bounds, lambda *args: crown_bounds(*args).bounds])
def test_rounding_is_on_the_safe_side(bounds):
    """Against rational arithmetic: of an affine map the bounds contain the extremes, and of |x| the values."""
    random = np.random.default_rng(3)
    for _ in range(50):
        weight, bias = random.normal(size=(1, 7)) * 10.0 ** random.integers(-3, 4, (1, 7)), random.normal(size=1)
        low, high = random_box(random.integers(2**31), 7)
        ends = [[Fraction(w) * Fraction(end) for end in pair] for w, *pair in zip(weight[0], low, high, strict=True)]
        lowest, highest = sum(map(min, ends)), sum(map(max, ends))
        below, above = bounds(chain([Affine.of(weight, bias)]), low, high)[-1]
        assert Fraction(below[0]) <= lowest + Fraction(bias[0]) and highest + Fraction(bias[0]) <= Fraction(above[0])
        split = [Affine.of(np.concatenate([weight, -weight]), slope=0.0), Affine.of([[1.0, 1.0]])]
        below, above = bounds(chain(split), low, high)[-1]
        assert (
            Fraction(below[0]) <= 0 if lowest <= 0 <= highest else Fraction(below[0]) <= min(abs(lowest), abs(highest))
        )
        assert max(abs(lowest), abs(highest)) <= Fraction(above[0])


def test_rounding_is_on_the_safe_side_where_large_coefficients_cancel():
    """Units that are on, whose outputs cancel: against rational arithmetic at the corners that are extremes."""
    random = np.random.default_rng(0)
    for _ in range(30):
        weight = random.uniform(1, 2, (1, 5)) + 1e-14 * random.uniform(0, 1, (6, 5))
        out = random.normal(size=6)
        out[-1] -= out.sum()
        box = np.zeros(5), random.uniform(1, 2, 5)
        network = chain([Affine.of(weight, 1.0, slope=0.0), Affine.of(out[None])])
        (below,), (above,) = crown_bounds(network, *box).bounds[-1]
        gradient = [sum(Fraction(v) * Fraction(w) for v, w in zip(out, column, strict=True)) for column in weight.T]
        for sign in (1, -1):
            corner = [Fraction(high) if sign * g > 0 else Fraction(0) for g, high in zip(gradient, box[1], strict=True)]
            z = [sum(Fraction(w) * x for w, x in zip(row, corner, strict=True)) + 1 for row in weight]
            value = sum(Fraction(v) * unit for v, unit in zip(out, z, strict=True))
            assert Fraction(below) <= value <= Fraction(above)


def test_an_input_next_to_a_kink_or_a_corner_is_moved_onto_it():
    network, box = (
        chain([Affine.of([[1.0], [-2.0]], [-0.3, 0.6], 0.0), Affine.of([[1.0, 1.0]])]),
        (-np.ones(1), np.ones(1)),
    )
    linear = crown_bounds(network, *box)
    for x, expected in ((0.3 + 1e-8, 0.3), (1 - 1e-8, 1.0), (-1 + 1e-8, -1.0), (0.31, 0.31)):
        found = exact_range._sharpened(network, box, linear, np.array([x]))
        np.testing.assert_allclose(found, [expected], rtol=0, atol=1e-15)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_the_line_above_an_activation_is_above_it_in_real_numbers(slope):
    random = np.random.default_rng(0)
    low, high = -random.exponential(size=300), random.exponential(size=300) * 10.0 ** random.integers(-4, 5, 300)
    step = _Step.of(Affine.of(np.eye(300), slope=slope), low, high, low, high)
    for above, offset, *ends in zip(step.above, step.offset, low, high, strict=True):
        for z in map(Fraction, ends):
            assert Fraction(above) * z + Fraction(offset) >= max(z, Fraction(slope) * z)


def test_large_layers_are_bounded_in_parts_and_a_deadline_leaves_intervals():
    network = random_network(0, (5, 200, 200, 7))
    box = -np.ones(5), np.ones(5)
    whole, slopes = crown_bounds(network, *box).bounds, crown_bounds(network, *box).slopes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras_sparse_init.ranges.bounds._CHUNK", 1000)
        parts = crown_bounds(network, *box)
    np.testing.assert_allclose(parts.bounds[-1], whole[-1], rtol=1e-12)
    np.testing.assert_allclose(parts.slopes, slopes, atol=1e-12)
    late = crown_bounds(network, *box, deadline=monotonic() - 1)
    assert late.slopes is None
    for found, expected in zip(late.bounds, interval_bounds(network, *box), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("seed", "sizes", "slope"), [(0, (2, 3, 3, 1), 0.0), (1, (3, 4, 2, 1), 0.3), (2, (2, 6, 1), 0.0)]
)
def test_the_exact_range_is_that_of_all_linear_regions(seed, sizes, slope):
    network, box = random_network(seed, sizes, slope), (-np.ones(sizes[0]), np.full(sizes[0], 1.5))
    assert sum(open_.sum() for open_ in crown_bounds(network, *box).unstable(network)) >= 4
    found = solved(network, box)
    np.testing.assert_allclose([found.lower[0], found.upper[0]], by_regions(network, box), rtol=1e-12)
    assert found.lower == found.attained_lower and found.upper == found.attained_upper
    np.testing.assert_array_equal(forward(network, found.x_lower)[0], found.attained_lower)
    np.testing.assert_array_equal(forward(network, found.x_upper)[0], found.attained_upper)
    for x in (found.x_lower, found.x_upper):
        assert np.all(box[0] <= x) and np.all(x <= box[1])


# (layers, lower, upper, range): |x|, a kink of two slopes, and |x_0 + x_1| of inputs between -2 and 2.
_KNOWN = [
    ([([[1.0], [-1.0]], 0.0), ([[1.0, 1.0]], 1.0)], [-2.0], [1.0], (0, 2)),
    ([([[1.0], [-1.0]], 0.0), ([[1.0, -0.5]], 1.0)], [-1.0], [1.0], (-0.5, 1)),
    ([([[1.0, 1.0], [-1.0, -1.0]], 0.0), ([[1.0, 1.0]], 1.0)], [-2.0, -2.0], [2.0, 2.0], (0, 4)),
]


@pytest.mark.parametrize(("layers", "lower", "upper", "expected"), _KNOWN)
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
def test_known_ranges_come_out_exactly_whatever_the_size_of_numbers(layers, lower, upper, expected, size):
    network = chain(Affine.of(weight, slope=slope) for weight, slope in layers)
    found = solved(network, (size * np.array(lower), size * np.array(upper)))
    np.testing.assert_allclose([found.lower[0] / size, found.upper[0] / size], expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal([found.lower, found.upper], [found.attained_lower, found.attained_upper])


def test_an_output_that_is_0_though_bounds_do_not_see_it():
    """relu(relu(x) - relu(x)): nothing that is attained gives it a size."""
    layers = [Affine.of([[1.0], [1.0]], slope=0.0), Affine.of([[1.0, -1.0]], slope=0.0)]
    network, box = chain(layers), (np.array([-1.0]), np.array([1.0]))
    assert crown_bounds(network, *box).bounds[-1][1] > 0.1
    found = solved(network, box)
    np.testing.assert_array_equal([found.lower, found.upper, found.attained_upper], np.zeros((3, 1)))


def test_without_time_bounds_are_certified_attained_values_inside_and_the_deadline_is_kept():
    network, box = random_network(0, (20, 60, 60, 60, 4)), (-np.ones(20), np.ones(20))
    start = monotonic()
    found = solved(network, box, deadline=start + 1.0)
    assert monotonic() - start < 3  # The solver looks at its clock now and then.
    low, high = crown_bounds(network, *box).bounds[-1]
    assert np.all(low <= found.lower) and np.all(found.upper <= high)
    assert np.all(found.lower < found.attained_lower) and np.all(found.attained_upper < found.upper)
    y = forward(network, np.random.default_rng(0).uniform(*box, (2000, 20)))
    assert np.all(found.lower < y.min(axis=0)) and np.all(y.max(axis=0) < found.upper)
    # The search is better than as many random inputs.
    assert np.all(found.attained_lower < y.min(axis=0)) and np.all(y.max(axis=0) < found.attained_upper)


@pytest.mark.parametrize("status", [0, 1])
def test_a_bound_within_the_tolerance_of_the_solver_is_not_believed_to_the_last_digit(monkeypatch, status):
    """A solver's bound may be above the lowest value by its tolerance: what is certified is not."""
    network, box = random_network(0, (2, 6, 1)), (-np.ones(2), np.full(2, 1.5))
    (low, high) = by_regions(network, box)
    size = high - low

    def minimum(self, output, sign, scale, seconds):
        return (low if sign > 0 else -high) + 1e-6 * size, None, status

    monkeypatch.setattr(exact_range._Program, "minimum", minimum)
    linear = crown_bounds(network, *box)
    nowhere = np.zeros((1, 2))
    x = forward(network, nowhere)[0]
    low_bound, high_bound = linear.bounds[-1]
    # Nothing near the extremes is known, so that a proof cannot be taken for one of what is attained.
    found = Extremes(low_bound.copy(), high_bound.copy(), x.copy(), x.copy(), nowhere, nowhere.copy())
    solve(network, box, linear, found, None)
    assert low - 1e-4 * size < found.lower[0] <= low and high <= found.upper[0] < high + 1e-4 * size
    # Where the lowest value is attained a complete search makes it the bound, and one that was stopped does not.
    found = Extremes(low_bound.copy(), high_bound.copy(), np.array([low]), np.array([high]), nowhere, nowhere.copy())
    solve(network, box, linear, found, 1e12)
    assert (found.lower[0] == low, found.upper[0] == high) == (status == 0,) * 2


def test_no_bound_is_beyond_what_the_program_of_another_output_attains(monkeypatch):
    """Two equal outputs: the second program finds what the first has missed within its tolerance."""
    network, box = (
        chain([Affine.of([[1.0]], slope=0.0), Affine.of([[1.0], [1.0]])]),
        (np.array([-1.0]), np.array([1.0])),
    )

    def minimum(self, output, sign, scale, seconds):
        x = np.array([1.0 - 1e-6 * (output == 0)]) if sign < 0 else np.array([-1.0])
        return sign * forward(network, x[None])[0, output], x, 0

    monkeypatch.setattr(exact_range._Program, "minimum", minimum)
    nowhere = np.zeros((2, 1))
    found = Extremes(np.full(2, -2.0), np.full(2, 2.0), np.full(2, 0.5), np.full(2, 0.5), nowhere, nowhere.copy())
    monkeypatch.setattr(exact_range, "_sharpened", lambda network, box, linear, x: x)
    solve(network, box, crown_bounds(network, *box), found, None)
    np.testing.assert_array_equal([found.upper, found.attained_upper], np.ones((2, 2)))


def test_time_that_is_left_over_goes_to_the_programs_that_were_stopped(monkeypatch):
    network, box = random_network(0, (2, 6, 3)), (-np.ones(2), np.full(2, 1.5))
    clock, runs = [0.0], []

    def minimum(self, output, sign, scale, seconds):
        """Of the first output each takes 5 seconds, of the others nothing."""
        runs.append((output, sign, seconds))
        needed = 5.0 if output == 0 else 0.0
        clock[0] += min(seconds, needed)
        if seconds < needed:
            return None, None, 1
        return forward(network, np.zeros((1, 2)))[0, output] * sign, None, 0

    monkeypatch.setattr(exact_range._Program, "minimum", minimum)
    monkeypatch.setattr(exact_range.time, "monotonic", lambda: clock[0])
    linear = crown_bounds(network, *box)
    bounds = linear.bounds[-1]

    def run(deadline):
        clock[0], value = 0.0, forward(network, np.zeros((1, 2)))[0]
        runs.clear()
        nowhere = np.zeros((3, 2))
        found = Extremes(bounds[0].copy(), bounds[1].copy(), value.copy(), value.copy(), nowhere, nowhere.copy())
        solve(network, box, linear, found, deadline)
        return np.concatenate([found.lower == value, found.upper == value]).reshape(2, 3)

    # Of 16 seconds 8/3 for each end of the first output are in vain; of the rest one takes 5 of its half, and so on.
    assert run(16.0).all() and clock[0] == pytest.approx(16 / 3 + 10)
    assert [(output, sign) for output, sign, _ in runs] == [*product(range(3), (1, -1)), (0, 1), (0, -1)]
    # Nothing is begun after the deadline, and nothing again that has been solved.
    assert run(12.0).sum() == 4 and clock[0] == pytest.approx(12) and len(runs) == 8
    assert run(36.0).all() and clock[0] == 10 and len(runs) == 6


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-300])
def test_boxes_of_numbers_next_to_0_are_bounded_without_a_warning(size):
    network, box = random_network(3, (3, 6, 2)), (np.zeros(3), np.full(3, size))
    free = chain([Affine.of(layer.weight, 0.0, layer.slope) for layer in network])
    for layers in (network, free):
        for low in (box[0], -box[1]):
            found = solved(layers, (low, box[1]))
            y = forward(layers, np.random.default_rng(0).uniform(low, box[1], (200, 3)))
            assert np.all(found.lower <= y.min(axis=0)) and np.all(y.max(axis=0) <= found.upper)


def test_numbers_that_are_not_finite_and_slopes_that_are_not_convex_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        Affine.of([[np.nan]])
    with pytest.raises(ValueError, match=r"in \[0, 1\]. Received: 1.5"):
        Affine.of([[1.0]], slope=1.5)
