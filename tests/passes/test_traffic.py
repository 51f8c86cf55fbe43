"""Traffic of kernels and the lower bound of their regions."""

from __future__ import annotations

import pytest
from tests.frontend.zoo import build
from tests.passes.programs import random_program

from weft.frontend.train_step import trace_module_train
from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.ir.types import Mesh, TensorType
from weft.passes.fuse import fuse
from weft.passes.simplify import Simplify
from weft.passes.traffic import Traffic, block_of, leftovers, traffic_of

N = 8 * 16 * 4  # bytes of f32[8, 16]


def program(*, product: bool) -> Module:
    """y = exp(silu(x) * x), with a product in between or not."""
    b = Builder()
    x = b.param(TensorType("f32", (8, 16)), "x")
    y: Value = b.one("mul", [b.one("silu", [x]), x])
    if product:
        w = b.param(TensorType("f32", (16, 16)), "w")
        y = b.one("einsum", [y, w], {"spec": "a b, b c -> a c"})
    return Module("logical", (b.function("main", [b.one("exp", [y])]),))


def total(module: Module) -> Traffic:
    out = Traffic()
    for traffic in traffic_of(module).values():
        out.add(traffic)
    return out


@pytest.mark.parametrize("product", [False, True])
def test_the_bound_reads_each_input_and_writes_each_output_once(product: bool) -> None:
    plain = total(program(product=product))
    assert plain.rows == plain.rows_moved == 7 * N  # silu 2, mul 3, exp 2
    assert plain.rows_bound == (4 * N if product else 2 * N)
    assert plain.kernels == plain.moved_in_kernels == 0
    fused = total(fuse(program(product=product)))
    assert (fused.kernels, fused.rows_in_kernels) == (1, (5 if product else 7) * N)
    assert fused.rows_bound == plain.rows_bound == fused.rows_moved
    assert leftovers(fuse(program(product=product))) == ({"exp": 2 * N} if product else {})


def test_kernels_never_change_the_bound_or_the_work() -> None:
    for seed in range(20):
        module = random_program(seed, 12).module
        plain, fused = total(module), total(fuse(module))
        assert (plain.rows_bound, plain.rows) == (fused.rows_bound, fused.rows)
        assert fused.flops == pytest.approx(plain.flops)
        assert fused.moved <= plain.moved


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_rows_of_a_train_step_are_fused(name: str) -> None:
    """The project's targets: 95 % of the traffic of rows, 1.15 times their bound."""
    model, inputs = build(name)
    module = Simplify().run(trace_module_train(model, (), inputs, optimizer="adamw").module)
    traffic = total(fuse(module.with_(mesh=Mesh((), "h100")), optimizers=True))
    assert traffic.rows_in_kernels >= 0.95 * traffic.rows
    assert traffic.rows_moved <= 1.15 * traffic.rows_bound


def test_repeated_blocks_are_one() -> None:
    assert block_of("model.layers.3.mlp") == block_of("model.layers.11") == "model.layers.*"
    assert block_of("lm_head") == "lm_head" and block_of("") == "(none)"
