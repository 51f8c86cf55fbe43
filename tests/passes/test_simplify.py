"""Simplify keeps what a program means, finds what is known without data, and is fast."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir.strategies import programs
from tests.passes.equality import assert_close
from tests.passes.networks import Net, residual_stages, transformer
from tests.passes.programs import random_program
from tests.passes.random_inputs import random_inputs

from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.ir.parser import parse_module
from weft.ir.types import TensorType
from weft.ir.verify import verify
from weft.passes.dead_code import eliminate_dead
from weft.passes.outline import Outline
from weft.passes.simplify import simplify
from weft.passes.simplify_affine import Affine
from weft.passes.simplify_data import data_of
from weft.passes.simplify_domain import SMALL, Below, Fact, Small, rounded
from weft.passes.simplify_facts import infer
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.interpreter import evaluate


@settings(max_examples=150, deadline=None)
@given(programs(most=10))
def test_random_programs_mean_the_same(module: Module) -> None:
    inputs = random_inputs(module)
    after = simplify(module)
    verify(after)
    assert_close(evaluate(module, inputs), evaluate(after, inputs))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_random_programs_with_calls_and_updates_mean_the_same(seed: int) -> None:
    program = random_program(seed, ops=9)
    after = simplify(program.module)
    verify(after)
    assert_close(evaluate(program.module, program.inputs), evaluate(after, program.inputs))
    assert after.entry.params == program.module.entry.params
    assert after.entry.result_attrs == program.module.entry.result_attrs


@settings(max_examples=40, deadline=None)
@given(programs(most=8))
def test_a_simplified_program_stays_as_it_is(module: Module) -> None:
    once = simplify(module)
    assert simplify(once) == once


# -- what is known without data --------------------------------------------------------------------

_COUNTS = (1, 2, 3, 4, 6)


class _Indices:
    """Draws a chain of ops on positions, as masks and index arithmetic are made of."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.b = draw, Builder()
        self.pool: list[Value] = []
        for _ in range(2):
            shape = self.shape()
            attrs = {"dim": draw(st.integers(0, len(shape) - 1)), "start": draw(st.integers(0, 3)),
                     "step": draw(st.integers(0, 3))}  # fmt: skip
            self.add("iota", [], TensorType("i64", shape), **attrs)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(st.sampled_from(_COUNTS), min_size=1, max_size=3)))

    def add(
        self, name: str, operands: list[Value], type: TensorType | None, **attrs: object
    ) -> None:
        types = None if type is None else [type]
        value = self.b.many(name, operands, attrs, types=types)[0]
        if value.type.numel <= SMALL:
            self.pool.append(value)

    def pick(self, dtype: str = "i64") -> Value:
        known = [value for value in self.pool if value.type.dtype == dtype]
        return self.draw(st.sampled_from(known or self.pool[:1]))

    def step(self) -> None:
        x = self.pick()
        shape = x.type.shape
        dim = self.draw(st.integers(0, len(shape) - 1)) if shape else 0
        kind = self.draw(st.sampled_from(("view", "sum", "scale", "compare", "index", "wrap")))
        if kind == "view":
            self.view(x, dim)
        elif kind in ("sum", "compare"):
            y = self.partner(x)
            names = ("add", "sub") if kind == "sum" else ("le", "lt", "gt", "ge", "eq", "ne")
            self.add(self.draw(st.sampled_from(names)), [x, y], None)
        elif kind == "scale":
            c = self.b.constant(self.draw(st.integers(-2, 3)), TensorType("i64", ()))
            self.add("mul", [x, c], None)
        elif kind == "wrap":
            c = self.b.constant(self.draw(st.integers(1, 30)), TensorType("i64", ()))
            self.add(self.draw(st.sampled_from(("remainder", "floor_divide"))), [x, c], None)
        elif shape:
            size = prod(shape)
            count, step = self.draw(st.sampled_from(((size, 1), (max(1, size // 2), 2), (1, 1))))
            index = self.b.one("iota", [], {"step": step}, types=[TensorType("i64", (count,))])
            flat = self.b.one("reshape", [x], types=[TensorType("i64", (size,))])
            self.add("take", [flat, index], None, dim=0)

    def partner(self, x: Value) -> Value:
        """A value that broadcasts with x: one with some of its dims, the others of size 1."""
        keep = self.draw(st.integers(0, len(x.type.shape)))
        shape = tuple(s if d == keep else 1 for d, s in enumerate(x.type.shape))
        attrs = {"dim": min(keep, len(shape) - 1), "start": self.draw(st.integers(0, 4))}
        if not shape:
            return self.b.constant(2, TensorType("i64", ()))
        return self.b.one("iota", [], attrs, types=[TensorType("i64", shape)])

    def view(self, x: Value, dim: int) -> None:
        shape = x.type.shape
        name = self.draw(
            st.sampled_from(("reshape", "permute", "expand", "slice", "flip", "concat"))
        )
        if not shape:
            return
        if name == "reshape":
            parts = [prod(shape)]
            for factor in self.draw(st.lists(st.sampled_from((1, 2, 3)), max_size=3)):
                if parts[-1] % factor == 0:
                    parts[-1:] = [factor, parts[-1] // factor]
            self.add(name, [x], TensorType("i64", tuple(parts)))
        elif name == "permute":
            self.add(name, [x], None, dims=tuple(self.draw(st.permutations(range(len(shape))))))
        elif name == "expand":
            self.add(name, [x], TensorType("i64", (2, *(3 if s == 1 else s for s in shape))))
        elif name == "slice":
            start = self.draw(st.integers(0, shape[dim] - 1))
            stop = self.draw(st.integers(start + 1, shape[dim]))
            self.add(
                name, [x], None, dim=dim, start=start, stop=stop, step=self.draw(st.integers(1, 2))
            )
        elif name == "flip":
            self.add(name, [x], None, dim=dim)
        else:
            later = self.b.one("add", [x, self.b.constant(shape[dim], TensorType("i64", ()))])
            self.add(name, [x, later], None, dim=dim)


@st.composite
def index_programs(draw: st.DrawFn) -> Module:
    maker = _Indices(draw)
    for _ in range(draw(st.integers(1, 7))):
        maker.step()
    return Module("logical", (maker.b.function("main", maker.pool),))


@settings(max_examples=250, deadline=None)
@given(index_programs())
def test_formulas_say_what_the_interpreter_computes(module: Module) -> None:
    facts: dict[str, Fact] = {}
    for op in module.entry.ops:
        fact = infer(op, facts)
        if fact is not None:
            facts[op.results[0].name] = fact
    for value, tensor in zip(module.entry.results, evaluate(module, []), strict=True):
        fact = facts.get(value.name)
        if isinstance(fact, Affine | Below | Small):
            data = data_of(fact, value.type)
            assert data is not None and torch.equal(torch.from_numpy(data.copy()), tensor)
        if isinstance(fact, Affine):
            assert fact.shape == value.type.shape
            if value.type.dtype == "i64":
                assert fact.low <= int(tensor.min()) and int(tensor.max()) <= fact.high


@settings(max_examples=60, deadline=None)
@given(index_programs())
def test_index_programs_mean_the_same(module: Module) -> None:
    after = simplify(module)
    verify(after)
    assert_close(evaluate(module, []), evaluate(after, []))


@settings(max_examples=300)
@given(st.floats(allow_nan=False), st.sampled_from(("f64", "f32", "f16", "bf16")))
def test_numbers_are_rounded_as_torch_rounds_them(number: float, dtype: str) -> None:
    wanted = torch.full((), number, dtype=torch.float64)
    if dtype != "f64":
        wanted = wanted.float().to(TORCH_DTYPES[dtype])
    assert rounded(number, dtype) == wanted.item()


def test_numbers_that_a_dtype_does_not_hold_are_not_folded() -> None:
    assert rounded(float("nan"), "f32") is None
    assert rounded(float("inf"), "i64") is None
    assert rounded(300, "i8") is None and rounded(127, "i8") == 127
    assert rounded(1.5, "f8e4m3") is None


def packed_mask(batch: int, seq: int) -> Module:
    """The mask that transformers builds when it looks for packed sequences: by index, through
    differences and running sums of positions, on (batch, 1, query, key)."""
    n = Net()
    flat = n.type(batch * seq)
    q = n.b.param(n.type(batch, 2, seq, 4), "q", role="input")

    def i64(*shape: int) -> TensorType:
        return TensorType("i64", shape)

    def along(name: str, dim: int, size: int) -> Value:
        shape = tuple(size if d == dim else 1 for d in range(4))
        return n.op("iota", dim=dim, types=[i64(*shape)])

    positions = n.op("expand", n.op("iota", dim=1, types=[i64(1, seq)]), types=[i64(batch, seq)])
    first = n.op("slice", positions, dim=1, start=0, stop=1)
    joined = n.op("concat", n.op("sub", first, n.constant(1, "i64")), positions, dim=1)
    later = n.op("slice", joined, dim=1, start=1, stop=seq + 1)
    step = n.op("sub", later, n.op("slice", joined, dim=1, start=0, stop=seq))
    jumps = n.op("cast", n.op("ne", step, n.constant(1, "i64")), types=[i64(batch, seq)])
    segment = n.op("cumsum", jumps, dim=1)
    rows, queries, keys = along("b", 0, batch), along("q", 2, seq), along("k", 3, seq)

    def at(table: Value, other: Value) -> Value:
        index = n.op("add", n.op("mul", rows, n.constant(seq, "i64")), other)
        shape = index.type.shape
        vector = n.op("reshape", index, types=[i64(index.type.numel)])
        picked = n.op("take", n.op("reshape", table, types=[i64(*flat.shape)]), vector, dim=0)
        return n.op("reshape", picked, types=[i64(*shape)])

    same = n.op("eq", at(segment, queries), at(segment, keys))
    order = n.op("le", at(positions, keys), at(positions, queries))
    mask = n.op("logical_and", n.op("logical_and", n.constant(True, "bool"), same), order)
    return n.module(n.op("attention", q, q, q, mask, mask=True, scale=0.5))


def test_the_mask_of_packed_sequences_is_found_causal() -> None:
    module = packed_mask(3, 5)
    after = simplify(module)
    (op,) = after.entry.ops
    assert op.attrs["causal"] is True and len(op.operands) == 3
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-6)


def test_a_mask_is_found_causal_whatever_its_size() -> None:
    (op,) = simplify(packed_mask(8, 1 << 17)).entry.ops
    assert op.attrs["causal"] is True


def test_a_large_filled_tensor_becomes_a_number() -> None:
    n = Net()
    x = n.b.param(n.type(512, 512), "x", role="input")
    two = n.op("constant", value=2.0, types=[n.type(512, 512)])
    after = simplify(n.module(n.op("mul", x, two), two))
    assert [str(op.results[0].type) for op in after.entry.ops if op.name == "constant"] == ["f32[]"]
    mul = next(op for op in after.entry.ops if op.name == "mul")
    assert mul.operands[1].type.shape == ()


# -- dead code and sharing -------------------------------------------------------------------------


def test_dead_parameters_and_results_of_functions_go_through_calls() -> None:
    module = parse_module("""weft 1 logical

func @main(%x: f32[2], %y: f32[2]) -> (f32[2]) {
  %u = exp(%y) : f32[2]
  %a, %b = call(%x, %u) {callee = "block"} : f32[2], f32[2]
  %c, %d = call(%a, %b) {callee = "block"} : f32[2], f32[2]
  return %c
}

func @block(%p: f32[2], %q: f32[2]) -> (f32[2], f32[2]) {
  %r = neg(%p) : f32[2]
  %s = call(%q) {callee = "inner"} : f32[2]
  return %r, %s
}

func @inner(%q: f32[2]) -> (f32[2]) {
  %t = sin(%q) : f32[2]
  return %t
}
""")
    verify(module)
    after = eliminate_dead(module)
    verify(after)
    assert [f.name for f in after.functions] == ["main", "block"]
    # the second result of @block is read through its own second parameter only
    assert [op.name for op in after.entry.ops] == ["call", "call"]
    assert [value.name for value in after.functions[1].params] == ["p"]
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs))


def test_what_all_calls_pass_is_known_in_the_function() -> None:
    """The mask is causal in both calls; the factor is 1 in one call only."""
    module = parse_module("""weft 1 logical

func @main(%q: f32[1, 2, 3, 4], %s: f32[]) -> (f32[1, 2, 3, 4]) {
  %i = iota() {dim = 2} : i64[1, 1, 3, 1]
  %j = iota() {dim = 3} : i64[1, 1, 1, 3]
  %m = le(%j, %i) : bool[1, 1, 3, 3]
  %one = constant() {value = 1.0} : f32[]
  %a = call(%q, %m, %one, %one) {callee = "block"} : f32[1, 2, 3, 4]
  %b = call(%a, %m, %one, %s) {callee = "block"} : f32[1, 2, 3, 4]
  return %b
}

func @block(%x: f32[1, 2, 3, 4], %mask: bool[1, 1, 3, 3], %p: f32[], %r: f32[]) -> (f32[1, 2, 3, 4]) {
  %y = mul(%x, %p) : f32[1, 2, 3, 4]
  %z = mul(%y, %r) : f32[1, 2, 3, 4]
  %o, %l = attention(%z, %z, %z, %mask) {mask = true, scale = 0.5} : f32[1, 2, 3, 4], f32[1, 2, 3]
  return %o
}
""")
    verify(module)
    after = simplify(module)
    verify(after)
    block = after.functions[1]
    assert [op.name for op in block.ops] == ["mul", "attention"]
    assert [value.name for value in block.params] == ["x", "r"]
    assert block.ops[-1].attrs["causal"] is True
    assert [op.name for op in after.entry.ops] == ["constant", "call", "call"]
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-6)


def test_updates_of_the_entry_are_alive() -> None:
    module = residual_stages()
    after = simplify(module)
    assert [a.get("updates") for a in after.entry.result_attrs] == [
        a.get("updates") for a in module.entry.result_attrs
    ]
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-5)


def test_simplify_before_and_after_outline_keeps_a_network() -> None:
    module = transformer(3)
    after = simplify(Outline().run(simplify(module)))
    verify(after)
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-5)


def test_a_deep_network_shrinks_by_as_much_in_each_layer() -> None:
    one, two, many = (len(simplify(transformer(layers)).entry.ops) for layers in (1, 2, 130))
    assert many - one == 129 * (two - one)
