"""Fuse: kernel functions compute what their ops did, are convex, and are shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.equality import assert_close, assert_equal_on_ranks
from tests.passes.programs import random_program
from torch import Generator

from weft.ir.builder import Builder
from weft.ir.module import Function, Location, Module, Op, Value
from weft.ir.types import TensorType
from weft.ir.verify import verify
from weft.passes.fuse import Fuse, fuse
from weft.passes.inline import inline
from weft.passes.random_place import parse_mesh
from weft.passes.space import analyse
from weft.runtime.interpreter import evaluate

MESHES = ("2", "3", "2x2", "3x2", "2x2x2")


def module_of(make: Callable[[Builder], Sequence[Value]], level: str = "logical") -> Module:
    b = Builder()
    results = make(b)
    return Module(level, (b.function("main", results, [{"role": "output"}] * len(results)),))


def kernels(module: Module) -> list[Function]:
    return [function for function in module.functions if "kernel" in function.attrs]


def names(ops: Sequence[Op]) -> list[str]:
    return [op.name for op in ops]


def x_of(b: Builder, *shape: int, name: str = "x", dtype: str = "f64") -> Value:
    return b.param(TensorType(dtype, shape), name)


# properties ---------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_a_fused_random_program_computes_the_same(seed: int, ops: int) -> None:
    program = random_program(seed, ops)
    fused = fuse(program.module)
    verify(fused)
    wanted = evaluate(program.module, program.inputs)
    assert_close(wanted, evaluate(fused, program.inputs), 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MESHES))
def test_a_fused_program_computes_the_same_on_every_mesh(seed: int, mesh: str) -> None:
    program = random_program(seed, 8)
    wanted = evaluate(program.module, program.inputs)
    spmd = assert_equal_on_ranks(program.module, program.inputs, wanted, parse_mesh(mesh), seed)
    fused = fuse(spmd)
    verify(fused)
    assert_close(wanted, evaluate(fused, program.inputs, noise=Generator().manual_seed(seed)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_every_op_is_kept_once_and_every_kernel_has_a_space(seed: int) -> None:
    module = random_program(seed, 12).module
    fused = fuse(module)
    free = {"constant", "iota", "expand", "reshape", "permute", "slice", "cast"}
    before = Counter(name for name in names(inline(module, keep=lambda f: False).entry.ops))
    after = Counter(name for name in names(inline(fused, keep=lambda f: False).entry.ops))
    for name in (before | after).keys() - free:
        assert before[name] == after[name], name
    for kernel in kernels(fused):
        space = analyse(kernel.ops, [value.name for value in kernel.results])
        assert space.points > 1


def test_the_random_programs_contain_kernels_of_many_kinds() -> None:
    """The properties above are worth what is fused in them."""
    ops: Counter[str] = Counter()
    for seed in range(80):
        for kernel in kernels(fuse(random_program(seed, 12).module)):
            ops.update(names(kernel.ops))
            ops[f"{min(len(kernel.ops), 6)} ops"] += 1
    for wanted in ("softmax", "layer_norm", "cross_entropy", "reduce_sum", "concat", "where",
                   "expand", "iota", "6 ops"):  # fmt: skip
        assert ops[wanted], wanted


# what is fused ------------------------------------------------------------------------------------


def norm(b: Builder, x: Value, path: str = "") -> Value:
    """x / sqrt(sum x * x): a reduction in the middle of a chain."""
    loc = Location(path)
    square = b.one("mul", [x, x], loc=loc)
    last = len(x.type.shape) - 1
    total = b.one("reduce_sum", [square], {"dims": (last,), "keepdim": True}, loc=loc)
    return b.one("mul", [x, b.one("rsqrt", [total], loc=loc)], loc=loc)


def test_a_chain_around_a_row_reduction_is_one_kernel() -> None:
    fused = fuse(module_of(lambda b: [norm(b, x_of(b, 6, 8))]))
    assert names(fused.entry.ops) == ["call"]
    assert names(kernels(fused)[0].ops) == ["mul", "reduce_sum", "rsqrt", "mul"]


def test_a_chain_through_a_matrix_product_is_cut_there() -> None:
    """x -> exp -> einsum -> add with exp's result: joining exp and add would close a cycle."""

    def make(b: Builder) -> list[Value]:
        x = x_of(b, 4, 4)
        y = b.one("neg", [b.one("exp", [x])])
        z = b.one("einsum", [y, y], {"spec": "a b, b c -> a c"})
        return [b.one("tanh", [b.one("add", [y, z])])]

    fused = fuse(module_of(make))
    assert names(fused.entry.ops) == ["call", "einsum", "call"]
    assert [names(k.ops) for k in kernels(fused)] == [["exp", "neg"], ["add", "tanh"]]


