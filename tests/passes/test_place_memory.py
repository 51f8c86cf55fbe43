"""Time against memory: recompute, prices of bytes, the frontier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.passes.pipeline_models import STEPS, traced
from tests.passes.place_programs import llama_step

from weft.costmodel.cluster import parse_cluster
from weft.frontend.driver import logical_passes
from weft.frontend.pass_table import ALL_PASSES
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes.apply import apply_phased
from weft.passes.manager import PassManager
from weft.passes.pipeline import parse_pipeline
from weft.passes.place import MEMORY_SHARE, search_frontier, search_mesh
from weft.passes.place_model import PlacementModel, Runs
from weft.passes.place_solve import settle, solve
from weft.passes.price import price

MESH = Mesh((("dev", 2),), "h100")
RICH = parse_cluster("1x2:h100")


def step() -> Module:
    return llama_step(layers=3, batch=32, seq=128, width=128, heads=4, kv=4, ffn=256, vocab=64)


def phases_of(module: Module) -> tuple[str, ...]:
    out, backward = [], False
    for op in module.entry.ops:
        backward = backward or op.name == "reduce_sum"
        late = op.name == "adamw_update" or (len(op.results) == 1 and op.result.type.dtype == "f64")
        out.append("update" if late else "backward" if backward else "forward")
    return tuple(out)


def test_blocks_are_computed_again_where_the_plan_does_not_fit() -> None:
    module = step()
    phases = phases_of(module)
    free = search_mesh(module, MESH, RICH, phases=phases)
    assert free is not None and not free.modes and free.price.saved_bytes > 0
    room = 0.6 * free.price.peak_bytes
    cluster = replace(RICH, device=replace(RICH.device, memory_bytes=room / MEMORY_SHARE))
    result = search_mesh(module, MESH, cluster, phases=phases, recompute=True)
    assert result is not None and result.report[0].fits and result.modes
    assert set(result.modes.values()) <= {"selective", "full"}
    assert result.price.peak_bytes <= room
    assert result.price.saved_bytes < free.price.saved_bytes
    assert result.lower_bound_us <= free.objective_us * (1 + 1e-9) <= result.objective_us * (1 + 2e-9)
    assert result.logical is not None and result.phases is not None
    verify(result.placed)
    again = price(result.placed, cluster, result.phases)
    assert again.total_us == pytest.approx(result.objective_us, rel=1e-6)


def test_the_frontier_has_no_point_that_another_beats() -> None:
    module = step()
    found = search_frontier(module, MESH, RICH, phases=phases_of(module))
    assert len(found) >= 2
    for first, second in zip(found, found[1:], strict=False):
        assert first.objective_us <= second.objective_us
        assert first.price.peak_bytes > second.price.peak_bytes
    fastest = search_mesh(module, MESH, RICH)
    assert fastest is not None
    assert found[0].objective_us == pytest.approx(fastest.objective_us)
    assert all(point.lower_bound_us <= found[0].objective_us * (1 + 1e-9) for point in found)
    for point in found:
        bytes_ = point.price
        assert bytes_.persistent_bytes + bytes_.saved_bytes <= bytes_.peak_bytes


@pytest.mark.parametrize(("micro", "us_per_byte"), [(1, 1e-3), (4, 0.0), (4, 1e-3)])
def test_any_plan_costs_what_the_search_says_once_nothing_better_is_near(
    micro: int, us_per_byte: float
) -> None:
    """A search that ends early must not count copies that nobody reads, or one copy twice."""
    module = llama_step(layers=1, batch=32, seq=128, width=128, heads=4, kv=4, ffn=256, vocab=64)
    mesh, cluster = Mesh((("dev0", 2), ("dev1", 2)), "h100"), parse_cluster("1x4:h100")
    runs = Runs(phases_of(module), micro)
    model = PlacementModel(module, mesh, cluster, runs=runs)
    network = model.weighted(us_per_byte)
    rng = np.random.default_rng(micro)
    moved = 0
    for _ in range(2):
        shaken = network.clone()
        for variable, states in network.states.items():
            shaken.add_unary(variable, rng.random(len(states)) * 50)
        found = solve(shaken, 0.0)
        assert found is not None
        at = {v: int(np.searchsorted(network.states[v], found.states[v])) for v in network.unary}
        before = network.cost(at)
        settle(network, at)
        cost = network.cost(at)
        moved += cost < before
        chosen = network.complete({v: int(network.states[v][k]) for v, k in at.items()})
        decoded = model.plan(chosen)
        placed, phases = apply_phased(module, mesh, decoded.choices)
        time_us = cost - model.memory_term_us(chosen, us_per_byte) + decoded.slack_us
        assert price(placed, cluster, phases, micro).total_us == pytest.approx(time_us, rel=1e-6)
    assert moved


def test_the_bytes_of_calls_inside_of_calls_are_counted() -> None:
    """What a reduced callee says of its own callees' results is found again in the entry."""
    program = traced(STEPS["two towers"])[0].module
    module = PassManager(parse_pipeline(logical_passes("train"), ALL_PASSES)).run(program)
    assert any(op.name == "call" for function in module.functions[1:] for op in function.ops)
    mesh, cluster = Mesh((("host", 2), ("dev", 2)), "a100"), parse_cluster("2x2:a100")
    model = PlacementModel(module, mesh, cluster)
    for us_per_byte in (0.0, 1e-2):
        found = solve(model.weighted(us_per_byte))
        assert found is not None and found.exact
        decoded = model.plan(found.states)
        placed, _ = apply_phased(module, mesh, decoded.choices)
        time_us = found.cost - model.memory_term_us(found.states, us_per_byte) + decoded.slack_us
        assert price(placed, cluster).total_us == pytest.approx(time_us, rel=1e-6)
