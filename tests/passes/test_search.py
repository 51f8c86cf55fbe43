"""The outer search: what it finds, what it says where nothing is found, what its plans compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.passes.search_models import stack

from weft.costmodel.cluster import Cluster, parse_cluster
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes import search_program
from weft.passes.micro import time_split
from weft.passes.place import search_mesh
from weft.passes.price import price
from weft.passes.search import Wishes, layouts_of, search_plan
from weft.passes.search_carry import Source
from weft.passes.search_costs import unit_costs
from weft.passes.search_mixed import lines_of, places_of, shares_of
from weft.passes.search_realize import realize, simulated, structure
from weft.passes.search_short import shorten
from weft.passes.search_state import State
from weft.passes.search_units import units_of
from weft.passes.stages import cut
from weft.runtime.interpreter import evaluate
from weft.runtime.lockstep_stages import evaluate_stages, whole_name

FAST = parse_cluster("1x4:h100")
SLOW = replace(
    parse_cluster("4x1:a100"),
    inter=replace(parse_cluster("4x1:a100").inter, bytes_per_s=1e8, latency_s=1e-4),
)


def wide(rows: int = 64) -> Module:
    """Blocks of 4 million weights, no data."""
    return stack(6, 1024, rows, torch.float32, "meta")[0]


def test_units_cost_together_what_the_program_does() -> None:
    split = time_split(wide(), 2)
    units = units_of(split)
    stage = cut(split, [0] * len(split.phases))[0]
    mesh = Mesh((("dev", 4),), "h100")
    found = search_mesh(stage.module, mesh, FAST, phases=stage.phases, micro=2)
    assert found is not None and found.phases is not None
    ops = split.module.entry.ops
    unit_of = {op.results[0].name: u for op, u in zip(ops, units.stage_of, strict=True)}
    costs = unit_costs(found.placed, found.phases, unit_of, units.count, FAST)
    total = 2 * costs.loop_us.sum() + costs.update_us.sum()
    assert total == pytest.approx(found.price.total_us, rel=0.02)
    assert costs.persistent_bytes.sum() >= found.price.persistent_bytes * 0.99
    inner = costs.loop_us[2:-2]
    np.testing.assert_allclose(inner, inner[0], rtol=0.05)


def test_a_shortened_program_finds_the_plan_of_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stack(8, 1024, 64, torch.float32, "meta")[0]
    split = time_split(module, 1)
    short = shorten(split, units_of(split))
    assert short is not None and len(short.module.entry.ops) < len(module.entry.ops)
    wishes = Wishes(stages=2, micro=4)
    fast = search_plan(module, FAST, wishes=wishes, finalists=0)
    monkeypatch.setattr(search_program, "shorten", lambda *_: None)
    whole = search_plan(module, FAST, wishes=wishes, finalists=0)
    # placements of equal cost may differ at the ends of the chain
    assert fast.best.pipeline.step_us == pytest.approx(whole.best.pipeline.step_us, rel=0.03)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_written_down_costs_what_was_evaluated(recompute: bool) -> None:
    """Stages take the placement of the short program over, op by op."""
    cluster = parse_cluster("2x2:a100")
    wishes = Wishes(stages=2, micro=4, order="1f1b")
    layouts = [layout for layout in layouts_of(cluster, 2) if layout.stages == 2][:1]
    found = search_plan(
        wide(512), cluster, wishes=wishes, layouts=layouts, finalists=0
    ).best
    stages = tuple(replace(stage, recompute=recompute) for stage in found.pipeline.stages)
    programs = search_program.Programs(wide(512))
    program = programs.of(4)
    assert found.placement is not None
    choices = replace(found.placement.choices, phases=program.phases)
    source = Source.make(program, programs.short.of, choices, found.layout.mesh)
    split = time_split(programs.module, 4)
    written = realize(
        split, units_of(split), replace(found.pipeline, stages=stages), found.layout.cluster,
        source=source,
    )  # fmt: skip
    costs = State.read(programs, 4, found.layout, found.placement.choices)
    for number, (module, phases) in enumerate(zip(written.placed, written.phases, strict=True)):
        verify(module)
        cost = price(module, found.layout.cluster, phases, 4).phase_us
        mine = np.array(found.pipeline.unit_stage) == number
        forward, backward = costs.forward_us[mine].sum(), costs.backward_us[mine].sum()
        assert cost["forward"] == pytest.approx(forward, rel=0.02)
        assert cost["backward"] == pytest.approx(backward + recompute * forward, rel=0.05)


def test_equal_parts_have_equal_structures() -> None:
    """Names of blocks and parameters do not count; what is in front of the first block does."""
    split = time_split(wide(64), 2)
    units = units_of(split)
    pieces = cut(split, [unit // 2 for unit in units.stage_of])
    keys = [structure(piece) for piece in pieces]
    assert len(set(keys[1:-1])) == 1 and keys[0] != keys[1]
    assert len({structure(piece, named=True) for piece in pieces}) == len(pieces)


def test_slow_links_between_hosts_get_stages() -> None:
    """A step whose gradients take longer over the links than its compute is cut there."""
    result = search_plan(wide(512), SLOW)
    assert len(result.best.pipeline.stages) > 1
    losers = [found for found, _ in result.rejected if len(found.pipeline.stages) == 1]
    assert all(f.pipeline.step_us > result.best.pipeline.step_us for f in losers)


def test_inside_a_fast_host_one_stage_is_best() -> None:
    result = search_plan(wide(), FAST)
    assert len(result.best.pipeline.stages) == 1
    assert result.lower_bound_us <= result.best.pipeline.step_us
    assert all(why for _, why in result.rejected)


def test_the_search_is_deterministic() -> None:
    one, two = (search_plan(wide(), SLOW, wishes=Wishes(stages=4)) for _ in range(2))
    assert one.best.pipeline == two.best.pipeline
    assert [why for _, why in one.rejected] == [why for _, why in two.rejected]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order, chunks", [("1f1b", 1), ("gpipe", 1), ("interleaved", 2)])
def test_a_plan_computes_what_the_program_does(order: str, chunks: int, recompute: bool) -> None:
    module, tensors = stack()
    cluster = parse_cluster("1x4:cpu")
    result = search_plan(module, cluster, wishes=Wishes(2, 2 * chunks, order))
    found = result.best
    assert found.pipeline.order == order and found.pipeline.chunks >= chunks
    stages = tuple(replace(stage, recompute=recompute) for stage in found.pipeline.stages)
    pipeline = replace(found.pipeline, stages=stages)
    modules = realize(result.split, result.units, pipeline, found.layout.cluster).schedules
    entry = module.entry
    names = {v.name: whole_name(a) for v, a in zip(entry.params, entry.param_attrs, strict=True)}
    given = {names[v.name]: t for v, t in zip(entry.params, tensors, strict=True)}
    results, updates = evaluate_stages(modules, given)
    for number, (attrs, tensor) in enumerate(
        zip(entry.result_attrs, evaluate(module, tensors), strict=True)
    ):
        got = updates[names[str(attrs["updates"])]] if "updates" in attrs else results[number]
        torch.testing.assert_close(got, tensor, rtol=1e-8, atol=1e-9)


def test_the_event_simulator_agrees() -> None:
    """The whole schedules of all ranks, fused, against the stages' sums of op times."""
    cluster = parse_cluster("4x1:a100")
    result = search_plan(wide(512), cluster, wishes=Wishes(stages=4, order="1f1b"))
    found = result.best
    step = simulated(result.split, result.units, found.pipeline, found.layout.cluster, cluster)
    assert step.step_us == pytest.approx(found.pipeline.step_us, rel=0.3)


