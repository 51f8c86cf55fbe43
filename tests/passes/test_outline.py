"""Outline finds repeated blocks by structure, and inline undoes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir.strategies import programs
from tests.passes.equality import assert_close
from tests.passes.networks import (
    Net,
    encoder_decoder,
    mlp_function,
    residual_stages,
    transformer,
)
from tests.passes.random_inputs import random_inputs

from weft.ir.builder import Builder
from weft.ir.module import NOWHERE, Module, Value
from weft.ir.types import TensorType
from weft.ir.verify import verify
from weft.passes.inline import inline, rebase
from weft.passes.outline import Outline
from weft.passes.outline_core import CONSTANTS, color_key, foreign
from weft.passes.outline_words import occurrences, repeats
from weft.runtime.interpreter import evaluate


def values_of(module: Module) -> tuple[list[int], Counter[int]]:
    """As hashes that do not depend on names or order: the results, and all ops but constants."""
    entry = module.entry
    known = {value.name: hash(("param", i)) for i, value in enumerate(entry.params)}
    ops: Counter[int] = Counter()
    for op in entry.ops:
        key = hash((color_key(op), tuple(known[value.name] for value in op.operands)))
        ops[key] += op.name not in CONSTANTS
        known.update((value.name, hash((key, k))) for k, value in enumerate(op.results))
    return [known[value.name] for value in entry.results], +ops


def check(module: Module) -> Module:
    """Outline, and check that inline undoes it. Returns the outlined module."""
    after = Outline().run(module)
    verify(after)
    flat = inline(after)
    verify(flat)
    assert len(flat.functions) == 1
    assert values_of(flat) == values_of(module)
    assert flat.entry.params == module.entry.params
    assert flat.entry.result_attrs == module.entry.result_attrs
    return after


def counts(module: Module) -> dict[str, int]:
    """How often the entry calls each function."""
    calls = Counter(str(op.attrs["callee"]) for op in module.entry.ops if op.name == "call")
    return dict(calls)


NETWORKS = {
    "decoder": (lambda: transformer(4), {"layers": 4}),
    "two layers": (lambda: transformer(2), {"layers": 2}),
    "shared table computed ahead": (lambda: transformer(3, shared_in_first=False), {"layers": 3}),
    "encoder and decoder": (lambda: encoder_decoder(3, 4), {"encoder": 3, "decoder": 4}),
    "stages of other widths": (lambda: residual_stages((4, 5, 2)), {"stages": 4, "stages_0": 3}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_networks_become_functions(name: str) -> None:
    make, wanted = NETWORKS[name]
    module = make()
    after = check(module)
    assert sorted(counts(after).values()) == sorted(wanted.values())
    assert set(counts(after)) == set(wanted)
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_inline_restores_the_module_paths(name: str) -> None:
    module = NETWORKS[name][0]()
    flat = inline(Outline().run(module))

    def places(m: Module) -> Counter[object]:
        return Counter((op.name, op.loc) for op in m.entry.ops if op.name not in CONSTANTS)

    assert places(flat) == places(module)


def test_paths_have_no_part_in_finding_blocks() -> None:
    module = transformer(3)
    bare = tuple(replace(op, loc=NOWHERE) for op in module.entry.ops)
    after = check(module.with_(functions=(module.entry.with_(ops=bare),)))
    assert counts(after) == {"block": 3}


def test_a_block_is_cut_where_only_the_residual_crosses() -> None:
    after = check(transformer(4))
    block = after.function("layers")
    assert len(block.results) == 1
    assert block.results[0].name.startswith("add")
    activations = [value for value in block.params if len(value.type.shape) == 3]
    assert len(activations) == 1


def test_programs_without_roles_and_paths_are_outlined() -> None:
    after = check(Module("logical", (mlp_function(6),)))
    assert sum(counts(after).values()) >= 3


def test_constants_are_copied_into_blocks_if_equal_and_passed_if_not() -> None:
    n = Net()
    x = n.b.param(n.type(3, 4), "x", role="input")
    for layer in range(3):
        shared, own = n.constant(0.5), n.constant(float(layer))
        y = n.op("mul", n.op("tanh", x), shared)
        x = n.op("add", n.op("mul", n.op("exp", y), own), x)
    after = check(n.module(x))
    (block,) = after.functions[1:]
    assert [op.name for op in block.ops].count("constant") == 1
    assert counts(after) == {block.name: 3}
    assert [op.name for op in after.entry.ops].count("constant") == 3


def test_a_layer_with_an_op_in_between_is_still_a_copy() -> None:
    """What the first layer computes from the activation for all layers goes in front of its call."""
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    w = n.weight("w", 4, 4)
    start = n.op("einsum", x, w, spec="b s k, n k -> b s n")
    x, gate = start, None
    for layer in range(3):
        y = n.op("exp", n.linear(x, f"fc{layer}", 4))
        if gate is None:
            gate = n.op("sigmoid", n.op("neg", start))
        x = n.op("add", x, n.op("mul", n.op("tanh", y), gate))
    after = check(n.module(x))
    assert sum(counts(after).values()) == 3


def test_a_new_weight_that_blocks_share_is_computed_ahead() -> None:
    """Its buffer is also a result of the entry, as in spectral norm."""
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    w, v = n.weight("w", 4, 4), n.weight("v", 4, role="buffer")
    new = n.op("einsum", w, v, spec="m k, k -> m")
    n.updates.append((new, v.name))
    wide = n.op("einsum", w, new, spec="m k, k -> m")
    for layer in range(3):
        x = n.op("add", x, n.op("mul", n.op("tanh", n.op("exp", n.linear(x, f"fc{layer}", 4))), wide))
    after = check(n.module(x))
    assert sum(counts(after).values()) == 3


def test_seeds_are_folded_ahead_and_passed() -> None:
    """Each dropout has a seed of its own, from a chain that runs through all layers."""
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    seed = n.b.param(TensorType("i64", ()), "seed", role="seed")
    for layer in range(3):
        y = n.op("exp", n.linear(x, f"fc{layer}", 4))
        own, seed = n.op("fold_seed", seed, by=0), n.op("fold_seed", seed, by=1)
        x = n.op("add", x, n.op("dropout", y, own, p=0.25))
    module = n.module(x)
    after = check(module)
    assert sum(counts(after).values()) == 3
    assert all(op.name != "fold_seed" for op in after.functions[1].ops)
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs))


def test_the_updates_of_a_layer_are_a_block() -> None:
    n = Net()
    scalars = [n.b.param(TensorType("f64", ()), role=role) for role in ("state", "lr")]
    for layer in range(3):
        n.path = f"model.layers.{layer}"
        for name, shape in (("norm", (4,)), ("fc", (4, 4))):
            w, g = n.weight(name, *shape), n.b.param(n.type(*shape), role="grad")
            n.updates.append((n.op("sgd_update", w, g, *scalars, path=name), w.name))
    after = Outline(min_ops=2).run(n.module())
    verify(after)
    assert counts(after) == {"layers_update": 3}
    assert values_of(inline(after)) == values_of(n.module())


def test_functions_of_one_name_are_told_apart_by_their_path() -> None:
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    for stack, ops in (("encoder", ("exp", "sin")), ("decoder", ("tanh", "relu"))):
        for layer in range(3):
            n.path = f"{stack}.layers.{layer}"
            y = n.linear(x, "fc", 4)
            for name in ops:
                y = n.op(name, y)
            x = n.op("add", x, y)
    assert set(counts(check(n.module(x)))) == {"layers", "decoder_layers"}


def test_short_unconnected_patterns_are_no_blocks() -> None:
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    parts = [n.op("relu", n.linear(x, part, 4)) for part in "qkv"]
    assert Outline().run(n.module(*parts)).functions[1:] == ()


def test_blocks_whose_wiring_differs_are_different() -> None:
    """The same ops in the same order, but the third copy adds another value."""
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    for layer in range(4):
        a = n.op("exp", n.linear(x, f"a{layer}", 4))
        b = n.op("tanh", n.linear(a, f"b{layer}", 4))
        x = n.op("add", n.op("mul", a, b), x if layer < 2 else a)
    after = check(n.module(x))
    assert sorted(counts(after).values()) == [2, 2]


def test_a_value_that_some_copies_return_is_a_result_of_all() -> None:
    n = Net()
    x = n.b.param(n.type(2, 3, 4), "x", role="input")
    kept = []
    for layer in range(3):
        h = n.op("gelu", n.linear(x, f"fc{layer}", 4))
        kept.append(h)
        x = n.op("add", x, n.op("tanh", h))
    after = check(n.module(x, kept[1]))
    assert len(after.functions[1].results) == 2


# -- random stacks ---------------------------------------------------------------------------------

_OPS = ("exp", "tanh", "neg", "linear", "add", "mul", "table", "number")


@st.composite
def stacks(draw: st.DrawFn) -> Module:
    """Random blocks, each repeated, with ops of their own in between."""
    b = Builder()
    type = TensorType("f64", (3, 4))
    x = b.param(type, "x", role="input")
    table = b.one("sin", [b.param(type, "table", role=draw(st.sampled_from(("buffer", "input"))))])
    for stage in range(draw(st.integers(1, 2))):
        recipe = [
            (draw(st.sampled_from(_OPS)), draw(st.integers(0, 3)))
            for _ in range(draw(st.integers(2, 6)))
        ]
        extra = draw(st.integers(-1, len(recipe)))
        for copy in range(draw(st.integers(2, 4))):
            values = [x]
            for number, (name, back) in enumerate(recipe):
                if number == extra and copy == 0:
                    table = b.one("cos", [table])
                values.append(_grow(b, name, values, values[max(0, len(values) - 1 - back)], table))
            x = b.one("add", [x, values[-1]])
        x = b.one(draw(st.sampled_from(("tanh", "relu"))), [x])
    return Module("logical", (b.function("main", [x]),))


def _grow(b: Builder, name: str, values: list[Value], other: Value, table: Value) -> Value:
    last = values[-1]
    if name == "linear":
        w = b.param(TensorType("f64", (4, 4)), "w", role="param")
        return b.one("einsum", [last, w], {"spec": "b k, k n -> b n"})
    if name == "number":
        return b.one("mul", [last, b.constant(0.5, TensorType("f64", ()))])
    if name in ("add", "mul"):
        return b.one(name, [last, other])
    return b.one("mul", [last, table]) if name == "table" else b.one(name, [b.one("tanh", [last])])


@settings(max_examples=150, deadline=None)
@given(stacks())
def test_random_stacks_mean_the_same(module: Module) -> None:
    after = check(module)
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs))


@settings(max_examples=60, deadline=None)
@given(programs(most=20))
def test_random_programs_mean_the_same(module: Module) -> None:
    check(module)


# -- parts -----------------------------------------------------------------------------------------


def test_all_repeats_of_a_word_are_found() -> None:
    word = np.array([7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 9, 1, 2, 3], dtype=np.int32)
    first = repeats(word, 3, 8)[0]
    assert (first.start, first.length, first.period, first.saving) == (1, 9, 3, 6)
    assert occurrences(word, word[1:4]) == [1, 4, 7, 11]


def test_a_word_is_not_found_at_odd_bytes() -> None:
    colors = np.array([0x01000000, 0x02000000, 0x03000000], dtype=np.int32)
    assert occurrences(colors, np.array([1], dtype=np.int32)) == []


def test_foreign_ops_that_cannot_move_are_noticed() -> None:
    b = Builder()
    x = b.param(TensorType("f32", (2,)), "x")
    y = b.one("exp", [x])
    between = b.one("neg", [y])
    b.one("add", [y, between])
    b.one("sin", [x])
    assert foreign(b.ops, (0, 2)) is None
    assert foreign(b.ops, (0, 3)) == ([], [1, 2])
    assert foreign(b.ops, (1, 3)) == ([], [2])


@pytest.mark.parametrize(
    ("path", "new"),
    [("a.0", "a.3"), ("a.0.b", "a.3.b"), ("a.01", "a.01"), ("b", "b"), ("", "")],
)
def test_only_whole_components_of_a_path_are_replaced(path: str, new: str) -> None:
    assert rebase(path, "a.0", "a.3") == new


def test_all_layers_of_a_deep_network_are_found() -> None:
    module = transformer(130)
    assert len(module.entry.ops) > 6000
    assert counts(Outline().run(module)) == {"layers": 130}
