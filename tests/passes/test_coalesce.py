"""Joined reductions compute what they computed apart, and only what may wait is joined."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.equality import assert_close, lowered
from tests.passes.programs import random_program

from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes.coalesce import STARTUPS, Coalesce, bucket_bytes
from weft.passes.random_place import random_choices
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

    assert abs(bucket_bytes(cost, 2, "dp") - STARTUPS * 10 * 1000) < 100
