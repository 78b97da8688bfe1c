"""The programs of calibration and their solvers: NumPy and SciPy alone."""

import numpy as np
import pytest
from scipy import optimize

from keras_sparse_init.calibration.unit_programs import OBJECTIVES, UnitPrograms, quantile_bias, wanted_signs
from keras_sparse_init.calibration.unit_solvers import solve_highs, solve_pdhg

SETTINGS = {"radius": 0.25, "margin": 0.5, "bias_radius": 1.0, "stay": 0.01}


def _random_layer(density, objective="fraction", samples=40, inputs=12, units=7, seed=0):
    """Features, kernel, mask and signs of a layer on features as ReLUs give them, with four odd units.

    Unit 0 has no weights, unit 1 weights that are all 0, unit 2 only the constant feature, unit 3 only the dead one;
    unit 4 is off on all samples.
    """
    random = np.random.default_rng(seed)
    features = np.maximum(random.normal(0.3, 1.0, size=(samples, inputs)), 0.0)
    features[:, 0], features[:, 1] = 0.7, 0.0
    mask = random.random((inputs, units)) < density
    kernel = random.normal(size=(inputs, units)) / np.sqrt(np.maximum(mask.sum(axis=0), 1))
    mask[:, 0], mask[:, 2], mask[:, 3], mask[:6, 4] = False, False, False, True
    mask[0, 2] = mask[1, 3] = True
    kernel[:, 1], kernel[:, 4] = 0.0, -np.abs(kernel[:, 4])
    signs = wanted_signs(features @ (kernel * mask), objective, 0.75)
    return features, kernel, mask, signs


def _slow_optimum(features, kernel, mask, signs, radius, margin, bias_radius, stay):
    """Each unit's smallest objective, of the program in its own words: variables w, t >= |w - w0|, b and xi."""
    samples, found = len(features), []
    for unit in range(kernel.shape[1]):
        h, w0, sign = features[:, mask[:, unit]], kernel[mask[:, unit], unit], signs[:, unit]
        size = len(w0)
        s0 = np.sqrt(np.mean(w0**2)) if size else 0.0
        m = margin * s0 * np.sqrt(np.mean(np.sum(h**2, axis=1)))
        if m == 0:
            found.append(0.0)
            continue
        cost = np.concatenate(
            [np.zeros(size), np.full(size, stay * m / (size * s0)), [0], np.full(samples, 1 / samples)]
        )
        one, none = np.eye(size), np.zeros((size, 1 + samples))
        rows = np.block(
            [
                [-sign[:, None] * h, np.zeros((samples, size)), -sign[:, None], -np.eye(samples)],
                [one, -one, none],
                [-one, -one, none],
            ]
        )
        equal = np.concatenate([w0, np.zeros(size + 1 + samples)])[None]
        std = np.std(h @ w0)
        bounds = [(w - radius * s0, w + radius * s0) for w in w0] + [(0, None)] * size
        bounds += [(-bias_radius * std, bias_radius * std)] + [(0, None)] * samples
        result = optimize.linprog(
            cost, rows, np.concatenate([np.full(samples, -m), w0, -w0]), equal, [w0 @ w0], bounds, method="highs"
        )
        assert result.status == 0, result.message
        found.append(result.fun)
    return np.array(found)


def _assert_feasible(programs, solution, features, kernel, mask, radius, bias_radius):
    w, b = programs.weights_and_bias(solution.u, solution.v)
    w0 = np.where(mask, kernel, 0.0)
    s0 = np.sqrt((w0**2).sum(axis=0) / np.maximum(mask.sum(axis=0), 1))
    assert np.all(w[~mask] == 0)
    assert np.all(np.abs(w - w0) <= radius * s0 * (1 + 1e-9) + 1e-12)
    np.testing.assert_allclose((w * w0).sum(axis=0), (w0**2).sum(axis=0), rtol=1e-6, atol=1e-12)
    assert np.all(np.abs(b) <= bias_radius * (features @ w0).std(axis=0) * (1 + 1e-9) + 1e-12)
    return w, b


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_both_solvers_reach_the_optimum_of_the_program_as_it_is_written_and_stay_feasible(density, objective):
    features, kernel, mask, signs = _random_layer(density, objective)
    programs = UnitPrograms.of(features, kernel, mask, signs, **SETTINGS)
    optimum = _slow_optimum(features, kernel, mask, signs, **SETTINGS)
    for solve, tolerance in ((solve_highs, 1e-6), (lambda p: solve_pdhg(p, tolerance=1e-4), 1e-4)):
        solution = solve(programs)
        w, b = _assert_feasible(programs, solution, features, kernel, mask, 0.25, 1.0)
        # What the weights and biases really cost, in the program's own words.
        moved = np.abs(w - np.where(mask, kernel, 0)).sum(axis=0) / np.maximum(mask.sum(axis=0), 1)
        slack = np.maximum(programs.margin - signs * (features @ w + b), 0).mean(axis=0)
        live = (programs.box > 0).any(axis=0)
        cost = np.where(live, slack + 0.01 * programs.margin * moved / programs.weight_scale, 0.0)
        assert np.all(cost >= optimum - 1e-6 * programs.margin)
        assert np.all(cost <= optimum + tolerance * programs.margin)
        assert solution.gap <= tolerance
        assert np.all(solution.bound <= np.where(live, optimum, np.inf) / programs.margin + 1e-6)


