"""The builder: fresh names, inferred types, finished functions."""

import pytest

from weft.ir.builder import Builder, infer_types
from weft.ir.module import Location, Module, Namer, Op, Value
from weft.ir.types import TensorType
from weft.ir.verify import verify

F32 = TensorType("f32", (8, 4))


def test_a_function_is_built_op_by_op() -> None:
    b = Builder()
    x = b.param(F32, "x", role="input")
    w = b.param(TensorType("f32", (4, 6)), "w", role="param", name="fc.weight")
    loc = Location("fc", "net.py", 3)
    y = b.one("einsum", [x, w], {"spec": "b k, k n -> b n"}, loc=loc)
    values, index = b.op("sort", [y], {"dim": 1}, hint="sorted")
    total = b.op("reduce_sum", [values], {"dims": (0, 1)})
    half = b.constant(0.5, total.type)
    loss = b.op("mul", [total, half], hint="loss")
    function = b.function("main", [loss], [{"role": "loss"}], {"path": "net"})
    verify(Module("logical", (function,)))
    assert y.type == TensorType("f32", (8, 6))
    assert index.type == TensorType("i64", (8, 6))
    assert [value.name for value in (x, w, values, index, loss)] == [
        "x", "w", "sorted", "sorted_0", "loss"]  # fmt: skip
    assert function.param_attrs[1] == {"role": "param", "name": "fc.weight"}
    assert function.result_attrs == ({"role": "loss"},)
    assert function.ops[0].loc == loc
    assert len({value.name for op in function.ops for value in op.results}) == 6


def test_names_in_use_are_not_handed_out_again() -> None:
    b = Builder(Namer(("x", "x_0")))
    assert b.param(F32, "x").name == "x_1"


def test_types_are_given_where_the_table_has_no_rule() -> None:
    b = Builder()
    x = b.param(F32)
    with pytest.raises(ValueError, match="reshape: the result types have to be given"):
        b.one("reshape", [x])
    assert b.one("reshape", [x], types=[TensorType("f32", (32,))]).type.shape == (32,)


def test_defaults_of_attributes_count_for_the_types() -> None:
    assert infer_types("reduce_sum", [F32], {"dims": (0,)}) == (TensorType("f32", (4,)),)
    assert infer_types("slice", [F32], {"dim": 0, "stop": 3}) == (TensorType("f32", (3, 4)),)


def test_an_existing_op_can_be_appended() -> None:
    b = Builder(Namer(("y",)))
    op = Op("neg", (b.param(F32, "x"),), (Value("y", F32),))
    assert b.append(op) == (Value("y", F32),)
    assert b.function("f", b.append(op)[:0]).ops == (op, op)


def test_an_unknown_op_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Builder().one("nge", [])
