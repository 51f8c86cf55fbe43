"""The simulator: closed forms, equal ranks once or all, who waits for whom."""

from __future__ import annotations

import pytest
from tests.costmodel.simulate_costs import Fixed, Sized
from tests.runtime.random_schedules import valid

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Settings, Simulation, simulate
from weft.ir.errors import WeftError
from weft.ir.module import Module
from weft.ir.parser import parse_module

OVERLAP = """weft 1 schedule
mesh [dp=2] "cpu"

func @main(%x: f32[8]{S(0)} {role = "input", name = "x"}) -> (f32[8]{S(0)} {role = "output"}) {
  %0 = all_gather(%x) {axis = "dp", dim = 0, async = true} : f32[8]{B}
  %1 = neg(%x) split [dp = a0] : f32[8]{S(0)}
  %2 = wait(%0) : f32[8]{B}
  free(%0)
  %3 = neg(%1) split [dp = a0] : f32[8]{S(0)}
  free(%1, %2)
  return %3
}
"""


def test_communication_behind_compute_is_not_exposed() -> None:
    costs = Fixed({"all_gather": 10.0, "neg": 4.0})
    found = simulate(parse_module(OVERLAP), parse_cluster("1x2:cpu"), costs=costs)
    assert found.step_us == 14.0  # 4 of the 10 us lie behind the first neg
    assert found.exposed_us == {"dp": 6.0}
    assert found.peak_bytes == 16 + 32 + 16 + 16  # x, all of x, both negs
    assert [(s.op.name, s.axis) for s in found.critical_path] == [("all_gather", "dp"), ("neg", "")]


SETTINGS = {
    "first in, first out": Settings(),
    "slowed": Settings(at_once=2, compute_slowdown=1.2, transfer_slowdown=1.3),
    "few cores": Settings(at_once=2, compute_slowdown=1.1, cores_per_host=1.5),
}


def random_step(seed: int, hosts: int, settings: Settings, symmetric: bool) -> Simulation | None:
    programs, mesh = valid(seed)
    if len(programs) % hosts:
        return None
    firsts = range(0, len(programs), mesh.size)
    stages = [Module("schedule", (programs[first],), mesh) for first in firsts]
    cluster = parse_cluster(f"{hosts}x{len(programs) // hosts}:cpu")
    return simulate(stages, cluster, settings=settings, costs=Sized(mesh), symmetric=symmetric)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_of_each_class_tells_what_all_ranks_do(name: str) -> None:
    smaller = 0
    for seed in range(60):
        once = random_step(seed, 1 + seed % 2, SETTINGS[name], True)
        every = random_step(seed, 1 + seed % 2, SETTINGS[name], False)
        if once is None or every is None:
            continue
        smaller += len(once.classes) < len(every.classes)
        assert once.step_us == pytest.approx(every.step_us, rel=1e-9), seed
        assert once.bubble == pytest.approx(every.bubble, abs=1e-9), seed
        assert once.exposed_us == pytest.approx(every.exposed_us, rel=1e-6, abs=1e-6), seed
        assert once.peak_bytes == every.peak_bytes
        for ranks in once.classes:
            for rank in ranks:
                one, other = once.actions(ranks[0]), every.actions(rank)
                assert [row[0] for row in one] == [row[0] for row in other]
                assert [row[2] for row in one] == pytest.approx([row[2] for row in other])
    assert smaller > 40


@pytest.mark.parametrize("name", SETTINGS)
def test_the_critical_path_is_as_long_as_the_step(name: str) -> None:
    for seed in range(40):
        found = random_step(seed, 1, SETTINGS[name], True)
        assert found is not None
        path = found.critical_path
        assert sum(s.duration_us for s in path) == pytest.approx(found.step_us)
        for before, after in zip(path, path[1:], strict=False):
            assert before.start_us + before.duration_us == pytest.approx(after.start_us)


def test_a_cluster_of_another_size_is_refused() -> None:
    with pytest.raises(WeftError, match="W0501.*\n.*why"):
        simulate(parse_module(OVERLAP), parse_cluster("1x4:cpu"))
    with pytest.raises(WeftError, match="W0201"):
        simulate(parse_module(OVERLAP).with_(level="spmd"), parse_cluster("1x2:cpu"))
