"""Kernel functions with a contraction: cut by `fuse`, run by a skeleton. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.codegen.kit import check_close, program, reference, samples
from tests.codegen.programs import tensor
from tests.codegen.skeletons import module_of

from weft.codegen.contraction import contraction_of, contraction_source
from weft.codegen.emit import kernel_functions
from weft.ir.builder import Builder
from weft.ir.module import Function, Value
from weft.passes.fuse import fuse

Make = Callable[[Builder], list[Value]]


def bias_gelu_residual(b: Builder) -> list[Value]:
    """A layer of a transformer: its result has two dims of rows, and its input is added."""
    x, w = b.param(tensor("bf16", 2, 9, 40), "a"), b.param(tensor("bf16", 40, 40), "w")
    bias = b.param(tensor("bf16", 40), "rows")
    y = b.one("einsum", [x, w], {"spec": "a b k, n k -> a b n"})
    y = b.one("gelu", [b.one("add", [y, bias], types=[tensor("bf16", 2, 9, 40)])])
    return [b.one("add", [y, x])]


def two_results(b: Builder) -> list[Value]:
    """The weight's gradient of a linear layer, scaled, and its square: a is stored k first."""
    dy, x = b.param(tensor("bf16", 2, 9, 24), "dy"), b.param(tensor("bf16", 2, 9, 40), "x")
    y = b.one("einsum", [dy, x], {"spec": "a b n, a b k -> n k"})
    scale = b.param(tensor("bf16", 24, 1), "scale")
    y = b.one("mul", [y, scale], types=[tensor("bf16", 24, 40)])
    return [y, b.one("mul", [y, y])]


def right_first(b: Builder) -> list[Value]:
    """The operand with the last dim comes first, stored k first, with one row."""
    w, x = b.param(tensor("bf16", 40, 24), "w"), b.param(tensor("bf16", 1, 40), "x")
    y = b.one("einsum", [w, x], {"spec": "k n, m k -> m n"}, types=[tensor("bf16", 1, 24)])
    return [b.one("relu", [b.one("mul", [y, y])])]


@pytest.mark.parametrize("make", [bias_gelu_residual, two_results, right_first])
def test_a_product_takes_the_region_behind_it(make: Make) -> None:
    fused = fuse(program(make), contractions=True)
    assert [op.name for op in fused.entry.ops] == ["call"]
    check(kernel_functions(fused)[0])


def read_twice(b: Builder) -> list[Value]:
    x, w = b.param(tensor("bf16", 9, 40), "x"), b.param(tensor("bf16", 24, 40), "w")
    y = b.one("einsum", [x, w], {"spec": "m k, n k -> m n"})
    z = b.one("reshape", [y], {"shape": (1, 9, 24)}, types=[tensor("bf16", 1, 9, 24)])
    return [b.one("relu", [b.one("exp", [z])]), z]


def reduced(b: Builder) -> list[Value]:
    x, w = b.param(tensor("bf16", 9, 40), "x"), b.param(tensor("bf16", 24, 40), "w")
    y = b.one("einsum", [x, w], {"spec": "m k, n k -> m n"})
    return [b.one("softmax", [b.one("exp", [y])])]


def batched(b: Builder) -> list[Value]:
    x, w = b.param(tensor("bf16", 2, 9, 40), "x"), b.param(tensor("bf16", 2, 24, 40), "w")
    y = b.one("einsum", [x, w], {"spec": "b m k, b n k -> b m n"})
    return [b.one("relu", [b.one("exp", [y])])]


@pytest.mark.parametrize("make", [read_twice, reduced, batched])
def test_other_products_stay_with_the_library(make: Make) -> None:
    fused = fuse(program(make), contractions=True)
    assert "einsum" in [op.name for op in fused.entry.ops]


@pytest.mark.parametrize("mask", ["", "bool", "f32"])
def test_attention_is_a_kernel(mask: str) -> None:
    def make(b: Builder) -> list[Value]:
        q, k, v = (b.param(tensor("f32", 2, heads, 21, 16), name)
                   for heads, name in ((4, "q"), (2, "k"), (2, "v")))  # fmt: skip
        extra = [b.param(tensor(mask, 1, 1, 21, 21), "mask")] if mask else []
        attrs = {"causal": not mask, "scale": 0.3, "mask": bool(mask)}
        return list(b.op("attention", [q, k, v, *extra], attrs))

    check(kernel_functions(fuse(program(make), contractions=True))[0])


def check(function: Function) -> None:
    """Run a kernel function on random operands and compare it with its float64 reference."""
    assert contraction_of(function) is not None
    source = contraction_source(function, None, "cuda:90")
    torch.manual_seed(0)
    inputs = samples(function)
    results = module_of(source.name, source.text).launch(*inputs)
    wanted = reference(function, inputs)
    for got, expected, value in zip(results, wanted, function.results, strict=True):
        check_close(got, expected, value.type)
