"""Classes of variables that look alike: whole layers, honest bounds, no loss in deep stacks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.passes import place_bound
from weft.passes.place_bound import lower_bound, tighten
from weft.passes.place_classes import classes, units_of
from weft.passes.place_eliminate import order_of, solve_by_elimination
from weft.passes.place_network import Array, Network

STATES = 3


def chain(rng: np.random.Generator, length: int) -> Network:
    """A block: variables in a row."""
    block = Network()
    for v in range(length):
        block.add_variable(rng.integers(0, 9, STATES).astype(float))
        if v:
            block.add_cost(v - 1, v, table(rng))
    return block


def table(rng: np.random.Generator) -> Array:
    return np.asarray(rng.integers(0, 9, (STATES, STATES)), dtype=float)


def stack(seed: int, layers: int, *, shared: bool) -> tuple[Network, list[tuple[int, int]]]:
    """Layers of a forward and a backward block; first numbers of both blocks of each layer.

    Activations lead from one forward block to the next, gradients back, three values from a layer's
    forward to its backward block; a head joins the ends, and one variable may be read everywhere.
    """
    rng = np.random.default_rng(seed)
    forward, backward = chain(rng, 4), chain(rng, 4)
    on, back, head = table(rng), table(rng), table(rng)
    saved = [table(rng) for _ in range(3)]
    network = Network()
    starts = []
    for _ in range(layers):
        starts.append((min(network.graft(forward).values()), min(network.graft(backward).values())))
    for a, b in starts:
        for k, costs in enumerate(saved):
            network.add_cost(a + k, b + k, costs)
    for (a, b), (c, d) in zip(starts, starts[1:], strict=False):
        network.add_cost(a + 3, c, on)
        network.add_cost(d + 3, b, back)
    network.add_cost(starts[-1][0] + 3, starts[-1][1], head)
    if shared:
        one = network.add_variable(rng.integers(0, 9, STATES).astype(float))
        reads = table(rng)
        for a, _ in starts:
            network.add_cost(one, a + 1, reads)
    return network, starts


def optimum(network: Network) -> float:
    return solve_by_elimination(network, order_of(network).vertices)[0]


seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, layers=st.integers(2, 9), radius=st.integers(1, 3))
@settings(max_examples=40)
def test_layers_are_told_apart_as_wholes(seed: int, layers: int, radius: int) -> None:
    network, starts = stack(seed, layers, shared=True)
    units = units_of(network)
    for a, b in starts:
        assert {units[v] for v in (*range(a, a + 4), *range(b, b + 4))} == {a}
    colours, _ = classes(network, radius)
    rows = [{colours[v] for v, unit in units.items() if unit == a} for a, _ in starts]
    for mine in rows:
        assert all(mine == its or mine.isdisjoint(its) for its in rows)


@given(seed=seeds, layers=st.integers(2, 9), shared=st.booleans(), radius=st.integers(1, 3))
@settings(max_examples=60)
def test_shared_messages_keep_totals_and_bound_the_optimum(
    seed: int, layers: int, shared: bool, radius: int
) -> None:
    network, _ = stack(seed, layers, shared=shared)
    moved = network.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place_bound, "SINGLE", 0)
        bound, found = tighten(moved, 10, radius)
        again, _ = tighten(moved, 10, radius)
    best = optimum(network)
    assert lower_bound(network) - 1e-9 <= bound <= again + 1e-9 <= best + 1e-6
    assert network.cost(found) >= best - 1e-6
    rng = np.random.default_rng(seed)
    for _ in range(5):
        any_choice = {v: int(rng.integers(STATES)) for v in network.unary}
        assert moved.cost(any_choice) == pytest.approx(network.cost(any_choice))


@pytest.mark.parametrize("shared", [False, True])
def test_a_deep_stack_is_bounded_as_well_as_with_messages_of_its_own(shared: bool) -> None:
    """Nothing that one layer gives is taken by forty, and borders of classes cost little."""
    for seed in range(8):
        network, _ = stack(seed, 40, shared=shared)
        single, lifted = network.clone(), network.clone()
        own, _ = tighten(single, 40)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place_bound, "SINGLE", 0)
            bound, _ = tighten(lifted, 40, 1)
        assert bound >= 0.97 * own, seed
