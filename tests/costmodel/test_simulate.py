"""The simulator: closed forms, equal ranks once or all, who waits for whom."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.pipelines import pipeline
from tests.costmodel.simulate_costs import Fixed, Sized
from tests.runtime.random_schedules import MUTATIONS, valid

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Settings, Simulation, simulate
from weft.ir.errors import CompileError, RunError, WeftError
from weft.ir.module import Function, Location, Module, Op, Value
from weft.ir.parser import parse_module
from weft.ir.types import B, Mesh, TensorType

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


def random_step(seed: int, hosts: int, name: str, symmetric: bool = True) -> Simulation:
    programs, mesh = valid(seed)
    hosts = hosts if len(programs) % hosts == 0 else 1
    firsts = range(0, len(programs), mesh.size)
    stages = [Module("schedule", (programs[first],), mesh) for first in firsts]
    cluster = parse_cluster(f"{hosts}x{len(programs) // hosts}:cpu")
    return simulate(stages, cluster, settings=SETTINGS[name], costs=Sized(mesh), symmetric=symmetric)


random_steps = given(
    seed=st.integers(0, 100_000), hosts=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(sorted(SETTINGS)),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@random_steps
def test_one_rank_of_each_class_tells_what_all_ranks_do(seed: int, hosts: int, name: str) -> None:
    once, every = (random_step(seed, hosts, name, symmetric) for symmetric in (True, False))
    assert once.step_us == pytest.approx(every.step_us, rel=1e-9)
    assert once.bubble == pytest.approx(every.bubble, abs=1e-9)
    assert once.exposed_us == pytest.approx(every.exposed_us, rel=1e-6, abs=1e-6)
    assert once.peak_bytes == every.peak_bytes
    for ranks in once.classes:
        for rank in ranks:
            one, other = once.actions(ranks[0]), every.actions(rank)
            assert [row[0] for row in one] == [row[0] for row in other]
            assert [row[2] for row in one] == pytest.approx([row[2] for row in other])


def test_equal_ranks_are_found() -> None:
    """Even shards on a regular cluster: one class; uneven ones and stages make more."""
    assert len(simulate(parse_module(OVERLAP), parse_cluster("2x1:cpu"), costs=Fixed({})).classes) == 1
    uneven = parse_module(OVERLAP.replace("f32[8]", "f32[9]"))
    assert simulate(uneven, parse_cluster("1x2:cpu"), costs=Fixed({})).classes == [[0], [1]]
    mesh = Mesh((("dp", 4), ("tp", 2)))
    stages = pipeline("1F1B", 2, 4, mesh)
    found = simulate(stages, parse_cluster("2x8:cpu"), costs=Fixed({"neg": 1.0}))
    assert [len(ranks) for ranks in found.classes] == [8, 8]


@settings(max_examples=80, deadline=None)
@random_steps
def test_the_critical_path_is_as_long_as_the_step(seed: int, hosts: int, name: str) -> None:
    found = random_step(seed, hosts, name)
    path = found.critical_path
    assert sum(s.duration_us for s in path) == pytest.approx(found.step_us)
    for before, after in zip(path, path[1:], strict=False):
        assert before.start_us + before.duration_us == pytest.approx(after.start_us)


@settings(max_examples=60, deadline=None)
@random_steps
def test_the_time_of_each_rank_is_busy_exposed_or_bubble(seed: int, hosts: int, name: str) -> None:
    found = random_step(seed, hosts, name)
    for row in found.waiting:
        parts = row.busy_us + sum(row.exposed_us.values()) + row.bubble_us
        assert parts == pytest.approx(found.step_us)
        assert min(row.busy_us, row.bubble_us, *row.exposed_us.values()) >= -1e-9


def test_a_cluster_of_another_size_is_refused() -> None:
    with pytest.raises(WeftError, match="W0501.*\n.*why"):
        simulate(parse_module(OVERLAP), parse_cluster("1x4:cpu"))
    with pytest.raises(WeftError, match="W0201"):
        simulate(parse_module(OVERLAP).with_(level="spmd"), parse_cluster("1x2:cpu"))


# -- ranks that do not fit together ---------------------------------------------------------------

#: mutations of one rank's communication (what changes no transfer is none of the simulator's business)
WRONG = ["swap", "drop", "operand dtype", "operand shape", "placement", "reduce-op", "axis", "root",
         "shift", "dim", "op", "drop a message", "swap messages", "message type", "tag"]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_ranks_that_disagree_are_told_where(name: str) -> None:
    caught, seed = 0, 0
    while caught < 12:
        programs, mesh = valid(seed)
        rng = Random(seed)
        rank = rng.randrange(len(programs))
        mutant = MUTATIONS[name](rng, programs[rank], len(programs))
        seed += 1
        assert seed < 4000, "too few schedules have what this mutation needs"
        if mutant is None or mutant == programs[rank]:
            continue
        modules = {r: Module("schedule", (f,), mesh) for r, f in {**programs, rank: mutant}.items()}
        with pytest.raises(RunError) as error:
            simulate(modules, parse_cluster(f"1x{len(programs)}:cpu"), costs=Sized(mesh))
        assert error.value.code == "W0802" and "rank" in str(error.value), f"seed {seed - 1}"
        caught += 1


def send(to: int, later: bool = False) -> Op:
    attrs = {"to": to, "async": True} if later else {"to": to}
    return Op("send", (X,), (Value("s", X.type),), attrs, loc=Location("model.block", "net.py", 7))


def recv(source: int) -> Op:
    return Op("recv", (), (Value("r", X.type),), {"source": source})


X = Value("x", TensorType("f32", (4,), (B,)))
PAIR = Mesh((("x", 1),))


def two_stages(first: list[Op], second: list[Op]) -> Simulation:
    functions = [Function("main", (X,), tuple(ops), ()) for ops in (first, second)]
    stages = [Module("schedule", (function,), PAIR) for function in functions]
    return simulate(stages, parse_cluster("1x2:cpu"), costs=Fixed({"send": 2.0, "recv": 2.0}))


def test_stages_that_both_send_first_deadlock_and_the_message_says_where() -> None:
    with pytest.raises(RunError, match="W0802.*deadlock") as error:
        two_stages([send(1), recv(1)], [send(0), recv(0)])
    assert "rank 0 waits in action 0, send" in str(error.value)
    assert "rank 1 waits in action 0, send" in str(error.value) and "net.py:7" in str(error.value)
    wait = Op("wait", (Value("s", X.type),), (Value("d", X.type),))
    found = two_stages([send(1, True), recv(1), wait], [send(0, True), recv(0), wait])
    assert found.step_us == 2.0  # both directions at once


def test_a_transfer_with_a_stage_that_is_not_there_is_refused() -> None:
    for stage in (0, 2, -1):
        with pytest.raises(RunError, match="W0802.*stage"):
            two_stages([send(stage)], [recv(0)])


def test_collectives_of_two_axes_in_other_orders_wait_for_ever_when_they_block() -> None:
    """
    ranks 0, 3: all_reduce over x, then over y
    ranks 1, 2: all_reduce over y, then over x
    """
    mesh = Mesh((("x", 2), ("y", 2)))
    value = Value("x", TensorType("f32", (4,), (B, B)))
    both = [Op("all_reduce", (value,), (Value(axis, value.type),), {"axis": axis}) for axis in "xy"]
    modules = {
        rank: Module("schedule", (Function("main", (value,), tuple(both[:: 1 if rank in (0, 3) else -1]), ()),), mesh)
        for rank in range(4)
    }  # fmt: skip
    for symmetric in (True, False):
        with pytest.raises(RunError, match="W0802.*deadlock"):
            simulate(modules, parse_cluster("1x4:cpu"), costs=Fixed({}), symmetric=symmetric)
    alike = {rank: modules[0] for rank in range(4)}
    assert simulate(alike, parse_cluster("1x4:cpu"), costs=Fixed({"all_reduce": 3.0})).step_us == 6.0


def test_a_program_for_each_rank_of_the_mesh_is_needed() -> None:
    module = parse_module(OVERLAP)
    with pytest.raises(CompileError, match="W0201.*2"):
        simulate({0: module}, parse_cluster("1x1:cpu"))
    with pytest.raises(CompileError, match="W0201"):
        simulate([], parse_cluster("1x1:cpu"))
    with pytest.raises(CompileError, match="W0501.*stage 0 has the ranks 0 to 1"):
        simulate(module, parse_cluster("1x1:h100+1x1:a100"))
