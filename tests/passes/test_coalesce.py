"""Joined reductions compute what they computed apart, and only what may wait is joined."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.equality import assert_close, lowered, random_cost
from tests.passes.programs import random_program
from torch import Generator

from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.ir.opdef import OPS
from weft.ir.parser import parse_module
from weft.ir.types import B, Mesh, P, Placement, S, TensorType, illegal_placement
from weft.ir.verify import verify
from weft.passes.coalesce import Coalesce
from weft.passes.joined import STARTUPS, bucket_bytes
from weft.passes.lower import lower
from weft.passes.random_place import random_choices
from weft.passes.reshard import legal_placements
from weft.passes.schedule import Schedule
from weft.runtime.interpreter import evaluate
from weft.runtime.schedule_check import check

MESHES = (Mesh((("x", 2),)), Mesh((("x", 2), ("y", 2))), Mesh((("x", 3), ("y", 2))))
HEAD = """weft 1 spmd
mesh [dp=2] "cpu"

func @main(%x: f32[6, 8]{S(0)} {role = "input"}) -> (f32[8]{B}, f32[8]{B}) {
  %a = reduce_sum(%x) {dims = [0]} split [dp = a0] : f32[8]{P(sum)}
"""


def reductions(module: Module) -> int:
    """all_reduces of the entry."""
    return Counter(op.name for op in module.entry.ops)["all_reduce"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MESHES))
def test_joined_reductions_mean_what_they_mean_apart(seed: int, mesh: Mesh) -> None:
    program = random_program(seed)
    spmd = lowered(program.module, mesh, random_choices(program.module, mesh, Random(seed)))
    after = Coalesce().run(spmd)
    verify(after)
    check(Schedule().run(after))
    assert reductions(after) <= reductions(spmd)
    assert_close(evaluate(spmd, program.inputs), evaluate(after, program.inputs))


def resharded(seed: int, mesh: Mesh) -> Module:
    """A placed module that moves some small tensors from a placement to another, and nothing else."""
    rng = Random(seed)
    many = legal_placements(TensorType("f64", (12, 12)), mesh)
    ways = [(rng.choice(many), rng.choice(many)) for _ in range(rng.randint(1, 2))]
    builder, results = Builder(), []
    for number in range(rng.randint(2, 6)):
        shape = rng.choice([(12, 12), (12, 24), (24, 12), (36, 12), (12, 12, 5), (12, 12, 1), (13, 12)])
        source, target = rng.choice(ways)
        type = TensorType("f64", shape)
        if any(illegal_placement(type, mesh, placement) for placement in (source, target)):
            continue
        value = builder.param(type.placed(source), f"p{number}", role="param", name=f"p{number}")
        results += builder.many("reshard", [value], types=[type.placed(target)])
    roles = [{"role": "output"}] * len(results)
    return Module("placed", (builder.function("main", results, roles),), mesh)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MESHES))
def test_tensors_of_any_shape_and_placement_are_joined_and_parted(seed: int, mesh: Mesh) -> None:
    apart = lower(resharded(seed, mesh), random_cost(Random(seed)))
    after = Coalesce().run(apart)
    verify(after)
    inputs = [torch.randn(v.type.shape, dtype=torch.float64) for v in apart.entry.params]
    noise = Generator().manual_seed(seed)
    assert_close(inputs, evaluate(after, inputs, noise=noise))


@pytest.mark.parametrize(("name", "source", "target"), [
    ("all_reduce", (P(), B), (B, B)), ("all_reduce", (S(0), P()), (S(0), B)),
    ("reduce_scatter", (P(), B), (S(0), B)), ("reduce_scatter", (P(), B), (S(1), B)),
    ("reduce_scatter", (S(1), P()), (S(1), S(0))), ("reduce_scatter", (S(0), P()), (S(0), S(0))),
    ("all_gather", (S(1), B), (B, B)), ("all_gather", (S(0), S(0)), (S(0), B)),
])  # fmt: skip
def test_each_collective_of_small_tensors_happens_once(
    name: str, source: tuple[Placement, Placement], target: tuple[Placement, Placement]
) -> None:
    mesh, builder = Mesh((("x", 3), ("y", 2))), Builder()
    results: list[Value] = []
    for number, shape in enumerate([(6, 12), (12, 6), (6, 6, 5)]):
        type = TensorType("f64", shape)
        value = builder.param(type.placed(source), role="input", name=f"p{number}")
        results += builder.many("reshard", [value], types=[type.placed(target)])
    entry = builder.function("main", results, [{"role": "output"}] * 3)
    apart = lower(Module("placed", (entry,), mesh))
    after = Coalesce().run(apart)
    verify(after)
    assert [op.name for op in apart.entry.ops] == [name] * 3
    assert [op.name for op in after.entry.ops if OPS[op.name].family == "collective"] == [name]


def test_uneven_shards_are_gathered_one_by_one() -> None:
    mesh, builder = Mesh((("x", 2),)), Builder()
    type = TensorType("f64", (3, 4))
    results: list[Value] = []
    for name in "ab":
        value = builder.param(type.placed((S(0),)), name, role="param", name=name)
        results += builder.many("reshard", [value], types=[type.placed((B,))])
    entry = builder.function("main", results, [{"role": "output"}] * 2)
    apart = lower(Module("placed", (entry,), mesh))
    assert Coalesce().run(apart) == apart


def test_a_result_that_is_read_before_the_other_is_made_is_not_joined() -> None:
    apart = parse_module(HEAD + """  %r = all_reduce(%a) {axis = "dp"} : f32[8]{B}
  %y = mul(%x, %r) split [dp = a0] : f32[6, 8]{S(0)}
  %b = reduce_sum(%y) {dims = [0]} split [dp = a0] : f32[8]{P(sum)}
  %s = all_reduce(%b) {axis = "dp"} : f32[8]{B}
  return %r, %s
}
""")
    verify(apart)
    assert Coalesce().run(apart) == apart


def test_sums_and_largest_elements_are_not_joined() -> None:
    apart = parse_module(HEAD + """  %b = reduce_max(%x) {dims = [0]} split [dp = a0] : f32[8]{P(max)}
  %r = all_reduce(%a) {axis = "dp"} : f32[8]{B}
  %s = all_reduce(%b) {axis = "dp", combine = "max"} : f32[8]{B}
  return %r, %s
}
""")
    verify(apart)
    assert reductions(Coalesce().run(apart)) == 2


def test_a_bucket_lasts_some_startups() -> None:
    def cost(name: str, size: float, ranks: int, axis: str) -> float:
        return 10.0 + size / 1000

    assert abs(bucket_bytes(cost, "all_reduce", 2, "dp") - STARTUPS["all_reduce"] * 10 * 1000) < 100
