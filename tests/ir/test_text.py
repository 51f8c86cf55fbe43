"""The text form: reading what was printed gives the same module."""

import math
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from tests.ir.strategies import programs, raw_modules

from weft.ir.module import Function, Location, Module, Op, Value
from weft.ir.parser import parse_module
from weft.ir.text import print_module
from weft.ir.types import B, Mesh, S, TensorType

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def round_trip(module: Module) -> None:
    text = print_module(module)
    again = parse_module(text)
    assert again == module
    assert print_module(again) == text


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(raw_modules())
def test_any_module_survives_the_round_trip(module: Module) -> None:
    round_trip(module)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(programs())
def test_programs_survive_the_round_trip(module: Module) -> None:
    round_trip(module)


def test_the_text_form_looks_like_this() -> None:
    text = """\
weft 1 placed
mesh [dp=2, tp=2] "cpu"
attrs {cluster = "2x2:cpu", versions = [1, 2.5, [true, "a\\nb"]]}

func @main(%w: f32[4, 4]{B, S(1)} {role = "param", name = "w"}, %x: f32[8, 4]{S(0), B}) -> (f32[8, 4]{S(0), S(1)} {role = "output"}) attrs {path = "model"} {
  %0 = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dp = b, tp = n] : f32[8, 4]{S(0), S(1)} @0
  %"a b", %i = sort(%0) {dim = 1} split [dp = partial(0)] : f32[8, 4]{S(0), S(1)}, i64[8, 4]
  free(%i) @1
  return %"a b"
}

func @empty() -> () {
  return
}

loc @0 = "model.layers.0.mlp" "net.py":212
loc @1 = "" "net.py":1
"""  # noqa: E501
    module = parse_module(text)
    assert print_module(module) == text
    assert module.entry.ops[0].loc == Location("model.layers.0.mlp", "net.py", 212)
    assert module.entry.ops[1].split == {"dp": "partial(0)"}
    assert module.mesh == Mesh((("dp", 2), ("tp", 2)), "cpu")


def test_comments_and_line_breaks_mean_nothing() -> None:
    module = parse_module("weft 1 logical // the header\r\nfunc @f\n( ) // x\n->()\t{return}//")
    assert module == Module("logical", (Function("f", (), (), ()),))


def test_a_module_without_functions_survives() -> None:
    round_trip(Module("logical", ()))


def test_no_placement_differs_from_an_empty_one() -> None:
    bare, placed = (Value("x", TensorType("f32", (), p)) for p in (None, ()))
    for value in (bare, placed):
        round_trip(Module("placed", (Function("f", (value,), (), (value,)),), Mesh()))
    assert print_module(Module("logical", (Function("f", (bare,), (), ()),))) != print_module(
        Module("logical", (Function("f", (placed,), (), ()),))
    )


def test_numbers_keep_their_kind_and_value() -> None:
    numbers = (1, 1.0, True, -0.0, 1e-45, 1.7976931348623157e308, math.inf, -math.inf, math.nan,
               -(2**63), 2**64 - 1)  # fmt: skip
    module = Module("logical", (), attrs={"n": numbers})
    (again,) = parse_module(print_module(module)).attrs.values()
    assert isinstance(again, tuple)
    assert [repr(value) for value in again] == [repr(value) for value in numbers]


def test_equal_types_are_shared_after_reading() -> None:
    text = "weft 1 logical func @f(%a: f32[3], %b: f32[3]) -> () {return}"
    first, second = parse_module(text).entry.params
    assert first.type is second.type


def large_module(count: int) -> Module:
    """`count` placed ops, each with two operands, attributes, a split and a location."""
    kind = TensorType("f32", (8, 4), (S(0), B))
    start, weight = Value("x", kind), Value("w", TensorType("f32", (4, 4), (B, B)))
    ops, last = [], start
    for index in range(count):
        result = Value(f"v{index}", kind)
        loc = Location(f"model.layers.{index % 80}.mlp.up_proj", "modeling_llama.py", index % 300)
        ops.append(Op("einsum", (last, weight), (result,), {"spec": "b k, k n -> b n"},
                      {"dp": "b"}, loc))  # fmt: skip
        last = result
    mesh = Mesh((("dp", 2), ("tp", 2)))
    return Module("placed", (Function("main", (start, weight), tuple(ops), (last,)),), mesh)


def test_a_long_program_is_read_back() -> None:
    module = large_module(5000)
    assert parse_module(print_module(module)) == module


def test_order_of_attributes_is_kept_and_does_not_matter_for_equality() -> None:
    one = Module("logical", (), attrs={"a": 1, "b": 2})
    other = replace(one, attrs={"b": 2, "a": 1})
    assert one == other
    assert print_module(one) != print_module(other)
    round_trip(other)
