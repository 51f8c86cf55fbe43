"""What if a link or the devices were faster: exact where it is known, never worse but for anomalies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.simulate_costs import Fixed, Sized
from tests.runtime.random_schedules import valid

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import PARTS, Settings, Simulation, simulate
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.ir.parser import parse_module


def faster(found: Simulation, part: str, factor: float) -> Simulation:
    if part == "device":
        return found.what_if(device=True, factor=factor)
    return found.what_if(part, factor)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000), hosts=st.sampled_from([1, 2]), at_once=st.sampled_from([1, 2]),
    part=st.sampled_from(PARTS), factor=st.floats(1.01, 20),
)  # fmt: skip
def test_nothing_that_is_faster_makes_a_step_of_queues_slower(
    seed: int, hosts: int, at_once: int, part: str, factor: float
) -> None:
    """Each start is the latest of some ends: where links are not shared, sums and maxima only."""
    programs, mesh = valid(seed)
    hosts = hosts if len(programs) % hosts == 0 else 1
    stages = [
        Module("schedule", (programs[first],), mesh) for first in range(0, len(programs), mesh.size)
    ]
    cluster = parse_cluster(f"{hosts}x{len(programs) // hosts}:cpu")
    found = simulate(stages, cluster, settings=Settings(at_once), costs=Sized(mesh, shared=False))
    other = faster(found, part, factor)
    assert other.step_us <= found.step_us * (1 + 1e-9)
    assert other.step_us >= found.step_us / factor * (1 - 1e-9)


ANOMALY = """weft 1 schedule
mesh [x=2, y=2] "h100"

func @main(%a: f32[8]{B, B} {role = "input", name = "a"}) -> (f32[8]{B, B} {role = "output"}) {
  %0 = all_reduce(%a) {axis = "x", async = true} : f32[8]{B, B}
  %1 = neg(%a) : f32[8]{B, B}
  %2 = all_gather(%1) {axis = "y", dim = 0, async = true} : f32[8]{B, B}
  %3 = wait(%0) : f32[8]{B, B}
  %4 = broadcast(%3) {axis = "x"} : f32[8]{B, B}
  %5 = wait(%2) : f32[8]{B, B}
  return %4
}
"""


def test_a_faster_device_may_take_bandwidth_from_the_critical_path() -> None:
    """
    neg of 10 us: all_reduce 0-10 alone, broadcast 10-30; all_gather 10-20 beside it
    neg of  5 us: all_gather from 5 on, so all_reduce 0-15, broadcast 15-35
    """
    costs = Fixed({"all_reduce": 10, "neg": 10, "all_gather": 10, "broadcast": 20}, still={"broadcast"})
    found = simulate(parse_module(ANOMALY), parse_cluster("1x4:h100"), settings=Settings(), costs=costs)
    assert found.step_us == pytest.approx(30)
    assert found.what_if(device=True, factor=2).step_us == pytest.approx(35)


def test_each_part_changes_what_uses_it() -> None:
    times = {"all_reduce": 40, "neg": 10, "all_gather": 60, "broadcast": 20}
    module = parse_module(ANOMALY)
    found = simulate(module, parse_cluster("2x2:h100"), settings=Settings(), costs=Fixed(times))
    # x goes between hosts, y stays inside one
    assert found.step_us == pytest.approx(70)  # neg, then the all_gather
    assert found.what_if("intra", 2).step_us == pytest.approx(60)  # all_reduce, broadcast
    assert found.what_if("inter", 2).step_us == pytest.approx(70)
    assert found.what_if("intra", 2).what_if("inter", 2).step_us == pytest.approx(40)
    assert found.what_if(device=True, factor=10).step_us == pytest.approx(61)
    assert found.step_us == pytest.approx(70)  # and the question leaves the answer alone


@pytest.mark.parametrize("link, device, factor", [
    ("between", False, 2.0), ("", False, 2.0), ("inter", True, 2.0), ("inter", False, 0.0),
    ("inter", False, -1.0), ("inter", False, float("inf")), ("inter", False, float("nan")),
])  # fmt: skip
def test_other_parts_and_factors_are_refused(link: str, device: bool, factor: float) -> None:
    module = parse_module(ANOMALY)
    found = simulate(module, parse_cluster("2x2:h100"), costs=Fixed({"neg": 1.0}))
    with pytest.raises(CompileError, match="W1001"):
        found.what_if(link, factor, device=device)
