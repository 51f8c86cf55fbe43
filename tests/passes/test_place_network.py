"""Cost networks: every reduction, bound and elimination keeps the minimum."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.passes import place_bound, place_solve
from weft.passes.place_bound import exclude, lower_bound, tighten
from weft.passes.place_eliminate import order_of, solve_by_elimination
from weft.passes.place_network import FORBIDDEN, Network, reduce
from weft.passes.place_solve import solve
from weft.passes.treewidth import best_order, eliminate


def random_network(seed: int, *, most: int = 6, density: float = 0.7) -> Network:
    """Up to `most` variables of 1 to 4 states; integer costs (ties) or real ones; some forbidden."""
    rng = np.random.default_rng(seed)
    network = Network()
    sizes = rng.integers(1, 5, rng.integers(1, most + 1))
    integers = bool(rng.integers(2))
    for size in sizes:
        costs = rng.integers(0, 5, size) if integers else rng.random(size)
        network.add_variable(costs.astype(float))
    for i, j in product(range(len(sizes)), repeat=2):
        if i < j and rng.random() < density:
            shape = (sizes[i], sizes[j])
            table = rng.integers(0, 9, shape).astype(float) if integers else rng.random(shape) * 5
            table[rng.random(shape) < 0.15] = FORBIDDEN
            network.add_cost(i, j, table)
    return network


def least(network: Network) -> float:
    """Minimum by enumeration, FORBIDDEN where there is none."""
    variables = list(network.unary)
    ranges = [range(len(network.unary[v])) for v in variables]
    costs = [network.cost(dict(zip(variables, x, strict=True))) for x in product(*ranges)]
    return min(min(costs, default=FORBIDDEN), FORBIDDEN)


seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds)
@settings(max_examples=150)
def test_reductions_keep_the_minimum_and_lead_back_to_it(seed: int) -> None:
    network = random_network(seed)
    best = least(network)
    for witnesses in (0, 32):
        small = network.clone()
        reduce(small, witnesses)
        if best >= FORBIDDEN / 2:
            assert not small.feasible() or least(small) >= FORBIDDEN / 2
            continue
        assert least(small) == pytest.approx(best)
        _, found = solve_by_elimination(small, order_of(small).vertices)
        full = small.complete({v: int(small.states[v][k]) for v, k in found.items()})
        assert network.cost(full) == pytest.approx(best)


@given(seed=seeds)
@settings(max_examples=150)
def test_elimination_finds_the_minimum(seed: int) -> None:
    network = random_network(seed)
    cost, found = solve_by_elimination(network, order_of(network).vertices)
    best = least(network)
    if best < FORBIDDEN / 2:
        assert cost == pytest.approx(best) == network.cost(found)


@given(seed=seeds)
@settings(max_examples=100)
def test_tightening_moves_costs_without_changing_totals_and_never_lowers_the_bound(
    seed: int,
) -> None:
    network = random_network(seed)
    reduce(network, 0)
    if not network.feasible() or not network.unary:
        return
    moved, before = network.clone(), lower_bound(network)
    bound, found = tighten(moved, 10)
    best = least(network)
    if best >= FORBIDDEN / 2:
        return
    assert before - 1e-9 <= bound <= best + 1e-6
    rng = np.random.default_rng(seed)
    for _ in range(5):
        any_choice = {v: int(rng.integers(len(u))) for v, u in network.unary.items()}
        if network.cost(any_choice) < FORBIDDEN / 2:
            assert moved.cost(any_choice) == pytest.approx(network.cost(any_choice))
    upper = network.cost(found)
    if upper < FORBIDDEN / 2:
        exclude(moved, upper, 1e-9)
        assert least(moved) == pytest.approx(best)


@given(seed=seeds)
@settings(max_examples=150)
def test_solving_is_exact(seed: int) -> None:
    network = random_network(seed, most=7, density=0.8)
    best = least(network)
    solution = solve(network)
    if best >= FORBIDDEN / 2:
        assert solution is None
        return
    assert solution is not None and solution.exact
    assert solution.cost == pytest.approx(best) == network.cost(solution.states)
    assert solution.lower_bound <= solution.cost


def test_branching_is_exact_where_no_table_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_solve, "TABLE_LOG10", 0.5)
    monkeypatch.setattr(place_solve, "_FEW", ((1, 1),))  # weak bounds: more is left to branching
    branched = 0
    for seed in range(120):
        network = random_network(seed, most=7, density=0.9)
        best = least(network)
        solution = solve(network)
        if best < FORBIDDEN / 2:
            assert solution is not None and solution.cost == pytest.approx(best)
            branched += solution.nodes > 1
    assert branched > 5


def test_a_search_out_of_time_still_answers_and_states_an_honest_gap() -> None:
    rng = np.random.default_rng(1)
    network = Network()
    for _ in range(60):
        network.add_variable(rng.random(12) * 4)
    for i, j in product(range(60), repeat=2):
        if i < j <= i + 12:
            network.add_cost(i, j, rng.random((12, 12)) * 3)
    solution = solve(network, limit_s=0.0)
    assert solution is not None and not solution.exact
    assert 0 < solution.lower_bound < solution.cost == pytest.approx(network.cost(solution.states))


def test_a_search_that_may_stop_early_states_an_honest_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_solve, "TABLE_LOG10", 0.5)
    monkeypatch.setattr(place_solve, "SINGLE", 0)
    for seed in range(60):
        network = random_network(seed, most=7, density=0.9)
        best, solution = least(network), solve(network, enough=0.2)
        if best < FORBIDDEN / 2:
            assert solution is not None
            assert solution.lower_bound <= best + 1e-9 <= solution.cost + 2e-9
            assert solution.cost - solution.lower_bound <= 0.2 * abs(solution.cost) + 1e-9


@given(seed=seeds)
@settings(max_examples=40)
def test_equal_parts_are_solved_as_they_would_be_one_by_one(seed: int) -> None:
    """A chain of equal parts: classes, memos and rounding keep the minimum."""
    rng = np.random.default_rng(seed)
    part, network = random_network(seed, most=2), Network()
    shape = (len(part.unary[len(part.unary) - 1]), len(part.unary[0]))
    link = np.asarray(rng.integers(0, 9, shape), dtype=float)
    ends: list[tuple[int, int]] = []
    for _ in range(3):
        numbers = network.graft(part)
        ends.append((numbers[0], numbers[len(part.unary) - 1]))
    for (_, last), (first, _) in zip(ends, ends[1:], strict=False):
        network.add_cost(last, first, link)
    best = least(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place_bound, "SINGLE", 0)
        patch.setattr(place_solve, "SINGLE", 0)
        patch.setattr(place_solve, "TABLE_LOG10", 0.5)
        solution = solve(network)
    if best >= FORBIDDEN / 2:
        assert solution is None
        return
    assert solution is not None and solution.exact
    assert solution.cost == pytest.approx(best) == network.cost(solution.states)


def test_widths_of_known_graphs() -> None:
    def width(graph: dict[int, set[int]]) -> int:
        return best_order(graph, {v: 2 for v in graph}).width

    path = {i: {i - 1, i + 1} & set(range(9)) for i in range(9)}
    cycle = {i: {(i - 1) % 9, (i + 1) % 9} for i in range(9)}
    clique = {i: set(range(6)) - {i} for i in range(6)}
    grid = {
        r * 4 + c: {r2 * 4 + c2 for r2, c2 in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
                    if 0 <= r2 < 4 and 0 <= c2 < 4}
        for r in range(4) for c in range(4)
    }  # fmt: skip
    assert (width(path), width(cycle), width(clique), width(grid)) == (1, 2, 5, 4)


def test_the_order_says_how_large_the_tables_are() -> None:
    star = {0: {1, 2, 3}, 1: {0}, 2: {0}, 3: {0}}
    order = eliminate(star, {0: 10, 1: 5, 2: 5, 3: 5})
    assert sorted(order.vertices) == [0, 1, 2, 3] and order.width == 1
    assert order.table_log10 == pytest.approx(1.0)
