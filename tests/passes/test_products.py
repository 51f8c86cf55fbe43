"""Products with the region behind them, and attention, as kernel functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.ir.types import B, Mesh, Placement, S, TensorType
from weft.ir.verify import verify
from weft.passes.fuse import fuse
from weft.passes.products import orders
from weft.runtime.interpreter import evaluate

UNARY = ["relu", "exp", "tanh", "neg"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["linear", "bias", "residual", *UNARY]),
                          st.integers(0, 9)), min_size=3, max_size=14))  # fmt: skip
def test_a_module_with_products_in_kernels_computes_the_same(steps: list[tuple[str, int]]) -> None:
    """Chains of linear layers and pointwise ops; any value may be read again, and is a result."""
    b, shape = Builder(), TensorType("bf16", (2, 3, 8))
    values = [b.param(shape, "x")]
    weights = [TensorType("bf16", (8, 8)), TensorType("bf16", (8,))]
    for op, pick in steps:
        x = values[pick % len(values)] if pick < 5 else values[-1]
        if op == "linear":
            w = b.param(weights[0], "w")
            values.append(b.one("einsum", [x, w], {"spec": "a b k, n k -> a b n"}))
        elif op in UNARY:
            values.append(b.one(op, [x]))
        else:
            other = b.param(weights[1], "bias") if op == "bias" else values[pick // 2 % len(values)]
            values.append(b.one("add", [x, other], types=[shape]))
    used = [values[-1], values[len(values) // 2]]
    module = Module("logical", (b.function("main", used, [{"role": "output"}] * 2),))
    fused = fuse(module, contractions=True)
    verify(fused)
    generator = torch.Generator().manual_seed(len(steps))
    inputs = [torch.randn(v.type.shape, generator=generator).bfloat16() for v in module.entry.params]
    for before, after in zip(evaluate(module, inputs), evaluate(fused, inputs), strict=True):
        assert torch.equal(before.isnan(), after.isnan())
        assert torch.equal(before.nan_to_num(), after.nan_to_num())


@pytest.mark.parametrize(
    "spec, shapes, expected",
    [
        ("a b k, n k -> a b n", ((2, 3, 4), (5, 4)), (0, 1, "mk", "nk")),
        ("a b n, n k -> a b k", ((2, 3, 4), (4, 5)), (0, 1, "mk", "kn")),
        ("a b n, a b k -> n k", ((2, 3, 4), (2, 3, 5)), (0, 1, "km", "kn")),
        ("k n, m k -> m n", ((4, 5), (3, 4)), (1, 0, "mk", "kn")),
        ("b m k, b n k -> b m n", ((2, 3, 4), (2, 5, 4)), None),  # batched
        ("m k, n k -> n m", ((3, 4), (5, 4)), (1, 0, "mk", "nk")),
        ("m k, k -> m", ((3, 4), (4,)), None),
    ],
)
def test_an_einsum_is_a_product_of_matrices(
    spec: str, shapes: tuple[tuple[int, ...], ...], expected: tuple[object, ...] | None
) -> None:
    b = Builder()
    operands = [b.param(TensorType("bf16", shape), name) for shape, name in zip(shapes, "xy", strict=True)]
    y = b.one("einsum", operands, {"spec": spec})
    (op,) = b.function("main", [y], [{"role": "output"}]).ops
    found = orders(op)
    assert (found and (found.a, found.b, found.a_order, found.b_order)) == expected


def attention(device: str, place: Placement, causal: bool) -> Module:
    b = Builder()

    def param(name: str) -> Value:
        return b.param(TensorType("bf16", (2, 4, 8, 16), (place,)), name)

    out, _ = b.op("attention", [param("q"), param("k"), param("v")], {"causal": causal, "scale": 0.5},
                  types=[TensorType("bf16", (2, 4, 8, 16), (place,)), TensorType("f32", (2, 4, 8), (place,))])  # fmt: skip
    module = Module("spmd", (b.function("main", [out], [{"role": "output"}]),))
    return replace(module, mesh=Mesh((("x", 2),), device))


@pytest.mark.parametrize(
    "device, place, causal, kernel",
    [
        ("h100", S(1), True, True),
        ("h100", B, True, True),
        ("h100", S(2), True, False),  # which keys a query sees depends on the rank
        ("cpu", S(1), True, False),
    ],
)
def test_attention_is_a_kernel_on_a_gpu(
    device: str, place: Placement, causal: bool, kernel: bool
) -> None:
    fused = fuse(attention(device, place, causal))
    assert [op.name for op in fused.entry.ops] == ["call" if kernel else "attention"]
