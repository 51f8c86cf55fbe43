"""Ops that write into an operand that ends with them."""

from __future__ import annotations

import pytest
import torch
from tests.runtime.examples import EXAMPLES

from weft.ir.module import Function, Op, Value
from weft.ir.ops import OPS
from weft.ir.types import TensorType
from weft.runtime.context import OpContext
from weft.runtime.reuse import into_operand, reusable

WRITTEN = [
    (name, place)
    for name in EXAMPLES
    for place in range(3)
    if into_operand(EXAMPLES[name][0].op, place) is not None
]


@pytest.mark.parametrize(("name", "place"), WRITTEN)
def test_writing_into_an_operand_gives_the_same_bits(name: str, place: int) -> None:
    tried = 0
    for case in EXAMPLES[name]:
        values = [tensor.clone() for tensor in case.values()]
        if case.op.operands[place].type != case.op.result.type:
            continue
        want = OPS[name].ref(OpContext(case.op), *values)
        call = into_operand(case.op, place)
        assert call is not None
        got = call(*values)
        assert got.data_ptr() == values[place].data_ptr()
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
        tried += 1
    assert tried


def value(name: str, size: int = 4) -> Value:
    return Value(name, TensorType("f32", (size,), ()))


def op(name: str, operands: str, result: str, size: int = 4) -> Op:
    return Op(name, tuple(value(o) for o in operands.split()), (value(result, size),))


def found(*ops: Op, results: str = "z", kept: tuple[str, ...] = ()) -> dict[int, int]:
    entry = Function("main", (value("p"),), ops, tuple(value(r) for r in results.split()))
    return reusable(entry, kept)


def test_the_last_reader_takes_the_memory_of_a_value_of_the_step() -> None:
    assert found(op("exp", "p", "x"), op("mul", "x p", "z")) == {1: 0}
    assert found(op("exp", "p", "x"), op("mul", "p x", "z")) == {1: 1}


def test_memory_that_somebody_else_sees_is_not_taken() -> None:
    make = op("exp", "p", "x")
    assert found(op("neg", "p", "z")) == {}, "a parameter"
    assert found(make, op("neg", "x", "z"), results="x z") == {}, "a result"
    assert found(make, op("neg", "x", "z"), kept=("x",)) == {}, "a hoisted constant"
    assert found(make, op("neg", "x", "y"), op("add", "x y", "z")) == {2: 0}, "read later"
    assert found(make, op("mul", "x x", "z")) == {}, "read twice at once"
    view = op("reshape", "x", "v")
    assert found(make, view, op("neg", "x", "y"), op("add", "v y", "z")) == {3: 1}, "has a view"
    assert found(op("iota", "", "x"), op("neg", "x", "z")) == {}, "elements that share memory"


def test_another_type_needs_memory_of_its_own() -> None:
    assert found(op("exp", "p", "x"), op("mul", "x p", "z", size=8)) == {}
