"""Cuts of units over devices: equal to trying everything."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.ir.types import Mesh
from weft.passes.search_costs import UnitCosts
from weft.passes.search_cuts import Block, Cutter
from weft.passes.search_layout import even_parts
from weft.passes.search_units import Units, down_sets


def units_of(count: int, edges: set[tuple[int, int]]) -> Units:
    ideals, complete = down_sets(count, edges)
    return Units(tuple(map(str, range(count))), (), frozenset(edges), ideals, complete)


def costs_of(rng: np.random.Generator, count: int) -> UnitCosts:
    row = lambda high: rng.integers(1, high, count).astype(float)  # noqa: E731
    return UnitCosts(
        Mesh(), row(9), row(9), row(9), row(5), row(5), np.zeros(count), row(3), *np.zeros((2, count)), ()
    )


def stages_of(units: Units, count: int) -> list[tuple[np.ndarray, ...]]:
    """All chains of `count` non-empty differences of nested down-sets."""
    rows = [row for row in units.ideals]
    inner = [r for r in rows if r.any() and not r.all()]
    found = []
    for chain in combinations(inner, count - 1):
        ordered = sorted(chain, key=lambda r: r.sum())
        whole = [np.zeros(units.count, bool), *ordered, np.ones(units.count, bool)]
        steps = list(zip(whole, whole[1:], strict=False))
        if all((a <= b).all() and (a != b).any() for a, b in steps):
            found.append(tuple(b & ~a for a, b in steps))
    return found


GRAPHS = {
    "line": {(0, 1), (1, 2), (2, 3), (3, 4)},
    "towers": {(0, 1), (2, 3), (1, 4), (3, 4)},
    "encoder and decoder": {(0, 1), (1, 3), (2, 3), (1, 4), (3, 4)},
    "apart": set(),
}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(GRAPHS)), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6),
       st.integers(8, 60), st.booleans())
def test_equal_to_trying_everything(
    graph: str, count: int, micro: int, seed: int, memory: int, recompute: bool
) -> None:
    """Two kinds of devices; each block of the line of three devices may be a stage."""
    units, rng = units_of(5, GRAPHS[graph]), np.random.default_rng(seed)
    kinds = [costs_of(rng, 5), costs_of(rng, 5)]
    blocks = [Block(a, b, kinds[(a + b) % 2], float(memory)) for a, b in combinations(range(4), 2)]
    expected = np.inf
    lines = [c for c in product(blocks, repeat=count)
             if c[0].start == 0 and c[-1].stop == 3
             and all(x.stop == y.start for x, y in zip(c, c[1:], strict=False))]  # fmt: skip
    for line in lines:
        for stages in stages_of(units, count):
            worst = 0.0
            for behind, (block, stage) in enumerate(zip(reversed(line), reversed(stages), strict=True)):
                costs, flight = block.costs, min(micro, behind + 1)
                time_us = (costs.loop_us + costs.update_us / micro)[stage].sum()
                held = costs.persistent_bytes[stage].sum() + costs.transient_bytes.max()
                if held + flight * costs.saved_bytes[stage].sum() > memory:
                    frugal = held + flight * costs.kept_bytes[stage].sum() + costs.saved_bytes.max()
                    again = costs.forward_us[stage].sum()
                    time_us = time_us + again if recompute and frugal <= memory else np.inf
                worst = max(worst, time_us)
            expected = min(expected, worst)
    cuts = {len(c.parts): c for c in Cutter(units, micro, recompute).best(blocks, 3)}
    if not np.isfinite(expected):
        assert count not in cuts
        return
    cut = cuts[count]
    assert cut.bottleneck_us == pytest.approx(expected)
    assert (np.sum([part.units for part in cut.parts], axis=0) == 1).all()
    assert [part.block.start for part in cut.parts][0] == 0
    for part, following in zip(cut.parts, cut.parts[1:], strict=False):
        assert part.block.stop == following.block.start


def test_two_towers_are_cut_side_by_side() -> None:
    """Stages need not be pieces of a line: of two towers of two units each, one is a stage."""
    units = units_of(4, {(0, 1), (2, 3)})
    even = np.ones(4)
    costs = UnitCosts(Mesh(), even, even, even * 0, even, even, even, even, even, even, ())
    cut = Cutter(units, 4).best([Block(0, 1, costs, 99.0), Block(1, 2, costs, 99.0)], 2)[-1]
    assert cut.bottleneck_us == 4.0
    assert units.complete and len(units.ideals) == 9


def test_many_units_without_order_are_cut_along_one() -> None:
    units = units_of(40, set())
    assert not units.complete and len(units.ideals) == 41


def test_chunks_of_a_stage_are_even_together() -> None:
    """10 units on 2 stages in 2 chunks: 5 and 5, though parts are of 2 and 3."""
    units = units_of(10, {(i, i + 1) for i in range(9)})
    one = np.ones(10)
    costs = UnitCosts(Mesh(), one, one, one, one, one, one, one, one, one, ())
    blocks = [Block(0, 1, costs, 99.0), Block(1, 2, costs, 99.0)]
    parts = even_parts(units, blocks, 2)
    assert parts is not None and len(parts) == 4
    assert np.logical_or.reduce([p.units for p in parts]).all()
    loads = [sum(int(p.units.sum()) for p in parts[s::2]) for s in range(2)]
    assert loads == [5, 5]
    assert even_parts(units_of(4, {(0, 1), (2, 3)}), blocks, 2) is None
