"""Descriptions count what a step really does."""

from __future__ import annotations

from weft.frontend.describe import collectives, executions, human_bytes, human_time, memory_by_role
from weft.ir.parser import parse_module

SPMD = """weft 1 spmd
mesh [dp=4] "cpu"

func @main(%x: f32[8, 4]{S(0)} {role = "input", name = "x"}, %w: f32[8, 4]{B} {role = "param", name = "w"}) -> (f32[]{B} {role = "loss"}) {
  %0 = call(%x) {callee = "twice"} : f32[]{B}
  %1 = call(%x) {callee = "twice"} : f32[]{B}
  %2 = add(%0, %1) : f32[]{B}
  return %2
}

func @twice(%x: f32[8, 4]{S(0)}) -> (f32[]{B}) {
  %0 = reduce_sum(%x) {dims = [0, 1]} split [dp = a0] : f32[]{P(sum)}
  %1 = all_reduce(%0) {axis = "dp"} : f32[]{B}
  return %1
}
"""


def test_calls_multiply() -> None:
    module = parse_module(SPMD)
    assert executions(module) == {"main": 1, "twice": 2}
    (row,) = collectives(module)
    assert (row.name, row.axis, row.count, row.bytes) == ("all_reduce", "dp", 2, 8)


def test_memory_is_that_of_one_rank() -> None:
    assert memory_by_role(parse_module(SPMD)) == {"input": 8 * 4, "param": 8 * 4 * 4}


def test_numbers_for_people() -> None:
    assert human_bytes(1536) == "1.5 KiB" and human_bytes(12) == "12 B"
    assert human_time(1500) == "1.50 ms" and human_time(2.5) == "2.5 us"
