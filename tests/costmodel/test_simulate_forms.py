"""Steps whose time is known in closed form: pipelines, overlap, shared links and cores."""

from __future__ import annotations

import pytest
from tests.costmodel.pipelines import pipeline
from tests.costmodel.simulate_costs import Fixed

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Settings, Simulation, simulate
from weft.ir.parser import parse_module
from weft.ir.types import Mesh

ONE = Mesh((("dp", 1),))


def run_pipeline(
    order: str, stages: int, micro: int, times: dict[str, float], hosts: int = 1
) -> Simulation:
    modules = pipeline(order, stages, micro, ONE)
    cluster = parse_cluster(f"{hosts}x{stages // hosts}:h100")
    return simulate(modules, cluster, settings=Settings(), costs=Fixed(times))


# -- pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["GPipe", "1F1B"])
@pytest.mark.parametrize("stages, micro", [(2, 1), (2, 5), (3, 3), (4, 4), (4, 16), (8, 11), (8, 64)])
@pytest.mark.parametrize("forward_us, backward_us", [(10.0, 10.0), (10.0, 20.0)])
def test_the_bubble_of_equal_stages(
    order: str, stages: int, micro: int, forward_us: float, backward_us: float
) -> None:
    """(m + p - 1) slots of a forward and a backward, m of them busy."""
    found = run_pipeline(order, stages, micro, {"neg": forward_us, "mul": backward_us})
    slots = micro + stages - 1
    assert found.step_us == pytest.approx(slots * (forward_us + backward_us))
    assert found.bubble == pytest.approx((stages - 1) / slots)
    assert found.exposed_us == {}


