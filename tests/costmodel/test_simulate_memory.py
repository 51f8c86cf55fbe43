"""Memory of a simulated rank: what the executor plans, what a step allocates, and whose it is."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.costmodel.simulate_costs import Sized
from tests.runtime.measured import allocated, large_step
from tests.runtime.random_schedules import MESHES
from tests.runtime.schedules import FORWARD_BACKWARD, TRAIN_STEP, random_schedule

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.estimate import VIEWS
from weft.costmodel.simulate import simulate
from weft.costmodel.simulate_memory import GRADIENT, SAVED, TRANSIENT, held_at, memory_of
from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.types import Mesh
from weft.runtime.executor import Executor, peak_bytes
from weft.runtime.lifetimes import may_alias


def certain(module: Module) -> bool:
    """Are there no ops that may return an operand's memory or new memory, as opaque calls do?"""
    ops = (op for op in module.entry.ops if op.name not in ("wait", "free"))
    return all(may_alias(op) == (op.name in VIEWS) for op in ops)


def test_the_peak_is_the_one_that_the_executor_plans() -> None:
    compared = 0
    for seed in range(60):
        mesh = MESHES[seed % len(MESHES)]
        module = random_schedule(seed, mesh).schedule
        if certain(module):
            for coord in mesh.coords():
                planned = peak_bytes(module.entry, mesh, coord)
                assert memory_of(module.entry, mesh, coord).peak_bytes == planned, seed
                compared += 1
    assert compared > 150
    for text in (TRAIN_STEP, FORWARD_BACKWARD):
        module = parse_module(text)
        assert module.mesh is not None
        for coord in module.mesh.coords():
            planned = peak_bytes(module.entry, module.mesh, coord)
            assert memory_of(module.entry, module.mesh, coord).peak_bytes == planned


def test_the_peak_is_what_a_step_allocates() -> None:
    module, inputs = large_step()
    executor = Executor(module)
    executor.run(inputs)
    peak = allocated(executor, inputs)
    before = executor.state_bytes() + sum(tensor.nbytes for tensor in inputs)
    found = simulate(module, parse_cluster("1x1:cpu"))
    assert peak == pytest.approx(found.peak_bytes - before, rel=0.2)


def test_what_is_held_at_the_peak_has_owners_that_add_up() -> None:
    module, _ = large_step()
    assert module.mesh is not None
    found = simulate(module, parse_cluster("1x1:cpu"))
    sizes: Counter[str] = Counter()
    for kind, _, size in found.at_peak:
        sizes[kind] += size
    assert sum(sizes.values()) == found.peak_bytes
    weight = 500 * 600 * 4
    assert sizes["param"] == weight and sizes["state"] == 2 * weight + 8
    assert sizes["input"] == 700 * 500 * 4 and sizes[GRADIENT] >= weight
    early = held_at(module.entry, module.mesh, (0, 0), 4)  # behind q = y * y
    kinds = {(kind, owner) for kind, owner, _ in early}
    assert (SAVED, "model.linear") in kinds  # y: the loss needs it, and its gradient
    assert (TRANSIENT, "") in kinds


def test_memory_over_time_begins_and_ends_with_what_stays() -> None:
    module = parse_module(TRAIN_STEP)
    mesh = module.mesh or Mesh()
    found = simulate(module, parse_cluster("2x2:cpu"), costs=Sized(mesh))
    for rank in range(4):
        timeline = found.timeline(rank)
        memory = found.memory(rank)
        times = [time for time, _ in timeline.memory]
        assert times == sorted(times) and times[-1] == found.step_us
        assert max(size for _, size in timeline.memory) == memory.peak_bytes == timeline.peak_bytes
        assert sum(size for _, _, size in timeline.at_peak) == memory.peak_bytes
    assert found.memory(0).peak_bytes > found.memory(2).peak_bytes  # 5 rows on 2 ranks
    assert found.peak_bytes == found.memory(0).peak_bytes
