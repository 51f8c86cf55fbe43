"""Explanations: placements, prices of alternatives, what axes do, who owns memory."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
from tests.frontend.targets import net

import weft
from weft.costmodel.cluster import parse_cluster
from weft.frontend.axes import axis_words
from weft.frontend.describe import collectives, memory_by_owner
from weft.frontend.explain import Explanation
from weft.frontend.options import OPTIONS
from weft.frontend.plan import Plan
from weft.ir.parser import parse_module
from weft.passes.apply import apply
from weft.passes.inline import inline
from weft.passes.price import price
from weft.passes.random_place import parse_mesh, random_choices

RANDOM = "simplify,outline,differentiate,simplify,random-place[mesh=2x2 seed=3],lower,fuse,schedule"

EINSUM = """weft 1 placed
mesh [a=2] "cpu"

func @main(%x: f32[8, 4]{PX} {role = "input", name = "x"}, %w: f32[4, 6]{PW} {role = "param", name = "w"}) -> (f32[8, 6]{B} {role = "output"}) {
  %y = einsum(%x, %w) {spec = "b k, k n -> b n"} split [a = DIM] : f32[8, 6]{PY}
  %z = reshard(%y) : f32[8, 6]{B}
  return %z
}
"""


@cache
def searched() -> Plan:
    """The blocks, trained on 2 x 2 ranks, placed by search."""
    model, (x,), _ = net()
    plan: Plan = weft.plan(model, (x,), cluster="2x2:cpu", optimizer="adamw", mesh="2x2")
    return plan


@cache
def scattered() -> Plan:
    """The same, placed at random: with collectives of all kinds."""
    model, (x,), _ = net()
    options = OPTIONS.with_({"pipeline": RANDOM})
    plan: Plan = weft.plan(model, (x,), cluster="2x2:cpu", optimizer="adamw", options=options)
    return plan


def test_no_alternative_beats_a_searched_choice_with_its_neighbours_fixed() -> None:
    plan = searched()
    explanation = Explanation(plan.module("placed"), plan.cluster)
    for number, op in explanation.matching(""):
        choice = explanation.op(number)
        if choice.runner_up is not None:
            assert choice.runner_up.total_us >= choice.chosen.total_us * (1 - 1e-9), op


def test_costs_of_the_ops_add_up_to_the_price_of_the_plan() -> None:
    plan = scattered()
    placed = inline(plan.module("placed"))
    explanation = Explanation(placed, plan.cluster)
    work_us = sum(explanation.op(n).chosen.work_us for n, _ in explanation.matching(""))
    assert work_us == pytest.approx(price(placed, plan.cluster).compute_us)


def test_a_runner_up_costs_what_the_plan_with_it_costs() -> None:
    """The difference in price from an explanation is that of pricing the changed program."""
    cluster = parse_cluster("1x2:cpu")
    logical = parse_module(
        "weft 1 logical\n\nfunc @main(%x: f32[8, 4] {role = \"input\", name = \"x\"}) -> (f32[8, 4] "
        "{role = \"output\"}) {\n  %y = exp(%x) : f32[8, 4]\n  %z = neg(%y) : f32[8, 4]\n  return %z\n}\n"
    )  # fmt: skip
    mesh = parse_mesh("2")
    seen = 0
    for seed in range(12):
        choices = random_choices(logical, mesh, Random(seed))
        placed = apply(logical, mesh, choices)
        explanation = Explanation(placed, cluster)
        (number, _), *_ = explanation.matching("exp")
        best = explanation.op(number).runner_up
        assert best is not None
        chosen = choices.functions["main"]
        split = best.text.partition("=")[2]
        other = type(chosen)(((split,), *chosen.splits[1:]), chosen.params, chosen.results)
        changed = price(apply(logical, mesh, type(choices)({"main": other})), cluster)
        difference = changed.total_us - price(placed, cluster).total_us
        got = best.total_us - explanation.op(number).chosen.total_us
        assert got == pytest.approx(difference, abs=1e-6)
        seen += 1
    assert seen == 12


def test_a_path_is_explained_with_placement_cost_runner_up_and_collectives() -> None:
    text = scattered().explain("blocks.2")
    for word in ("param blocks.2.weight", "held", "runner-up", "split", "cost", "einsum", "targets.py"):
        assert word in text, word
    assert "collectives of blocks.2" in text
    with pytest.raises(weft.CompileError, match="W1001"):
        scattered().explain("no.such.path")


def test_the_whole_plan_names_collectives_memory_and_replicated_work() -> None:
    text = scattered().explain()
    for word in ("collectives on", "replicated", "memory at the peak", "gradients", "state"):
        assert word in text, word


def test_repeated_blocks_share_a_row_of_the_collectives() -> None:
    rows = collectives(scattered().module("spmd"))
    assert len({(r.name, r.axis, r.tensor, r.carries, r.where) for r in rows}) == len(rows)
    assert any("blocks.*" in row.carries and row.count > 1 for row in rows)


def test_memory_at_the_peak_adds_up() -> None:
    timeline = scattered().timeline
    assert sum(size for _, _, size in timeline.at_peak) == timeline.peak_bytes
    assert max(size for _, size in timeline.memory) == timeline.peak_bytes
    owners = memory_by_owner(timeline.at_peak)
    assert sum(size for _, _, size in owners) == timeline.peak_bytes
    assert {"param", "state", "input", "gradients"} <= {kind for kind, _, _ in owners}


@pytest.mark.parametrize(
    ("dim", "x", "w", "y", "words"),
    [
        ("b", "S(0)", "B", "S(0)", "data parallel: the batch is split in 100%"),
        ("n", "B", "S(1)", "S(1)", "tensor parallel: weights or heads are split in 100%"),
        ("k", "S(1)", "S(0)", "P(sum)", "each rank holds its part of 100% of the parameters"),
    ],
)
def test_axes_are_named_by_what_they_split(dim: str, x: str, w: str, y: str, words: str) -> None:
    text = EINSUM.replace("PX", x).replace("PW", w).replace("PY", y).replace("DIM", dim)
    assert words in axis_words(parse_module(text), "a")


UPDATE = """weft 1 placed
mesh [a=2] "cpu"