def test_a_stage_of_1f1b_keeps_as_many_activations_as_stages_follow_it() -> None:
    """A forward's result lives until its backward; GPipe keeps all of them."""
    size = 8 * 4 * 4

    def peaks(order: str, micro: int) -> list[int]:
        found = run_pipeline(order, 4, micro, {"neg": 1.0, "mul": 1.0})
        return [found.memory(rank).peak_bytes // size for rank in range(4)]

    assert peaks("1F1B", 6) == peaks("1F1B", 16)
    grown = zip(peaks("GPipe", 6), peaks("GPipe", 16), strict=True)
    assert [after - before for before, after in grown] == [10] * 4
    first, *_, last = peaks("1F1B", 8)
    assert first - last == 4 - 1  # activations; what is sent stays where it is


def test_sends_between_stages_delay_each_other_along_the_pipeline() -> None:
    """One micro-batch passes p - 1 links on its way down and p - 1 on its way back."""
    found = run_pipeline("GPipe", 4, 1, {"neg": 10.0, "mul": 10.0, "send": 3.0, "recv": 3.0})
    assert found.step_us == pytest.approx(4 * 20.0 + 2 * 3 * 3.0)
    axes = [step.axis for step in found.critical_path]
    assert axes.count("stage") == 6 and axes.count("") == 8


# -- overlap --------------------------------------------------------------------------------------

RING = """weft 1 schedule
mesh [dp=4] "h100"

func @main(%x: f32[8]{B} {role = "input", name = "x"}) -> (f32[8]{B} {role = "output"}) {
  %p = exp(%x) : f32[8]{B}
  %0 = all_reduce(%x) {axis = "dp", async = true} : f32[8]{B}
  %1 = neg(%x) : f32[8]{B}
  %2 = neg(%1) : f32[8]{B}
  %3 = wait(%0) : f32[8]{B}
  %4 = exp(%3) : f32[8]{B}
  free(%0, %1, %2, %3, %p)
  return %4
}
"""


def run_ring(settings: Settings, times: dict[str, float]) -> Simulation:
    return simulate(parse_module(RING), parse_cluster("1x4:h100"), settings=settings, costs=Fixed(times))


@pytest.mark.parametrize("transfer_us", [3.0, 14.0, 50.0])
def test_an_all_reduce_hides_behind_the_compute_beside_it(transfer_us: float) -> None:
    found = run_ring(Settings(), {"exp": 5.0, "neg": 7.0, "all_reduce": transfer_us})
    assert found.step_us == 5.0 + max(transfer_us, 14.0) + 5.0
    assert found.exposed_us.get("dp", 0.0) == max(0.0, transfer_us - 14.0)
    assert found.bubble == 0.0


def test_overlapped_compute_and_communication_slow_each_other() -> None:
    """14 us of compute take 1.25 as long; of the transfer's 50 us those 17.5 us do 17.5 / 1.4."""
    found = run_ring(
        Settings(compute_slowdown=1.25, transfer_slowdown=1.4),
        {"exp": 5.0, "neg": 7.0, "all_reduce": 50.0},
    )
    overlapped = 14.0 * 1.25
    assert found.step_us == pytest.approx(5.0 + overlapped + 50.0 - overlapped / 1.4 + 5.0)
    short = run_ring(Settings(compute_slowdown=1.25), {"exp": 5.0, "neg": 7.0, "all_reduce": 5.0})
    assert short.step_us == pytest.approx(5.0 + 5.0 + (14.0 - 5.0 / 1.25) + 5.0)


def test_ranks_that_share_cores_take_turns() -> None:
    times = {"exp": 5.0, "neg": 7.0}
    assert run_ring(Settings(cores_per_host=4), times).step_us == pytest.approx(24.0)
    assert run_ring(Settings(cores_per_host=1), times).step_us == pytest.approx(4 * 24.0)


# -- shared links ---------------------------------------------------------------------------------

TWO = """weft 1 schedule
mesh [x=2, y=2] "h100"

func @main(%a: f32[8]{B, B} {role = "input", name = "a"}) -> (f32[8]{B, B} {role = "output"}, f32[8]{B, B} {role = "output"}) {
  %0 = all_reduce(%a) {axis = "x", async = true} : f32[8]{B, B}
  %1 = all_gather(%a) {axis = "AXIS", dim = 0, async = true} : f32[8]{B, B}
  %2 = wait(%0) : f32[8]{B, B}
  %3 = wait(%1) : f32[8]{B, B}
  return %2, %3
}
"""


def run_two(
    axis: str, cluster: str, first_us: float, second_us: float, empty: float = 0.0, at_once: int = 1
) -> tuple[float, float]:
    """When two collectives that start together end."""
    module = parse_module(TWO.replace("AXIS", axis))
    costs = Fixed({"all_reduce": first_us, "all_gather": second_us}, empty)
    found = simulate(module, parse_cluster(cluster), settings=Settings(at_once=at_once), costs=costs)
    assert len(found.classes) == 1
    (_, _, _, one), (_, _, _, two) = found.transfers(0)
    return one, two


@pytest.mark.parametrize("cluster", ["1x4:h100", "4x1:h100"])
def test_collectives_of_two_groups_share_a_link(cluster: str) -> None:
    assert run_two("y", cluster, 10, 10) == pytest.approx((20, 20))
    assert run_two("y", cluster, 4, 10) == pytest.approx((8, 14))  # then the second is alone


def test_collectives_inside_and_between_hosts_do_not_share_a_link() -> None:
    assert run_two("y", "2x2:h100", 10, 6) == pytest.approx((10, 6))


def test_latency_takes_no_bandwidth() -> None:
    """Each is on the wire for half of its time: together they fill the link and no more."""
    assert run_two("y", "1x4:h100", 10, 10, empty=0.5) == pytest.approx((10, 10))
    assert run_two("y", "1x4:h100", 10, 10, empty=0.25) == pytest.approx((15, 15))


def test_a_process_group_runs_one_after_the_other_or_two_at_once() -> None:
    assert run_two("x", "1x4:h100", 10, 6) == pytest.approx((10, 16))
    assert run_two("x", "1x4:h100", 10, 6, empty=1.0) == pytest.approx((10, 16))
    assert run_two("x", "1x4:h100", 10, 6, at_once=2) == pytest.approx((16, 12))
    assert run_two("x", "1x4:h100", 10, 6, empty=1.0, at_once=2) == pytest.approx((10, 6))


def test_an_asynchronous_local_action_runs_on_the_copy_stream() -> None:
    module = parse_module(RING)
    entry = module.entry
    copy = entry.ops[1].with_(name="cast", attrs={"async": True})
    entry = entry.with_(ops=(entry.ops[0], copy, *entry.ops[2:]))
    costs = Fixed({"exp": 5.0, "neg": 7.0, "cast": 30.0})
    found = simulate(module.with_(functions=(entry,)), parse_cluster("1x4:h100"),
                     settings=Settings(compute_slowdown=2.0), costs=costs)  # fmt: skip
    assert found.step_us == 5.0 + 30.0 + 5.0  # copies do not slow compute
    assert found.exposed_us == {"copy": 16.0}