def test_two_reductions_of_different_dims_are_two_kernels() -> None:
    def make(b: Builder) -> list[Value]:
        x = b.one("exp", [x_of(b, 3, 4, 6)])
        y = b.one("mul", [x, b.one("reduce_sum", [x], {"dims": (2,), "keepdim": True})])
        return [b.one("mul", [y, b.one("reduce_sum", [y], {"dims": (1,), "keepdim": True})])]

    fused = fuse(module_of(make))
    rows = [op for k in kernels(fused) for op in k.ops if op.name == "reduce_sum"]
    assert [op.attrs["dims"] for op in rows] == [(2,)]


def test_a_sum_over_all_rows_ends_a_kernel() -> None:
    """The gradient of a norm's weight: a product that only its sum over the rows needs."""

    def make(b: Builder) -> list[Value]:
        x, dy = x_of(b, 3, 4, 6), x_of(b, 3, 4, 6, name="dy")
        dw = b.one("reduce_sum", [b.one("mul", [norm(b, x), dy])], {"dims": (0, 1)})
        return [b.one("neg", [dw])]

    fused = fuse(module_of(make))
    assert names(fused.entry.ops) == ["call", "neg"]
    assert [value.type.shape for value in kernels(fused)[0].results] == [(6,)]


def test_equal_regions_share_a_function_named_after_path_and_ops() -> None:
    def make(b: Builder) -> list[Value]:
        x = norm(b, x_of(b, 6, 8), "model.layers.0.norm")
        w = x_of(b, 8, 8, name="w")
        x = b.one("einsum", [x, w], {"spec": "a k, k n -> a n"})
        return [norm(b, x, "model.layers.1.norm")]

    fused = fuse(module_of(make))
    assert names(fused.entry.ops) == ["call", "einsum", "call"]
    (kernel,) = kernels(fused)
    assert kernel.attrs["kernel"] == kernel.name == "layers_norm_mul_reduce_sum_rsqrt"
    assert [op.loc.path for op in fused.entry.ops[::2]] == [
        "model.layers.0.norm", "model.layers.1.norm",
    ]  # fmt: skip


def test_views_are_copied_into_kernels_and_kept_for_others() -> None:
    def make(b: Builder) -> list[Value]:
        x, w = x_of(b, 4, 6), x_of(b, 6, name="w")
        wide = b.one("expand", [w], types=[x.type])
        y = b.one("mul", [b.one("exp", [x]), wide])
        return [y, b.one("einsum", [x, wide], {"spec": "a k, b k -> a b"})]

    fused = fuse(module_of(make))
    assert sorted(names(fused.entry.ops)) == ["call", "einsum", "expand"]
    assert names(kernels(fused)[0].ops) == ["exp", "expand", "mul"] or names(
        kernels(fused)[0].ops
    ) == ["expand", "exp", "mul"]


def test_a_widened_operand_is_not_stored_for_a_second_kernel() -> None:
    """Both kernels read x in bf16 and widen it themselves."""

    def make(b: Builder) -> list[Value]:
        x = x_of(b, 4, 6, dtype="bf16")
        wide = b.one("cast", [x], types=[TensorType("f32", (4, 6))])
        first = b.one("exp", [b.one("tanh", [wide])])
        w = b.one("einsum", [first, first], {"spec": "a k, b k -> a b"})
        second = b.one("mul", [wide, b.one("reduce_sum", [w], {"dims": (1,), "keepdim": True})])
        return [b.one("sin", [second])]

    fused = fuse(module_of(make))
    assert "cast" not in names(fused.entry.ops)
    assert all(x.type.dtype == "bf16" for k in kernels(fused) for x in k.params if x.name == "x")


