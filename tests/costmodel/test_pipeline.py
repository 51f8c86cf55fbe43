"""The pipeline evaluator: equal to the event simulator; its bound and counts hold for any order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.pipelines import gpipe, one_f_one_b, pipeline
from tests.costmodel.simulate_costs import Fixed

from weft.costmodel import simulate_engine
from weft.costmodel.cluster import parse_cluster
from weft.costmodel.pipeline import (
    ChunkTimes,
    Order,
    Slot,
    in_flight,
    lower_bound_us,
    step_us,
)
from weft.costmodel.simulate import Settings, simulate
from weft.ir.errors import CompileError
from weft.ir.module import Op
from weft.ir.types import Mesh

ORDERS = {"GPipe": gpipe, "1F1B": one_f_one_b}
PHASES = {"F": "forward", "B": "backward"}


def slots_of(name: str, stages: int, micro: int) -> Order:
    return tuple(
        tuple((PHASES[kind], k, 0) for kind, k in ORDERS[name](stage, stages, micro))
        for stage in range(stages)
    )


def looped(stages: int, chunks: int, micro: int) -> Order:
    """Each stage runs all forwards chunk by chunk, then all backwards."""
    rows: list[tuple[Slot, ...]] = []
    for _ in range(stages):
        ahead = [("forward", k, c) for c in range(chunks) for k in range(micro)]
        back = [("backward", k, c) for c in reversed(range(chunks)) for k in range(micro)]
        rows.append(tuple(ahead + back))
    return tuple(rows)


def times(forward: list[float], backward: list[float], send: float, update: float = 0.0) -> ChunkTimes:
    edges = np.full(len(forward) - 1, send)
    return ChunkTimes(
        np.array(forward), np.array(backward), edges, edges, np.full(len(forward), update)
    )


class ByStage(Fixed):
    """Times that differ by stage."""

    def __init__(self, stage_of: dict[int, int], forward: list[float], backward: list[float], send: float):
        super().__init__({"send": send, "recv": send})
        self.stage_of, self.by = stage_of, {"neg": forward, "mul": backward}

    def action_us(self, op: Op, coord: tuple[int, ...]) -> float:
        return self.by[op.name][self.stage_of[id(op)]] if op.name in self.by else 0.0


durations = st.integers(20, 100).map(float)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(ORDERS)), st.integers(2, 5), st.integers(1, 6), st.integers(0, 200))
def test_equal_to_the_event_simulator(data: st.DataObject, name: str, stages: int, micro: int, send: int) -> None:
    forward = data.draw(st.lists(durations, min_size=stages, max_size=stages))
    backward = data.draw(st.lists(durations, min_size=stages, max_size=stages))
    modules = pipeline(name, stages, micro, Mesh((("dp", 1),)), ahead=None)
    stage_of = {id(op): s for s, module in enumerate(modules) for op in module.entry.ops}
    costs = ByStage(stage_of, forward, backward, float(send))

    def replayed() -> float:
        return simulate(
            modules, parse_cluster(f"1x{stages}:h100"), settings=Settings(), costs=costs, symmetric=False
        ).step_us

    own = float(step_us(slots_of(name, stages, micro), times(forward, backward, float(send))))
    with pytest.MonkeyPatch.context() as patch:  # a link for each boundary and direction
        patch.setattr(simulate_engine, "fair_rates", lambda uses, weights, caps: list(caps))
        assert own == pytest.approx(replayed())
    # a stage's transfers share its ports: what meets there takes longer
    assert own <= replayed() * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_the_bound_is_never_above_the_step(data: st.DataObject, stages: int, chunks: int, micro: int) -> None:
    count = stages * chunks
    draw = lambda size: np.array(  # noqa: E731
        data.draw(st.lists(st.floats(0, 50), min_size=size, max_size=size))
    )
    row = ChunkTimes(draw(count), draw(count), draw(count - 1), draw(count - 1), draw(stages))
    orders = [looped(stages, chunks, micro)]
    if chunks == 1:
        orders += [slots_of(name, stages, micro) for name in ORDERS]
    for order in orders:
        assert lower_bound_us(micro, stages, row) <= step_us(order, row) * (1 + 1e-12) + 1e-9


@pytest.mark.parametrize("stages, micro", [(1, 3), (2, 5), (4, 4), (4, 16)])
def test_the_bound_of_equal_stages_is_reached(stages: int, micro: int) -> None:
    row = times([10.0] * stages, [20.0] * stages, 0.0, 5.0)
    expected = (micro + stages - 1) * 30.0 + 5.0
    assert float(step_us(slots_of("1F1B", stages, micro), row)) == pytest.approx(expected)
    assert float(lower_bound_us(micro, stages, row)) == pytest.approx(expected)


def test_many_pipelines_at_once_are_each_alone() -> None:
    rng = np.random.default_rng(0)
    many = ChunkTimes(*(rng.uniform(1, 9, (7, n)) for n in (4, 4, 3, 3, 4)))
    order = slots_of("1F1B", 4, 6)
    alone = [
        step_us(order, ChunkTimes(many.forward[i], many.backward[i], many.activation[i],
                                  many.gradient[i], many.update[i]))
        for i in range(7)
    ]  # fmt: skip
    np.testing.assert_allclose(step_us(order, many), alone)


def test_activations_in_flight() -> None:
    assert in_flight(slots_of("GPipe", 3, 5)) == ((5,), (5,), (5,))
    assert in_flight(slots_of("1F1B", 4, 8)) == ((4,), (3,), (2,), (1,))
    assert in_flight(slots_of("1F1B", 4, 2)) == ((2,), (2,), (2,), (1,))
    assert in_flight(looped(2, 2, 3)) == ((3, 3), (3, 3))


def test_an_order_that_waits_for_itself_is_refused() -> None:
    order: Order = ((("backward", 0, 0), ("forward", 0, 0)),)
    with pytest.raises(CompileError, match="waits for itself"):
        step_us(order, times([1.0], [1.0], 0.0))
