"""`verify` tells programs apart by their numbers."""

from __future__ import annotations

import pytest
import torch

from weft.frontend.verify import difference, verify_dumps, widen
from weft.ir.module import Module
from weft.ir.parser import parse_module

TEXT = """weft 1 logical

func @main(%x: f32[4, 8] {role = "input", name = "x"}, %w: f32[8, 8] {role = "param", name = "w"}) -> (f32[4, 8] {role = "output"}) {
  %0 = einsum(%x, %w) {spec = "b k, k n -> b n"} : f32[4, 8]
  %1 = tanh(%0) : f32[4, 8]
  return %1
}
"""


def module(text: str = TEXT) -> Module:
    return parse_module(text)


def test_equal_programs_agree_and_the_first_is_the_reference() -> None:
    first, second = verify_dumps([("00-a", module()), ("01-b", module())], {})
    assert first.against == "" and second.against == "00-a"
    assert second.holds and second.error == 0.0


@pytest.mark.parametrize(("old", "new"), [("tanh", "sin"), ("b k, k n", "b k, n k")])
def test_another_program_is_told(old: str, new: str) -> None:
    _, other = verify_dumps([("00-a", module()), ("01-b", module(TEXT.replace(old, new)))], {})
    assert not other.holds and other.error > 1e-4


def test_programs_with_another_interface_are_not_compared() -> None:
    renamed = TEXT.replace('name = "w"', 'name = "v"')
    assert [c.against for c in verify_dumps([("a", module()), ("b", module(renamed))], {})] == ["", ""]


def test_widening_changes_floats_only() -> None:
    wide = widen(parse_module(TEXT.replace("%x: f32", "%x: i64").replace("einsum(%x, %w)", "aten(%x, %w)")
                              .replace('{spec = "b k, k n -> b n"}', '{target = "t", args = "[]"}')))  # fmt: skip
    assert [value.type.dtype for value in wide.entry.params] == ["i64", "f64"]
    assert wide.entry.results[0].type.dtype == "f64"


def test_a_difference_is_relative_to_the_largest_value_and_sees_nan() -> None:
    a, b = torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0])
    assert difference([a], [b]) == pytest.approx(0.01)
    assert difference([a], [torch.tensor([100.0, float("nan")])]) == float("inf")
    assert difference([a], [a[:1]]) == float("inf")
    inf = torch.tensor([float("inf"), 1.0])
    assert difference([inf], [inf]) == 0.0