func @main(%x: f32[8, 4]{S(0)} {role = "input", name = "x"}, %w: f32[4, 4]{B} {role = "param", name = "w"}, %m: f32[4, 4]{S(0)} {role = "state", name = "m"}, %lr: f64[]{B} {role = "lr"}) -> (f32[4, 4]{B} {role = "update", updates = "w"}) {
  %g = einsum(%x, %x) {spec = "b k, b n -> k n"} split [a = b] : f32[4, 4]{P(sum)}
  %s = reshard(%g) : f32[4, 4]{S(0)}
  %v = reshard(%w) : f32[4, 4]{S(0)}
  %u, %n = momentum_update(%v, %s, %m, %lr) split [a = a0] : f32[4, 4]{S(0)}, f32[4, 4]{S(0)}
  %r = reshard(%u) : f32[4, 4]{B}
  return %r
}
"""


def test_sharded_states_of_a_data_parallel_axis_are_a_zero_stage() -> None:
    assert axis_words(parse_module(UPDATE), "a").endswith("100% of the optimizer states are sharded (ZeRO-2)")
    earlier = UPDATE.replace("%s = reshard(%g) : f32[4, 4]{S(0)}", "%h = reshard(%g) : f32[4, 4]{B}\n"
                             "  %s = reshard(%h) : f32[4, 4]{S(0)}")  # fmt: skip
    assert axis_words(parse_module(earlier), "a").endswith("(ZeRO-1)")
    param = UPDATE.replace("%w: f32[4, 4]{B}", "%w: f32[4, 4]{S(0)}")
    assert axis_words(parse_module(param), "a").endswith("(ZeRO-3)")


def test_a_collective_says_which_gradient_it_carries() -> None:
    spmd = UPDATE.replace("placed", "spmd").replace("%s = reshard(%g)", '%s = reduce_scatter(%g) {axis = "a", dim = 0}')
    rows = collectives(parse_module(spmd))
    assert [(row.name, row.carries) for row in rows] == [("reduce_scatter", "gradient of w")]