def test_units_without_inputs_keep_their_weights_and_a_bias_of_0():
    features, kernel, mask, signs = _random_layer(0.5)
    programs = UnitPrograms.of(features, kernel, mask, signs, **SETTINGS)
    for solution in (solve_highs(programs), solve_pdhg(programs)):
        w, b = programs.weights_and_bias(solution.u, solution.v)
        for unit in (0, 1, 3):
            np.testing.assert_array_equal(w[:, unit], np.where(mask[:, unit], kernel[:, unit], 0.0))
        # The unit with the constant feature alone has one weight, which <w, w0> = <w0, w0> holds.
        assert w[0, 2] == pytest.approx(kernel[0, 2], abs=1e-9)
        np.testing.assert_array_equal(b[:4], 0)


def test_a_unit_that_is_off_on_all_samples_is_revived():
    features, kernel, mask, signs = _random_layer(0.5)
    programs = UnitPrograms.of(features, kernel, mask, signs, **(SETTINGS | {"bias_radius": 3.0}))
    assert np.all(programs.start[:, 4] < 0)
    solution = solve_pdhg(programs)
    w, b = programs.weights_and_bias(solution.u, solution.v)
    on = (features @ w + b)[:, 4] > 0
    assert 0.65 < on.mean() < 0.85


def test_the_bound_of_any_multipliers_is_below_the_objective_of_any_feasible_point():
    programs = UnitPrograms.of(*_random_layer(0.6), **SETTINGS)
    random, best = np.random.default_rng(1), solve_highs(programs).objective
    live = (programs.box > 0).any(axis=0)
    for _ in range(20):
        bound = programs.dual(random.random(programs.start.shape))
        assert np.all(bound[live] <= best[live] + 1e-7)


def test_a_bound_on_iterations_is_kept_and_the_gap_tells_of_it():
    programs = UnitPrograms.of(*_random_layer(1.0), **SETTINGS)
    short, none = solve_pdhg(programs, max_iterations=30), solve_pdhg(programs, max_iterations=0)
    assert (short.iterations, none.iterations) == (30, 0)
    assert none.gap > short.gap > 1e-3
    assert np.all(short.objective <= none.objective)
    np.testing.assert_array_equal(none.u, 0)


@pytest.mark.parametrize("margin", [0.05, 5.0])
def test_the_first_order_solver_reaches_the_optimum_of_small_and_large_margins(margin):
    programs = UnitPrograms.of(*_random_layer(0.6), **SETTINGS | {"margin": margin})
    solution = solve_pdhg(programs)
    assert solution.gap <= 1e-3 and solution.iterations < 2000
    np.testing.assert_allclose(solution.objective, solve_highs(programs).objective, atol=1.1e-3)


def test_results_do_not_depend_on_the_scale_of_features_and_weights_or_on_the_other_units():
    features, kernel, mask, signs = _random_layer(0.6)
    programs = UnitPrograms.of(features, kernel, mask, signs, **SETTINGS)
    solution = solve_pdhg(programs)
    scaled = solve_pdhg(UnitPrograms.of(8 * features, kernel / 2, mask, signs, **SETTINGS))
    np.testing.assert_allclose(scaled.u, solution.u, atol=1e-9)
    alone = solve_pdhg(programs.subset(np.array([4, 5])))
    np.testing.assert_allclose(alone.u, solution.u[:, [4, 5]], atol=1e-9)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 0.9, 0.7125, 0.001, 0.999])
def test_the_quantile_bias_turns_each_unit_on_for_exactly_its_part_of_the_samples(p):
    z = np.random.default_rng(0).normal(3.0, [0.1, 1.0, 10.0], size=(40, 3))
    bias = quantile_bias(z, p)
    # 28.5 of 40 are 29 or 28.
    np.testing.assert_allclose((z + bias > 0).sum(axis=0), 40 * p, atol=0.5)
    assert len(set((z + bias > 0).sum(axis=0))) == 1
    # So that float32 does not turn one off: nowhere near the edge.
    assert np.abs(z + bias).min() > 1e-5


def test_samples_with_equal_pre_activations_are_on_or_off_together_and_none_is_on_the_edge():
    random = np.random.default_rng(0)
    groups = np.array([1.0, 2.0, 4.0, 7.0])
    z = np.repeat(groups, [30, 10, 40, 20])
    z = (z * (1 + 1e-7 * random.standard_normal(100)))[:, None] * np.array([1.0, -1.0])
    # On for the nearest of 70, 60, 20 samples; of 80, 40, 30 of the other unit; for all only when that is nearest.
    for p, expected in ((0.5, (60, 40)), (0.75, (70, 80)), (0.9, (70, 80)), (0.05, (20, 30)), (0.999, (100, 100))):
        bias = quantile_bias(z, p)
        assert tuple((z + bias > 0).sum(axis=0)) == expected
        assert np.abs(z + bias).min() > 0.02
        assert tuple((wanted_signs(z, "fraction", p) > 0).sum(axis=0)) == expected


def test_a_unit_that_is_constant_has_no_bias():
    z = np.concatenate([np.full((9, 1), 0.1), np.zeros((9, 1)), np.arange(9.0)[:, None]], axis=1)
    np.testing.assert_array_equal(quantile_bias(z, 0.5), [0, 0, -4.5])


def test_signs_are_those_of_the_largest_of_all_or_of_the_draw():
    z = np.random.default_rng(0).normal(1.0, 1.0, size=(40, 5))
    np.testing.assert_array_equal((wanted_signs(z, "fraction", 0.25) > 0).sum(axis=0), 10)
    np.testing.assert_array_equal(wanted_signs(z, "fraction", 0.25) > 0, z + quantile_bias(z, 0.25) > 0)
    np.testing.assert_array_equal(wanted_signs(z, "zeros", 0.25), 1)
    np.testing.assert_array_equal(wanted_signs(z, "margin", 0.25), np.sign(z))