def test_a_slice_that_does_not_fit_the_space_stays_outside() -> None:
    """Labels shifted by one: a slice of what is the row dim of the logits."""

    def make(b: Builder) -> list[Value]:
        logits, labels = x_of(b, 4, 6), x_of(b, 5, name="labels", dtype="i64")
        shifted = b.one("slice", [labels], {"dim": 0, "start": 1, "stop": 5})
        return list(b.many("cross_entropy", [b.one("tanh", [logits]), shifted]))

    assert names(fuse(module_of(make)).entry.ops) == ["slice", "call"]


def test_regions_that_read_the_same_tensor_are_joined() -> None:
    def make(b: Builder) -> list[Value]:
        dy, gate, up = (x_of(b, 4, 6, name=name) for name in ("dy", "gate", "up"))
        first = b.one("mul", [dy, b.one("silu", [gate])])
        return [first, b.one("silu_backward", [b.one("mul", [dy, up]), gate])]

    fused = fuse(module_of(make))
    assert names(fused.entry.ops) == ["call"]


def test_a_vocabulary_split_keeps_cross_entropy_out_of_kernels() -> None:
    """Its label is an index into all columns, which a kernel of some columns does not know."""

    def make(b: Builder) -> list[Value]:
        logits, labels = x_of(b, 4, 6), x_of(b, 4, name="labels", dtype="i64")
        return list(b.many("cross_entropy", [logits, labels]))

    module = module_of(make)
    assert names(fuse(module).entry.ops) == ["call"]
    (op,) = module.entry.ops
    split = module.with_(functions=(module.entry.with_(ops=(op.with_(split={"tp": "n"}),)),))
    assert names(fuse(split).entry.ops) == ["cross_entropy"]


def test_a_vocabulary_of_one_has_no_column_and_stays_outside() -> None:
    def make(b: Builder) -> list[Value]:
        logits, labels = x_of(b, 4, 1), x_of(b, 4, name="labels", dtype="i64")
        loss, lse = b.many("cross_entropy", [logits, labels])
        return [b.one("cross_entropy_backward", [loss, logits, labels, lse])]

    assert names(fuse(module_of(make)).entry.ops) == ["cross_entropy", "cross_entropy_backward"]


def test_ops_on_constants_alone_stay_outside() -> None:
    """A kernel takes its device from an operand."""

    def make(b: Builder) -> list[Value]:
        i = b.one("iota", [], {"dim": 0}, types=[TensorType("i64", (4,))])
        return [b.one("mul", [b.one("add", [i, i]), i])]

    assert names(fuse(module_of(make)).entry.ops) == ["iota", "add", "mul"]


def test_optimizer_updates_are_fused_only_on_request() -> None:
    def make(b: Builder) -> list[Value]:
        p, g = x_of(b, 4, 6, name="p"), x_of(b, 4, 6, name="g")
        step, lr = x_of(b, name="step"), x_of(b, name="lr")
        return [b.one("sgd_update", [p, g, step, lr])]

    module = module_of(make)
    assert names(Fuse().run(module).entry.ops) == ["sgd_update"]
    assert names(Fuse(optimizers=True).run(module).entry.ops) == ["call"]


@pytest.mark.parametrize("exponent, fused", [(2.0, True), (-0.5, True), (2.7, False)])
def test_powers_are_fused_where_they_are_products_and_roots(exponent: float, fused: bool) -> None:
    def make(b: Builder) -> list[Value]:
        power = b.one("pow", [x_of(b, 4, 6), b.constant(exponent, TensorType("f64", ()))])
        return [b.one("exp", [power])]

    assert ("pow" in names(fuse(module_of(make)).entry.ops)) != fused


def test_every_chain_of_a_long_function_is_fused() -> None:
    """4,000 ops in chains of 8 between matrix products."""

    def make(b: Builder) -> list[Value]:
        x, w = x_of(b, 8, 8), x_of(b, 8, 8, name="w")
        rng = Random(0)
        for _ in range(400):
            x = b.one("einsum", [x, w], {"spec": "a k, k n -> a n"})
            for _ in range(6):
                x = b.one(rng.choice(["exp", "tanh", "neg"]), [x])
            x = norm(b, x)
        return [x]

    fused = fuse(module_of(make))
    assert names(fused.entry.ops) == ["einsum", "call"] * 400