# -- what cannot be met -----------------------------------------------------------------------------


def small(cluster: Cluster, memory_bytes: float) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))


def test_where_nothing_fits_it_says_by_how_much_and_what_would_help() -> None:
    with pytest.raises(CompileError) as error:
        search_plan(wide(), small(parse_cluster("2x1:a100"), 4e6), wishes=Wishes(stages=2, micro=2))
    text = str(error.value)
    assert error.value.code == "W0402" and "GB more than" in text and "a100" in text
    assert "devices of" in text


def test_memory_that_is_short_is_met_by_another_plan() -> None:
    """Less than the fastest plan takes: another one is found, and fits."""
    line = parse_cluster("2x1:h100")
    free = search_plan(wide(4096), line, wishes=Wishes(stages=2, micro=8, order="gpipe"))
    need = max(stage.peak_bytes for stage in free.best.pipeline.stages)
    tight = search_plan(wide(4096), small(line, 0.8 * need), wishes=Wishes(stages=2, micro=8))
    assert tight.best.pipeline.fits
    again = any(stage.recompute for stage in tight.best.pipeline.stages)
    assert again or tight.best.pipeline.order != "gpipe"


def test_a_budget_without_a_plan_is_an_error() -> None:
    with pytest.raises(CompileError, match="ran out before a first plan"):
        search_plan(wide(), FAST, budget_s=1e-9)


@pytest.mark.parametrize("wishes", [Wishes(stages=3), Wishes(micro=1000)])
def test_wishes_that_cannot_be_met(wishes: Wishes) -> None:
    with pytest.raises(CompileError) as error:
        search_plan(wide(), FAST, wishes=wishes)
    assert error.value.code == "W0404"


@pytest.mark.parametrize("text", ["1x1:h100", "1x7:h100"])
def test_one_device_and_prime_numbers_of_devices(text: str) -> None:
    result = search_plan(wide(), parse_cluster(text))
    assert sum(stage.mesh.size for stage in result.best.pipeline.stages) == result.best.layout.ranks * len(
        result.best.pipeline.stages
    )


# -- several kinds of devices -----------------------------------------------------------------------


def test_fast_devices_get_more_of_the_program_than_slow_ones() -> None:
    mixed = parse_cluster("1x2:h100+1x2:v100")
    result = search_plan(wide(4096), mixed)
    stages = result.best.pipeline.stages
    assert {stage.kind for stage in stages} == {"h100", "v100"}
    share = {kind: sum(len(s.units) for s in stages if s.kind == kind) for kind in ("h100", "v100")}
    assert share["h100"] > share["v100"]
    assert result.lower_bound_us <= result.best.pipeline.step_us
    slow = parse_cluster("1x4:v100")
    assert result.best.pipeline.step_us < search_plan(wide(4096), slow).best.pipeline.step_us


def test_a_mixed_cluster_is_covered_by_its_blocks() -> None:
    cluster = parse_cluster("2x4:h100+1x8:a100")
    for line in lines_of(cluster):
        for share in shares_of(cluster):
            group = cluster.groups[share.group]
            places = places_of(cluster, line, share)
            assert len(places) * share.own.ranks == group.ranks
    assert {str(share.own) for share in shares_of(cluster)} == {
        "1x2:h100", "1x4:h100", "2x4:h100", "1x4:a100", "1x8:a100"
    }  # fmt: skip
