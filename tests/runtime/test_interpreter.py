"""The reference interpreter at every level."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest
import torch
from tests.passes.programs import random_program
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from weft.ir.errors import RunError
from weft.ir.module import Op
from weft.ir.parser import parse_module
from weft.ir.types import Mesh
from weft.passes.apply import apply
from weft.passes.random_place import random_choices
from weft.runtime.context import OpContext
from weft.runtime.interpreter import evaluate, run_function

BLOCKS = """weft 1 logical

func @main(%x: f32[3, 4], %w: f32[4, 4], %seed: i64[]) -> (f32[], f32[3, 4]) {
  %a = call(%x, %w) {callee = "block"} : f32[3, 4]
  %b = call(%a, %w) {callee = "block"} : f32[3, 4]
  %u = uniform(%seed) : f32[3, 4]
  %c = mul(%b, %u) : f32[3, 4]
  %s = reduce_sum(%c) {dims = [0, 1]} : f32[]
  return %s, %b
}

func @block(%x: f32[3, 4], %w: f32[4, 4]) -> (f32[3, 4]) {
  %y = einsum(%x, %w) {spec = "b k, k n -> b n"} : f32[3, 4]
  %z = tanh(%y) : f32[3, 4]
  %r = add(%x, %z) : f32[3, 4]
  return %r
}
"""


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=g), torch.randn(4, 4, generator=g), torch.tensor(7)]


def test_calls_recurse_and_gradients_flow() -> None:
    module = parse_module(BLOCKS)
    x, w, seed = inputs()
    w.requires_grad_()
    total, b = run_function(module, module.entry, [x, w, seed])
    a = x + (x @ w).tanh()
    expected = a + (a @ w).tanh()
    torch.testing.assert_close(b, expected)
    (mine,) = torch.autograd.grad(b.sum(), w, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), w)
    torch.testing.assert_close(mine, theirs)
    assert total.requires_grad


def test_fake_meta_and_traced_tensors() -> None:
    module = parse_module(BLOCKS)
    meta = evaluate(module, [t.to("meta") for t in inputs()])
    assert [t.device.type for t in meta] == ["meta", "meta"]
    with FakeTensorMode():
        shapes = [t.shape for t in evaluate(module, [torch.empty_like(t) for t in inputs()])]
    assert shapes == [(), (3, 4)]
    trace = make_fx(lambda *t: run_function(module, module.entry, t), tracing_mode="fake")
    graph = trace(*inputs())
    for traced, plain in zip(graph(*inputs()), evaluate(module, inputs()), strict=True):
        torch.testing.assert_close(traced, plain)


def test_hook_surrounds_each_op_and_override_replaces_its_semantics() -> None:
    module = parse_module(BLOCKS)
    seen: list[str] = []

    @contextmanager
    def hook(op: Op) -> Iterator[None]:
        seen.append(op.name)
        yield

    def linear(context: OpContext, x: Tensor) -> Tensor:
        assert context.op.name == "tanh"
        return x

    x, w, seed = inputs()
    _, b = run_function(module, module.entry, [x, w, seed], hook=hook, override={"tanh": linear})
    a = x + x @ w
    torch.testing.assert_close(b, a + a @ w)
    assert seen == ["einsum", "tanh", "add"] * 2 + ["uniform", "mul", "reduce_sum"]


def test_values_are_dropped_after_their_last_use() -> None:
    chain = "\n".join(f"  %v{i + 1} = exp(%v{i}) : f32[4]" for i in range(6))
    module = parse_module(f"weft 1 logical\nfunc @main(%v0: f32[4]) -> (f32[4]) {{\n{chain}\n"
                          "  return %v6\n}\n")  # fmt: skip
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(context: OpContext, x: Tensor) -> Tensor:
        out = x.exp()
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(out))
        return out

    run_function(module, module.entry, [torch.zeros(4)], override={"exp": watch})
    assert max(alive) == 1  # an op's operand only


ATEN = """weft 1 logical
func @main(%x: f32[3, 4]) -> (f32[3, 4], i64[3, 4], f64[3], f32[2]) {
  %v, %i = aten(%x) {target = "aten.sort.default", args = "[\\"%0\\", 1, true]"} : f32[3, 4], i64[3, 4]
  %s = aten(%x) {target = "aten.sum.dim_IntList", args = ARGS} : f64[3]
  %z = aten() {target = "aten.full.default", args = FULL} : f32[2]
  return %v, %i, %s, %z
}
"""  # noqa: E501
ARGS = r'"{\"args\": [\"%0\", [1], false], \"kwargs\": {\"dtype\": {\"dtype\": \"f64\"}}}"'
FULL = (r'"{\"args\": [[2], {\"float\": \"inf\"}], \"kwargs\": {\"dtype\": {\"dtype\": \"f32\"},'
        r' \"device\": {\"device\": \"\"}}}"')  # fmt: skip


def test_opaque_aten_calls_take_lists_keywords_dtypes_and_give_tuples() -> None:
    module = parse_module(ATEN.replace("ARGS", ARGS).replace("FULL", FULL))
    x = torch.randn(3, 4)
    v, i, s, z = evaluate(module, [x])
    expected = x.sort(1, descending=True)
    assert torch.equal(v, expected.values) and torch.equal(i, expected.indices)
    assert s.dtype == torch.float64 and z.tolist() == [float("inf")] * 2


def test_an_operator_that_pytorch_lacks_is_named() -> None:
    text = ATEN.replace("ARGS", ARGS).replace("FULL", FULL).replace("aten.sort", "aten.no_such")
    with pytest.raises(RunError, match="no operator aten.no_such.default"):
        evaluate(parse_module(text), [torch.zeros(3, 4)])


@pytest.mark.parametrize("level", ["logical", "spmd"])
def test_wrong_number_of_inputs(level: str) -> None:
    text = (f'weft 1 {level}\nmesh [x=2] "cpu"\n'
            "func @main(%x: f32[4]{B}) -> (f32[4]{B}) {\n  return %x\n}\n")  # fmt: skip
    if level == "logical":
        text = text.replace('mesh [x=2] "cpu"\n', "").replace("{B}", "")
    with pytest.raises(RunError, match="W0804.*1 parameters, got 2"):
        evaluate(parse_module(text), [torch.zeros(4), torch.zeros(4)])


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2), (2, 3), (2, 2, 2)])
def test_placed_level_with_ideal_reshards_equals_the_logical_program(
    shape: tuple[int, ...],
) -> None:
    mesh = Mesh(tuple(zip("xyz", shape, strict=False)))
    for seed in range(12):
        program = random_program(seed, 6)
        placed = apply(program.module, mesh, random_choices(program.module, mesh, Random(seed)))
        expected = evaluate(program.module, program.inputs)
        noise = torch.Generator().manual_seed(seed)
        for mine, theirs in zip(evaluate(placed, program.inputs, ranks=True, noise=noise), expected,
                                strict=True):  # fmt: skip
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
        for mine, theirs in zip(evaluate(placed, program.inputs), expected, strict=True):
            assert torch.equal(mine, theirs)


SPMD = """weft 1 spmd
mesh [dp=2, tp=3] "cpu"
func @main(%x: f64[7, 8]{S(0), B}, %w: f64[8, 5]{B, S(0)}) -> (f64[]{B, B}, f64[7, 5]{S(0), S(0)}) {
  %xs = shard(%x) {axis = "tp", dim = 1} : f64[7, 8]{S(0), S(1)}
  %y = einsum(%xs, %w) {spec = "b k, k n -> b n"} split [dp = b, tp = k] : f64[7, 5]{S(0), P(sum)}
  %z = reduce_scatter(%y) {axis = "tp", dim = 0} : f64[7, 5]{S(0), S(0)}
  %s = reduce_sum(%z) {dims = [0, 1]} split [dp = a0, tp = a0] : f64[]{P(sum), P(sum)}
  %t = all_reduce(%s) {axis = "tp"} : f64[]{P(sum), B}
  %l = all_reduce(%t) {axis = "dp"} : f64[]{B, B}
  return %l, %z
}
"""


def test_spmd_level_runs_collectives_on_uneven_nested_shards() -> None:
    x, w = torch.randn(7, 8, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    total, z = evaluate(parse_module(SPMD), [x, w])
    torch.testing.assert_close(z, x @ w)
    torch.testing.assert_close(total, (x @ w).sum())


def test_a_missing_all_reduce_is_found_by_comparing_copies() -> None:
    text = SPMD.replace('%l = all_reduce(%t) {axis = "dp"} : f64[]{B, B}',
                        '%l = broadcast(%t) {axis = "tp"} : f64[]{B, B}')  # fmt: skip
    with pytest.raises(RunError, match="differ along axis dp"):
        evaluate(parse_module(text), [torch.randn(7, 8).double(), torch.randn(8, 5).double()])


SCHEDULE = """weft 1 schedule
mesh [dp=2] "cpu"
func @main(%w: f64[4]{B}, %x: f64[6, 4]{S(0)}, %step: f64[]{B}, %lr: f64[]{B}) -> (f64[4]{B}) {
  %y = call(%x) {callee = "k0"} : f64[6, 4]{S(0)}
  %g = reduce_sum(%y) {dims = [0]} split [dp = a0] : f64[4]{P(sum)}
  %h = all_reduce(%g) {axis = "dp", async = true} : f64[4]{B}
  %q = mul(%w, %w) : f64[4]{B}
  %r = wait(%h) : f64[4]{B}
  free(%g, %h, %q)
  %w1 = sgd_update(%w, %r, %step, %lr) {inplace = true} : f64[4]{B}
  free(%r)
  return %w1
}
func @k0(%x: f64[6, 4]{S(0)}) -> (f64[6, 4]{S(0)}) attrs {kernel = "k0"} {
  %a = exp(%x) split [dp = a0] : f64[6, 4]{S(0)}
  %b = mul(%a, %x) split [dp = a0] : f64[6, 4]{S(0)}
  return %b
}
"""


def schedule_inputs() -> list[Tensor]:
    scalars = [torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)]
    g = torch.Generator().manual_seed(0)
    big = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4,), (6, 4))]
    return [*big, *scalars]


def test_schedule_level_runs_kernels_and_asynchronous_pairs() -> None:
    w, x, step, lr = schedule_inputs()
    (mine,) = evaluate(parse_module(SCHEDULE), [w, x, step, lr])
    torch.testing.assert_close(mine, w - lr * (x.exp() * x).sum(0))


MISTAKES = [
    ("%r = wait(%h) :", "%r = neg(%h) :", "%h is read before it was waited"),
    ("  %q = mul", "  free(%g)\n  %q = mul", "%g was freed while %h still reads it"),
    ("free(%g, %h, %q)", "free(%g, %h, %r)", "%r was freed"),
    ("free(%r)", "free(%r, %q)", "%q was freed, but it was freed"),
    ("free(%r)", "free(%w)", "%w was freed, but it was overwritten in place"),
    ("free(%r)", "%n = neg(%w) : f64[4]{B}", "%w was overwritten in place"),
    ("  free(%r)", '  %n = all_reduce(%g2) {axis = "dp", async = true} : f64[4]{B}',
     "%n is never waited for"),
    ("%r = wait(%h)", "%e = wait(%g) : f64[4]{B}\n  %r = wait(%h)",
     "%g is waited for, but was not"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_schedule_mistakes_are_errors(old: str, new: str, message: str) -> None:
    assert old in SCHEDULE
    text = SCHEDULE.replace(old, new, 1)
    text = text.replace("  %h = all_reduce", "  %g2 = neg(%g) split [dp = partial(0)] "
                        ": f64[4]{P(sum)}\n  %h = all_reduce")  # fmt: skip
    with pytest.raises(RunError, match=message):
        evaluate(parse_module(text), schedule_inputs())
