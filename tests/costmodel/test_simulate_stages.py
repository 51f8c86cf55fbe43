"""The simulator on stages of different meshes and devices: right bytes on the right links."""

from __future__ import annotations

from random import Random

import pytest
from tests.costmodel.simulate_costs import Fixed, Sized
from tests.passes.pipeline_models import STEPS, logical
from tests.passes.test_stage_schedule import scheduled
from tests.passes.test_stages import random_stages

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Settings, simulate
from weft.ir.errors import CompileError, RunError
from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.types import DTYPES, Mesh, local_shape
from weft.passes.micro import time_split
from weft.passes.random_place import parse_mesh

SENDER = """weft 1 schedule
mesh [a=2] "cpu"

func @main(%x: f32[4, 6]{S(0)} {role = "input", name = "x"}) -> () {
  %0 = send(%x) {to = 1, mesh = "b=3", placement = "S(1)"} : f32[4, 6]{S(0)}
  return
}
"""
RECEIVER = """weft 1 schedule
mesh [b=3] "cpu"

func @main() -> (f32[4, 6]{S(1)} {role = "output"}) {
  %0 = recv() {source = 0, mesh = "a=2", placement = "S(0)"} : f32[4, 6]{S(1)}
  return %0
}
"""


def transfer() -> list[Module]:
    """Two ranks that hold rows send to three that take columns."""
    return [parse_module(SENDER), parse_module(RECEIVER)]


@pytest.mark.parametrize("cluster", ["1x5:cpu", "1x2:cpu+1x3:cpu"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pieces_share_the_links_of_their_ends(cluster: str, symmetric: bool) -> None:
    costs = Fixed({"send": 6.0, "recv": 6.0})
    found = simulate(transfer(), parse_cluster(cluster), costs=costs, symmetric=symmetric)
    # three pieces leave a rank through its port, six a host of two ranks through its card
    assert found.step_us == pytest.approx(18.0)
    op = found.program(0).ops[0]
    sent = [(link.source, link.target, link.bytes) for rank in (0, 1) for link in found.links(rank, op)]
    assert sent == [(rank, other, 16) for rank in (0, 1) for other in (2, 3, 4)]
    assert {rank: len(found.transfers(rank)) for rank in range(5)} == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}


def test_a_slower_card_sets_the_speed() -> None:
    """A host's card of ten times the bandwidth is used to a tenth by what the other one can take."""
    channel = simulate(
        transfer(), parse_cluster("1x2:h100+1x3:v100"), costs=Fixed({"send": 6.0, "recv": 6.0})
    ).transfers(0)[0][1]
    shares = {way: use for (way, _), use in channel.uses}
    assert shares["nic out"] == pytest.approx(12.5 / 50 / 2)
    assert shares["nic in"] == pytest.approx(1 / 3)


CASES = [
    ("tied", "1f1b", 1, ["2x2", "3"], "1x4:cpu+1x3:cpu"),
    ("skips", "interleaved", 2, ["3", "2x2"], "1x7:cpu"),
    ("two towers", "gpipe", 1, ["", "4", "2"], "1x1:cpu+1x6:cpu"),
]


@pytest.mark.parametrize(("name", "order", "chunks", "meshes", "cluster"), CASES)
def test_equal_ranks_once_or_all(
    name: str, order: str, chunks: int, meshes: list[str], cluster: str
) -> None:
    rng = Random(name)
    split = time_split(logical(STEPS[name])[0], 3)
    grids = [parse_mesh(mesh) if mesh else Mesh() for mesh in meshes]
    modules = scheduled(split, random_stages(split, len(grids) * chunks, rng), grids, order, rng)
    runs = [
        simulate(
            modules, parse_cluster(cluster), settings=Settings(at_once=2, compute_slowdown=1.2),
            costs=Sized(Mesh()), symmetric=symmetric,
        )
        for symmetric in (True, False)
    ]  # fmt: skip
    assert runs[0].step_us == pytest.approx(runs[1].step_us)
    for rank in range(runs[0].ranks):
        one, two = (found.actions(rank) for found in runs)
        assert len(one) == len(two)
        assert all(a == pytest.approx(b) for a, b in zip(one, two, strict=True))


def test_each_receiver_gets_the_bytes_of_its_shard() -> None:
    found = simulate(transfer(), parse_cluster("1x5:cpu"), costs=Sized(Mesh()))
    for rank in (2, 3, 4):
        op = found.program(rank).ops[0]
        rows, columns = local_shape(op.result.type, found.mesh(rank), found.coord(rank))
        got = sum(link.bytes for link in found.links(rank, op))
        assert got == rows * columns * DTYPES["f32"]


BUSY = """weft 1 schedule
mesh [] "cpu"

func @main(%x: f32[512, 512]{} {role = "input", name = "x"}) -> (f32[512, 512]{} {role = "output"}) {
  %0 = exp(%x) : f32[512, 512]{}
  return %0
}
"""


def test_each_stage_has_the_times_of_its_devices() -> None:
    stages = [parse_module(BUSY)] * 2
    mixed = simulate(stages, parse_cluster("1x1:h100+1x1:cpu"))
    alone = [simulate(stages[0], parse_cluster(f"1x1:{kind}")) for kind in ("h100", "cpu")]
    busy = [row.busy_us for row in (mixed.waiting[mixed.classes.index([r])] for r in (0, 1))]
    assert busy == pytest.approx([found.step_us for found in alone]) and busy[1] > 2 * busy[0]
    faster = mixed.what_if(device=True, factor=2)
    assert faster.step_us == pytest.approx(mixed.step_us / 2)


def test_stages_that_do_not_fit_are_told() -> None:
    with pytest.raises(CompileError, match=r"W0501.*stage 1 has the ranks 2 to 4"):
        simulate(transfer(), parse_cluster("1x3:cpu+1x2:cpu"))
    with pytest.raises(CompileError, match="W0501.*for 5 devices"):
        simulate(transfer(), parse_cluster("1x4:cpu"))
    sender, receiver = transfer()
    other = parse_module(RECEIVER.replace("a=2", "a=3").replace('"S(0)"', '"B"'))
    with pytest.raises(RunError, match="W0802.*another mesh"):
        simulate([sender, other], parse_cluster("1x5:cpu"))
    wrong = parse_module(RECEIVER.replace('placement = "S(0)"', 'placement = "B"'))
    with pytest.raises(RunError, match="W0802"):
        simulate([sender, wrong], parse_cluster("1x5:cpu"))
    plain = parse_module(SENDER.replace(', mesh = "b=3", placement = "S(1)"', ""))
    with pytest.raises(RunError, match="W0802.*another shape"):
        simulate([plain, receiver], parse_cluster("1x5:cpu"))
