"""Every op that kernels can hold, alone, against its reference. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.codegen.kit import check_close, load, program, reference, samples
from tests.codegen.programs import tensor

from weft.codegen.pointwise import POINTWISE
from weft.codegen.source import generate
from weft.ir.builder import Builder
from weft.ir.module import Function, Value
from weft.ir.opdef import OPS
from weft.passes.regions import BOOLEAN, EXPONENTS, INTEGER

#: ops whose operand has to be positive
POSITIVE = frozenset({"log", "sqrt", "rsqrt", "log1p"})
SHAPE = (3, 50)


def alone(name: str, dtype: str, attrs: dict[str, str] | None = None) -> Function:
    """A kernel function that holds one op."""

    def make(b: Builder) -> list[Value]:
        signature = OPS[name].signature
        assert isinstance(signature, str)
        count = signature.split("->")[0].count("a...")
        kinds = ["bool" if name == "where" and not i else dtype for i in range(count)]
        xs = [b.param(tensor(kind, *SHAPE), f"x{i}") for i, kind in enumerate(kinds)]
        return [b.one(name, xs, attrs or {})]

    function = program(make).entry
    return function.with_(attrs={"kernel": f"{name}_{dtype}"})


def run(function: Function, folder: Path, scale: float = 1.0) -> None:
    inputs = [x * scale if x.is_floating_point() else x for x in samples(function)]
    if function.ops[0].name in POSITIVE:
        inputs = [x.abs() + 1e-3 for x in inputs]
    results = load(generate(function), folder).launch(*inputs)
    for got, wanted, value in zip(
        results, reference(function, inputs), function.results, strict=True
    ):
        check_close(got, wanted, value.type)


FLOAT_OPS = sorted(POINTWISE.keys() - {"pow", "logical_and", "logical_or", "logical_not",
                                       "bitwise_xor", "floor_divide", "remainder"})  # fmt: skip


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", FLOAT_OPS)
def test_a_float_op_equals_its_reference(name: str, dtype: str, tmp_path: Path) -> None:
    run(alone(name, dtype), tmp_path)


@pytest.mark.parametrize("name", ["tanh", "expm1", "log1p", "softplus", "gelu", "silu"])
def test_small_arguments_lose_no_precision(name: str, tmp_path: Path) -> None:
    """Results near zero are right relative to themselves, on all sides of every threshold."""
    function = alone(name, "f32")
    x = torch.logspace(-6, 0.5, 150).reshape(SHAPE)
    x = torch.where(torch.arange(150).reshape(SHAPE) % 2 == 0, x, -x)
    x = x.clamp(min=-0.99) if name == "log1p" else x
    (got,) = load(generate(function), tmp_path).launch(x)
    (wanted,) = reference(function, [x])
    assert ((got - wanted) / wanted).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [30.0, 1e4])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "softplus", "gelu", "gelu_backward",
                                  "silu_backward"])  # fmt: skip
def test_large_arguments_do_not_overflow(name: str, scale: float, tmp_path: Path) -> None:
    run(alone(name, "f32"), tmp_path, scale)


@pytest.mark.parametrize("name", ["gelu", "gelu_backward"])
def test_the_tanh_form_of_gelu(name: str, tmp_path: Path) -> None:
    run(alone(name, "f32", {"approximate": "tanh"}), tmp_path)


@pytest.mark.parametrize("dtype", ["i64", "i32", "i8"])
@pytest.mark.parametrize("name", sorted(INTEGER - {"cast", "logical_and", "logical_or",
                                                   "logical_not", "where"}))  # fmt: skip
def test_an_integer_op_equals_torch(name: str, dtype: str, tmp_path: Path) -> None:
    """Operands of both signs; the quotient of integers is rounded down, not towards zero."""
    function = alone(name, dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randint(-9, 9, SHAPE, generator=generator).to(torch.int64) for _ in function.params
    ]
    if name in ("floor_divide", "remainder"):
        inputs[1] = torch.where(inputs[1] == 0, 5, inputs[1])
    inputs = [x.to({"i64": torch.int64, "i32": torch.int32, "i8": torch.int8}[dtype])
              for x in inputs]  # fmt: skip
    results = load(generate(function), tmp_path).launch(*inputs)
    for got, wanted in zip(results, reference(function, inputs), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", sorted(BOOLEAN - {"cast", "where", "isfinite", "lt", "le", "gt",
                                                   "ge"}))  # fmt: skip
def test_a_bool_op_equals_torch(name: str, tmp_path: Path) -> None:
    run(alone(name, "bool"), tmp_path)


@pytest.mark.parametrize("target", ["f64", "f32", "bf16", "f16", "i64", "i32", "bool"])
@pytest.mark.parametrize("source", ["f64", "f32", "bf16", "i64", "bool"])
def test_a_cast_equals_torch(source: str, target: str, tmp_path: Path) -> None:
    def make(b: Builder) -> list[Value]:
        return [
            b.one("cast", [b.param(tensor(source, *SHAPE), "x")], types=[tensor(target, *SHAPE)])
        ]

    function = program(make).entry.with_(attrs={"kernel": f"cast_{source}_{target}"})
    run(function, tmp_path, 3.0)


def test_a_cast_to_fp8_rounds_where_it_stands(tmp_path: Path) -> None:
    """Quantize and dequantize in one kernel: the error of fp8 stays in the result."""

    def make(b: Builder) -> list[Value]:
        x = b.param(tensor("f32", *SHAPE), "x")
        narrow = b.one("cast", [x], types=[tensor("f8e4m3", *SHAPE)])
        return [b.one("cast", [narrow], types=[tensor("f32", *SHAPE)]), narrow]

    function = program(make).entry.with_(attrs={"kernel": "quantize"})
    (x,) = samples(function)
    wide, narrow = load(generate(function), tmp_path).launch(x)
    assert torch.equal(wide, x.to(torch.float8_e4m3fn).float())
    assert torch.equal(narrow.float(), wide)


@pytest.mark.parametrize("exponent", sorted(EXPONENTS))
def test_a_power_equals_torch(exponent: float, tmp_path: Path) -> None:
    def make(b: Builder) -> list[Value]:
        x = b.one("abs", [b.param(tensor("f32", *SHAPE), "x")])
        return [b.one("pow", [x, b.constant(exponent, tensor("f32"))])]

    run(program(make).entry.with_(attrs={"kernel": "power"}), tmp_path)


@pytest.mark.parametrize("name", ["reduce_sum", "reduce_max", "reduce_min"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64"])
def test_a_reduction_equals_torch(name: str, dtype: str, tmp_path: Path) -> None:
    def make(b: Builder) -> list[Value]:
        x = b.param(tensor(dtype, *SHAPE), "x")
        return [b.one(name, [x], {"dims": (1,)})]

    run(program(make).entry.with_(attrs={"kernel": name}), tmp_path)


def test_not_a_number_passes_through_maxima_and_relu(tmp_path: Path) -> None:
    def make(b: Builder) -> list[Value]:
        x, y = b.param(tensor("f32", *SHAPE), "x"), b.param(tensor("f32", *SHAPE), "y")
        highest = b.one("reduce_max", [x], {"dims": (1,), "keepdim": True})
        return [highest, b.one("maximum", [x, y]), b.one("minimum", [x, y]), b.one("relu", [x])]

    function = program(make).entry.with_(attrs={"kernel": "missing"})
    x, y = samples(function)
    x[0, 3], y[1, 7] = float("nan"), float("nan")
    results = load(generate(function), tmp_path).launch(x, y)
    for got, wanted, value in zip(
        results, reference(function, [x, y]), function.results, strict=True
    ):
        check_close(got, wanted, value.type)


def test_rows_of_minus_infinity_have_torchs_logsumexp(tmp_path: Path) -> None:
    def make(b: Builder) -> list[Value]:
        return [b.one("logsumexp", [b.param(tensor("f32", *SHAPE), "x")])]

    function = program(make).entry.with_(attrs={"kernel": "logsumexp"})
    (x,) = samples(function)
    x[1] = float("-inf")
    (got,) = load(generate(function), tmp_path).launch(x)
    assert torch.equal(got[1], torch.tensor(float("-inf")))
    check_close(got, reference(function, [x])[0], function.results[0].type)
