"""Sources of kernels: what a person reads, and what does not become one."""

from __future__ import annotations

import ast

import pytest
from tests.codegen.kit import only_kernel, program
from tests.codegen.programs import PROGRAMS, tensor

from weft.codegen.kernel import SUPPORTED, build
from weft.codegen.layout import layout
from weft.codegen.source import generate
from weft.ir.builder import Builder
from weft.ir.errors import CompileError
from weft.ir.module import Function, Value
from weft.ir.ops import OPS
from weft.ir.types import Mesh, S, TensorType
from weft.passes.regions import JOINS, OPTIMIZERS, REDUCTIONS, ROW
from weft.passes.space import VIEWS


def test_kernels_can_hold_exactly_what_fuse_puts_into_them() -> None:
    pointwise = {name for name, entry in OPS.items() if entry.family == "pointwise"}
    assert SUPPORTED == pointwise | ROW | REDUCTIONS | OPTIMIZERS | JOINS | VIEWS


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_source_says_where_it_comes_from_and_what_it_computes(name: str) -> None:
    function = only_kernel(PROGRAMS[name]("bf16", (4, 8), 64))
    source = generate(function)
    text = ast.get_docstring(ast.parse(source.text)) or ""
    assert function.ops[-1].loc.path in text
    assert all(f"{op.name}(" in text for op in function.ops)
    code = source.text.split('"""', 2)[2]
    assert max(map(len, code.splitlines())) <= 160


def kind_of(function: Function, mesh: Mesh | None = None) -> tuple[str, int]:
    plan = layout(build(function), mesh)
    return plan.kind, len(plan.groups)


@pytest.mark.parametrize(
    "name, kind, groups",
    [
        ("swiglu", "flat", 0),
        ("adamw", "flat", 0),
        ("residual_rms_norm", "persistent", 1),
        ("swiglu_packed", "tile", 1),
        ("rope", "tile", 3),  # batch, heads and sequence have strides of their own
    ],
)
def test_dims_are_walked_as_one_where_all_tensors_allow(name: str, kind: str, groups: int) -> None:
    assert kind_of(only_kernel(PROGRAMS[name]("bf16", (4, 8), 64))) == (kind, groups)


def test_results_are_made_where_the_tensors_are() -> None:
    """The first operand is a scalar, which may be on the CPU."""

    def make(b: Builder) -> list[Value]:
        s, x = b.param(tensor("f32"), "s"), b.param(tensor("f32", 5, 1), "x")
        y = b.one("mul", [s, x], types=[tensor("f32", 5, 1)])
        return [b.one("exp", [y])]

    assert "device=x.device" in generate(only_kernel(program(make))).text


def test_a_bias_per_channel_joins_the_image_dims() -> None:
    """[n, c, h, w] with a bias [c, 1, 1]: h and w are one column, n and c two rows."""

    def make(b: Builder) -> list[Value]:
        x, bias = b.param(tensor("f32", 2, 3, 4, 5), "x"), b.param(tensor("f32", 3, 1, 1), "bias")
        return [b.one("relu", [b.one("add", [x, bias])])]

    plan = layout(build(only_kernel(program(make))))
    assert (plan.kind, plan.groups, plan.tail, plan.columns) == ("tile", ((0,), (1,)), (2,), 20)


def test_a_long_row_is_looped_unless_its_shard_is_short() -> None:
    """Sums over a split column are partial: the rows of a rank are a quarter as long."""
    place = (S(1),)

    def typed(*shape: int, split: bool) -> TensorType:
        return TensorType("f32", shape, place if split else None)

    def make(b: Builder, split: bool) -> list[Value]:
        x = b.param(typed(8, 20000, split=split), "x")
        return [b.one("reduce_sum", [b.one("exp", [x], types=[x.type])], {"dims": (1,)},
                      types=[TensorType("f32", (8,))])]  # fmt: skip

    mesh = Mesh((("tp", 4),), "h100")
    whole = only_kernel(program(lambda b: make(b, False)))
    part = only_kernel(program(lambda b: make(b, True)))
    assert kind_of(whole, mesh)[0] == "looped"
    assert kind_of(part, mesh)[0] == "persistent"


def test_fusing_moves_fewer_bytes() -> None:
    source = generate(only_kernel(PROGRAMS["residual_rms_norm"]("bf16", (4, 8), 64)))
    assert source.bytes_moved == 2 * (4 * (4 * 8 * 64) + 64)
    assert source.bytes_unfused > 4 * source.bytes_moved


def test_ops_without_a_common_space_are_a_diagnostic() -> None:
    def make(b: Builder) -> list[Value]:
        x = b.param(tensor("f32", 3, 4, 6), "x")
        return [b.one("reduce_sum", [x], {"dims": (1,)}), b.one("reduce_sum", [x], {"dims": (2,)})]

    with pytest.raises(CompileError, match="W0901"):
        generate(program(make).entry.with_(attrs={"kernel": "k"}))
